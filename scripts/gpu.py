#!/usr/bin/env python3
"""What ``make gpu`` runs; see scripts/gpu.sh.

Every part is a process of its own with a limit, and all of them together have one. The record is written when a part
starts and when it ends, so that it tells how far a run came that ended with the machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LOGS = ROOT / "build" / "gpu-logs"
# which parts each choice runs, in this order
CHOICES = {
    "all": ("build", "gpu", "kernels", "self-test", "memcheck", "racecheck", "bench"),
    "tests": ("build", "gpu", "kernels", "self-test", "memcheck", "racecheck"),
    "bench": ("build", "bench"),
    "cpu": ("build", "cpu"),
}
# seconds; benchmarks take what is left
LIMITS = {"build": 140, "gpu": 120, "kernels": 80, "self-test": 25, "memcheck": 35, "racecheck": 35}
TOTAL = 525  # of all parts together
GRACE = 10  # from the polite end of a part to the other one
TRACEBACK, TRACEBACKS, TAIL = 4000, 30, 4000  # characters, failures a part, characters of a log

CARD = """
import json, platform, torch
found = {"gpu": None, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    found |= {"multiprocessors": properties.multi_processor_count, "cards": torch.cuda.device_count()}
print(json.dumps(found))
"""
SELF_TEST = """
import json, sys
from clipfast import doctor
report = doctor.examine()
with open(sys.argv[1], "w") as file:
    json.dump(report, file, default=str)
for level, line in report["problems"]:
    print(f"{level}: {line}")
failed = [line for level, line in report["problems"] if level == "failed"]
print(f"{len(report['self_test'])} checks of {len(report['ops'])} devices, {len(failed)} failures")
sys.exit(bool(failed))
"""


@dataclass(frozen=True)
class Part:
    """A command with a limit in seconds, or the reason why there is none."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None


class Record:
    """What was found, in a file that is whole at any time."""

    def __init__(self, file: Path, about: dict[str, Any], keep: bool) -> None:
        """Start a record; ``keep`` what the file says about parts that do not run now."""
        self.file, self.content = file, about | {"status": {}}
        if keep and file.exists():
            self.content["status"] = json.loads(file.read_text()).get("status", {})

    def put(self, part: str, status: dict[str, Any]) -> None:
        """Set what is known of a part."""
        self.content["status"][part] = status
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.file)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started: as Ctrl-C does, and for good where that is not enough."""
    for sign, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            # pytest then ends as if all was done, and writes what it measured
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def run(part: Part, limit: float) -> dict[str, Any]:
    """Run a part, show what it prints, and return what the record keeps of it."""
    start, log, failures = time.monotonic(), LOGS / f"{part.name}.log", LOGS / f"{part.name}.failures"
    LOGS.mkdir(parents=True, exist_ok=True)
    failures.write_text("")
    environment = os.environ | {"CLIPFAST_FAILURES": str(failures)} | part.environment
    late = False
    with log.open("w") as output, log.open(errors="replace") as shown:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and not late:
                time.sleep(0.1)
                print(shown.read(), end="", flush=True)
                late = time.monotonic() - start > limit
        finally:
            stop(process)
        print(shown.read(), end="", flush=True)
    text = log.read_text(errors="replace")
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    code = 124 if late else process.returncode
    status = {"exit": code, "seconds": round(time.monotonic() - start, 1), "last line": last[-300:]}
    if late:
        status["stopped"] = f"after {round(limit, 1)} s"
    failed, running = found_in(failures)
    if failed:
        status["failures"] = failed
    if code != 0:
        if running:
            status["running"] = running
        status["log"] = text[-TAIL:]
    return status


def found_in(file: Path) -> tuple[list[dict[str, str]], str | None]:
    """Return failures with their tracebacks, and the test that had not ended, from pytest_failures.py's file."""
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    failed = [{"test": x["failed"], "traceback": x["traceback"][-TRACEBACK:]} for x in lines if "failed" in x]
    more = len(failed) - TRACEBACKS
    if more > 0:
        failed[TRACEBACKS:] = [{"test": f"and {more} more", "traceback": ""}]
    return failed, next((x["started"] for x in reversed(lines) if "started" in x), None)


def run_all(parts: list[Part], record: Record, total: float = TOTAL) -> dict[str, dict[str, Any]]:
    """Run parts one after the other, whatever becomes of them; return what the record says of each."""
    end, statuses = time.monotonic() + total, {}
    for part in parts:
        left = end - time.monotonic()
        if part.skipped is not None:
            status = {"exit": 0, "skipped": part.skipped}
        elif left < 1:
            status = {"exit": 124, "stopped": f"before it began: {total:.0f} s are over"}
        else:
            record.put(part.name, {"exit": None, "running": "it began, and has not ended"})
            print(f"== {part.name}", flush=True)
            try:
                status = run(part, min(part.limit, left))
            except OSError as error:
                status = {"exit": 127, "log": f"{type(error).__name__}: {error}"}
        if part.name == "build":
            status |= library(wants_cuda=record.content.get("gpu") is not None, made=status["exit"] == 0)
        record.put(part.name, status)
        statuses[part.name] = status
        print(f"== {summary(part.name, status)}", flush=True)
        if part.name == "self-test" and (LOGS / "doctor.json").exists():
            record.content["doctor"] = json.loads((LOGS / "doctor.json").read_text())
            record.put(part.name, status)
    return statuses


def summary(part: str, status: dict[str, Any]) -> str:
    """Return one line about a part."""
    if "skipped" in status:
        return f"{part}: skipped: {status['skipped']}"
    said = "; ".join(filter(None, (status.get("stopped") and f"stopped {status['stopped']}", status.get("last line"))))
    return f"{part}: {'passed' if status['exit'] == 0 else 'FAILED ({})'.format(status['exit'])}: {said}"


def library(wants_cuda: bool, made: bool) -> dict[str, Any]:
    """Return what became of the op library; where nothing was made, put the package together without it.

    A build without CUDA is none for a card: tests would skip what they are there for.
    """
    if not made:
        skipped = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        shutil.rmtree(BUILD, ignore_errors=True)
        shutil.copytree(ROOT / "clipfast", BUILD / "clipfast", ignore=skipped)
        shutil.copytree(ROOT / "kernels", BUILD / "clipfast" / "kernels", ignore=skipped)
        return {}
    built = json.loads((BUILD / "clipfast" / "_build.json").read_text())
    why = built["reason"] or (built["cuda_reason"] if wants_cuda else None)
    return {"library": built} | ({"exit": 1, "last line": why} if why else {})


def cuda_tool(name: str) -> str | None:
    """Find one of CUDA's programs: on the path, in the toolkit, or beside PyTorch's own CUDA libraries."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *Path(sysconfig.get_path("purelib")).glob("nvidia/cu*")]
    return shutil.which(name) or next(
        (found for home in homes if home and (found := shutil.which(str(Path(home) / "bin" / name)))), None
    )


def commit() -> str:
    """Return the commit's short name."""
    if os.environ.get("CLIPFAST_COMMIT"):
        return os.environ["CLIPFAST_COMMIT"]
    try:
        done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def card() -> dict[str, Any]:
    """Return the GPU's name and the versions of what is measured with, or why they are not known.

    Another process asks: this one stays off the card.
    """
    try:
        done = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True, timeout=60)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, OSError):
        return {"gpu": None, "error": "PyTorch did not answer within 60 s"}
    except (ValueError, IndexError):
        return {"gpu": None, "error": done.stderr[-TAIL:] or "PyTorch did not answer"}


def parts_of(choice: str, found: dict[str, Any], times: Path) -> list[Part]:
    """Return the parts of a choice, for the card that was found."""
    # the package as it would be installed, kernels included, in a folder that comes first on Python's path
    package = {"PYTHONPATH": f"{BUILD}:{ROOT / 'scripts'}", "PYTHONSAFEPATH": "1", "CLIPFAST_SKIP_MISSING": "1"}
    package["CLIPFAST_COMMIT"] = commit()
    # a test that hangs leaves its stack in the log
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_failures", "-o", "faulthandler_timeout=60"]
    build = {}
    if nvcc := cuda_tool("nvcc"):
        build["CUDA_HOME"] = os.environ.get("CUDA_HOME") or str(Path(nvcc).resolve().parent.parent)
    if found["gpu"] and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        # code for this card, and the PTX that a card without code compiles
        build["TORCH_CUDA_ARCH_LIST"] = found["capability"] + ("a" if float(found["capability"]) >= 9 else "") + "+PTX"
    no_pytest = None if importlib.util.find_spec("pytest") else "pytest is not installed"

    def test(name: str, *arguments: str, skipped: str | None = None, before: tuple[str, ...] = ()) -> Part:
        limit = LIMITS.get(name, TOTAL)
        return Part(name, [*before, *pytest, *arguments], limit, package, no_pytest or skipped)

    with_gpu = sorted(str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text())
    not_found = None if found["gpu"] else "no NVIDIA GPU"
    sanitizer = cuda_tool("compute-sanitizer")
    sanitize = (str(sanitizer), "--error-exitcode", "9", "--tool")
    sanitized = ("tests/ops/test_contrastive_loss_gpu.py", "-m", "gpu", "-k", "twice or anywhere")
    no_sanitizer = not_found or (None if sanitizer else "no compute-sanitizer")
    cores = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    benchmarks = [str(ROOT / "benchmarks"), "--ignore", str(ROOT / "benchmarks" / "test_tokenizer.py")]
    made = [
        Part("build", [sys.executable, "setup.py", "-q", "build", "--build-lib", str(BUILD)], LIMITS["build"], build),
        test("gpu", *with_gpu, "-m", "gpu"),
        # what Triton's interpreter runs elsewhere runs on the card here
        test("kernels", "tests/kernels", "-m", "not gpu and not slow and not exhaustive", skipped=not_found),
        Part("self-test", [sys.executable, "-c", SELF_TEST, str(LOGS / "doctor.json")], LIMITS["self-test"], package),
        *(test(tool, *sanitized, skipped=no_sanitizer, before=(*sanitize, tool)) for tool in ("memcheck", "racecheck")),
        test("bench", *benchmarks, "--results", str(times), skipped=not_found),
        test("cpu", "tests", *cores, "-m", "not gpu and not slow and not exhaustive", "--ignore=tests/test_install.py"),
    ]
    return [part for part in made if part.name in CHOICES[choice]]


def table(path: Path) -> str:
    """Return a line a benchmark: ours, the best of the others, and their ratio."""
    lines = [f"{'benchmark':<78} {'ours, ms':>9} {'best other':>10} {'ratio':>6}  which"]
    for row in json.loads(path.read_text())["rows"]:
        times = {name: 1e3 * statistics.median(side["device_s"]) for name, side in row["sides"].items()}
        ours = {name: ms for name, ms in times.items() if name.startswith("clipfast")}
        others = {name: ms for name, ms in times.items() if name not in ours}
        if ours and others:
            best, mine = min(others, key=others.get), min(ours.values())
            ratio = others[best] / mine
            lines.append(f"{row['name']:<78} {mine:>9.4f} {others[best]:>10.4f} {ratio:>6.2f}  {best}")
    return "\n".join(lines)


def main() -> int:
    """Run the parts, write the record, print the table last; return the exit status."""
    choice = sys.argv[1] if len(sys.argv) > 1 else "all"
    if choice not in CHOICES:
        print(f"gpu.sh: got {choice!r}, expected one of {', '.join(CHOICES)}", file=sys.stderr)
        return 2
    found = card()
    print(f"{found}, commit {commit()}", flush=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", found["gpu"] or "cpu")
    folder = (ROOT / "benchmarks" / "results" / name) if found["gpu"] else ROOT / "build"
    times, file = folder / f"{commit()}.json", folder / f"{commit()}-status.json"
    record = Record(file, found | {"commit": commit()}, keep=choice != "all")
    shutil.rmtree(LOGS, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so stops the part that runs
    statuses = run_all(parts_of(choice, found, times), record)
    print(f"wrote {file.relative_to(ROOT)}" + ("" if found["gpu"] else ": no NVIDIA GPU, nothing to keep"))
    if "bench" in statuses and times.exists():
        print(f"{times.relative_to(ROOT)}:\n{table(times)}")
    for part, status in statuses.items():
        print(summary(part, status))
        for failure in status.get("failures", []):
            print(f"    {failure['test']}")
    return max(status["exit"] != 0 for status in statuses.values())


if __name__ == "__main__":
    sys.exit(main())
