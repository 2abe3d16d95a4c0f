#!/usr/bin/env python3
"""Write the reckoning's tables of docs/kernels.md: what the kernels cost that CLIP's models launch, on four cards.

    python scripts/reckoning_table.py            # print them
    python scripts/reckoning_table.py --write    # put them into the page

No GPU is needed; with nothing compiled before it takes some minutes. A test compares a part of the page.
"""

from __future__ import annotations

import argparse
import itertools
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# interpreted kernels cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

import triton  # noqa: E402  # after the environment

from clipfast.benchmark.reckoning.cards import CARDS, LATENCY, LAUNCH, SHARED, SPECIAL  # noqa: E402
from clipfast.benchmark.reckoning.launches import Reckoned, reckon_job  # noqa: E402
from clipfast.benchmark.reckoning.report import RESOURCES, problems  # noqa: E402
from clipfast.kernels import attention, bias_gelu, layer_norm  # noqa: E402
from clipfast.kernels.aot import Call, capture  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- the reckoning: begin -->\n", "<!-- the reckoning: end -->\n"
ARCHITECTURES = (80, 90, 100, 120)
PICTURES = 256


class Line(NamedTuple):
    """A call that models make: its name, the launch, and how many heads or rows it has."""

    name: str
    call: Call
    units: int


def lines() -> Iterator[Line]:
    """Yield the calls of the tables, for 256 pictures or captions."""
    for tokens, heads, causal in ((50, 12, False), (77, 8, True), (197, 12, False), (257, 16, False), (577, 16, False)):
        name = f"attention, {tokens} tokens" + (", causal" if causal else "")
        yield Line(name, attention.aot_call(PICTURES, tokens, heads, 64, "bf16", causal), PICTURES * heads)
    packed = attention.aot_call(PICTURES, None, 8, 64, "bf16", True)
    yield Line("attention, packed captions of 20", packed, PICTURES * 8)
    for width, tokens in ((768, 50), (768, 197), (1024, 257), (1280, 257)):
        rows = PICTURES * tokens
        pure = layer_norm.aot_call(rows, width, True, "bf16", "bf16", "bf16")
        yield Line(f"add_layer_norm, {tokens} tokens of {width}", pure, rows)
    rows = PICTURES * 197
    alone = layer_norm.aot_call(rows, 768, False, "bf16", "bf16", "bf16")
    yield Line("layer_norm, 197 tokens of 768", alone, rows)
    mixed = layer_norm.aot_call(rows, 768, True, "bf16", "fp32", "fp32", sums=True)
    yield Line("add_layer_norm, autocast, column sums, 197 tokens of 768", mixed, rows)
    for form, name in (("none", "erf"), ("tanh", "tanh"), ("quick", "quick")):
        yield Line(f"bias_gelu, {name}, 197 tokens of 3072", bias_gelu.aot_call(rows, 3072, form, "bf16", "bf16"), rows)


def reckoned(line: Line, architecture: int) -> list[Reckoned]:
    """Compile and reckon what a line launches."""
    return [reckon_job(job) for job in capture(line.call, architecture)]


def compile_line(which: tuple[int, int]) -> None:
    """Compile what the n-th line launches on an architecture: Triton keeps it on disk."""
    index, architecture = which
    for job in capture(list(lines())[index].call, architecture):
        job.compile()


def heads() -> str:
    """Return the head of the table of one card."""
    cells = (
        "kernel",
        "warps",
        "registers",
        "spills",
        "shared memory",
        "programs",
        *RESOURCES,
        "binds",
        "ceiling",
        "µs",
    )
    return "| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|\n"


def rows(line: Line, found: list[Reckoned]) -> str:
    """Return a call's rows of the table of one card: clocks a head or a row, and the time at best of all of them."""
    text = ""
    for one in found:
        clocks = [one.cost.clocks[resource] * one.job.programs / line.units for resource in RESOURCES]
        cells = (
            f"{line.name}: {_short(one)}", one.job.num_warps, one.registers, one.spills, one.shared_memory,
            one.cost.resident, *(f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in clocks),
            one.cost.binding, _share(one), f"{one.seconds * 1e6:.1f}",
        )  # fmt: skip
        text += "| " + " | ".join(map(str, cells)) + " |\n"
    return text


def ceilings(line: Line, found: dict[int, list[Reckoned]]) -> str:
    """Return a call's rows of the table of all cards."""
    text = ""
    names = {_short(one): None for launches in found.values() for one in launches}
    for name in names:
        cells = [_cell(launches, name) for launches in found.values()]
        text += f"| {line.name}: {name} | " + " | ".join(cells) + " |\n"
    return text


def cards() -> str:
    """Return the table of what is assumed of each card."""
    text = (
        "| | card | clock, GHz | multiprocessors | memory, TB/s | float32 lanes | other lanes | "
        "16-bit products, of a warp | programs, warps |\n" + "|---" * 9 + "|\n"
    )
    for number in ARCHITECTURES:
        card = CARDS[number]
        text += (
            f"| {number / 10} | {card.name} | {card.clock / 1e9:.2f} | {card.multiprocessors} | "
            f"{card.memory / 1e12:.2f} | {card.fp32} | {card.alu} | {card.matrix:,}, {card.matrix_of_a_warp:,} | "
            f"{card.programs}, {card.warps} |\n"
        )
    return text


def text() -> str:
    """Return what stands between the page's marks."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        places = itertools.product(range(len(list(lines()))), ARCHITECTURES)
        list(pool.map(compile_line, places))
    first = heads()
    second = "| kernel | " + " | ".join(f"{number / 10}" for number in ARCHITECTURES) + " |\n|---|---|---|---|---|\n"
    for line in lines():
        found = {number: reckoned(line, number) for number in ARCHITECTURES}
        first += rows(line, found[90])
        second += ceilings(line, found)
    return (
        f"Predicted, with Triton {triton.__version__}; nothing here is measured. Of every card is assumed:\n\n"
        f"{cards()}\n"
        f"and of all: {SPECIAL} lanes a clock of special functions, {SHARED} bytes of shared memory, {LATENCY} clocks "
        f"for a load, {LAUNCH} µs between two kernels (an estimate, in no figure below).\n\n"
        f"On 9.0, bfloat16, head_dim 64, {PICTURES} pictures or captions, clocks a head or a row:\n\n{first}\n"
        f"Ceilings on four cards, the share of device memory's time, and what binds:\n\n{second}"
    )


def _short(one: Reckoned) -> str:
    return one.job.label.rpartition(": ")[2].replace("_", " ")


def _share(one: Reckoned) -> str:
    return f"{one.cost.ceiling():.0%}"


def _cell(launches: list[Reckoned], name: str) -> str:
    here = [one for one in launches if _short(one) == name]
    if not here:
        return ""
    told = f"{_share(here[0])}, {here[0].cost.binding}"
    return told + (", does not fit" if any("shared memory" in problem for problem in problems(here[0])) else "")


def main() -> None:
    """Print the tables, or put them where the page has them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    if not parser.parse_args().write:
        print(text())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + text() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
