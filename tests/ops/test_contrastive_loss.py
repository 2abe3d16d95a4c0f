"""The contrastive losses in tiles, by the op library and by PyTorch, against fp64 and the reference's own error."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contrastive_oracle import BIAS, LOSSES, TILED, compare, oracle, oracle_in_chunks, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipfast import ops
from clipfast.ops import announcements, contrastive_kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def features(batch: int, width: int, dtype: torch.dtype, kind: str = "trained", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return pairs of features: partly aligned as in training, or one of the hard cases."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
    text = image + noise
    if kind == "duplicates":
        image[1::2], text[1::2] = image[: batch // 2], text[: batch // 2]
    if kind == "all equal":
        image, text = image[:1].expand(batch, width), text[:1].expand(batch, width)
    if kind == "anti-aligned":
        text = -image
    if kind != "large":
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return image.to(dtype), text.to(dtype)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_small_batches(name: str, scale: float, dtype: torch.dtype, backend: str) -> None:
    widths = (1, 32, 512, 640, 768, 1024) if backend == "native" else (1, 640)
    for batch, width in itertools.product((1, 2, 63, 64), widths):
        compare(name, backend, *features(batch, width, dtype), scale)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_thousand(name: str, dtype: torch.dtype, backend: str) -> None:
    compare(name, backend, *features(1000, 640, dtype), 100.0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize(
    ("width", "scale", "dtype"), [(512, 100.0, torch.float32), (1024, 14.3, torch.bfloat16)], ids=str
)
def test_four_thousand_and_a_tail(width: int, scale: float, dtype: torch.dtype, backend: str) -> None:
    compare("contrastive", backend, *features(4097, width, dtype), scale)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["duplicates", "all equal", "anti-aligned"])
@pytest.mark.parametrize("name", LOSSES)
def test_hard_cases(name: str, kind: str, dtype: torch.dtype, backend: str) -> None:
    compare(name, backend, *features(130, 48, dtype, kind), 100.0, cancels=True)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_logits_beyond_ten_thousand(name: str, dtype: torch.dtype, backend: str) -> None:
    image, text = features(67, 200, dtype, "large")
    assert float((100 * image.double() @ text.double().T).abs().max()) > 1e4
    compare(name, backend, image, text, 100.0)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_each_pair(name: str, dtype: torch.dtype, backend: str) -> None:
    compare(name, backend, *features(130, 32, dtype), 14.3, reduction="none")


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_normalised_within_the_tiles(name: str, dtype: torch.dtype, backend: str) -> None:
    image, text = features(130, 32, dtype, "large")
    compare(name, backend, image, text, 14.3, normalize=True)
    # a row of zeros stays what F.normalize makes of it, and gets its gradient
    image[3] = 0
    with ops.backend("reference"):
        expected = run(LOSSES[name], image.double(), text.double(), 14.3, normalize=True)
    with ops.backend(backend):
        actual = run(LOSSES[name], image.double(), text.double(), 14.3, normalize=True)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", TILED)
def test_accuracy(backend: str) -> None:
    image, text = features(300, 16, torch.float32)
    logits = image @ text.T
    with ops.backend(backend):
        _, found = ops.contrastive_loss(image, text, 10.0, return_accuracy=True)
    label = torch.arange(300)
    assert found.image_to_text == (logits.argmax(1) == label).float().mean()
    assert found.text_to_image == (logits.argmax(0) == label).float().mean()
    assert 0 < found.image_to_text < 1
    with ops.backend(backend):
        _, tied = ops.contrastive_loss(image[:1].expand(5, -1), text[:1].expand(5, -1), 10.0, return_accuracy=True)
        _, alone = ops.contrastive_loss(image[:1], text[:1], 10.0, return_accuracy=True)
    assert tied == (0, 0), "features that are all the same find nothing"
    assert alone == (1, 1)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 300),
    # at a width of 1 to 3 a large batch's gradients are long sums of numbers that cancel, and BLAS adds them in another
    # order than the reference: fp32 has missed the rule there by a tenth
    width=st.integers(4, 70),
    scale=st.floats(0, 100),
    length=st.floats(1e-3, 30),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    backend: str, name: str, batch: int, width: int, scale: float, length: float, dtype: torch.dtype, seed: int
) -> None:
    image, text = features(batch, width, dtype, seed=seed)
    compare(name, backend, image * length, text, scale, cancels=True)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(name: str, normalize: bool, backend: str) -> None:
    image, text = (t.requires_grad_() for t in features(5, 3, torch.float64, "large"))
    scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0)]

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        with ops.backend(backend):
            return LOSSES[name](image, text, scale, logit_bias=bias, normalize=normalize)

    assert torch.autograd.gradcheck(loss, (image, text, *scalars))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kernels", ["chunked", "native"])
def test_opcheck(kernels: str, name: str) -> None:
    chosen = getattr(contrastive_kernels, kernels)
    if chosen is None:
        pytest.skip(contrastive_kernels.native_unavailable)
    image, text = features(5, 3, torch.float32)
    scale, bias, factor, weight = torch.tensor(9.0), torch.tensor(-1.0), torch.rand(5) + 1, torch.rand(5)
    if name == "contrastive":
        row_lse, col_lse, *_ = chosen.statistics(image, text, scale, factor, None, 0)
        torch.library.opcheck(chosen.statistics.default, (image, text, scale, factor, None, 0))
        arguments = (image, text, scale, factor, None, row_lse, col_lse, weight, weight, 0)
        for wide in ((), (True,)):
            torch.library.opcheck(chosen.gradients.default, (*arguments, *wide))
    else:
        torch.library.opcheck(chosen.siglip_statistics.default, (image, text, scale, bias, None, factor, 0))
        half = [x.half() for x in (image, text)]
        for wide in (False, True):
            torch.library.opcheck(chosen.siglip_gradients.default, (*half, scale, bias, None, factor, weight, 0, wide))


@pytest.mark.slow
@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_whole(name: str, backend: str) -> None:
    image, text = features(70, 32, torch.float32)
    with ops.backend(backend):
        eager = run(LOSSES[name], image, text, 14.3)
        torch.compiler.reset()
        compiled = run(torch.compile(LOSSES[name], fullgraph=True), image, text, 14.3)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name: str, backend: str) -> None:
    image, text = features(70, 32, torch.float32)
    with ops.backend(backend):
        expected = run(LOSSES[name], image, text, 100.0)
        with torch.autocast("cpu", torch.bfloat16):
            actual = run(LOSSES[name], image, text, 100.0)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_twice(name: str, dtype: torch.dtype, backend: str) -> None:
    image, text = features(700, 64, dtype)
    with ops.backend(backend):
        first, second = (run(LOSSES[name], image, text, 100.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_what_lies_around(dtype: torch.dtype, backend: str) -> None:
    image, text = features(70, 33, dtype)
    around = torch.full((2, 72, 80), math.nan, dtype=dtype)
    around[0, 1:71, 20:53], around[1, 1:71, 20:53] = image, text
    with ops.backend(backend):
        expected = run(ops.contrastive_loss, image, text, 14.3)
        slices = [around[k, 1:71, 20:53].requires_grad_() for k in (0, 1)]
        value = ops.contrastive_loss(*slices, 14.3)
        value.backward()
        turned = ops.contrastive_loss(*(t.T.contiguous().T for t in (image, text)), 14.3)
    assert torch.equal(value, expected[0])
    assert torch.equal(turned, expected[0])
    assert torch.equal(slices[0].grad, expected[1])
    assert torch.equal(slices[1].grad, expected[2])
    assert around.isnan().sum() == 2 * (72 * 80 - 70 * 33)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
def test_not_a_number_is_not_hidden(name: str, backend: str) -> None:
    image, text = features(70, 33, torch.float32)
    image[5, 7] = math.nan
    with ops.backend(backend):
        assert LOSSES[name](image, text, 14.3).isnan()


@pytest.mark.skipif(contrastive_kernels.native is None, reason="no op library")
@pytest.mark.parametrize(
    ("gemm", "dtype"),
    [
        ("portable", torch.float32),
        ("blas", torch.float32),
        ("blas", torch.bfloat16),
        ("blas", torch.float16),
        ("mkl_bf16", torch.bfloat16),
        ("avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("rows", "columns", "width", "label"),
    [(1, 1, 1, 0), (3, 2, 7, 1), (131, 300, 33, 5), (300, 131, 96, -9), (1100, 257, 40, 0)],
)
def test_every_product(
    monkeypatch: pytest.MonkeyPatch, gemm: str, dtype: torch.dtype, rows: int, columns: int, width: int, label: int
) -> None:
    monkeypatch.setenv("CLIPFAST_CPU_GEMM", gemm)
    native, chunked = contrastive_kernels.native, contrastive_kernels.chunked
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(n, width), dim=1).to(dtype) for n in (rows, columns))
    scale, f, g = torch.tensor(20.0), torch.rand(rows) + 0.5, torch.rand(columns) + 0.5
    try:
        statistics = native.statistics(image, text, scale, f, g, label)
    except RuntimeError as error:
        if "that this CPU and dtype can have" not in str(error):
            raise
        pytest.skip(f"this CPU has no {gemm}")
    expected = chunked.statistics(image, text, scale, f, g, label)
    for mine, theirs in zip(statistics, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    arguments = (image, text, scale, f, g, *expected[:2], torch.rand(rows), torch.rand(columns), label)
    for mine, theirs in zip(native.gradients(*arguments), chunked.gradients(*arguments), strict=True):
        bound = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine, theirs, atol=bound * float(theirs.abs().max()) + 1e-6, rtol=0)


def test_without_the_library_chunks_are_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_kernels, "native", None)
    monkeypatch.setattr(contrastive_kernels, "native_unavailable", "it was not built")
    monkeypatch.setattr(announcements, "_announced", set())
    image, text = features(4, 3, torch.float32)
    with pytest.warns(ops.FallbackWarning, match="run in chunks in PyTorch: it was not built"):
        ops.contrastive_loss(image, text, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.siglip_loss(image, text, 1.0)
        ops.contrastive_loss(image, text, 1.0)
    assert ops.explain("contrastive_loss", image, text, 1.0).startswith("contrastive_loss: torch")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"comm": "pigeon"}, "comm.*'pigeon'"), ({"reduction": "sum"}, r"reduction\): got 'sum'.*'mean', 'none'")],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.contrastive_loss(*features(3, 2, torch.float32), 1.0, **options)


MEMORY = """
import sys, torch
from clipfast import ops
width, sizes = 256, (1024, 4096)
def peak(*case):
    *inputs, scale, options = case
    # the peak so far is forgotten: Linux' proc(5), clear_refs
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    field = lambda name: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(name)) * 1024
    before = field("VmRSS")
    ops.contrastive_loss(*inputs, scale, normalize=True, **options).backward()
    return field("VmHWM") - before
def used(batch, dtype, all_three):
    image, text, extra = (torch.randn(batch, width).to(dtype).requires_grad_() for _ in range(3))
    scale = torch.tensor(14.3, requires_grad=True)
    options = dict(label_smoothing=0.1, groups=torch.arange(batch) // 3, extra_text_features=extra) if all_three else {}
    return peak(image, text, scale, options)
for case in sys.argv[1:]:
    backend, dtype, recipe = case.split(":")
    with ops.backend(backend):
        used(256, getattr(torch, dtype), bool(recipe))
        print(*(used(size, getattr(torch, dtype), bool(recipe)) for size in sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process' memory from /proc")
def test_memory_grows_with_the_batch_and_not_its_square() -> None:
    """What 3,072 more pairs take is 12 bytes a feature, as documented; one block of all logits would be 63 MB more.

    Differences between two sizes have nothing in them that is there at any size, such as threads' buffers of tiles.
    """
    cases = ["torch:float32:", "torch:float32:all"]
    if contrastive_kernels.native is not None:
        cases += ["native:float32:", "native:bfloat16:", "native:float32:all"]
    # what is freed goes back to the system at once, so that every peak is seen whole
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        small, large = map(int, line.split())
        # smoothed labels, groups and as many extra texts keep their means and differences too
        allowed = (12 if case.endswith(":") else 40) * (4096 - 1024) * 256 + 4 * 2**20
        grown = f"{case}: {(large - small) / 2**20:.1f} MB more, allowed {allowed / 2**20:.1f}"
        print(grown)
        assert large - small <= allowed, grown


@pytest.mark.parametrize("name", LOSSES)
def test_the_oracle_in_chunks_is_the_oracle(name: str) -> None:
    image, text = features(70, 24, torch.float32)
    whole = oracle(name, image, text, 30.0, BIAS)
    for rows in (16, 70):
        chunks = oracle_in_chunks(name, image, text, 30.0, BIAS, rows)
        for what, a, b in zip(whole._fields, chunks, whole, strict=True):
            if what != "scales":
                assert np.abs(a - b).max() <= 1e-13 * max(1, np.abs(b).max())
        assert {k: round(v, 9) for k, v in chunks.scales.items()} == {k: round(v, 9) for k, v in whole.scales.items()}
