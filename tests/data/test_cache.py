from __future__ import annotations

from pathlib import Path

import pytest

from clipfast.data.cache import cache_folder


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CLIPFAST_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "clipfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "clipfast"


def test_no_home_is_an_os_error(monkeypatch):
    for name in ("CLIPFAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="CLIPFAST_CACHE"):
        cache_folder()
