"""``scripts/gpu.py``: what its record holds when parts pass, fail, hang, crash or cannot start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
FAILING = """
import os, signal, time
def test_passes(): pass
def test_fails():
    expected = "a very long text " * 1000
    assert 1 == 2, "the last line of a traceback"
def test_is_late(): time.sleep(60)
def test_crashes(): os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # from its text, so that no compiled copy is left in scripts/
    module = ModuleType("gpu_script")
    module.__file__ = str(ROOT / "scripts" / "gpu.py")
    monkeypatch.setitem(sys.modules, "gpu_script", module)
    exec(compile((ROOT / "scripts" / "gpu.py").read_text(), module.__file__, "exec"), module.__dict__)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build" / "gpu")
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(module, "GRACE", 0.3)
    return module


def shell(gpu: ModuleType, name: str, command: str, limit: float = 10) -> object:
    return gpu.Part(name, ["bash", "-c", command], limit)


def record(gpu: ModuleType, tmp_path: Path, keep: bool = False) -> object:
    return gpu.Record(tmp_path / "results" / "a-status.json", {"gpu": None}, keep)


def written(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "results" / "a-status.json").read_text())["status"]


def test_the_record_is_whole_after_every_part(gpu: ModuleType, tmp_path: Path) -> None:
    # each part reads what was written before it
    copy = f"cp {tmp_path}/results/a-status.json {tmp_path}/"
    parts = [shell(gpu, "one", f"{copy}one; exit 3"), shell(gpu, "two", f"echo fine; {copy}two")]
    missing = gpu.Part("three", [str(tmp_path / "nothing")], 1)
    skipped = gpu.Part("four", ["false"], 1, skipped="no card")
    statuses = gpu.run_all([*parts, missing, skipped], record(gpu, tmp_path))
    assert json.loads((tmp_path / "one").read_text())["status"]["one"]["exit"] is None
    during_two = json.loads((tmp_path / "two").read_text())["status"]
    assert (during_two["one"]["exit"], during_two["two"]["exit"]) == (3, None)
    assert written(tmp_path) == statuses
    assert list(statuses) == ["one", "two", "three", "four"]
    assert (statuses["two"]["exit"], statuses["two"]["last line"]) == (0, "fine")
    assert statuses["three"]["exit"] == 127
    assert "No such file" in statuses["three"]["log"]
    assert (statuses["four"]["exit"], statuses["four"]["skipped"]) == (0, "no card")


def test_limits_of_a_part_and_of_all(gpu: ModuleType, tmp_path: Path) -> None:
    # the first two ignore a polite end, and start a process that would outlive them
    deaf = f"trap '' INT; (sleep 30; touch {tmp_path}/alive) & while true; do sleep 0.1; done"
    parts = [shell(gpu, name, deaf, 0.5) for name in ("one", "two")] + [shell(gpu, "three", "sleep 30")]
    start = time.monotonic()
    statuses = gpu.run_all([*parts, shell(gpu, "four", "true")], record(gpu, tmp_path), total=2.6)
    assert time.monotonic() - start < 6
    assert [s["exit"] for s in statuses.values()] == [124] * 4
    assert statuses["one"]["stopped"] == "after 0.5 s"
    assert statuses["four"]["stopped"].startswith("before it began")
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"touch {tmp_path}/alive" not in left


def test_failures_come_with_their_tracebacks(gpu: ModuleType, tmp_path: Path) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text(textwrap.dedent(FAILING))
    (tmp_path / "test_broken.py").write_text("import a_module_that_is_nowhere\n")
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_failures"]
    environment = {"PYTHONPATH": str(ROOT / "scripts"), "PYTHONDONTWRITEBYTECODE": "1"}

    def part(name: str, *arguments: str, limit: float = 30) -> object:
        return gpu.Part(name, [*pytest_, *arguments], limit, environment)

    parts = [
        part("fails", str(tests), "-k", "passes or fails"),
        part("is late", str(tests), "-k", "fails or late", limit=4),
        part("crashes", str(tests), "-k", "fails or crashes"),
        part("imports", str(tmp_path / "test_broken.py")),
    ]
    statuses = gpu.run_all(parts, record(gpu, tmp_path))
    assert [s["exit"] for s in statuses.values()] == [1, 124, -9, 2]
    for name in ("fails", "is late", "crashes"):
        (failure,) = statuses[name]["failures"]
        assert failure["test"].endswith("test_fails (call)")
        assert "the last line of a traceback" in failure["traceback"]
        assert len(failure["traceback"]) <= 4000
    assert "1 failed, 1 passed" in statuses["fails"]["last line"]
    assert "running" not in statuses["fails"]
    # SIGKILL leaves no time for a last word
    assert statuses["crashes"]["running"].endswith("test_crashes")
    assert "a_module_that_is_nowhere" in statuses["imports"]["failures"][0]["traceback"]


def test_no_more_than_thirty_failures(gpu: ModuleType, tmp_path: Path) -> None:
    lines = [json.dumps({"failed": f"test {i}", "traceback": "x" * 9000}) for i in range(50)]
    (tmp_path / "failures").write_text("\n".join(lines) + '\n{"failed": "cut o')
    failed, running = gpu.found_in(tmp_path / "failures")
    assert [f["test"] for f in failed[::10]] == ["test 0", "test 10", "test 20", "and 20 more"]
    assert running is None
    assert max(len(f["traceback"]) for f in failed) == 4000


def test_the_parts_and_their_order(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", ROOT)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def parts(choice: str, card: dict) -> list:
        return gpu.parts_of(choice, card, tmp_path / "times.json")

    h200 = {"gpu": "NVIDIA H200", "capability": "9.0"}
    order = ["build", "gpu", "kernels", "self-test", "memcheck", "racecheck", "bench"]
    assert [part.name for part in parts("all", h200)] == order
    assert [part.name for part in parts("cpu", h200)] == ["build", "cpu"]
    build, tests, *_ = parts("all", h200)
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == "9.0a+PTX"
    assert parts("all", h200 | {"capability": "8.9"})[0].environment["TORCH_CUDA_ARCH_LIST"] == "8.9+PTX"
    assert str(ROOT / "tests" / "ops" / "test_contrastive_loss_gpu.py") in tests.command
    # all but the last are sure of their time, and of half a minute for the benchmarks
    assert sum(part.limit for part in parts("tests", h200)) + 30 < gpu.TOTAL
    assert gpu.TOTAL + gpu.GRACE < 540
    without = {part.name: part.skipped for part in parts("all", {"gpu": None})}
    assert without["bench"] == without["memcheck"] == "no NVIDIA GPU"
    assert without["gpu"] is None


def test_a_build_that_fails_leaves_a_package(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "clipfast").mkdir()
    (tmp_path / "clipfast" / "__init__.py").write_text("")
    (tmp_path / "clipfast" / "libclipfast.so").write_text("old")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "attention.py").write_text("")
    statuses = gpu.run_all([shell(gpu, "build", "exit 1")], record(gpu, tmp_path))
    assert statuses["build"]["exit"] == 1
    found = sorted(str(p.relative_to(gpu.BUILD)) for p in gpu.BUILD.rglob("*") if p.is_file())
    assert found == ["clipfast/__init__.py", "clipfast/kernels/attention.py"]


@pytest.mark.parametrize(("card", "code"), [(None, 0), ("a card", 1)])
def test_a_build_without_cuda_is_a_failure_on_a_card(gpu: ModuleType, tmp_path: Path, card: str, code: int) -> None:
    (gpu.BUILD / "clipfast").mkdir(parents=True)
    built = {"reason": None, "cuda": None, "cuda_reason": "no nvcc was found"}
    (gpu.BUILD / "clipfast" / "_build.json").write_text(json.dumps(built))
    about = gpu.Record(tmp_path / "results" / "a-status.json", {"gpu": card}, False)
    status = gpu.run_all([shell(gpu, "build", "echo done")], about)["build"]
    assert status["exit"] == code
    assert status["last line"] == ("done" if code == 0 else "no nvcc was found")
    assert status["library"] == built


def test_what_other_parts_found_stays(gpu: ModuleType, tmp_path: Path) -> None:
    gpu.run_all([shell(gpu, "one", "true"), shell(gpu, "two", "true")], record(gpu, tmp_path))
    gpu.run_all([shell(gpu, "two", "exit 5")], record(gpu, tmp_path, keep=True))
    assert {name: status["exit"] for name, status in written(tmp_path).items()} == {"one": 0, "two": 5}


def test_a_machine_where_pytorch_does_not_answer(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CARD", "raise ImportError('libcuda is missing')")
    found = gpu.card()
    assert found["gpu"] is None
    assert "libcuda is missing" in found["error"]


def test_it_needs_no_more_than_bash_and_python(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(next(p for p in os.get_exec_path() if (Path(p) / tool).exists()) + f"/{tool}")
    environment = {"PATH": str(tmp_path), "PYTHON": sys.executable}
    script = ROOT / "scripts" / "gpu.sh"
    done = subprocess.run([script, "nonsense"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "gpu.sh: got 'nonsense', expected one of all, tests, bench, cpu\n")
