"""CUDA graphs on a card: the model's numbers, from any stream and thread, whatever became of the weights."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from oracle import assert_as_exact_as_reference
from torch import Tensor, nn

import clipfast
from clipfast.models.graphed import Graphed
from clipfast.ops import FallbackWarning

pytestmark = pytest.mark.gpu

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 128, "heads": 2, "layers": 3},
}
SIZES = (1, 4, 16)
METHODS = ("encode_image", "encode_text")


@pytest.fixture(autouse=True)
def _no_fallback() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


def made(dtype: torch.dtype = torch.float16) -> clipfast.CLIP:
    torch.manual_seed(0)
    return clipfast.create_model(CONFIG).eval().requires_grad_(False).to("cuda", dtype)


def batch(method: str, rows: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if method == "encode_image":
        return torch.randn(rows, 3, 64, 64, generator=generator).to("cuda", dtype)
    ids = torch.randint(1, 998, (rows, 77), generator=generator)
    ends = torch.randint(1, 77, (rows,), generator=generator)
    return torch.where(torch.arange(77) == ends[:, None], 999, ids).cuda()


def check(encoded: Graphed, method: str, inputs: Tensor) -> None:
    """Compare with the oracle in float64, by the rule of docs/numerics.md."""
    model = encoded.model
    oracle = copy.deepcopy(model).double()
    exact = getattr(oracle, method)(inputs.double() if inputs.is_floating_point() else inputs)
    with clipfast.backend("reference"):
        reference = getattr(model, method)(inputs)
    assert_as_exact_as_reference(getattr(encoded, method)(inputs), reference, exact, f"{method}, {len(inputs)}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_models_numbers(method: str, dtype: torch.dtype) -> None:
    encoded = clipfast.graphed(made(dtype), SIZES)
    for rows in (1, 3, 4, 16, 9, 1):
        check(encoded, method, batch(method, rows, rows, dtype))
    assert encoded.fallbacks == {}


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    encoded = clipfast.graphed(made(torch.float32), SIZES)
    inputs = batch(method, 3, dtype=torch.float32)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            features = getattr(encoded, method)(inputs)
            expected = getattr(encoded.model, method)(inputs)
        assert features.dtype == expected.dtype
        torch.testing.assert_close(features, expected, rtol=5e-2, atol=5e-2)
        # casts of weights that autocast kept would be gone by now
        torch.cuda.empty_cache()
        torch.empty(1 << 24, device="cuda").fill_(torch.nan)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_twice_and_nothing_waits(method: str) -> None:
    encoded = clipfast.graphed(made(), SIZES)
    inputs = batch(method, 3)
    first = getattr(encoded, method)(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = getattr(encoded, method)(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


def test_weights_that_are_written_to_and_that_move() -> None:
    model = made()
    encoded = clipfast.graphed(model, SIZES)
    inputs = batch("encode_image", 3)
    before = encoded.encode_image(inputs)
    model.visual.proj.mul_(2)
    torch.testing.assert_close(encoded.encode_image(inputs), 2 * before)
    model.visual.proj.data = 2 * model.visual.proj.data
    torch.cuda.empty_cache()
    torch.testing.assert_close(encoded.encode_image(inputs), 4 * before)
    model.visual.transformer.resblocks[0] = nn.Identity()
    check(encoded, "encode_image", inputs)


def test_threads_and_streams() -> None:
    encoded = clipfast.graphed(made(), SIZES)
    inputs = [batch("encode_image", 1 + seed % 5, seed) for seed in range(24)]
    expected = [encoded.encode_image(x).clone() for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(which: range) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for n in which:
                found = encoded.encode_image(inputs[n])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(found, expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(range(start, 24, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_that_waits_is_left_to_itself() -> None:
    model = made()
    forward = model.visual.ln_post.forward
    model.visual.ln_post.forward = lambda x: forward(x) * (1 if x.float().sum().item() < 1e9 else 2)
    encoded = clipfast.graphed(model, SIZES)
    inputs = batch("encode_image", 3)
    with pytest.warns(FallbackWarning, match="its capture failed"):
        found = encoded.encode_image(inputs)
    assert torch.equal(found, model.encode_image(inputs))
    # the card is as it was
    check(clipfast.graphed(made(), SIZES), "encode_image", inputs)


def test_hooks_and_training() -> None:
    model = made()
    encoded = clipfast.graphed(model, SIZES)
    inputs = batch("encode_image", 3)
    encoded.encode_image(inputs)
    model.train()
    with pytest.warns(FallbackWarning, match="training mode"):
        encoded.encode_image(inputs)
    model.eval()
    handle = model.visual.transformer.resblocks[0].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(FallbackWarning, match="a hook"):
        assert torch.equal(encoded.encode_image(inputs), model.encode_image(inputs))
    handle.remove()
    check(encoded, "encode_image", inputs)
