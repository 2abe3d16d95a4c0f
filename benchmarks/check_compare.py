"""Is a planted slowdown of 20% flagged, and a rerun of the same code not? Five times, in processes of their own.

python benchmarks/check_compare.py [TIMES]

Every time, the same rows are measured again and compared with the first run: once as they are, and once with every call
of clipfast's made a fifth longer. A quarter of an hour on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from clipfast.benchmark.compare import compare, lines_of
from clipfast.benchmark.results import Run, read_run

FOLDER = Path(__file__).parent
FILES = ("test_attention.py", "test_contrastive_loss.py", "test_bias_gelu.py", "test_layer_norm.py")
# rows from 40 µs to 200 ms
CHOSEN = (
    "(attention and not 577) or (contrastive and (512 or 1024 or 2048) and not siglip) or (gelu and none) or layer_norm"
)


def measure(path: Path, planted: str = "") -> Run:
    """Run the benchmarks in a process of their own."""
    environment = os.environ | ({"CLIPFAST_PLANTED": planted, "PYTHONPATH": str(FOLDER)} if planted else {})
    command = [sys.executable, "-m", "pytest", "-q", *(str(FOLDER / name) for name in FILES), "-k", CHOSEN]
    plugin = ["-p", "planted"] if planted else []
    done = subprocess.run([*command, *plugin, "--results", str(path)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return read_run(path)


def main() -> int:
    """Print what was flagged, time by time; return 1 where something was missed or flagged without a cause."""
    times, failed = int(sys.argv[1]) if len(sys.argv) > 1 else 5, False
    with tempfile.TemporaryDirectory() as folder:
        first = measure(Path(folder) / "first.json")
        print(f"{len(first.rows)} rows on {first.machine}", flush=True)
        for i in range(times):
            for planted in ("", "slow"):
                changes = compare(first, measure(Path(folder) / "again.json", planted))
                # what was planted is on one side alone
                changes = [change for change in changes if change.side == "clipfast"]
                verdicts = Counter(change.verdict for change in changes)
                ratios = sorted(change.ratio for change in changes)
                spread = f"ratios {ratios[0]:.3f} to {ratios[-1]:.3f}"
                print(f"{i + 1}. {planted or 'as it is'}: {dict(verdicts)}, {spread}", flush=True)
                expected = "slower" if planted else "same"
                if verdicts[expected] < len(changes):
                    failed = True
                    for line in lines_of([c for c in changes if c.verdict != expected], everything=True)[:-1]:
                        print(f"   {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
