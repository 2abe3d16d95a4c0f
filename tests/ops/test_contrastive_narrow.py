"""The losses' tiles in 16 bits under autocast, with the CPU in a card's place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contrastive_oracle import BIAS, LOSSES, TILED, oracle, run
from torch import Tensor

from clipfast import ops
from clipfast.ops import contrastive_kernels, contrastive_narrow, contrastive_ranks

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_narrow, "_DEVICES", ("cpu",))
    monkeypatch.setattr(contrastive_kernels, "ROWS", 48)
    monkeypatch.setattr(contrastive_kernels, "COLUMNS", 64)


def features(batch: int = 150, width: int = 64, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, other = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(F.normalize(x, dim=-1).float() for x in (image, image + noise * other))


def check(
    name: str, backend: str, dtype: torch.dtype, image: Tensor, text: Tensor, scale: float, **options: object
) -> None:
    """Hold a loss under autocast to twice the error of the reference with features in autocast's dtype."""
    exact = oracle(name, image, text, scale, BIAS, **options)
    with ops.backend("reference"):
        reference = run(LOSSES[name], image.to(dtype), text.to(dtype), scale, **options)
    with ops.backend(backend), torch.autocast("cpu", dtype):
        fast = run(LOSSES[name], image, text, scale, **options)
    for what, mine, theirs, value in zip(exact._fields, fast, reference, exact, strict=False):
        assert mine.dtype == torch.float32
        error, of_reference = (float(np.abs(t.double().numpy() - value).max()) for t in (mine, theirs))
        natural = float(np.abs(value).max()) if what.startswith("d_") and value.ndim else exact.scales[what]
        allowed = 2 * of_reference + 2 * torch.finfo(dtype).eps * natural
        assert error <= allowed, (
            f"{name} {what}: error {error:.3e}, of the reference {of_reference:.3e}, {allowed=:.3e}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
def test_no_further_off_than_in_autocasts_dtype(name: str, backend: str, dtype: torch.dtype) -> None:
    for noise, scale in ((1.0, 100.0), (0.1, 14.3)):
        check(name, backend, dtype, *features(noise=noise), scale)
    check(name, backend, dtype, *features(), 20.0, reduction="none")
    image, text = features()
    check(name, backend, dtype, 30 * image, 0.01 * text, 20.0, normalize=True)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_have_the_digits_of_float16_in_a_bfloat16_run(name: str, backend: str) -> None:
    image, text = features()
    exact = oracle(name, image, text, 100.0, BIAS)
    with ops.backend("reference"):
        reference = run(LOSSES[name], image.bfloat16(), text.bfloat16(), 100.0)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        fast = run(LOSSES[name], image, text, 100.0)
    for mine, theirs, value in zip(fast[1:3], reference[1:3], (exact.d_image, exact.d_text), strict=True):
        error, of_reference = (np.abs(t.double().numpy() - value).max() for t in (mine, theirs))
        assert error < of_reference / 4


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
def test_features_of_every_size(name: str, backend: str) -> None:
    image, text = features()
    sizes = torch.logspace(-3, 3, len(image))[:, None]
    # far past float16's range, and of lengths that differ
    for a, b in ((1e6, 1e-6), (1e-30, 1e30), (1e-12, 1e12)):
        check(name, backend, torch.bfloat16, a * image, b * text, 20.0)
    check(name, backend, torch.bfloat16, image * sizes, text, 1.0)
    check(name, backend, torch.bfloat16, image * sizes, text * sizes.flip(0), 0.1)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        zero = image.clone().index_fill_(0, torch.tensor([3]), 0).requires_grad_()
        LOSSES[name](zero, text, 20.0).backward()
    assert zero.grad.isfinite().all()


def test_powers_are_exact_and_bring_rows_to_one() -> None:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-25, 30, 40)[:, None]
    rows, powers = contrastive_narrow.narrowed(x, torch.float16)
    assert (powers.frexp().mantissa == 0.5).all()
    largest = rows.abs().amax(1)
    assert ((largest >= 1) & (largest <= 2)).all()
    torch.testing.assert_close(contrastive_narrow.widened(rows, powers), x, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_float32_outside_autocast(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (*features(), 100.0)
    with ops.backend(backend):
        found = run(LOSSES[name], *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = run(LOSSES[name], *inputs)
            sixteen = run(LOSSES[name], *(x.bfloat16() for x in inputs[:2]), 100.0)
        monkeypatch.undo()
        monkeypatch.setattr(contrastive_kernels, "ROWS", 48)
        monkeypatch.setattr(contrastive_kernels, "COLUMNS", 64)
        for actual, expected in zip(found, run(LOSSES[name], *inputs), strict=True):
            assert torch.equal(actual, expected)
        # nor do features that came in 16 bits change
        for actual, expected in zip(
            sixteen, run(LOSSES[name], *(x.bfloat16() for x in inputs[:2]), 100.0), strict=True
        ):
            assert torch.equal(actual, expected)
    assert not torch.equal(narrow[1], found[1])


@pytest.mark.parametrize("backend", TILED)
def test_every_recipe(backend: str) -> None:
    image, text = features(60, 32)
    options = {
        "label_smoothing": 0.1,
        "groups": torch.arange(60) // 2,
        "extra_text_features": features(60, 32, 2.0)[1][:17],
    }
    with ops.backend("reference"):
        exact = run(ops.contrastive_loss, image.double(), text.double(), 30.0, **_in(options, torch.float64))
        rough = run(ops.contrastive_loss, image.bfloat16(), text.bfloat16(), 30.0, **_in(options, torch.bfloat16))
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = run(ops.contrastive_loss, image, text, 30.0, **options)
    for actual, other, expected in zip(found[:4], rough[:4], exact[:4], strict=True):
        assert (actual - expected).abs().max() <= 2 * (other - expected).abs().max()


def _in(options: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    return options | {"extra_text_features": options["extra_text_features"].to(dtype)}


@pytest.mark.parametrize("name", LOSSES)
def test_compiled(name: str) -> None:
    image, text = features(40, 32)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        for actual, expected in zip(
            run(compiled, image, text, 20.0), run(LOSSES[name], image, text, 20.0), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def one_rank() -> dist.ProcessGroup:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["gather", "ring", "sent"])
@pytest.mark.parametrize("name", LOSSES)
def test_features_travel_in_16_bits(
    name: str, how: str, one_rank: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    travelled: list[Tensor] = []
    gather, pass_on = contrastive_ranks._all_gather, contrastive_ranks.Ranks._pass_on

    def watched(out: Tensor, x: Tensor, **options: object) -> object:
        travelled.append(x)
        return gather(out, x, **options)

    def passed(self: object, leaving: tuple[Tensor, ...], following: int) -> object:
        travelled.append(leaving[0])
        return pass_on(self, leaving, following)

    monkeypatch.setattr(contrastive_ranks, "_all_gather", watched)
    monkeypatch.setattr(contrastive_ranks.Ranks, "_pass_on", passed)
    image, text = features()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(LOSSES[name], image, text, 20.0)

        def loss(image: Tensor, text: Tensor, *rest: object, **more: object) -> Tensor:
            comm = ops.send_texts(text, one_rank) if how == "sent" else how
            return LOSSES[name](image, text, *rest, group=one_rank, comm=comm, **more)

        found = run(loss, image, text, 20.0)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-6)
    matrices = [x for x in travelled if x.dim() == 2]
    assert matrices
    assert all(x.dtype == torch.float16 for x in matrices)
