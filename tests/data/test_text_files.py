from __future__ import annotations

import pytest

from clipfast.data.text_files import (
    EncodingError,
    check_encoding,
    decode,
    iterate_lines,
    read_lines,
    read_text,
    split_lines,
)

# what str.splitlines ends a line at, and people's captions hold
SEPARATORS = ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\r"]


@pytest.mark.parametrize("sign", SEPARATORS)
def test_lines_end_with_line_feeds_alone(tmp_path, sign):
    path = tmp_path / "list.txt"
    path.write_bytes(f"a{sign}b\n\n c \r\nlast".encode())
    assert read_lines(path) == [f"a{sign}b", "", " c ", "last"]
    assert list(iterate_lines(path)) == [f"a{sign}b\n", "\n", " c \r\n", "last"]


def test_the_end_of_a_text():
    assert split_lines("") == []
    assert split_lines("\n") == [""]
    assert split_lines("a\n") == ["a"]
    assert split_lines("a\n\n") == ["a", ""]
    assert split_lines("a\r\r\n") == ["a\r"]


@pytest.mark.parametrize("encoding", [None, "utf-8", "UTF8", "utf-16", "utf-32", "latin-1", "cp1252", "utf-16-le"])
def test_texts_in_the_encoding_that_was_given(tmp_path, encoding):
    path = tmp_path / "text.txt"
    text = "café\r\nnaïve\n"
    path.write_bytes(text.encode(encoding or "utf-8"))
    assert read_text(path, encoding) == text
    assert "".join(iterate_lines(path, encoding)) == text


@pytest.mark.parametrize(("encoding", "given"), [("utf-8-sig", None), ("utf-8-sig", "utf-8"), ("utf-16", "utf-16-le")])
def test_byte_order_marks_are_dropped(tmp_path, encoding, given):
    path = tmp_path / "text.txt"
    path.write_bytes("first\nsecond".encode(encoding))
    assert read_lines(path, given) == ["first", "second"]
    assert list(iterate_lines(path, given)) == ["first\n", "second"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"abc\ncaf\xe9\n", r"text.txt: got 0xe9 at byte 7, expected UTF-8: give --encoding .*latin-1"),
        (b"\xef\xbb\xbfcaf\xe9", r"got 0xe9 at byte 6, expected UTF-8"),
        ("猫".encode()[:2], r"got 0xe7 at byte 0, expected UTF-8"),
        ("café".encode("utf-16"), r"byte order mark of utf-16 at byte 0, .*--encoding utf-16$"),
        ("café".encode("utf-32"), r"byte order mark of utf-32 at byte 0"),
        (b"\xfe\xff\x00a", r"byte order mark of utf-16 "),
        ("a cat\n".encode("utf-16-le"), r"zero at byte 1 .*--encoding utf-16-le"),
        ("a cat\n".encode("utf-16-be"), r"zero at byte 0 .*--encoding utf-16-be"),
    ],
)
def test_another_encoding_is_named_with_its_offset(tmp_path, data, words):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(EncodingError, match=words):
        read_text(path)
    with pytest.raises(EncodingError, match=words):
        list(iterate_lines(path))


def test_the_offset_far_into_a_large_file(tmp_path):
    path = tmp_path / "text.txt"
    start = ("猫" * 400_000 + "\n").encode()  # over a megabyte, with a character across every border of chunks
    path.write_bytes(start + b"a\xff")
    with pytest.raises(EncodingError, match=rf"got 0xff at byte {len(start) + 1}, expected UTF-8"):
        list(iterate_lines(path))
    path.write_bytes(start + "猫".encode()[:1])
    with pytest.raises(EncodingError, match=rf"got 0xe7 at byte {len(start)}, expected UTF-8"):
        list(iterate_lines(path))


@pytest.mark.parametrize("data", [b"a\x00\x00", b"abc"])
def test_what_the_given_encoding_does_not_read(tmp_path, data):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    for read in (read_text, lambda *given: list(iterate_lines(*given))):
        with pytest.raises(EncodingError, match=r"text.txt: got .*--encoding"):
            read(path, "utf-16-le")
    with pytest.raises(EncodingError, match="text.txt: got .*--encoding"):
        list(iterate_lines(path, "utf-32"))


@pytest.mark.parametrize("encoding", ["klingon", "hex", "rot13", "", "zlib", "utf-8\0", "caf\udce9"])
def test_encodings_that_are_none(encoding):
    with pytest.raises(ValueError, match=r"encoding: got .*, expected one that Python knows"):
        check_encoding(encoding)


def test_a_zero_in_a_text_is_a_character():
    assert decode(b"a long caption with \x00 in it", "x") == "a long caption with \x00 in it"
