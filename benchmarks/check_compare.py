"""Is a planted slowdown of 20% flagged, and a rerun of the same code not? Five times, in processes of their own.

python benchmarks/check_compare.py [TIMES [RUNS]]

Every time, the same rows are measured in turn, four runs each: before, again as they are, and with every call of
clipfast's made a fifth longer. Three quarters of an hour on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from clipfast.benchmark.compare import compare, lines_of
from clipfast.benchmark.results import read_runs

FOLDER = Path(__file__).parent
FILES = ("test_attention.py", "test_contrastive_loss.py", "test_bias_gelu.py", "test_layer_norm.py")
# rows from 0.1 to 30 ms
CHOSEN = (
    "(attention and not 577 and not 77) or (contrastive and (512 or 1024) and not siglip) or (gelu and none) or "
    "(layer_norm and B-32)"
)


def measure(path: Path, planted: str = "") -> None:
    """Run the benchmarks in a process of their own."""
    environment = os.environ | ({"CLIPFAST_PLANTED": planted, "PYTHONPATH": str(FOLDER)} if planted else {})
    command = [sys.executable, "-m", "pytest", "-q", *(str(FOLDER / name) for name in FILES), "-k", CHOSEN]
    plugin = ["-p", "planted"] if planted else []
    done = subprocess.run([*command, *plugin, "--results", str(path)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])


def main() -> int:
    """Print what was flagged, time by time.

    Returns 1 where a rerun had a row flagged, or a slowed run no more than half of them.
    """
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    failed = False
    for i in range(times):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for run in range(runs):
                for state, planted in {"before": "", "again": "", "slow": "slow"}.items():
                    measure(folder / state / f"{run}.json", planted)
            for state in ("again", "slow"):
                changes = compare(read_runs(folder / "before"), read_runs(folder / state))
                # what was planted is on one side alone
                changes = [change for change in changes if change.side == "clipfast"]
                verdicts = Counter(change.verdict for change in changes)
                ratios = sorted(change.ratio for change in changes)
                spread = f"ratios {ratios[0]:.3f} to {ratios[-1]:.3f}"
                print(f"{i + 1}. {state}: {dict(verdicts)}, {spread}", flush=True)
                if state == "slow":
                    expected, wrong = "slower", verdicts["slower"] <= len(changes) / 2
                else:
                    expected, wrong = "same", verdicts["slower"] + verdicts["faster"] > 0
                failed = failed or wrong
                for line in lines_of([c for c in changes if c.verdict != expected], everything=True)[:-1]:
                    print(f"   {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
