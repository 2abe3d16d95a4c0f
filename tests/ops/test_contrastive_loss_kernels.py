"""The CUDA kernels of the contrastive losses, run on the CPU under the fibre shim, against fp64 numpy oracles."""

from __future__ import annotations

import functools
import itertools
import re
from types import ModuleType
from typing import Any

import kernels_on_cpu
import numpy as np
import pytest
from kernels_on_cpu import STORED, SUMS, Padded, to_bits, to_float64

DTYPES = ("float64", "float32", "float16", "bfloat16")
EPS = {"float64": 2.3e-16, "float32": 1.2e-7, "float16": 9.8e-4, "bfloat16": 7.9e-3}
# (M, N, D): one, around a warp's and a tile's edge, past a tile; widths that fill no slab, one and two
SIZES = ((1, 1, 1), (2, 63, 32), (65, 64, 40), (130, 2, 64), (64, 130, 33), (130, 257, 32))


class Case:
    """Arguments of the ops in ``dtype``, each surrounded by NaN, and the oracle's view of them."""

    def __init__(
        self,
        dtype: str,
        m: int,
        n: int,
        d: int,
        *,
        scale: float = 20.0,
        first_label: int = 0,
        factors: bool = False,
        sigmoid: bool = False,
        image: np.ndarray | None = None,
        text: np.ndarray | None = None,
        vectors: bool = True,
        stages: int = 3,
    ) -> None:
        self.dtype, self.m, self.n, self.first_label, self.sigmoid = dtype, m, n, first_label, sigmoid
        rng = np.random.default_rng(m * 10007 + n * 101 + d)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(r, d)) for r in (m, n))]
        step = 16 // np.dtype(STORED[dtype]).itemsize
        pitch, shift = (-(-d // step) * step + step, 0) if vectors else (d + 3, 1)
        self.arrays: dict[str, Padded] = {}
        for name, values in (
            ("image", unit[0] if image is None else image),
            ("text", unit[1] if text is None else text),
        ):
            self.arrays[name] = Padded((len(values), d), STORED[dtype], pitch, shift)
            self.arrays[name].array[:] = to_bits(values, dtype)
        self.args: dict[str, Any] = {
            "rows": m, "columns": n, "width": d, "image_stride": pitch, "text_stride": pitch,
            "first_label": first_label, "stages": stages,
        }  # fmt: skip
        self.put("scale", [scale])
        if sigmoid:
            self.put("bias", [-2.5])
        if factors:
            self.put("image_factor", rng.uniform(0.2, 3, m))
            self.put("text_factor", rng.uniform(0.2, 3, n))
        f, g = (self.read(k) if factors else np.ones(s) for k, s in (("image_factor", m), ("text_factor", n)))
        self.image, self.text = (to_float64(self.arrays[k].array, dtype) for k in ("image", "text"))
        self.factor = f[:, None] * g[None, :]
        self.scale = float(self.read("scale")[0])
        self.cosines = self.factor * (self.image @ self.text.T)
        self.logits = self.scale * self.cosines
        self.is_label = np.arange(m)[:, None] + first_label == np.arange(n)[None, :]
        # what float32 sums of products may be off by
        self.noise = 8 * EPS["float64" if dtype == "float64" else "float32"] * max(1.0, np.abs(self.logits).max())

    def put(self, name: str, values: Any) -> None:
        self.arrays[name] = Padded((len(values),), SUMS[self.dtype])
        self.arrays[name].array[:] = values

    def new(self, name: str, *shape: int, dtype: Any = None, pitch: int | None = None) -> None:
        self.arrays[name] = Padded(shape, dtype or SUMS[self.dtype], pitch)

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name].array.astype(np.float64)

    def lse(self, name: str) -> np.ndarray:
        """Return a log-sum-exp from its two parts, as stored."""
        return self.read(name).reshape(2, -1).sum(0)

    def call(self, function: Any, **more: Any) -> None:
        function(self.dtype, self.args | {k: a.address for k, a in self.arrays.items()} | more)
        for array in self.arrays.values():
            array.assert_untouched_around()

    def statistics(self, module: ModuleType, group: int = 2, shares: int = 2) -> dict[str, np.ndarray]:
        shares = min(shares, -(-self.n // 128))
        plan = {"group": group, "shares": shares}
        self.new("scratch", module.softmax_numbers(self.dtype, self.args | plan))
        if self.sigmoid:
            self.new("row_loss", self.m)
            self.call(module.sigmoid_statistics, **plan)
            return {"row_loss": self.read("row_loss")}
        self.new("row_lse", 2 * self.m), self.new("column_lse", 2 * self.n)
        for name in ("positive", "row_rival"):
            self.new(name, self.m)
        self.new("column_rival", self.n)
        self.arrays["positive"].array[:] = 0
        self.call(module.softmax_statistics, **plan)
        names = ("row_lse", "column_lse", "positive", "row_rival", "column_rival")
        # log-sum-exps come in two parts
        return {name: self.read(name).reshape(2 if name.endswith("lse") else 1, -1).sum(0) for name in names}

    def expected_statistics(self) -> dict[str, np.ndarray]:
        x = self.logits
        if self.sigmoid:
            z = np.where(self.is_label, 1.0, -1.0)
            return {"row_loss": np.logaddexp(0, -z * (x + self.read("bias")[0])).sum(1)}
        rivals = np.where(self.is_label, -np.inf, x)
        return {
            "row_lse": np.logaddexp.reduce(x, 1),
            "column_lse": np.logaddexp.reduce(x, 0),
            "positive": np.where(self.is_label, x, 0).sum(1),
            "row_rival": rivals.max(1),
            "column_rival": rivals.max(0),
        }

    def weigh(self) -> None:
        """Set what the gradients need, from the oracle."""
        rng = np.random.default_rng(5)
        self.put("row_weight", rng.uniform(0.5, 1, self.m) / (2 * self.m))
        if not self.sigmoid:
            expected = self.expected_statistics()
            self.put("column_weight", rng.uniform(0.5, 1, self.n) / (2 * self.n))
            for name, axis in (("row_lse", 1), ("column_lse", 0)):
                most = self.logits.max(axis)
                self.put(name, np.concatenate([most, expected[name] - most]))

    def gradients(self, module: ModuleType, chunk_tiles: int = 1, shares: int = 2) -> dict[str, np.ndarray]:
        """Run the kernels in the launcher's order, with numpy for the matrix products."""
        if "row_weight" not in self.arrays:
            self.weigh()
        sums, d, shares = SUMS[self.dtype], self.args["width"], min(shares, -(-self.n // 128))
        tile_rows = module.tile_rows(self.dtype)
        # neighbours are stored together: an even pitch
        chunk, pitch = chunk_tiles * tile_rows, self.n + self.n % 2 + 4
        for name in ("unit", "d_scale", "d_bias"):
            self.new(name, 1)
        for name in ("scale_sums", "bias_sums"):
            self.new(name, -(-self.m // tile_rows) * shares)
        if self.sigmoid:
            self.new("row_scratch", chunk * shares), self.new("row_loss", self.m)
        d_image, d_text = np.zeros((self.m, d)), np.zeros((self.n, d), sums)
        for row in range(0, self.m, chunk):
            rows = min(chunk, self.m - row)
            self.new("out", rows, self.n, dtype=STORED[self.dtype], pitch=pitch)
            self.call(module.logit_gradient, row=row, chunk_rows=rows, pitch=pitch, shares=shares)
            gradient = to_float64(self.arrays["out"].array, self.dtype)
            d_image[row : row + rows] = self._finish(module, (gradient @ self.text).astype(sums))
            part = (gradient.T @ self.image[row : row + rows]).astype(sums)
            if sums is np.float32 and row > 0:
                module.accumulate(d_text.ctypes.data, part.ctypes.data, d_text.size)
            else:
                d_text += part
        result = {"d_image": d_image, "d_text": self._finish(module, d_text), "d_scale": self.read("d_scale")}
        return result | ({k: self.read(k) for k in ("d_bias", "row_loss")} if self.sigmoid else {})

    def _finish(self, module: ModuleType, sum_: np.ndarray) -> np.ndarray:
        found = []
        for wide in (False, True):
            dtype = np.dtype(SUMS[self.dtype]).name if wide else self.dtype
            self.new("sum", sum_.size), self.new("gradient", sum_.size, dtype=STORED[dtype])
            self.arrays["sum"].array[:] = sum_.ravel()
            self.call(module.finish_gradient, count=sum_.size, wide=wide)
            found.append(self.arrays["gradient"].array.copy())
        # in the precision of sums they are what is rounded for the others
        assert (to_bits(found[1], self.dtype) == found[0]).all()
        return to_float64(found[0], self.dtype).reshape(sum_.shape)

    def expected_gradients(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return the oracle, and the natural scale of the sum behind each of them."""
        u, x, label = self.read("row_weight")[:, None], self.logits, self.is_label.astype(float)
        if self.sigmoid:
            z = np.where(self.is_label, 1.0, -1.0)
            g = -u * z / (1 + np.exp(np.clip(z * (x + self.read("bias")[0]), -700, 700)))
        else:
            v = self.read("column_weight")[None, :]
            g = u * (np.exp(x - self.lse("row_lse")[:, None]) - label)
            g = g + v * (np.exp(x - self.lse("column_lse")[None, :]) - label)
        w = g * self.factor
        oracle = {
            "d_image": self.scale * w @ self.text,
            "d_text": self.scale * w.T @ self.image,
            "d_scale": np.array([(g * self.cosines).sum()]),
            "d_bias": np.array([g.sum()]),
        }
        # probabilities and labels cancel in g, but each was rounded: rows of P sum to 1
        total = np.abs(g).sum() if self.sigmoid else self.read("row_weight").sum() + self.read("column_weight").sum()
        largest = np.abs(u).max() + (0 if self.sigmoid else np.abs(v).max())
        largest = self.scale * float(largest * self.factor.max())
        scales = {
            "d_image": max(largest * np.abs(self.text).max(), (self.scale * np.abs(w) @ np.abs(self.text)).max()),
            "d_text": max(largest * np.abs(self.image).max(), (self.scale * np.abs(w).T @ np.abs(self.image)).max()),
            "d_scale": total * np.abs(self.cosines).max(),
            "d_bias": total,
        }
        return {k: v for k, v in oracle.items() if k != "d_bias" or self.sigmoid}, scales


@functools.cache
def kernels() -> ModuleType:
    return kernels_on_cpu.build()


def assert_statistics(case: Case, actual: dict[str, np.ndarray]) -> None:
    for name, expected in case.expected_statistics().items():
        with np.errstate(invalid="ignore"):
            error = np.where(actual[name] == expected, 0, np.abs(actual[name] - expected)).max()
        allowed = case.noise * (max(1, case.n / 4) if case.sigmoid else 1)
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"


def assert_gradients(case: Case, actual: dict[str, np.ndarray]) -> None:
    expected, scales = case.expected_gradients()
    if case.sigmoid:
        assert_statistics(case, {"row_loss": actual["row_loss"]})
    for name in expected:
        # the gradient of a logit is rounded to the features' dtype, sums are not
        eps = 4 * EPS[case.dtype] if name in ("d_image", "d_text") else 0
        floor = 2.0**-24 if case.dtype == "float16" and eps else 0  # numbers of float16 lie no closer
        error, allowed = np.abs(actual[name] - expected[name]).max(), (eps + case.noise) * scales[name] + floor
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"


def check(case: Case, module: ModuleType | None = None) -> None:
    module = module or kernels()
    assert_statistics(case, case.statistics(module))
    assert_gradients(case, case.gradients(module))


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_every_edge(dtype: str, sigmoid: bool) -> None:
    for m, n, d in SIZES:
        check(Case(dtype, m, n, d, sigmoid=sigmoid))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_start_anywhere(dtype: str) -> None:
    for d in (1, 5, 40):
        check(Case(dtype, 65, 70, d, vectors=False))


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("first_label", [-3, 7, 64, 127, 200, -(2**32), 2**32])
def test_labels_elsewhere_and_nowhere(first_label: int, sigmoid: bool) -> None:
    check(Case("float32", 66, 131, 8, first_label=first_label, sigmoid=sigmoid))


@pytest.mark.parametrize("first_label", [-125, 125, 3])
def test_labels_in_the_corners_of_whole_tiles(first_label: int) -> None:
    # tensor cores' tiles without a label nor an edge are not asked element by element
    check(Case("bfloat16", 128, 256, 8, first_label=first_label))


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors(dtype: str) -> None:
    for sigmoid in (False, True):
        check(Case(dtype, 66, 131, 24, factors=True, first_label=5, sigmoid=sigmoid))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_logits_of_every_size(dtype: str, sigmoid: bool) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(70, 16))
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    same = np.repeat(base[:1], 70, axis=0)
    # duplicates, features that point away from each other, and logits up to ±1e4
    for image, text, scale in ((same, same, 100), (same, -same, 100), (base, -base, 100), (10 * base, 10 * base, 100)):
        check(Case(dtype, 70, 70, 16, image=image, text=text, scale=scale, sigmoid=sigmoid))


def test_the_division_of_work_does_not_matter() -> None:
    for group, shares in itertools.product((1, 3), (1, 3)):
        case = Case("float32", 270, 300, 4)
        assert_statistics(case, case.statistics(kernels(), group, shares))
        assert_gradients(case, case.gradients(kernels(), group, shares))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitwise_the_same_twice(dtype: str) -> None:
    results = [
        run(Case(dtype, 140, 140, 16))
        for _ in range(2)
        for run in (lambda c: c.statistics(kernels()) | c.gradients(kernels()),)
    ]
    assert all(results[0][name].tobytes() == results[1][name].tobytes() for name in results[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_the_order_of_warps_nor_when_copies_arrive_matters(dtype: str) -> None:
    results = []
    for hasty in (False, True):
        kernels().hasty(hasty)
        try:
            case = Case(dtype, 150, 270, 130)
            results.append(case.statistics(kernels()) | case.gradients(kernels()))
        finally:
            kernels().hasty(False)
    assert all(results[0][name].tobytes() == results[1][name].tobytes() for name in results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_of_two_slabs_gives_the_bits_of_one_of_three(dtype: str) -> None:
    for sigmoid in (False, True):
        results = []
        for stages in (2, 3):
            case = Case(dtype, 70, 260, 80, sigmoid=sigmoid, stages=stages)
            results.append(case.statistics(kernels()) | case.gradients(kernels()))
        assert all(results[0][name].tobytes() == results[1][name].tobytes() for name in results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_fit_beside_each_other_on_every_card(dtype: str) -> None:
    # KB of a multiprocessor, and of a block at most: 8.0 and 8.7; 8.6, 8.9 and 12.x; 9.0, 10.x and 11.0
    for multiprocessor, block in ((164, 163), (100, 99), (228, 227)):
        for stages, shared in kernels().rings(dtype, multiprocessor << 10, block << 10):
            # with what the system takes of each block's
            assert 2 * (shared + 1024) <= multiprocessor << 10
            assert shared <= block << 10
            assert stages == (2 if multiprocessor == 100 else 3)


@pytest.mark.parametrize("multiprocessors", [82, 108, 132, 148, 188])
@pytest.mark.parametrize("size", [512, 4096, 8192, 32768, 65536, 131072])
def test_the_last_wave_of_blocks_is_not_almost_empty(size: int, multiprocessors: int) -> None:
    room = 2 * multiprocessors
    for width in (512, 1024):
        group, shares, chunk, chunk_shares, text_block = kernels().plans("bfloat16", size, size, width, multiprocessors)
        assert chunk >= min(size, 4096)
        assert chunk * size * 2 <= max(32 << 20, 4 * size * width, 2 * 4096 * size)
        assert text_block * width * 4 <= max(16 << 20, 4096 * width * 4)
        for rows, parts in ((group, shares), (chunk, chunk_shares)):
            tiles = size // 128
            waves, longest = -(-(rows // 128) * parts // room), -(-tiles // parts)
            busy = rows // 128 * tiles / (waves * room * longest)
            # where there is work for every place
            assert busy > 0.85 or rows // 128 * tiles < 16 * room, (rows, parts, busy)


def assert_unit(module: ModuleType, factors: bool = False) -> None:
    """The largest weight, wherever it is, must be what the unit is made of."""
    for dtype in ("float32", "bfloat16"):
        case = Case(dtype, 130, 70, 8, factors=factors)
        case.weigh()
        weights = {name: np.full(size, 1e-9) for name, size in (("row_weight", 130), ("column_weight", 70))}
        weights["row_weight"][101], weights["column_weight"][33] = 3e-5, -1e-5
        for name, values in weights.items():
            case.put(name, values)
        case.gradients(module)
        bound = 4e-5
        for name in ("image_factor", "text_factor") if factors else ():
            bound *= case.read(name).max()
        assert case.read("unit")[0] == 2.0 ** (11 - np.floor(np.log2(bound)))


@pytest.mark.parametrize("factors", [False, True])
def test_the_unit_comes_from_the_largest_weight_and_factors(factors: bool) -> None:
    assert_unit(kernels(), factors)


def test_small_weights_do_not_underflow_in_float16() -> None:
    case = Case("float16", 64, 64, 16)
    case.weigh()
    for name in ("row_weight", "column_weight"):
        case.put(name, case.read(name) * 1e-9)
    case.gradients(kernels())
    assert 2**8 < np.abs(case.arrays["out"].array.astype(float)).max() < 2**13


# ---------------------------------------------------------------------------------------------------------------------
# the tests notice mistakes

# One build has all of them, and makes the one that is asked for: compiling takes most of their time.

BARRIERS = {"tile_engine.cuh": 1, "contrastive_loss_kernels.cuh": 2, "contrastive_loss_gradient_kernels.cuh": 4}
LOAD = "load_next((stage == 0 ? ring_bytes : stage) - kStageBytes<T>);"
MISTAKES = [
    "waits for too little",
    "waits for too little of two",
    "fills a stage that is read",
    *(f"no barrier {i} in {file}" for file, count in BARRIERS.items() for i in range(count)),
]


def if_made(mistake: str) -> str:
    return f"shim::mistake == {MISTAKES.index(mistake)}"


def without_barriers(file: str, text: str) -> str:
    numbers = itertools.count()
    return re.sub(
        r"__syncthreads\(\);", lambda m: f"if (!({if_made(f'no barrier {next(numbers)} in {file}')})) {m[0]}", text
    )


def out_of_step(text: str) -> str:
    for stages, mistake in (("kStages", MISTAKES[0]), ("kFewStages", MISTAKES[1])):
        right, wrong = (f"cp_async_wait<{stages} - {n}>()" for n in (2, 1))
        assert text.count(right) == 1
        text = text.replace(right, f"{if_made(mistake)} ? {wrong} : {right}")
    assert text.count(f"__syncthreads();\n            {LOAD}") == 1
    made = if_made(MISTAKES[2])
    around = f"if ({made}) {LOAD}\n            __syncthreads();\n            if (!({made})) {LOAD}"
    return without_barriers("tile_engine.cuh", text.replace(f"__syncthreads();\n            {LOAD}", around))


@functools.cache
def mistaken() -> ModuleType:
    edits = {file: functools.partial(without_barriers, file) for file in BARRIERS}
    return kernels_on_cpu.build(edits | {"tile_engine.cuh": out_of_step})


def check_all(module: ModuleType) -> None:
    for dtype, sigmoid in (("float32", False), ("float32", True), ("bfloat16", False)):
        check(Case(dtype, 300, 140, 40, sigmoid=sigmoid, factors=True), module)
    # more slabs than stages, where copies arrive late and where they come at once
    for hasty in (False, True):
        module.hasty(hasty)
        try:
            check(Case("float32", 140, 140, 80, vectors=False), module)
        finally:
            module.hasty(False)
    check(Case("bfloat16", 140, 140, 140, stages=2), module)
    assert_unit(module)


@pytest.mark.slow
def test_without_a_mistake_the_build_of_all_passes() -> None:
    check_all(mistaken())


def test_every_barrier_is_listed() -> None:
    folder = kernels_on_cpu.ROOT / "csrc" / "cuda"
    found = {path.name: path.read_text().count("__syncthreads();") for path in folder.glob("*.cuh")}
    assert {name: count for name, count in found.items() if count} == BARRIERS


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    module = mistaken()
    module.mistake(MISTAKES.index(mistake))
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            check_all(module)
    finally:
        module.mistake(-1)
