"""A clone that nobody installed: what Python finds in it and beside it, and which command is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast import installation

ROOT = Path(__file__).parent.parent
WHERE = "import clipfast.kernels.attention_policy as k, clipfast; print(clipfast.__file__, k.__file__)"
FIRST_MODELS = """
import clipfast
for _ in range(2):
    model = clipfast.ViT(image_size=16, patch_size=8, width=16, layers=1, heads=1)
"""
NO_LIBRARY = "the op library was not built: clipfast runs from its sources in"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone named clipfast holds of use here."""
    root = tmp_path / "clipfast"
    skipped = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("clipfast", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=skipped)
    (root / "csrc").mkdir()
    shutil.copy(ROOT / "setup.py", root)
    return root


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=180)


def installed_elsewhere(code: str) -> str:
    """Leave out whatever clipfast the tests' own environment has."""
    return f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)]\n{code}"


def found(clone: Path) -> str:
    return f"{clone / 'clipfast' / '__init__.py'} {clone / 'kernels' / 'attention_policy.py'}"


def test_a_clone_is_whole_wherever_it_is_found(clone: Path, tmp_path: Path) -> None:
    (clone / "script.py").write_text(WHERE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = {"PYTHONPATH": str(clone)}
    for done in (
        python(clone, "-c", WHERE),
        python(clone, "script.py"),
        python(elsewhere, str(clone / "script.py")),
        python(elsewhere, "-c", WHERE, **path),
        python(clone.parent, "-c", WHERE, **path),
    ):
        assert done.stdout.strip() == found(clone), done.stderr
    assert python(clone, "-m", "clipfast", "--version").stdout.startswith("clipfast ")


def test_an_unbuilt_clone_says_once_what_to_run(clone: Path) -> None:
    done = python(clone, "-c", FIRST_MODELS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FallbackWarning") == 1
    assert f"{NO_LIBRARY} {clone}: " in done.stderr
    assert done.stderr.rstrip().endswith("run `pip install -e .`")


@pytest.mark.slow
def test_ranks_of_an_unbuilt_clone_say_it_once(clone: Path) -> None:
    (clone / "script.py").write_text(f"{WHERE}\n{FIRST_MODELS}")
    options = ("--standalone", "--nproc-per-node", "2", "script.py")
    done = python(clone, "-m", "torch.distributed.run", *options, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [found(clone)] * 2
    assert done.stderr.count(NO_LIBRARY) == 1


def test_the_folder_of_a_clone_is_no_package(clone: Path) -> None:
    # Python takes the clone for a namespace package, and its kernels/ for one in that
    done = python(clone.parent, "-c", installed_elsewhere("import clipfast.kernels"))
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last == f"ImportError: {clone} holds clipfast's sources and is not the package: run `pip install -e {clone}`"


def test_two_clones_are_not_mixed(clone: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(clone, other)
    code = f"import sys; sys.path.append({str(other)!r})\n{WHERE}"
    assert python(clone, "-c", code).stdout.strip() == found(clone)
    # imported anew from another place, it takes its own kernels along, also where they lie in it
    whole = tmp_path / "site" / "clipfast"
    shutil.copytree(clone / "clipfast", whole)
    shutil.copytree(clone / "kernels", whole / "kernels")
    code = f"import sys\n{WHERE}\n"
    for folder in (other, whole.parent, clone):
        code += f"sys.path[0] = {str(folder)!r}\n"
        code += f"for name in [m for m in sys.modules if m.startswith('clipfast')]: del sys.modules[name]\n{WHERE}\n"
    done = python(clone, "-c", code)
    inner = f"{whole / '__init__.py'} {whole / 'kernels' / 'attention_policy.py'}"
    assert done.stdout.splitlines() == [found(clone), found(other), inner, found(clone)], done.stderr


def test_a_package_without_its_kernels_takes_nobody_elses(clone: Path) -> None:
    (clone / "csrc").rmdir()
    done = python(clone, "-c", installed_elsewhere(WHERE))
    assert done.stderr.rstrip().endswith("ModuleNotFoundError: No module named 'clipfast.kernels'")


def test_who_imports_another_package_named_kernels_gets_that_one(clone: Path, tmp_path: Path) -> None:
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import kernels.inner")
    (package / "inner.py").write_text("here = 'the other'")
    done = python(clone, "-c", "import kernels; print(kernels.inner.here)", PYTHONPATH=str(package.parent))
    assert done.stdout == "the other\n", done.stderr
    # transformers takes what has no file for nothing
    code = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    done = python(clone, "-c", code + "import kernels; print(hasattr(kernels, '__file__'))")
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("name", ["torch", "typer"])
def test_what_a_bare_clone_misses_is_named(clone: Path, name: str) -> None:
    code = f"import sys, runpy; sys.modules[{name!r}] = None\n"
    uses = "import clipfast; clipfast.ViT" if name == "torch" else "runpy.run_module('clipfast', run_name='__main__')"
    done = python(clone, "-c", code + uses)
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert f"clipfast runs from its sources in {clone} and needs {name}, which is not installed: " in last
    assert last.endswith("run `pip install -e .`")
    assert ("install PyTorch (2.10 or newer), then" in last) is (name == "torch")


def test_the_clipfast_that_a_clone_hides_is_named(clone: Path, tmp_path: Path) -> None:
    site = tmp_path / "a site" / "clipfast"
    shutil.copytree(clone / "clipfast", site)
    say = "from clipfast import installation; print(installation.other_built())"
    assert python(clone, "-c", installed_elsewhere(say), PYTHONPATH=str(site.parent)).stdout == "None\n"
    (site / "libclipfast.so").touch()
    assert python(clone, "-c", say, PYTHONPATH=str(site.parent)).stdout == f"{site}\n"


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"url": "{folder}", "dir_info": {}}, "'{path}'`"),
        ({"url": "file:///gone", "dir_info": {}}, ".` in a clone of clipfast"),
        ({"url": "https://x.org/c.git", "vcs_info": {"vcs": "git", "commit_id": "0"}}, "git+https://x.org/c.git`"),
        ({"url": "file:///x/clipfast-0.2.0-py3-none-any.whl", "archive_info": {}}, ".` in a clone of clipfast"),
        (None, ".` in a clone of clipfast"),
        ([], ".` in a clone of clipfast"),
    ],
)
def test_pip_is_told_what_it_was_told(
    record: object, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a source"
    source.mkdir()
    info = tmp_path / "clipfast-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clipfast\nVersion: 0.2.0\n")
    if record is not None:
        (info / "direct_url.json").write_text(json.dumps(record).replace("{folder}", source.as_uri()))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "clipfast")
    command = "`pip install --force-reinstall --no-deps --no-cache-dir "
    assert installation.command() == command + what.format(path=source)
