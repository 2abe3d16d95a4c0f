from __future__ import annotations

import json

import pytest

from clipfast.evaluate.prompts import class_prompts, load_prompts


def test_prompts_by_class_and_templates(tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"tench": ["A tench is {a} fish."], "猫": ["[b]", "x"]}).encode())
    assert load_prompts(path) == {"tench": ("A tench is {a} fish.",), "猫": ("[b]", "x")}
    path.write_text('["a {c}", "the {}"]')
    assert load_prompts(path) == ("a {}", "the {}")
    assert class_prompts(["x{}y", "z"], ("a {}", str.upper)) == [("a x{}y", "X{}Y"), ("a z", "Z")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "prompts: got .*p.json, expected JSON"),
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"a": ["\xe9"]}', "p.json: got .*at byte 8"),
        (b'{"missile": ["a"], "missile": ["b"]}', "'missile' comes twice"),
        (b"{}", "expected an object of lists"),
        (b'"a {}"', "expected an object of lists"),
        (b"[]", "without templates"),
        (b'["a cat"]', r"got 'a cat' .* expected a \{\}"),
        (b'{"cat": []}', r"got \[\] for 'cat'"),
        (b'{"cat": "a cat"}', "got \"a cat\" for 'cat'"),
        (b'{"cat": ["a", null]}', r"got \[\"a\", null\] for 'cat'"),
        (b'{"cat": {"x": 1}}', "for 'cat'"),
    ],
)
def test_files_that_do_not_fit(tmp_path, text, message):
    (tmp_path / "p.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / "p.json")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompts: got .*nowhere.json, expected a JSON file"):
        load_prompts(tmp_path / "nowhere.json")
