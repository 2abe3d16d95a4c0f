"""The compiler of tests that build the library: an object is taken where all that was read is the same."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import compile_once
import pytest

if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++")):
    pytest.skip("no C++ compiler", allow_module_level=True)


def test_an_object_is_taken_where_all_that_was_read_is_the_same(tmp_path: Path) -> None:
    kept, trees = tmp_path / "kept", [tmp_path / "one tree", tmp_path / "another"]
    for tree in trees:
        tree.mkdir()
        (tree / "number.h").write_text("const int number = 3;\n")
        (tree / "a.cpp").write_text('#include "number.h"\nint f() { return number; }\n')
    command = shlex.split(compile_once.command(kept))

    def made(tree: Path, *options: str) -> tuple[bytes, int]:
        target = tmp_path / "a.o"
        target.unlink(missing_ok=True)
        subprocess.run([*command, *options, "-c", "a.cpp", "-o", target], cwd=tree, check=True)
        return target.read_bytes(), len(list(kept.rglob("*.o")))

    first, _ = made(trees[0])
    assert made(trees[0]) == made(trees[1]) == (first, 1)
    # a header, then what it was before; the source; an option
    (trees[1] / "number.h").write_text("const int number = 4;\n")
    other, count = made(trees[1])
    assert (other != first, count) == (True, 2)
    assert made(trees[0]) == (first, 2)
    (trees[0] / "a.cpp").write_text('#include "number.h"\nint f() { return -number; }\n')
    assert made(trees[0])[1] == 3
    assert made(trees[1], "-O2")[1] == 4
    # what is no object, and what does not compile
    assert subprocess.run([*command, "--version"], stdout=subprocess.DEVNULL).returncode == 0
    (trees[0] / "a.cpp").write_text("int f() {\n")
    with pytest.raises(subprocess.CalledProcessError):
        made(trees[0])
    assert len(list(kept.rglob("*.o"))) == 4
