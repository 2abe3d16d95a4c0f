"""``clipfast doctor``, and what happens with an op library that cannot be used, each in a fresh process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import interpreter
import pytest
import torch
from typer.testing import CliRunner

import clipfast
from clipfast import doctor, doctor_report, self_test
from clipfast.cli import app
from clipfast.ops import dispatch, library, registry, tuned

LIBRARY = library.path()
USE = """
import torch, clipfast
a = clipfast.ops.attention(torch.ones(1, 3, 12), 2)
x = torch.eye(3, 4, requires_grad=True)
loss = clipfast.ops.contrastive_loss(x, x, 2.0)
loss.backward()
assert a.isfinite().all() and x.grad.isfinite().all()
assert clipfast.__file__.startswith({site!r}), clipfast.__file__
"""
EXAMINE = """
import json
from clipfast import doctor
report = doctor.examine()
print(json.dumps([report, doctor.exit_code(report)]))
"""


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Triton's kernels out, which the interpreter makes slow."""
    interpreter.leave_out(monkeypatch)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Copy the package, without its op library, to where ``PYTHONPATH`` finds it first."""
    source, target = Path(clipfast.__file__).parent, tmp_path / "site" / "clipfast"
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(source, target, ignore=skipped)
    # an editable install has the kernels elsewhere
    from clipfast import kernels

    if not (target / "kernels").exists():
        shutil.copytree(Path(kernels.__file__).parent, target / "kernels", ignore=skipped)
    return target


def run(package: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(package.parent)} | environment
    # elsewhere than the clone, whose folder would come first
    where = package.parent
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=180)


def examined(package: Path, *options: str, **environment: str) -> tuple[dict, int]:
    code = "from clipfast.cli import app; app()"
    done = run(package, "-c", code, "doctor", "--json", *options, **environment)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout), done.returncode


def built(package: Path) -> bytes:
    if not LIBRARY.exists():
        pytest.skip(f"needs an op library: {library.unavailable()}")
    return LIBRARY.read_bytes()


def cut(package: Path) -> None:
    whole = built(package)
    (package / "libclipfast.so").write_bytes(whole[: len(whole) // 2])


def cut_in_the_header(package: Path) -> None:
    (package / "libclipfast.so").write_bytes(built(package)[:40])


def zeros_in_the_middle(package: Path) -> None:
    # what an interrupted copy leaves that first made the file as long as it will be
    content = built(package)
    (package / "_build.json").write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))
    half = len(content) // 2
    (package / "libclipfast.so").write_bytes(content[:half] + bytes(len(content) - half))


def for_another_machine(package: Path) -> None:
    content = bytearray(built(package))
    other = 183 if struct.unpack_from("<H", content, 18)[0] == 62 else 62
    struct.pack_into("<H", content, 18, other)
    (package / "libclipfast.so").write_bytes(content)


def compiled(package: Path, source: str, *options: str) -> None:
    compiler = next((c for c in (os.environ.get("CC", "gcc"), "cc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    file = package / "library.c"
    file.write_text(source)
    command = [compiler, "-shared", "-fPIC", "-o", package / "libclipfast.so", file, *options]
    subprocess.run(command, check=True)


def with_a_missing_symbol(package: Path) -> None:
    compiled(package, "void aoti_torch_of_the_future(void); void f(void) { aoti_torch_of_the_future(); }")


def without_our_ops(package: Path) -> None:
    compiled(package, "int nothing;")


BROKEN = [
    (cut, "bytes of at least"),
    (cut_in_the_header, "is damaged: 40 bytes"),
    (zeros_in_the_middle, "is not the file that was built: its SHA-256 differs"),
    (for_another_machine, "is built for"),
    (with_a_missing_symbol, "undefined symbol: aoti_torch_of_the_future; it does not fit PyTorch"),
    (without_our_ops, "has no op build_info, contrastive_statistics"),
]


@pytest.mark.parametrize(("damage", "reason"), BROKEN, ids=[f.__name__ for f, _ in BROKEN])
def test_a_library_that_cannot_be_used(package: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(package)
    # used and examined by one process; importing PyTorch takes most of its time
    done = run(package, "-c", USE.format(site=str(package.parent)) + EXAMINE)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert len(said) == 1, done.stderr
    assert f"{package / 'libclipfast.so'}" in said[0]
    assert reason in said[0]

    report, code = json.loads(done.stdout)
    assert code == 0
    lines = [text for level, text in report["problems"] if level == "warning"]
    assert reason in lines[0]
    assert "\n" not in lines[0]
    assert "run in PyTorch" in lines[0]
    assert report["ops"]["cpu"]["contrastive_loss"].startswith("contrastive_loss: torch")
    assert all(result["passed"] for result in report["self_test"])
    if damage is BROKEN[0][0]:
        told, code = examined(package)
        assert (told["problems"], code) == (report["problems"], 0)


def test_without_a_library_it_warns_and_strict_fails(package: Path) -> None:
    report, code = examined(package, "--strict")
    assert code == 1
    assert "was not installed with it" in dict(report["problems"])["warning"]


def test_a_library_that_ends_the_process(package: Path) -> None:
    compiled(package, "#include <stdlib.h>\n__attribute__((constructor)) static void end(void) { abort(); }")
    report, code = examined(package)
    assert code == 1
    level, text = report["problems"][0]
    assert level == "failed"
    assert "was ended by SIGABRT with the op library, and not without" in text
    assert report["self_test"]


def with_triton(package: Path, source: str) -> None:
    (package.parent / "triton").mkdir()
    (package.parent / "triton" / "__init__.py").write_text(source)


def test_a_triton_that_ends_the_process(package: Path) -> None:
    with_triton(package, "import os\nos.abort()\n")
    report, code = examined(package)
    assert code == 1
    level, text = report["problems"][0]
    assert level == "failed"
    assert "was ended by SIGABRT with Triton, and not without" in text
    assert report["triton"] == {"version": None, "reason": "not installed"}
    assert report["self_test"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libcuda.so.1: cannot open')", "ImportError: libcuda.so.1: cannot open"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        # it imports, but is none that the kernels could use
        ("__version__ = '1.0'", "ModuleNotFoundError: No module named 'triton."),
    ],
)
def test_a_triton_that_does_not_import(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = [name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("clipfast.kernels.")]
    for name in loaded:
        # what is imported again becomes its package's attribute too
        package, _, attribute = name.rpartition(".")
        if hasattr(sys.modules.get(package), attribute):
            monkeypatch.setattr(f"{package}.{attribute}", getattr(sys.modules[package], attribute))
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for wanted, level in ((True, "warning"), (False, "note")):
            problems: list = []
            found = doctor._triton(problems, wanted)
            assert reason in found["reason"]
            ((said, text),) = problems
            assert said == level
            assert re.match(r"Triton( [\d.]+)? does not import: .*: PyTorch's operators serve$", text)
            assert reason in text
    finally:
        sys.modules.pop("triton", None)


def test_a_package_that_does_not_import(package: Path) -> None:
    (package / "ops" / "attention.py").write_text("raise OSError('the disk is gone')\n")
    report, code = examined(package)
    assert code == 1
    assert report["problems"] == [["failed", "clipfast cannot be used: OSError: the disk is gone"]]
    assert report["python"]


def test_a_record_that_is_no_json(package: Path) -> None:
    (package / "_build.json").write_text("{")
    done = run(package, "-c", "from clipfast.ops import library; print(library.unavailable())")
    assert "was not installed with it" in done.stdout, done.stderr


def test_the_library_can_be_switched_off() -> None:
    code = "from clipfast.ops import library; print(library.unavailable())"
    environment = os.environ | {"CLIPFAST_NO_LIBRARY": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "the op library is not used: CLIPFAST_NO_LIBRARY=1 is set"


def test_it_examines_this_machine() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("platform", f"PyTorch   {torch.__version__}", "library", "self-test: ", "contrastive_loss: "):
        assert word in result.output
    block = result.output.split("```")[1]
    assert "attention=" in block
    if library.unavailable() is None:
        why_not = library.why_no_amx()
        assert f"AMX       {'multiplies bfloat16' if why_not is None else f'not used: {why_not}'}" in block
    assert str(Path.home()) not in block or str(Path.home()) == "/"


def test_triton_kernels_are_tested_where_they_run(package: Path) -> None:
    pytest.importorskip("triton")
    report, code = examined(package, TRITON_INTERPRET="1")
    assert code == 0, report["problems"]
    tested = {result["op"] for result in report["self_test"] if result["backend"] == "triton"}
    assert tested == {"attention", "layer_norm", "add_layer_norm", "bias_gelu"}
    assert report["environment"]["TRITON_INTERPRET"] == "1"


def test_every_op_is_tested() -> None:
    results = self_test.run(torch.device("cpu"))
    assert {result.op for result in results} == set(dispatch.operations())
    assert [r for r in results if not r.passed] == []
    # each case must be one that the op library serves where it can
    if library.unavailable() is None:
        assert {("contrastive_loss", "native"), ("siglip_loss", "native")} <= {(r.op, r.backend) for r in results}
    # products in bfloat16 are others than in float32
    for op in ("contrastive_loss", "siglip_loss", "encoder"):
        assert {r.dtype for r in results if r.op == op} == {"float32", "bfloat16"}


@pytest.mark.parametrize("name", ["statistics", "gradients", "siglip_statistics", "siglip_gradients"])
def test_a_wrong_kernel_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipfast.ops import contrastive_kernels

    right = getattr(contrastive_kernels.chunked, name)

    def wrong(*arguments: object) -> object:
        found = right(*arguments)
        return found * 1.001 if isinstance(found, torch.Tensor) else tuple(x * 1.001 for x in found)

    monkeypatch.setattr(contrastive_kernels, "chunked", contrastive_kernels.chunked._replace(**{name: wrong}))
    # a student's own loss is the contrastive one
    served = {"siglip_loss"} if name.startswith("siglip") else {"contrastive_loss", "distillation_loss"}
    failed = [r for r in self_test.run(torch.device("cpu")) if not r.passed]
    assert {(r.op, r.backend) for r in failed} == {(op, "torch") for op in served}
    assert "is allowed" in failed[0].reason


@pytest.mark.parametrize(
    ("op", "mistake"),
    [
        *((op, "wrong") for op in ("attention", "single_query_attention", "layer_norm", "bias_gelu", "encoder")),
        ("attention", "nan"),
        ("attention", "raises"),
    ],
)
def test_a_wrong_op_fails_the_examination(op: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.entries[op]

    def run(*arguments: object) -> torch.Tensor:
        # float64 is the oracle, which stays right
        x = entry.implementations[-1].run(*arguments)
        if mistake == "raises" and x.dtype != torch.float64:
            raise RuntimeError("no kernel image is available")
        return x if x.dtype == torch.float64 else x * 1.01 if mistake == "wrong" else x * float("nan")

    broken = dispatch.Implementation("native", "broken", run)
    monkeypatch.setitem(registry.entries, op, entry.with_implementations(broken, entry.implementations[-1]))
    report = doctor.examine()
    assert doctor.exit_code(report) == 1
    failed = [text for level, text in report["problems"] if level == "failed"]
    assert any(f"self-test of {op}" in text for text in failed)
    assert "clipfast does not work here as it should" in doctor_report.render(report)


@pytest.mark.parametrize(
    ("cuda", "capability", "driver", "served", "how"),
    [
        ("13.0:80,90a,100,100+PTX", (9, 0), (13, 0), True, "code for sm_90a"),
        ("13.0:80,90a,100,100+PTX", (8, 9), (13, 0), True, "code for sm_80, which runs on 8.9"),
        ("13.0:80,90a,100,100+PTX", (10, 0), (13, 0), True, "code for sm_100"),
        ("13.0:80,90a,100,100+PTX", (10, 3), (13, 0), True, "code for sm_100, which runs on 10.3"),
        ("13.0:80,90a,100,100+PTX", (11, 0), (13, 0), True, "PTX of compute_100, compiled by the driver"),
        ("13.0:80,86,89,90a,100,100+PTX,120", (12, 0), (13, 0), True, "code for sm_120"),
        ("13.0:80,86,89,90a,100,100+PTX,120", (12, 1), (13, 0), True, "code for sm_120, which runs on 12.1"),
        ("13.0:80,86,89,90a,100,100+PTX,120", (8, 7), (13, 0), False, "no code for compute capability 8.7"),
        ("13.0:80+PTX,86", (8, 7), (13, 0), True, "PTX of compute_80, compiled by the driver"),
        ("13.0:80,86,89,90a", (8, 9), None, True, "code for sm_89"),
        ("13.0:80,90a,100,100+PTX", (12, 0), (13, 0), True, "PTX of compute_100, compiled by the driver"),
        ("13.1:80,90a,100,100+PTX", (12, 0), (13, 0), False, "no code for compute capability 12.0"),
        ("13.0:100f", (10, 3), (13, 0), True, "code for sm_100f, which runs on 10.3"),
        ("13.0:100a", (10, 3), (13, 0), False, 'build it with TORCH_CUDA_ARCH_LIST="10.3"'),
        ("13.0:90a", (8, 0), (13, 0), False, "no code for compute capability 8.0 (only 90a)"),
        ("13.0:80,90a", (7, 5), (13, 0), False, "the card has compute capability 7.5, the op library needs 8.0"),
        ("13.0:80,90a", (9, 0), (12, 8), False, "the driver serves CUDA 12.8, the op library needs 13.0 or later"),
        ("none", (9, 0), (13, 0), False, "built without CUDA"),
    ],
)
def test_cards_that_a_build_serves(cuda: str, capability: tuple, driver: tuple, served: bool, how: str) -> None:
    found = library.card_support(cuda, capability, driver)
    assert found[0] is served
    assert how in found[1]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    (tmp_path / "file").touch()
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    for home, writable in ((tmp_path / "file", False), (tmp_path / "to come", True)):
        monkeypatch.setenv("TRITON_HOME", str(home))
        problems: list = []
        found = doctor._triton(problems, wanted=True)
        assert found["cache"].endswith(".triton/cache")
        assert [level for level, _ in problems] == ([] if writable else ["warning"])
        assert writable or "set TRITON_CACHE_DIR" in problems[0][1]
    assert not (tmp_path / "to come").exists()


def test_what_is_missing_on_a_gpu_machine_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    # as Python has it where there is none
    monkeypatch.setitem(sys.modules, "triton", None)
    for wanted, level in ((True, "warning"), (False, "note")):
        problems: list = []
        doctor._triton(problems, wanted)
        assert [found for found, _ in problems] == [level]
        assert "Triton is not installed" in problems[0][1]
    assert doctor.exit_code({"problems": [("warning", "")]}) == 0
    assert doctor.exit_code({"problems": [("warning", "")]}, strict=True) == 1
    assert doctor.exit_code({"problems": [("note", "")]}, strict=True) == 0


@pytest.mark.parametrize("state", ["none", "off", "counts", "cut off", "other version"])
def test_it_says_which_tuned_file_counts_and_why_not(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path))
    monkeypatch.delenv("CLIPFAST_TUNED")
    # the machine itself is not what is asked about
    monkeypatch.setattr(self_test, "run", lambda device: [])
    monkeypatch.setattr(self_test, "explanations", lambda device: {})
    if state != "none":
        choices = {"a": tuned.Choice("reference", "torch"), "b": tuned.Choice("torch", "torch")}
        path = tuned.write(torch.device("cpu"), {"attention": choices})
    if state == "off":
        monkeypatch.setenv("CLIPFAST_TUNED", "off")
    elif state == "cut off":
        path.write_bytes(path.read_bytes()[:-30])
    elif state == "other version":
        path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.10.0"'))
    report = json.loads(json.dumps(doctor.examine() | {"seconds": 0.0}))
    expected = {
        "none": "no tuned file",
        "off": "CLIPFAST_TUNED=off is set",
        "counts": "made today: 1 choices other than the rule's, 1 the same",
        "cut off": "it is damaged or cut off",
        "other version": f"it was made for torch 2.10.0, this is torch {torch.__version__}",
    }[state]
    # in the facts, among them those to paste in a bug report; and one line that says what follows
    lines = doctor_report.render(report).splitlines()
    assert sum(expected in line for line in lines if line.startswith("tuned cpu")) == 2
    notes = [text for level, text in report["problems"] if level == "note" and "the rule decides" in text]
    assert len(notes) == (state != "counts")
    assert all(expected in text for text in notes)
    assert doctor.exit_code(report) == 0
