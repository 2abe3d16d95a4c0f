"""big_vision's .npz files: read exactly, written at once or not at all, and never a way for code to run."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import archives
import numpy as np
import pytest
import tiny
import torch

from clipfast.models.checkpoint_files import read_state_dict, write_state_dict
from clipfast.models.npz import is_npz

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_is_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = (4 * torch.randn(3, 5)).to(dtype)
    state = {"params/a/b": numbers, "scalar": numbers[0, 0], "transposed": numbers.T, "none": numbers[:0]}
    write_state_dict(state, tmp_path / "w.npz")
    tiny.assert_same_state(read_state_dict(tmp_path / "w.npz"), {k: v.contiguous() for k, v in state.items()})
    with np.load(tmp_path / "w.npz", allow_pickle=False) as arrays:
        assert arrays["params/a/b"].shape == (3, 5)
        assert arrays["params/a/b"].dtype == (np.dtype("V2") if dtype == torch.bfloat16 else numbers.numpy().dtype)


def test_other_ways_to_store_an_array(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez_compressed(tmp_path / "w.npz", big=values.astype(">f4"), fortran=np.asfortranarray(values))
    state = read_state_dict(tmp_path / "w.npz")
    for key in ("big", "fortran"):
        assert torch.equal(state[key], torch.from_numpy(values))
        assert state[key].is_contiguous()
        state[key].add_(1)  # its own memory


def test_it_is_told_by_its_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    (tmp_path / "w.npz").rename(tmp_path / "weights")
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    assert is_npz(tmp_path / "weights")
    assert not is_npz(tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "weights")["a"].tolist() == [1, 1]


def member(header: bytes | None = None, data: bytes = b"", **array: object) -> bytes:
    """Return an .npy file's bytes: an array's, or a header's with any data behind it."""
    opened = io.BytesIO()
    if header is None:
        np.lib.format.write_array(opened, **array)
    else:
        opened.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return opened.getvalue()


GOOD = member(array=np.ones(4, np.float32))
HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000), }\n"
NEGATIVE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }\n"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.npy": GOOD, "notes.txt": b"text"}, r"got 'notes\.txt', expected arrays \(\.npy\) alone"),
        ({"a.npy": member(array=np.array(["text"]))}, r"got an array of <U4, expected numbers in a"),
        ({"a.npy": member(array=np.ones(2, np.complex64))}, "got an array of complex64, expected numbers in a"),
        ({"a.npy": member(array=np.ones(2, "V4"))}, r"got an array of \|V4, expected numbers in a"),
        ({"a.npy": member(array=np.ones(2, [("x", "f4")]))}, "got an array of .*, expected numbers in a"),
        ({"a.npy": b"no array"}, "corrupt, expected the header of an array .* in a"),
        ({"a.npy": b""}, "corrupt, expected the header of an array .* in a"),
        ({"a.npy": member(b"{'descr': __import__('os').system('true')}")}, "corrupt, expected the header of an array"),
        ({"a.npy": GOOD[:-3]}, r"corrupt: got .* an array \(4,\) of float32 .*in a|corrupt: got \d+ bytes"),
        ({"a.npy": GOOD + b"more"}, "corrupt: got more or fewer bytes than an array .* in a"),
        ({"a.npy": member(HUGE, b"0000")}, "corrupt: got \\d+ bytes for an array .* in a"),
        ({"a.npy": member(NEGATIVE, b"0" * 16)}, "corrupt: got \\d+ bytes for an array .* in a"),
        ({}, "got no entries, expected a state dict"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=rf"w\.npz: {message}"):
        read_state_dict(tmp_path / "w.npz")


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    malice = archives.Malice(tmp_path / "was_run")
    np.savez(tmp_path / "w.npz", a=np.array([malice, None], dtype=object))
    with pytest.raises(ValueError, match=r"w\.npz: got pickled objects, expected numbers \(code .* never run\) in a"):
        read_state_dict(tmp_path / "w.npz")
    assert not (tmp_path / "was_run").exists()


def test_a_file_cut_or_changed_anywhere_is_refused_or_its_arrays_are_right(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.arange(64, dtype=np.float32), b=np.ones((3, 3)))
    whole = (tmp_path / "w.npz").read_bytes()
    damaged = tmp_path / "damaged.npz"
    for end in range(0, len(whole), 37):
        damaged.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"damaged\.npz: corrupt or truncated, expected an \.npz of arrays"):
            read_state_dict(damaged)
    for place in range(0, len(whole), 11):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            state = read_state_dict(damaged)
        except ValueError:
            continue
        # the archive's directory may lose an array, whose key is missing then; a checksum holds those that are there
        for value in state.values():
            assert value.tolist() == (list(range(64)) if value.dim() == 1 else [[1.0] * 3] * 3)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state_dict({"a": torch.ones(2)}, tmp_path / "w.npz")
    before = (tmp_path / "w.npz").read_bytes()

    def full(file: object, **arrays: object) -> None:
        file.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        write_state_dict({"a": torch.zeros(2)}, tmp_path / "w.npz")
    assert (tmp_path / "w.npz").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.npz"]
