"""The op library: what it reports of its build, and the reason where it cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clipfast.ops import contrastive_kernels, library


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the library another place, and forget what was found there."""
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    library.unavailable.cache_clear()
    yield tmp_path
    library.unavailable.cache_clear()


def test_it_reports_its_build() -> None:
    reason = library.unavailable()
    if reason is not None:
        pytest.skip(reason)
    info = library.build_info()
    assert set(info) == {"compiler", "torch_target", "cpu", "cuda"}
    assert info["torch_target"].startswith("0x020a")


def test_amx_is_used_where_the_cpu_and_the_system_have_it() -> None:
    if library.unavailable() is not None:
        assert library.why_no_amx() == library.unavailable()
        return
    info = Path("/proc/cpuinfo")
    if info.exists() and "amx_bf16" not in info.read_text().split():
        assert library.why_no_amx() in ("this CPU has no AMX", "the op library was built without AMX")
    else:
        assert library.why_no_amx() is None


def test_an_older_library_is_missed_for_any_op_that_it_lacks() -> None:
    source = (Path(__file__).parents[2] / "csrc" / "library.cpp").read_text()
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', source)
    assert len(defined) > 20
    assert sorted(defined) == sorted(library._OPS)


def test_both_sets_of_kernels_have_one_schema() -> None:
    if library.unavailable() is not None:
        pytest.skip(library.unavailable())
    for name in contrastive_kernels._NAMES:
        # of csrc/library.cpp, and of a Python signature
        native, chunked = (getattr(torch.ops.clipfast, op).default._schema for op in (name, f"{name}_chunked"))
        arguments = [[(a.name, str(a.type)) for a in schema.arguments] for schema in (native, chunked)]
        assert arguments[0] == arguments[1]
        assert [str(r.type) for r in native.returns] == [str(r.type) for r in chunked.returns]


def test_the_reason_of_the_build_is_kept(package: Path) -> None:
    (package / "_build.json").write_text(json.dumps({"reason": "no C++ compiler was found"}))
    assert library.unavailable() == "the op library was not built: no C++ compiler was found"
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        library.build_info()


def test_without_a_record(package: Path) -> None:
    assert "not installed with it" in library.unavailable()


def test_a_corrupt_library_is_a_reason_and_no_crash(package: Path) -> None:
    (package / "libclipfast.so").write_bytes(b"\x7fELF and nothing else")
    assert library.unavailable().startswith("the op library does not load: ")
    assert "\n" not in library.unavailable()


def test_a_pytorch_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    library.unavailable.cache_clear()
    monkeypatch.setattr(library, "_damage", lambda *arguments: None)
    monkeypatch.setattr(library.Path, "exists", lambda path: True)
    try:
        for version, older in (("2.9.1+cu128", True), ("2.10.0", False), ("2.10.0a0+git1", False), ("3.0", False)):
            monkeypatch.setattr(library.torch, "__version__", version)
            assert library.torch_is_older() is older
        monkeypatch.setattr(library.torch, "__version__", "2.9.1+cu128")
        reason = library.unavailable()
        assert "PyTorch 2.9.1+cu128 is older than 2.10" in reason
        assert "upgrade PyTorch" in reason
    finally:
        library.unavailable.cache_clear()


def test_a_card_without_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build_info", lambda: {"cuda": "13.0:90a"})
    monkeypatch.setattr(library, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(library.torch.cuda, "get_device_capability", lambda index: {0: (9, 0), 1: (8, 0)}[index])
    library._card_refusal.cache_clear()
    try:
        assert library.card_refusal(0) is None
        assert "no code for compute capability 8.0 (only 90a)" in library.card_refusal(1)
    finally:
        library._card_refusal.cache_clear()
