"""What the contrastive losses take on a card: the machine code of csrc/cuda for an ordinary tile, and arithmetic.

A tile is ordinary if it holds no label and no edge; nearly all are. Its slabs and what comes behind them are counted
from the machine code, by the shortest way through it. What a launch leaves idle follows from the plan, which
``tests/benchmark/test_reckoning_losses.py`` holds against the one in csrc/cuda. Everything here is predicted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from clipfast.benchmark.reckoning import cost, sass
from clipfast.benchmark.reckoning.cards import CARDS, Card

TILE, SLAB, BLOCKS, WARPS = 128, 32, 2, 4
# of a kernel's clocks: what barriers, waits and bank conflicts are assumed to leave
BUSY = 0.7
# of a matrix product's rate in 16 bits with float32 results, for d_image and for d_text: of cuBLAS on H100, assumed
PRODUCTS = (600e12, 560e12)
# the kernels by what they do: the mangled name's beginning
KERNELS = {
    "statistics": "softmax_statistics_kernelI6__half",
    "gradient": "logit_gradient_kernelI6__halfLb0E",
    "sigmoid gradient": "logit_gradient_kernelI6__halfLb1E",
}


@dataclass
class Steps(sass.Kernel):
    """Instructions of a kernel along one way, each as often as it runs."""

    counted: list[tuple[sass.Instruction, float]] = field(default_factory=list)

    def runs(self, trips: Sequence[sass.Trips]) -> list[tuple[sass.Instruction, float]]:
        """Return the instructions; there are no loops to ask for."""
        return [(i, often) for i, often in self.counted if i.base != "NOP"]


@dataclass(frozen=True)
class Tile:
    """Clocks of a multiprocessor by resource, of one block: for a slab, and for what comes behind a tile's slabs."""

    slab: dict[str, float]
    behind: dict[str, float]
    instructions: tuple[float, float]

    def clocks(self, width: int) -> float:
        """Return the clocks of a tile: the slabs' binding resource, then the binding one behind them."""
        return width / SLAB * max(self.slab.values()) + max(self.behind.values())


def tile(kernel: sass.Kernel, card: Card) -> Tile:
    """Return what an ordinary tile of one of the losses' kernels costs."""
    slab, around = _slab_loop(kernel)
    edges = kernel._edges
    copies = next(b for b in sorted(slab.blocks) if any(i.base == "LDGSTS" for i in kernel.blocks[b]))
    ends = [b for b in slab.blocks if slab.start in edges[b]]
    way = _shortest(kernel, slab.start, [copies], slab.blocks) + _shortest(kernel, copies, ends, slab.blocks)[1:]
    # where the next tile's rows are: asked for once a tile
    others = [b for b in slab.blocks if b not in way and len(kernel.blocks[b]) > 16]
    first = _shortest(kernel, around.start, [slab.start], around.blocks)[:-1]
    after = [t for e in ends for t in edges[e] if t not in slab.blocks]
    last = [b for b in around.blocks if around.start in edges[b]]
    # through the exponentials: the way of a tile with an edge could leave out every entry
    outside = around.blocks - slab.blocks
    special = {b: sum(i.base == "MUFU" for i in kernel.blocks[b]) for b in outside}
    most = max(special.values())
    through = min((b for b in outside if special[b] >= 0.9 * most), key=lambda b: len(kernel.blocks[b]))
    behind = first + _shortest(kernel, after[0], [through], outside) + _shortest(kernel, through, last, outside)[1:]
    behind += others

    def steps(blocks: Iterable[int]) -> cost.Cost:
        counted = [(i, 1.0) for b in blocks for i in kernel.blocks[b]]
        path = Steps(kernel.name, kernel.instructions, kernel.labels, kernel.registers, 0, counted)
        return cost.reckon(path, card, WARPS)

    costs = steps(way), steps(behind)
    return Tile(costs[0].clocks, costs[1].clocks, tuple(float(sum(c.instructions.values())) for c in costs))


def _slab_loop(kernel: sass.Kernel) -> tuple[sass.Nest, sass.Nest]:
    """Return the innermost loop with tensor-core steps, and the one around it."""

    def visit(nests: list[sass.Nest], around: sass.Nest | None) -> tuple[sass.Nest, sass.Nest] | None:
        for nest in nests:
            found = visit(nest.inside, nest)
            if found is not None:
                return found
            if around is not None and any(i.base == "HMMA" for b in nest.blocks for i in kernel.blocks[b]):
                return nest, around
        return None

    found = visit(kernel.loops, None)
    if found is None:
        raise ValueError(f"{kernel.name}: found no loop of tensor-core steps within another")
    return found


def _shortest(kernel: sass.Kernel, start: int, ends: Iterable[int], inside: Iterable[int]) -> list[int]:
    """Return the blocks of the way with the fewest instructions, both ends included."""
    ends, inside = set(ends), set(inside)
    queue: list[tuple[int, list[int]]] = [(0, [start])]
    done: set[int] = set()
    while queue:
        length, way = heapq.heappop(queue)
        block = way[-1]
        if block in ends:
            return way
        if block in done:
            continue
        done.add(block)
        for following in kernel._edges[block]:
            if following in inside and following not in done:
                heapq.heappush(queue, (length + len(kernel.blocks[block]), [*way, following]))
    raise ValueError(f"{kernel.name}: no way leads from {start:#x} to {sorted(ends)}")


# ---------------------------------------------------------------------------------------------------------------------
# the plan of csrc/cuda/contrastive_loss_launchers.cuh, in 16 bits


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def shares(row_tiles: int, columns: int, multiprocessors: int) -> int:
    """Return how many blocks share a row of tiles."""
    room, tiles = BLOCKS * multiprocessors, _ceil(columns, TILE)
    times = [_ceil(row_tiles * s, room) * _ceil(tiles, s) for s in range(1, min(tiles, 64) + 1)]
    return times.index(min(times)) + 1


def statistics_rows(rows: int, columns: int) -> int:
    """Return the rows of a launch of the statistics."""
    tiles, most = _ceil(rows, TILE), min(max((32 << 20) // (12 * columns), 8), 64)
    return _ceil(tiles, _ceil(tiles, most)) * TILE


def gradient_rows(rows: int, columns: int, width: int) -> int:
    """Return the rows of a chunk of the gradients."""
    pitch, tiles = _ceil(columns, 8) * 8, _ceil(rows, TILE)
    most = max(max(4 * columns * width, 32 << 20) // (2 * pitch), 4096) // TILE
    return _ceil(tiles, _ceil(tiles, most)) * TILE


def waves(rows: int, columns: int, chunk: int, multiprocessors: int) -> float:
    """Return the tiles that each place for a block works on, one behind the other, in all launches."""
    total, parts, tiles = 0, shares(_ceil(chunk, TILE), columns, multiprocessors), _ceil(columns, TILE)
    for row in range(0, rows, chunk):
        of_launch = _ceil(min(chunk, rows - row), TILE)
        total += _ceil(of_launch * parts, BLOCKS * multiprocessors) * _ceil(tiles, parts)
    return float(total)


# ---------------------------------------------------------------------------------------------------------------------
# milliseconds


def kernel_ms(found: Tile, card: Card, batch: int, width: int, chunk: int) -> float:
    """Return a kernel's time over all tiles: two blocks share a multiprocessor's clocks."""
    tiles = BLOCKS * waves(batch, batch, chunk, card.multiprocessors)
    return 1e3 * tiles * found.clocks(width) / BUSY / card.clock


def rest_ms(card: Card, batch: int, width: int) -> dict[str, float]:
    """Return what stands beside the kernels: two products, and the sums of ``d_text`` over the chunks."""
    flops, numbers = 2.0 * batch * batch * width, batch * width
    chunks = _ceil(batch, gradient_rows(batch, batch, width))
    # a share of d_text is read, the sum read and written; then both sums are read, and written in 16 bits
    passes = (12 * (chunks - 1) + 12) * numbers / card.memory
    return {"products": 1e3 * sum(flops / rate for rate in PRODUCTS), "sums": 1e3 * passes}


def loss_ms(tiles: dict[str, Tile], card: Card, batch: int, width: int, sigmoid: bool = False) -> dict[str, float]:
    """Return the parts of a loss's time, forward and backward, and their sum."""
    chunk = gradient_rows(batch, batch, width)
    if sigmoid:
        parts = {"gradient": kernel_ms(tiles["sigmoid gradient"], card, batch, width, chunk)}
    else:
        rows = statistics_rows(batch, batch)
        parts = {"statistics": kernel_ms(tiles["statistics"], card, batch, width, rows)}
        parts["gradient"] = kernel_ms(tiles["gradient"], card, batch, width, chunk)
    parts |= rest_ms(card, batch, width)
    return parts | {"all": sum(parts.values())}


def tiles_of(kernels: dict[str, sass.Kernel], card: Card) -> dict[str, Tile]:
    """Return the tiles of the kernels that a loss in 16 bits takes, by what they do."""
    found = {}
    for told, symbol in KERNELS.items():
        (kernel,) = (k for name, k in kernels.items() if symbol in name)
        found[told] = tile(kernel, card)
    return found


def report(kernels: dict[str, sass.Kernel], say: Callable[[str], None] = print) -> None:
    """Print an H100's figures from the kernels for sm_90a: their tiles, and the losses."""
    card = CARDS[90]
    tiles = tiles_of(kernels, card)
    say("| kernel | instructions a warp: slab, behind | clocks a block: slab | behind |")
    say("|---|---|---|---|")
    for told, found in tiles.items():
        slab, behind = (
            ", ".join(f"{k} {v:.0f}" for k, v in sorted(clocks.items(), key=lambda x: -x[1]) if v)
            for clocks in (found.slab, found.behind)
        )
        counts = " , ".join(f"{n:,.0f}" for n in found.instructions).replace(" ,", ",")
        say(f"| {told} | {counts} | {slab} | {behind} |")
    say("")
    say("| loss, ms forward + backward | width | " + " | ".join(f"{b // 1024}k" for b in (8192, 32768, 65536)) + " |")
    say("|---|---|---|---|---|")
    for sigmoid, told in ((False, "CLIP"), (True, "SigLIP")):
        for width in (512, 768, 1024):
            cells = []
            for batch in (8192, 32768, 65536):
                parts = loss_ms(tiles, card, batch, width, sigmoid)
                cells.append(f"{parts.pop('all'):.1f} (" + " + ".join(f"{v:.1f}" for v in parts.values()) + ")")
            say(f"| {told} | {width} | " + " | ".join(cells) + " |")
