"""Write the table of docs/accelerate.md: every configuration of open_clip, and what ``accelerate`` makes of it.

Run it where the tests' rivals are installed: ``.venv/bin/python scripts/accelerate_table.py``. Nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "accelerate.md"
BEGIN, END = "<!-- configurations: begin -->\n", "<!-- configurations: end -->\n"

# transformers would take the folder of kernels for a package of that name
sys.path[:] = [str(ROOT / "tests" / "support"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"


def table() -> str:
    """Return the table: configurations that fare alike in one row."""
    import torchvision_on_cpu

    torchvision_on_cpu.enable()
    import open_clip
    from configurations import outcome_of

    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    worst = 0.0
    for name in open_clip.list_models():
        outcome = outcome_of(name)
        worst = max(worst, outcome.error)
        rows[outcome.image, outcome.text].append(name)
        print(f"{name}: {outcome.image} | {outcome.text} | {outcome.error:.1e}", file=sys.stderr)
    both = len(rows["served", "served"])
    some = sum(len(names) for (image, text), names in rows.items() if "served" in (image, text)) - both
    total = sum(map(len, rows.values()))
    lines = [
        f"Of the {total} configurations of open_clip {open_clip.__version__}, {both} are served whole, {some} in one",
        f"tower and {total - both - some} in none; outputs differ by {worst:.0e} at most (float64, shallow models with",
        "random weights). `make exhaustive` checks it, and `scripts/accelerate_table.py` writes this table.",
        "",
        "| image tower | text tower | configurations |",
        "|---|---|---|",
    ]
    for (image, text), names in sorted(rows.items(), key=lambda row: -len(row[1])):
        lines.append(f"| {image} | {text} | {len(names)}: {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Put the table where the page has it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
