"""The AMX kernels' own source on software tiles: tiles against the manual's formula, kernels against float64."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import amx_on_cpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from amx_on_cpu import numbers
from torch import Tensor

Run = amx_on_cpu.Run


@pytest.fixture(scope="module")
def run() -> Run:
    return amx_on_cpu.kernels()


# ----------------------------------------------------------------------------------------------------------------------
# the tiles


def configuration(rows: int = 16, pairs: int = 16, columns: int = 16) -> Tensor:
    """Return 64 bytes as the instruction reads them: C and A of `rows`, of `columns` numbers and `pairs`."""
    bytes_, counts = np.zeros(16, np.uint16), np.zeros(16, np.uint8)
    bytes_[[2, 5, 7]], counts[[2, 5, 7]] = (4 * columns, 4 * pairs, 4 * columns), (rows, rows, pairs)
    head = np.array([1, *[0] * 15], np.uint8)
    return torch.from_numpy(np.concatenate([head, bytes_.view(np.uint8), counts]))


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x).astype(np.float32)


def manual(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """TDPBF16PS as Intel's manual writes it; products of two bfloat16 are exact in float32 within its range."""
    out = np.empty_like(c)
    for m in range(c.shape[0]):
        even, odd = np.zeros(c.shape[1], np.float32), np.zeros(c.shape[1], np.float32)
        for k in range(a.shape[1] // 2):
            even = flushed(even + flushed(a[m, 2 * k]) * flushed(b[k, 0::2]))
            odd = flushed(odd + flushed(a[m, 2 * k + 1]) * flushed(b[k, 1::2]))
        out[m] = flushed(flushed(c[m]) + flushed(even + odd))
    return out


@pytest.mark.parametrize("shape", [(16, 16, 16), (3, 16, 16), (16, 5, 16), (16, 16, 7), (1, 1, 1)])
@pytest.mark.parametrize("size", [1.0, 1e-19])
def test_a_product_of_tiles_is_the_manuals(run: Run, shape: tuple[int, int, int], size: float) -> None:
    """Every bit; at 1e-19 many products and sums lie below the normal range, and some factors do."""
    rows, pairs, columns = shape
    a, b = numbers(16, 32, seed=1) * size, numbers(16, 32, seed=2) * size
    a[2, 4], b[1, 3], a[0, 0] = 1e-39, -1e-40, -0.0
    c = numbers(16, 16, seed=3).float() * size * size
    expected = c.clone()
    found = c.clone()
    run("one_dot", configuration(*shape), a, b, found)
    of_tiles = manual(
        a.float().numpy()[:rows, : 2 * pairs], b.float().numpy()[:pairs, : 2 * columns], c.numpy()[:rows, :columns]
    )
    expected[:rows, :columns] = torch.from_numpy(of_tiles)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    # the case says something: order and range matter
    exact = a.double()[:rows, : 2 * pairs] @ _unpaired(b.double())[: 2 * pairs, :columns]
    if rows * pairs * columns > 1000:
        assert not torch.equal(found[:rows, :columns], (exact + c[:rows, :columns]).float())


def _unpaired(b: Tensor) -> Tensor:
    """Return the matrix ``[32, 16]`` whose pairs of rows a tile holds."""
    return b.reshape(16, 16, 2).transpose(1, 2).reshape(32, 16)


def test_nan_and_infinity_pass(run: Run) -> None:
    a, b, c = (torch.ones(16, n, dtype=d) for n, d in ((32, torch.bfloat16), (32, torch.bfloat16), (16, torch.float32)))
    a[1, 5], a[2, 6] = math.nan, math.inf
    run("one_dot", configuration(), a, b, c)
    assert c[1].isnan().all()
    assert (c[2] == math.inf).all()
    assert (c[[0, 3]] == 33).all()


def test_what_stays_in_a_tile(run: Run) -> None:
    a = numbers(16, 16, seed=4).float()
    for what, expected in ((0, a), (1, torch.zeros_like(a)), (2, torch.zeros_like(a))):
        found = torch.full_like(a, 7.0)
        run("what_stays", what, a, found)
        assert torch.equal(found, expected)


# ----------------------------------------------------------------------------------------------------------------------
# the kernels, in whole numbers that every sum holds exactly, or as near as softmax and GELU come

STORE, GELU, ADD = 0, 1, 2
GUARD = 12345.0


def whole(*shape: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check_products(run: Run) -> None:
    for rows, terms, columns in ((32, 64, 32), (1, 2, 2), (50, 72, 72), (150, 544, 96), (17, 800, 40)):
        x, weights, bias = whole(rows, terms, seed=1), whole(columns, terms, seed=2), whole(columns, seed=3).float()
        exact = x.double() @ weights.double().T
        for split in (0, 2):
            # columns beyond and rows behind are another's
            c = torch.full((rows + 32, columns + 6), GUARD).bfloat16()
            run("product", x, weights, bias, c, rows, terms, columns, columns + 6, STORE, 0, split)
            assert torch.equal(c[:rows, :columns], (exact + bias).bfloat16())
            assert (c[rows:] == c[rows, 0]).all()
            assert (c[:, columns:] == c[rows, 0]).all()
        for gelu, approximate in enumerate(("none", "tanh", "quick")):
            hidden = torch.empty(rows, columns, dtype=torch.bfloat16)
            small = (0.05 * weights.double()).bfloat16()
            run("product", x, small, bias, hidden, rows, terms, columns, columns, GELU, gelu, 1)
            pre = x.double() @ small.double().T + bias
            quick = approximate == "quick"
            expected = pre * torch.sigmoid(1.702 * pre) if quick else F.gelu(pre, approximate=approximate)
            torch.testing.assert_close(hidden.double(), expected, rtol=2**-8, atol=4e-3)
        if columns % 32 == 0:
            # sums are kept in the rows themselves, with room behind
            c = torch.randint(-9, 9, (rows + 32, columns), generator=torch.Generator().manual_seed(5)).float()
            expected = c[:rows].double() + exact + bias
            run("product", x, weights, bias, c, rows, terms, columns, columns, ADD, 0, 1)
            assert torch.equal(c[:rows].double(), expected)


def check_attention(run: Run) -> None:
    for tokens, heads, dim, causal in ((50, 2, 64, 0), (1, 1, 32, 1), (33, 3, 8, 1), (77, 2, 80, 1), (97, 2, 88, 0)):
        width = heads * dim
        qkv = torch.full((tokens + 32, 3 * width), math.nan).bfloat16()
        qkv[:tokens] = numbers(tokens, 3 * width, seed=6, spread=0.3)
        out = torch.empty(tokens, width, dtype=torch.bfloat16)
        run("attention", qkv, out, tokens, heads, dim, causal)
        q, k, v = (x.double().transpose(0, 1) for x in qkv[:tokens].reshape(tokens, 3, heads, dim).unbind(1))
        exact = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=bool(causal))[0]
        assert not out.isnan().any()
        torch.testing.assert_close(out.double(), exact.transpose(0, 1).reshape(tokens, width), rtol=0.02, atol=0.02)
        if heads > 1:
            before, qkv[: tokens // 2, dim] = out[:, :dim].clone(), math.inf
            run("attention", qkv, out, tokens, heads, dim, causal)
            assert torch.equal(out[:, :dim], before), "another head's query"


def check_loss(run: Run) -> None:
    for images, texts, width, row, rows in ((128, 256, 64, 0, 128), (3, 2, 7, 0, 3), (215, 131, 33, 128, 87)):
        image, text = whole(images, width, seed=7), whole(texts, width, seed=8)
        g = torch.full((128, 256), math.nan)
        g[:rows, :texts] = whole(rows, texts, seed=9).float()
        logits = torch.empty(128, 256)
        d_image, d_text = torch.full((rows + 1, width), 2.0), torch.full((texts + 1, width), 3.0)
        run("loss_products", image, text, g, logits, d_image, d_text, images, texts, width, row, rows)
        i, t, g = image[row : row + rows].double(), text.double(), g[:rows, :texts].double()
        assert torch.equal(logits[:rows, :texts].double(), i @ t.T)
        assert torch.equal(d_image[:rows].double(), 2 + g @ t)
        assert torch.equal(d_text[:texts].double(), 3 + g.T @ i)
        assert (d_image[rows] == 2).all()
        assert (d_text[texts] == 3).all()


def test_products(run: Run) -> None:
    check_products(run)


def test_attention(run: Run) -> None:
    check_attention(run)


def test_products_of_the_loss(run: Run) -> None:
    check_loss(run)


def test_the_machine_code() -> None:
    """What the compiler and the assembler made of the kernels computes the same, instruction by instruction."""
    with amx_on_cpu.machine_code() as run:
        check_products(run)
        check_attention(run)
        check_loss(run)
    if not torch.cpu._is_amx_tile_supported():
        assert amx_on_cpu.machine_code.emulated > 10_000


def test_factors_in_the_wrong_order_are_noticed() -> None:
    def edit(text: str) -> str:
        return text.replace("%%tmm%c2, %%tmm%c1, %%tmm%c0", "%%tmm%c1, %%tmm%c2, %%tmm%c0")

    with amx_on_cpu.machine_code(edit, "amx.h") as run, pytest.raises(AssertionError):
        check_products(run)


def check_tiles(run: Run) -> None:
    test_a_product_of_tiles_is_the_manuals(run, (16, 16, 16), 1e-19)


MISTAKES = {
    "a wrong tile": ("amx_steps.h", "dot<3, 5, 7>();", "dot<3, 4, 7>();", check_products),
    "a tile that is not zeroed": ("amx_steps.h", "zero_tile<2>();", "", check_products),
    "a tile of the other half": ("amx_steps.h", "load_tile<7>(pairs + panel / 2", "load_tile<7>(pairs", check_products),
    "a residual that is not loaded": (
        "encoder_amx.cpp",
        "load_sums<both>(c, p.c_row);\n    else",
        ";\n    else",
        check_products,
    ),
    "sums that start anew at each block": (
        "encoder_amx.cpp",
        "load_sums<both>(c",
        "zero_sums<both>(), (void)(c",
        check_products,
    ),
    "terms beyond the last": (
        "encoder_rows.h",
        "std::memset(at + units * panel",
        "if (false) std::memset(at",
        check_products,
    ),
    "activations beyond the last": (
        "encoder_amx.cpp",
        "_mm512_maskz_loadu_epi16(mask,",
        "_mm512_mask_loadu_epi16(_mm512_set1_epi16(-1), mask,",
        check_products,
    ),
    "rows beyond the last": (
        "encoder_amx.cpp",
        "std::min(p.rows - row, 2 * tile_height);",
        "2 * tile_height;",
        check_products,
    ),
    "one bias for both halves": (
        "encoder_amx.cpp",
        "(_mm512_load_ps(sums + 16), bias[1])",
        "(_mm512_load_ps(sums + 16), bias[0])",
        check_products,
    ),
    "tanh for erf": ("encoder_amx.cpp", "Gelu::none ? gelu_erf(sum)", "Gelu::none ? gelu_quick(sum)", check_products),
    "a swapped pair": (
        "lanes_avx512.h",
        "_mm512_or_si512(first, _mm512_slli_epi32(second, 16))",
        "_mm512_or_si512(second, _mm512_slli_epi32(first, 16))",
        check_attention,
    ),
    "a key too many": ("encoder_amx.cpp", "query + r + 1 : h.tokens", "query + r + 2 : h.tokens", check_attention),
    "another head's terms": ("encoder_amx.cpp", "if (dim != h.head_dim) {", "if (false) {", check_attention),
    "a tail that is left": (
        "encoder_amx.cpp",
        "query < h.tokens; query += tile_height",
        "query + tile_height <= h.tokens; query += tile_height",
        check_attention,
    ),
    "columns over a tile's edge": ("encoder_rows.h", "if (left < lanes) {", "if (false) {", check_attention),
    "the block's first rows": ("products_amx.cpp", "first / 2 * panel", "0", check_loss),
    "G of rows that are not there": ("products_amx.cpp", "r < count ? mask : 0, g", "0xffff, g", check_loss),
    "gradients that are not added to": ("products_amx.cpp", "if (add && !whole)", "if (false)", check_loss),
    "a pair without its second": ("products_amx.cpp", "r + 1 < count ? row_of", "false ? row_of", check_loss),
    "the order of a sum": (
        "amx_software.h",
        "sums[n]) + without_denormals(even[n] + odd[n])",
        "sums[n]) + even[n]) + without_denormals(odd[n]",
        check_tiles,
    ),
    "numbers below the range": ("amx_software.h", "if ((bits & 0x7f800000) == 0) bits", "if (false) bits", check_tiles),
}


@pytest.mark.parametrize(("file", "right", "wrong", "check"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_noticed(run: Run, file: str, right: str, wrong: str, check: Callable[[Run], None]) -> None:
    def edit(text: str) -> str:
        # a line break of the source's layout is no difference
        return re.sub(r"\s+".join(map(re.escape, right.split(" "))), lambda _: wrong, text)

    made_of_it = {"amx_software.h": amx_on_cpu.HARNESS, "products_amx.cpp": "cpu/products_amx.cpp"}
    mistaken = amx_on_cpu.kernels(edit, file, made_of_it.get(file, "cpu/encoder_amx.cpp"))
    with pytest.raises(AssertionError):
        check(mistaken)


# ----------------------------------------------------------------------------------------------------------------------
# the instructions


def test_the_instructions_of_a_step(tmp_path: Path) -> None:
    """A step of 32 terms is four products, four loads of tiles and the fetches of what comes four steps later."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump")
    amx_on_cpu.compile_file("cpu/encoder_amx.cpp", tmp_path / "encoder_amx.o", ("-O3",))
    text = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", str(tmp_path / "encoder_amx.o")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "tdpbf16ps" not in text:
        pytest.skip("this compiler has no AMX")
    steps = [loop for loop in _innermost_loops(text) if loop["tdpbf16ps"]]
    whole_steps = [s for s in steps if s["tdpbf16ps"] == 4 and s["prefetcht0"]]
    # added, stored, and the three GELUs
    assert len(whole_steps) >= 5
    for step in whole_steps:
        assert (step["tileloadd"], step["prefetcht0"], step["tilestored"]) == (4, 32, 0)
        # a product takes 16 cycles: 64 a step, in which a core issues 384 instructions
        assert step["all"] <= 80
    attention = [s for s in steps if s["tdpbf16ps"] == 4 and not s["prefetcht0"]]
    assert attention
    assert all(s["tileloadd"] == 5 and s["all"] <= 40 for s in attention)


def _innermost_loops(text: str) -> list[Counter[str]]:
    """Count the instructions of every loop that holds no other."""
    found = [re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*([0-9a-f]*)", line) for line in text.splitlines()]
    instructions = [(int(m[1], 16), m[2], m[3]) for m in found if m]
    place = {address: i for i, (address, _, _) in enumerate(instructions)}
    loops = []
    for i, (_, name, target) in enumerate(instructions):
        start = place.get(int(target, 16), i) if name.startswith("j") and target else i
        if start < i:
            loops.append((start, i))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    counts = []
    for a, b in inner:
        names = Counter(name for _, name, _ in instructions[a : b + 1])
        counts.append(names | Counter(all=b - a + 1))
    return counts


def test_it_builds_by_a_compiler_without_amx(tmp_path: Path) -> None:
    for source in amx_on_cpu.KERNELS:
        target = tmp_path / f"{Path(source).stem}.o"
        amx_on_cpu.compile_file(source, target, ("-O0", "-DCLIPFAST_WITHOUT_AMX"))
    assert b"the op library was built without AMX" in (tmp_path / "amx.o").read_bytes()
