"""The wheel of `make wheel`: what it holds, what it needs of a system, and that its tag is true."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from clipfast.ops import library

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
COMPILER = next((c for c in (os.environ.get("CXX", "c++"), "g++", "clang++") if shutil.which(c)), None)
# calls of functions that newer C libraries have in newer versions, and an exception
SOURCE = """
#include <cmath>
#include <pthread.h>
#include <sstream>
#include <stdexcept>
#include <string>
static void* square(void* x) { *(double*)x *= *(double*)x; return nullptr; }
extern "C" double calculate(double x) {
    pthread_t thread;
    pthread_create(&thread, nullptr, square, &x);
    pthread_join(thread, nullptr);
    try {
        std::stringstream text;
        text << "three";
        throw std::runtime_error(text.str());
    } catch (const std::exception& error) {
        return std::exp(x) + std::expm1(x) + std::string(error.what()).size();
    }
}
"""


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def manylinux(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    if COMPILER is None or not all(map(shutil.which, ("nm", "objdump", "readelf"))):
        pytest.skip("no C++ compiler, or no binutils")
    return load("manylinux", monkeypatch)


def build_wheel(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "build_wheel.py", *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, compiled_once: dict[str, str]) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    done = build_wheel("--cpu", "--output", str(folder), **compiled_once)
    assert done.returncode == 0, done.stderr
    assert re.search(r"MB, built in \d+ s", done.stdout)
    (wheel,) = folder.glob("*.whl")
    return wheel


def compile_source(folder: Path, *options: str | Path) -> Path:
    source, target = folder / "source.cpp", folder / "libsource.so"
    source.write_text(SOURCE)
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-o", target, *options, source, "-pthread"]
    subprocess.run([*command, "-static-libstdc++", "-Wl,--gc-sections,--exclude-libs,ALL"], check=True)
    return target


def test_an_older_c_library_is_linked_for(manylinux: types.ModuleType, tmp_path: Path) -> None:
    plain = compile_source(tmp_path)
    expected = ctypes.CDLL(str(shutil.copy2(plain, tmp_path / "plain.so"))).calculate
    if not manylinux.violations(plain, (2, 28)):
        pytest.skip("this system's C library is old enough by itself")
    newer = [v for v in manylinux.violations(plain, (2, 28)) if v.startswith("pthread_create@")]
    assert newer == ["pthread_create@GLIBC_2.34 is newer than 2.28"]
    assert manylinux.best_tag(plain, "x86_64") != "manylinux_2_28_x86_64"

    first = manylinux.link_options(plain, (2, 28), tmp_path / "old", [COMPILER])
    old = compile_source(tmp_path, "-Wl,--no-as-needed", *first, "-Wl,--as-needed")
    assert manylinux.violations(old, (2, 28)) == []
    assert manylinux.best_tag(old, "x86_64") == "manylinux_2_28_x86_64"
    found = ctypes.CDLL(str(old)).calculate
    for function in (expected, found):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
    assert found(1.5) == expected(1.5)


def test_what_has_no_older_version_is_told(manylinux: types.ModuleType, tmp_path: Path) -> None:
    plain = compile_source(tmp_path)
    with pytest.raises(manylinux.NotAllowed, match=r"@GLIBC_[\d.]+ has no version of glibc 2.1 or older"):
        manylinux.link_options(plain, (2, 1), tmp_path / "old", [COMPILER])


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("void c10_of_torch(); void f() { c10_of_torch(); }", [], "is no part of PyTorch's stable ABI"),
        ('extern "C" void torch_of_the_abi(); void f() { torch_of_the_abi(); }', [], None),
        ("void f() {}", ["-Wl,-rpath,/somewhere"], "it has a run path"),
        ("void f() {}", ["-Wl,--no-as-needed", "-lgomp"], "libgomp.so.1 is no part of the system"),
    ],
)
def test_what_a_tag_allows(
    manylinux: types.ModuleType, tmp_path: Path, source: str, options: list, reason: str | None
) -> None:
    (tmp_path / "source.cpp").write_text(source)
    target = tmp_path / "lib.so"
    command = [COMPILER, "-fPIC", "-shared", "-o", target, tmp_path / "source.cpp", *options]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the compiler has no such library")
    found = manylinux.violations(target, (2, 28))
    assert (found == []) if reason is None else any(reason in line for line in found)


def test_the_check_as_a_command(manylinux: types.ModuleType, tmp_path: Path) -> None:
    plain = compile_source(tmp_path)
    for arguments, code in ((("check", plain), 0), (("check", plain, "manylinux_2_17"), 1), (("what",), 2)):
        command = [sys.executable, SCRIPTS / "manylinux.py", *arguments]
        assert subprocess.run(command, capture_output=True).returncode == code


@pytest.mark.slow
def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        content = {name: archive.read(name) for name in names}
    of_package = {str(p.relative_to(ROOT)) for p in (ROOT / "clipfast").rglob("*.py")}
    of_package |= {f"clipfast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    data = {"libclipfast.so", "_build.json", "py.typed", "data/VOCABULARY_LICENSE", "data/bpe_simple_vocab_16e6.txt.gz"}
    data.add("evaluate/imagenet.json")
    assert {n for n in names if ".dist-info/" not in n} == of_package | {f"clipfast/{name}" for name in data}
    metadata = {name.split(".dist-info/")[1] for name in names if ".dist-info/" in name}
    licences = {"licenses/LICENSE", "licenses/THIRD_PARTY_LICENSES", "licenses/clipfast/data/VOCABULARY_LICENSE"}
    assert metadata == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"} | licences | {
        "sboms/clipfast.cdx.json"
    }
    for name, text in content.items():
        for place in (ROOT, Path(sys.prefix), Path(library.torch.__file__).parent.parent):
            assert f"{place}/".encode() not in text, f"{name} names {place}"
        # nothing but what glibc and the CUDA runtime look for themselves
        assert not re.search(rb"/(home|root|work|build)/[a-z]", text), name
    record = json.loads(content["clipfast/_build.json"])
    assert record["sha256"] == hashlib.sha256(content["clipfast/libclipfast.so"]).hexdigest()


@pytest.mark.slow
def test_its_bill_of_materials(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if ".dist-info/sboms/" in n)
        bill = json.loads(archive.read(name))
        built = hashlib.sha256(archive.read("clipfast/libclipfast.so")).hexdigest()
    parts = {part["name"]: part for part in bill["components"]}
    names = {
        "bpe_simple_vocab_16e6",
        "imagenet-names",
        "clipfast/libclipfast.so",
        "torch-stable-abi-headers",
        "libstdc++",
    }
    assert set(parts) == names  # and no CUDA runtime in a wheel for CPUs
    assert parts["clipfast/libclipfast.so"]["hashes"] == [{"alg": "SHA-256", "content": built}]
    assert parts["torch-stable-abi-headers"]["version"] == library.torch.__version__


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"library": None}, []),
        ({"library": "libclipfast.so", "torch": "2.13.0+cpu", "cuda": None}, ["torch-stable-abi-headers"]),
        (
            {"library": "libclipfast.so", "torch": None, "cuda": "13.0:80,90a", "libstdcxx": "12.2.0"},
            ["torch-stable-abi-headers", "cudart_static", "libstdc++"],
        ),
    ],
)
def test_a_bill_of_materials_names_what_was_built(
    record: dict, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbom = load("sbom", monkeypatch)
    package = tmp_path / "clipfast"
    (package / "data").mkdir(parents=True)
    (package / "evaluate").mkdir()
    for place in (sbom.VOCABULARY, sbom.IMAGENET):
        (tmp_path / place).write_bytes(b"words")
    (package / "libclipfast.so").write_bytes(b"code")
    text = sbom.document("1.2", package, record)
    assert text == sbom.document("1.2", package, record)
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["purl"] == "pkg:pypi/clipfast@1.2"
    first = ["bpe_simple_vocab_16e6", "imagenet-names"] + (["clipfast/libclipfast.so"] if record["library"] else [])
    assert [part["name"] for part in bill["components"]] == first + names
    assert all(part["licenses"] and part["description"] for part in bill["components"])
    references = {"clipfast", *(part["bom-ref"] for part in bill["components"])}
    assert {r for d in bill["dependencies"] for r in (d["ref"], *d["dependsOn"])} == references
    toolkits = [part["version"] for part in bill["components"] if part["name"] == "cudart_static"]
    assert toolkits == (["13.0"] if record.get("cuda") else [])


@pytest.mark.slow
def test_the_same_input_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    # everything is compiled anew
    done = build_wheel("--cpu", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (second,) = tmp_path.glob("*.whl")
    assert second.name == wheel.name
    assert hashlib.sha256(second.read_bytes()).digest() == hashlib.sha256(wheel.read_bytes()).digest()


@pytest.mark.exhaustive  # compiles the CUDA kernels once more
def test_a_wheel_for_one_architecture(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        pytest.skip("no nvcc")
    done = build_wheel("--archs", "9.0a", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"CUDA: \d+\.\d+:90a;", done.stdout)
    (wheel,) = tmp_path.glob("*-py3-none-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("clipfast/_build.json"))
        built = Path(archive.extract("clipfast/libclipfast.so", tmp_path))
    assert record["cuda"].endswith(":90a")
    listing = subprocess.run(["nm", "-D", "--undefined-only", built], capture_output=True, text=True, check=True).stdout
    # it loads in a PyTorch without them: CUDA's functions are looked up by name when they are needed
    assert "aoti_torch_get_current_cuda_stream" not in listing
    assert b"aoti_torch_get_current_cuda_stream" in built.read_bytes()


@pytest.mark.slow
def test_its_tag_is_true(wheel: Path, manylinux: types.ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        built = Path(archive.extract("clipfast/libclipfast.so", tmp_path))
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        tags = re.findall(r"^Tag: (.+)$", archive.read(metadata).decode(), re.M)
    assert wheel.name.removesuffix(".whl").split("-", 2)[2] == tags[0]
    glibc = tuple(map(int, re.fullmatch(r"py3-none-manylinux_(\d+)_(\d+)_\w+", tags[0]).groups()))
    # by another tool than the one that chose the tag
    listing = subprocess.run(["objdump", "-p", built], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)$", listing, re.M)}
    assert versions
    assert max(versions)[:2] <= glibc
    assert "GLIBCXX" not in listing
    assert manylinux.violations(built, glibc) == []


@pytest.mark.slow
def test_it_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(command, check=True, capture_output=True)
    code = """
import json, clipfast, torch
from clipfast import doctor
from clipfast.ops import library
assert library.unavailable() is None, library.unavailable()
try:
    # an exception that crosses from the library to PyTorch's
    torch.ops.clipfast.pack_weight(torch.zeros(3))
except RuntimeError as error:
    assert "expected [columns, terms]" in str(error), error
else:
    raise AssertionError("no exception")
report = doctor.diagnose()
assert report["package"].endswith("site/clipfast"), report["package"]
print(doctor.exit_code(report), sum(r["backend"] == "native" for r in report["self_test"]), report["problems"])
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], cwd=site, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    code, natives, _ = run.stdout.split(maxsplit=2)
    # the losses everywhere; the encoder, LayerNorm and GELU where the CPU has AVX2
    assert int(code) == 0, run.stdout
    assert int(natives) >= 3, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tests/test_x.py": b""}, "the wheel holds what it should not: tests/test_x.py"),
        ({"clipfast/build.o": b""}, "the wheel holds what it should not: clipfast/build.o"),
        ({"clipfast/cli.py": f"# {ROOT}/clipfast".encode()}, "a place of the machine that built it"),
        ({"clipfast/libclipfast.so": b"\x7fELF"}, "is not the file that _build.json tells of"),
    ],
)
def test_a_wheel_that_is_wrong_is_refused(
    wheel: Path, change: dict, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("manylinux", monkeypatch)
    build_wheel = load("build_wheel", monkeypatch)
    wrong = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(wrong, "w") as target:
        for name in archive.namelist():
            if name not in change:
                target.writestr(name, archive.read(name))
        for name, content in change.items():
            target.writestr(name, content)
    with pytest.raises(build_wheel.Failed, match=re.escape(reason)):
        build_wheel.check(wrong, False, build_wheel.places())
    with pytest.raises(build_wheel.Failed, match="built without CUDA: CLIPFAST_SKIP_CUDA=1 was set"):
        build_wheel.check(wheel, True, build_wheel.places())
    assert build_wheel.check(wheel, False, build_wheel.places())[0]["reason"] is None


@pytest.mark.slow
def test_without_nvcc_there_is_no_wheel(tmp_path: Path, compiled_once: dict[str, str]) -> None:
    done = build_wheel("--archs", "9.0a", "--output", str(tmp_path / "made"), CUDA_HOME=str(tmp_path), **compiled_once)
    assert done.returncode == 1
    assert "error: the op library was built without CUDA: no nvcc was found" in done.stderr
    assert not (tmp_path / "made").exists()


def test_the_script_that_tests_a_wheel_wants_one() -> None:
    done = subprocess.run(["bash", SCRIPTS / "test_wheel.sh", "no.whl"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "WHEEL: got 'no.whl', expected a file" in done.stderr


@pytest.mark.parametrize("changed", [False, True])
def test_a_wheel_that_changes_pytorch_is_refused(changed: bool, tmp_path: Path) -> None:
    # an environment whose Python tells of another PyTorch after the first install
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in
    *importlib.metadata*) echo "2.12.0 1 $(cat {tmp_path}/installs)" ;;
    *"pip install"*) echo {"$*" if changed else "same"} > {tmp_path}/installs ;;
    *) echo ran "$*" ;;
esac
""")
    python.chmod(0o755)
    (tmp_path / "installs").write_text("same\n")
    (tmp_path / "some.whl").touch()
    command = ["bash", SCRIPTS / "test_wheel.sh", tmp_path / "some.whl"]
    environment = os.environ | {"CLIPFAST_ENV": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (1 if changed else 0), done.stderr
    assert ("changed PyTorch: 2.12.0 1 same, then" in done.stderr) is changed
    assert ("-m pytest --ignore=tests/test_wheel.py" in done.stdout) is not changed
