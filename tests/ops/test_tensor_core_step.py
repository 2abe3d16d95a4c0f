"""The tensor-core step of ``csrc/cuda/tile_engine.cuh``, its very source, on the CPU, and the shim's instructions.

The shim's ``ldmatrix``, ``mma`` and ``cp.async`` are held against plain matrices here; then the engine against a plain
product, in whole numbers that every sum holds exactly; and then a mistake in every part of the step has to be noticed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import kernels_on_cpu
import numpy as np
import pytest
from kernels_on_cpu import to_bits

Run = Callable[..., None]
LANES = np.arange(32)


@pytest.fixture(scope="module")
def step() -> Run:
    return kernels_on_cpu.build_step()


# ---------------------------------------------------------------------------------------------------------------------
# the instructions


def whole(*shape: int, seed: int = 0, most: int = 8) -> np.ndarray:
    """Return whole numbers that 16 bits hold exactly, none of them zero."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1, most + 1, shape) * rng.choice([-1, 1], shape)).astype(np.float64)


def bits(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(to_bits(x, dtype)).view(np.uint16)


def fragments(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, dtype: str) -> np.ndarray:
    """Return registers ``[32, elements / 2]``: of every lane, the entries at its rows and columns."""
    return np.ascontiguousarray(bits(matrix[rows, columns], dtype)).view(np.uint32)


# [32, elements]: the formulas of the PTX ISA for mma.m16n8k16, of the elements a0 … a7, b0 … b3 and c0 … c3
GROUP, IN_GROUP = (LANES >> 2)[:, None], (LANES % 4)[:, None]
I4, I8 = np.arange(4)[None, :], np.arange(8)[None, :]
A_ROW = np.where((I8 < 2) | ((I8 >= 4) & (I8 < 6)), GROUP, GROUP + 8)
A_COLUMN = np.where(I8 < 4, IN_GROUP * 2 + (I8 & 1), IN_GROUP * 2 + (I8 & 1) + 8)
B_ROW = np.where(I4 < 2, IN_GROUP * 2 + (I4 & 1), IN_GROUP * 2 + (I4 & 1) + 8)
B_COLUMN = np.broadcast_to(GROUP, (32, 4))
C_ROW = np.where(I4 < 2, GROUP, GROUP + 8)
C_COLUMN = IN_GROUP * 2 + (I4 & 1)


def test_the_formulas_agree_with_the_pictures() -> None:
    # what the ISA draws for a few threads
    assert list(zip(A_ROW[1], A_COLUMN[1], strict=True)) == [
        (0, 2), (0, 3), (8, 2), (8, 3), (0, 10), (0, 11), (8, 10), (8, 11),
    ]  # fmt: skip
    assert list(zip(A_ROW[31], A_COLUMN[31], strict=True))[::2] == [(7, 6), (15, 6), (7, 14), (15, 14)]
    assert list(zip(B_ROW[6], B_COLUMN[6], strict=True)) == [(4, 1), (5, 1), (12, 1), (13, 1)]
    assert list(zip(C_ROW[6], C_COLUMN[6], strict=True)) == [(1, 4), (1, 5), (9, 4), (9, 5)]
    # every entry is held once
    for rows, columns, count in ((A_ROW, A_COLUMN, 256), (B_ROW, B_COLUMN, 128), (C_ROW, C_COLUMN, 128)):
        assert len(set(zip(rows.ravel(), columns.ravel(), strict=True))) == count == rows.size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma_is_a_matrix_product(step: Run, dtype: str) -> None:
    a, b, c = whole(16, 16), whole(16, 8, seed=1), whole(16, 8, seed=2)
    sums = np.ascontiguousarray(c[C_ROW, C_COLUMN].astype(np.float32))
    step(f"mma_{dtype}", fragments(a, A_ROW, A_COLUMN, dtype), fragments(b, B_ROW, B_COLUMN, dtype), sums)
    found = np.full((16, 8), np.nan)
    found[C_ROW, C_COLUMN] = sums
    np.testing.assert_array_equal(found, a @ b + c)


def test_ldmatrix_gathers_four_matrices_from_anywhere(step: Run) -> None:
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 2**16, 8 * 64, dtype=np.uint16)  # 64 places of 16 bytes
    places = rng.permutation(64)[:32].astype(np.int32)
    registers = np.zeros((32, 4), np.uint32)
    step("ldmatrix", memory, memory.nbytes, places * 16, registers)
    matrices = memory.reshape(64, 8)[places].reshape(4, 8, 8)
    halves = registers.view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for m in range(4):
            np.testing.assert_array_equal(halves[lane, m], matrices[m, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2])


@pytest.mark.parametrize("transposed", [False, True], ids=["A", "B"])
def test_ldmatrix_loads_what_mma_wants(step: Run, transposed: bool) -> None:
    # the two instructions' layouts are one: of A by rows, and of two B by columns
    matrix = whole(16, 16, seed=3)
    memory = bits(matrix, "bfloat16")
    rows = LANES % 16 if not transposed else LANES % 8 + LANES // 16 * 8
    halves = LANES // 16 if not transposed else LANES // 8 % 2
    registers = np.zeros((32, 4), np.uint32)
    step("ldmatrix", memory, memory.nbytes, (rows * 32 + halves * 16).astype(np.int32), registers)
    if not transposed:
        np.testing.assert_array_equal(registers, fragments(matrix, A_ROW, A_COLUMN, "bfloat16"))
    for j in range(2) if transposed else ():
        b = matrix[8 * j : 8 * j + 8].T
        np.testing.assert_array_equal(registers[:, 2 * j : 2 * j + 2], fragments(b, B_ROW, B_COLUMN, "bfloat16"))


@pytest.mark.parametrize(("offset", "what"), [(8, "multiple of 16"), (2, "multiple of 16"), (1024, "outside shared")])
def test_ldmatrix_refuses_an_address(step: Run, offset: int, what: str) -> None:
    memory, offsets = np.zeros(1024, np.uint8), (LANES * 16).astype(np.int32)
    offsets[13] = offset
    with pytest.raises(RuntimeError, match=rf"ldmatrix: .*{what}.*thread 13"):
        step("ldmatrix", memory, memory.nbytes, offsets, np.zeros((32, 4), np.uint32))


def aligned_bytes(count: int) -> np.ndarray:
    buffer = np.arange(1, count + 17, dtype=np.uint8)
    return buffer[-buffer.ctypes.data % 16 :][:count]


def test_copies_arrive_group_by_group(step: Run) -> None:
    source, seen = aligned_bytes(80), np.zeros((5, 4, 16), np.uint8)
    step("copies", source, seen, 0, 0, 0)
    expected = source[:64].reshape(4, 16)
    for arrived in range(5):
        np.testing.assert_array_equal(seen[arrived, :arrived], expected[:arrived])
        assert (seen[arrived, arrived:] == 0xFF).all(), "too early"
    step("copies", source, seen, 0, 0, 1)
    assert (seen == expected).all()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((4, 0), "source is no multiple"),
        ((0, 8), "address is no multiple"),
        ((0, 16), "outside shared memory"),
        ((0, -16), "outside shared memory"),
    ],
)
@pytest.mark.parametrize("hasty", [0, 1])
def test_copies_refuse_what_a_card_cannot_do(step: Run, arguments: tuple[int, ...], what: str, hasty: int) -> None:
    with pytest.raises(RuntimeError, match=rf"cp\.async: .*{what}"):
        step("copies", aligned_bytes(80), np.zeros((5, 64), np.uint8), *arguments, hasty)


def test_lanes_that_stay_together_are_fine(step: Run) -> None:
    step("diverge", 0)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (1, "lanes are missing at ldmatrix"),
        (2, "wait for each other at different places"),
        (3, "threads diverge: one is at ldmatrix .* another at ldmatrix"),
        (4, "threads diverge: one is at mma .* another at ldmatrix"),
        (5, "lanes are missing at mma"),
        (6, "lanes are missing at ldmatrix"),
        (7, "wait for each other at different places"),
    ],
)
def test_a_lane_that_is_elsewhere_is_an_error(step: Run, how: int, what: str) -> None:
    with pytest.raises(RuntimeError, match=what):
        step("diverge", how)
    step("diverge", 0)  # and leaves nothing behind


def test_the_instructions_name_their_registers_in_the_order_of_the_isa() -> None:
    # the one part of the step that the shim replaces: the text of the instructions
    source = (kernels_on_cpu.ROOT / "csrc" / "cuda" / "instructions.cuh").read_text()
    for name, pattern, results, operands in (
        (
            "CLIPFAST_MMA",
            r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.TYPE\.TYPE\.f32 "
            r"\{%0, %1, %2, %3\}, \{%4, %5, %6, %7\}, \{%8, %9\}, \{%0, %1, %2, %3\};",
            ["upper[0]", "upper[1]", "lower[0]", "lower[1]"],
            ["a[0]", "a[1]", "a[2]", "a[3]", "b[0]", "b[1]"],
        ),
        (
            "ldmatrix_x4(",
            r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 \{%0, %1, %2, %3\}, \[%4\];",
            [f"fragment[{i}]" for i in range(4)],
            ["shared_address(row)"],
        ),
        (
            "cp_async_16(",
            r"cp\.async\.cg\.shared\.global \[%0\], \[%1\], 16;",
            [],
            ["shared_address(shared)", "global"],
        ),
        ("cp_async_wait(", r"cp\.async\.wait_group %0;", [], ["kPending"]),
        ("cp_async_commit(", r"cp\.async\.commit_group;", [], []),
    ):
        asm = source[source.index("asm volatile(", source.index(name)) :].replace("\\\n", " ")
        depth = itertools.accumulate((c == "(") - (c == ")") for c in asm)
        end = next(i for i, (c, d) in enumerate(zip(asm, depth, strict=True)) if c == ")" and d == 0)
        asm = re.sub(r'"\s*type\s*"', "TYPE", asm[:end])
        text = "".join(re.findall(r'"([^"]*)"', re.split(r"\s*::?\s*\"|\s::", asm)[0]))
        assert re.fullmatch(pattern, text), f"{name}: {text}"
        named = [expression.strip() for expression in re.findall(r'"[+=]?[frln]"\(((?:[^()]|\([^()]*\))*)\)', asm)]
        assert named == results + operands, name


# ---------------------------------------------------------------------------------------------------------------------
# the step

# (rows, columns, width, shares): inside a tile; more slabs than stages, several tiles a block; one slab
SIZES = ((130, 300, 160, 2), (70, 130, 64, 1), (128, 257, 32, 1))


def check_step(step: Run, dtype: str = "bfloat16", sizes: tuple[tuple[int, ...], ...] = SIZES) -> None:
    """Compare with a plain product: exactly, since all of it is whole numbers."""
    tile = np.zeros(2, np.int32)
    step("tile", tile)
    for rows, columns, width, shares in sizes:
        stride = -(-width // 8) * 8 + 8
        whole_rows, whole_columns = (-(-n // t) * t for n, t in zip((rows, columns), tile, strict=True))
        stored, values = [], []
        for count, whole_count, seed in ((rows, whole_rows, 1), (columns, whole_columns, 2)):
            # what lies around a matrix is NaN
            values.append(whole(count, width, seed=seed))
            buffer = np.full(whole_count * stride + 16, 0x7FC1 if dtype == "bfloat16" else 0x7E00, np.uint16)
            start = (-buffer.ctypes.data % 16) // 2
            matrix = buffer[start : start + whole_count * stride].reshape(whole_count, stride)
            matrix[:count, :width] = bits(values[-1], dtype)
            stored.append(matrix)
        # past the last row and column, those again
        rows_of, columns_of = (np.arange(w).clip(max=n - 1) for w, n in ((whole_rows, rows), (whole_columns, columns)))
        expected = (values[0] @ values[1].T)[rows_of][:, columns_of].astype(np.float32)
        # places of the ring, as many as a card has room for; and the two extremes of timing
        for stages, hasty in itertools.product((3, 2), (0, 1)):
            out = np.full(expected.shape, np.nan, np.float32)
            step(f"product_{dtype}", *stored, out, rows, columns, width, stride, whole_columns, shares, stages, hasty)
            np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_step_is_a_matrix_product(step: Run, dtype: str) -> None:
    check_step(step, dtype)


# What to change in tile_engine.cuh: a pattern in a function, and what takes its place
TENSOR_CORES = r"void add_by_tensor_cores\(.*?\n    }\n"
PLACE = r"struct Place \{.*?\n};"
LOADS = r"struct Copies \{.*?\n};"
WALK = r"void for_each_tile\(.*?\n}\n"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "two lanes swapped in ldmatrix's addresses": (
        TENSOR_CORES, r"lane = (threadIdx\.x % 32)", r"lane = \1 == 3 ? 4 : \1 == 4 ? 3 : \1"),
    "A's registers permuted": (TENSOR_CORES, r"(ldmatrix_x4\(a, [^;]*;)", r"\1 std::swap(a[1], a[2]);"),
    "A's right half never read": (TENSOR_CORES, r" \+ lane / 16 \* kChunk", ""),
    "A's fragments half as far apart": (TENSOR_CORES, r"\bi \* 16 \* kPitch", "i * 8 * kPitch"),
    "B's halves exchanged": (TENSOR_CORES, r"lane / 8 % 2 \* kChunk", "(1 - lane / 8 % 2) * kChunk"),
    "B's two fragments exchanged": (TENSOR_CORES, r"j % 2 \* 2\]", "2 - j % 2 * 2]"),
    "the wrong pair of B": (TENSOR_CORES, r"b\[j / 2\]\[j % 2 \* 2\]", "b[j % 2][j / 2 * 2]"),
    "B's fragments half as far apart": (TENSOR_CORES, r"\bj \* 16 \* kPitch", "j * 8 * kPitch"),
    "upper and lower sums exchanged": (
        TENSOR_CORES, r"&entries\[2 \* i\]\[2 \* j\], &entries\[2 \* i \+ 1\]\[2 \* j\]",
        "&entries[2 * i + 1][2 * j], &entries[2 * i][2 * j]"),
    "half a step along k": (TENSOR_CORES, r"half \* 2 \* kChunk", "half * kChunk"),
    "rows and columns of warps exchanged": (TENSOR_CORES, r"warp / kWarpColumns", "warp % kWarpRows"),
    "rows and columns of a thread's entries exchanged": (
        PLACE, r"lane / 4;(.*?)lane % 4 \* 2;", r"lane % 8;\1lane / 8 * 2;"),
    "a thread's columns in another order": (PLACE, r"c / 2 \* 8 \+ c % 2", "c % 4 * 8 + c / 4"),
    "a copy one row off": (LOADS, r"threadIdx\.x / kChunks \* kPitch", "(threadIdx.x / kChunks ^ 1) * kPitch"),
    "a row's chunks on top of each other": (
        LOADS, r"threadIdx\.x % kChunks \* kChunk;\n#", "threadIdx.x % 2 * kChunk;\n#"),
    "rows half as far apart": (LOADS, r"i \* kStep \* kPitch", "i * kStep / 2 * kPitch"),
    "rows that are not there are read": (LOADS, r"row < rows \? row : rows - 1", "row"),
    "the row behind the last is read": (LOADS, r"rows - 1;", "rows;"),
    "a tile's texts not moved on": (WALK, r"(load_column \+= kTileColumns;).*?;", r"\1"),
    "offsets not started again": (WALK, r"load_offset = 0, load_column", "load_column"),
    "a slab half as wide": (WALK, r"load_offset \+= kSlabBytes", "load_offset += kSlabBytes / 2"),
    "a group that is not committed": (
        WALK, r"cp_async_commit\(\);", "if (load_column < share.last_column) cp_async_commit();"),
    "no barrier": (WALK, r"__syncthreads\(\);", ""),
    "a wait for one group too few": (WALK, r"kStages - 2>\(\)", "kStages - 1>()"),
    "the same in a ring of two": (WALK, r"kFewStages - 2>\(\)", "kFewStages - 1>()"),
    "a stage filled while it is read": (
        WALK, r"(__syncthreads\(\);\s*)(load_next\([^;]*;)", r"\2 \1"),
    "sums not cleared": (WALK, r"(visit\([^;]*;\s*)product\.clear\(\);", r"\1"),
    "rows that start on 8 bytes": ("constexpr int kPitch.*?;", r"kChunks \+ 16", "kChunks + 8"),
}  # fmt: skip


def plant(mistake: str, text: str) -> str:
    """Change what the table says; what is not found, or found twice, is an error."""
    function, old, new = MISTAKES[mistake]
    found = list(re.finditer(function, text, re.DOTALL))
    assert len(found) == 1, f"{function} is there {len(found)} times"
    changed, count = re.subn(old, new, found[0][0], flags=re.DOTALL)
    assert count > 0, f"{mistake}: {old} is not there"
    return text[: found[0].start()] + changed + text[found[0].end() :]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    mistaken = kernels_on_cpu.build_step(lambda text: plant(mistake, text))
    with pytest.raises((AssertionError, RuntimeError)) as noticed:
        check_step(mistaken)
    # by the numbers, or by what the shim refuses; not by a test that broke
    assert noticed.type is RuntimeError or "Arrays are not equal" in str(noticed.value)


def test_every_mistake_is_one_of_its_own() -> None:
    text = (kernels_on_cpu.ROOT / "csrc" / "cuda" / "tile_engine.cuh").read_text()
    assert len({plant(mistake, text) for mistake in MISTAKES} - {text}) == len(MISTAKES)
