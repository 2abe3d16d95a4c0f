#!/usr/bin/env python3
"""What ``make gpu`` runs; see scripts/gpu.sh. It stays under 9 minutes: every part has a limit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LIMITS = {"build": 90, "tests": 200, "memcheck": 45, "racecheck": 45, "bench": 150}  # seconds
PARTS = ("all", "tests", "bench")


def run(part: str, command: list[str], **environment: str) -> tuple[int, str]:
    """Run a command under its part's limit, show what it prints, and return its exit status and its last line."""
    start, log = time.monotonic(), ROOT / "build" / f"gpu-{part}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output, log.open() as shown:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        late = False
        while process.poll() is None and not late:
            time.sleep(0.2)
            print(shown.read(), end="", flush=True)
            late = time.monotonic() - start > LIMITS[part]
        if late:
            process.send_signal(signal.SIGINT)  # pytest then ends as if all was done, and writes what it measured
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        print(shown.read(), end="", flush=True)
    status = f"stopped after {LIMITS[part]} s" if late else f"{time.monotonic() - start:.0f} s"
    print(f"== {part}: {status}", flush=True)
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
    return (124, f"{status}; {last}") if late else (process.returncode, last)


def commit() -> str:
    """Return the commit's short name."""
    if os.environ.get("CLIPFAST_COMMIT"):
        return os.environ["CLIPFAST_COMMIT"]
    try:
        done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def card() -> dict[str, str | None]:
    """Return the GPU's name and the versions of what is measured with."""
    import torch

    try:
        import triton
    except ImportError:
        triton = None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if triton else None,
        "python": sys.version.split()[0],
    }


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
    """Run the parts, write the file, print the table last; return the exit status."""
    part = sys.argv[1] if len(sys.argv) > 1 else "all"
    if part not in PARTS:
        print(f"gpu.sh: got {part!r}, expected one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    found = card()
    print(f"{found}, commit {commit()}", flush=True)

    # the package as it would be installed, kernels included, in a folder that comes first on Python's path
    statuses = {"build": run("build", [sys.executable, "setup.py", "-q", "build", "--build-lib", str(BUILD)])}
    environment = {"PYTHONPATH": str(BUILD), "PYTHONSAFEPATH": "1", "CLIPFAST_SKIP_MISSING": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q"]
    if part in ("all", "tests"):
        marks = ["-m", "(gpu or not slow) and not exhaustive", "--ignore=tests/test_install.py"]
        statuses["tests"] = run("tests", [*pytest, "tests", *marks], **environment)
        if sanitizer := shutil.which("compute-sanitizer"):
            few = ["tests/ops/test_contrastive_loss_gpu.py", "-k", "twice or anywhere"]
            for tool in ("memcheck", "racecheck"):
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, *few]
                statuses[tool] = run(tool, command, **environment)
    name = re.sub(r"[^A-Za-z0-9]+", "-", found["gpu"] or "cpu")
    folder = (ROOT / "benchmarks" / "results" / name) if found["gpu"] else BUILD
    times = folder / f"{commit()}.json"
    if part in ("all", "bench"):
        environment["CLIPFAST_COMMIT"] = commit()
        LIMITS["bench"] = LIMITS["bench"] if part == "all" else 430
        benchmarks = [str(ROOT / "benchmarks"), "--ignore", str(ROOT / "benchmarks" / "test_tokenizer.py")]
        statuses["bench"] = run("bench", [*pytest, *benchmarks, "--results", str(times)], **environment)

    status = {key: {"exit": code, "last line": last} for key, (code, last) in statuses.items()}
    file = folder / f"{commit()}-status.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and part != "all":  # the other part's results stay
        status = json.loads(file.read_text())["status"] | status
    file.write_text(json.dumps(found | {"commit": commit(), "status": status}, indent=1) + "\n")
    print(f"wrote {file.relative_to(ROOT)}" + ("" if found["gpu"] else ": no NVIDIA GPU, nothing to keep"))
    if times.exists():
        print(f"{times.relative_to(ROOT)}:\n{table(times)}")
    for key, (code, last) in statuses.items():
        print(f"{key}: {'passed' if code == 0 else f'FAILED ({code})'}: {last}")
    return max(code != 0 for code, _ in statuses.values())


if __name__ == "__main__":
    sys.exit(main())
