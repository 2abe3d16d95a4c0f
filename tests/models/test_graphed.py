"""Graphs compute what the model computes, as it is now, or the model itself does and says why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded_graphs import Graphs
from torch import Tensor, nn

import clipfast
from clipfast.models import graphed as module
from clipfast.models.graphed import Graphed
from clipfast.ops import FallbackWarning

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}
SIZES = (2, 4, 8)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    found = Graphs()
    monkeypatch.setattr(module, "_has_graphs", lambda device: True)
    monkeypatch.setattr(module, "_new_pool", lambda: "pool")
    monkeypatch.setattr(module, "_capture", found.capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield found


def model_of(**changes: Any) -> clipfast.CLIP:
    torch.manual_seed(0)
    model = clipfast.create_model(CONFIG | changes).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, length: int = 20, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (rows, length), generator=generator)
    ends = torch.randint(1, length, (rows,), generator=generator)
    return torch.where(torch.arange(length) == ends[:, None], 99, ids)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def compare_images(encoded: Graphed, *batches: Tensor) -> None:
    """Compare the image tower with the model's own, in whose place the model itself may compute."""
    for batch in batches:
        assert_close(encoded.encode_image(batch), encoded.model.encode_image(batch))


def check(encoded: Graphed, rows: int = 3, seed: int = 1) -> None:
    """Compare both towers with the model itself."""
    for method, inputs in (("encode_image", images(rows, seed)), ("encode_text", tokens(rows, seed=seed))):
        assert_close(getattr(encoded, method)(inputs), getattr(encoded.model, method)(inputs))


# ----------------------------------------------------------------------------------------------------------------------
# the same numbers


def test_every_size_up_to_the_largest(graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    for rows in (1, 2, 3, 4, 5, 8, 1, 7):
        check(encoded, rows, seed=rows)
    # one graph a size and tower, and one replay a call
    assert (graphs.captures, graphs.replays) == (6, 16)
    assert encoded.fallbacks == {}
    assert "6 captured" in repr(encoded)


def test_results_are_the_callers(graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    first = encoded.encode_image(images(2, 1))
    kept = first.clone()
    encoded.encode_image(images(2, 2))
    assert torch.equal(first, kept)
    first.zero_()
    assert_close(encoded.encode_image(images(2, 1)), kept)


def test_padding_is_no_ones_business(graphs: Graphs) -> None:
    """What earlier batches left in the rows that are padded does not show, be it infinite."""
    encoded = clipfast.graphed(model_of(), SIZES)
    encoded.encode_image(torch.full((4, 3, 16, 16), torch.inf))
    encoded.encode_text(tokens(4))
    check(encoded, 3)
    assert graphs.captures == 2


def test_normalized_and_whole_calls(graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    model, pair = encoded.model, (images(3), tokens(3))
    assert_close(encoded.encode_image(pair[0], normalize=True), model.encode_image(pair[0], normalize=True))
    for actual, expected in zip(encoded(*pair), model(*pair), strict=True):
        assert_close(actual, expected)
    assert encoded(image=pair[0])[1] is None
    assert graphs.replays == 4
    assert encoded.logit_scale is model.logit_scale
    with torch.inference_mode():
        assert encoded.encode_image(pair[0]).is_inference()
    assert not encoded.encode_image(pair[0]).is_inference()


@pytest.mark.parametrize("pooling", ["eos", "argmax"])
def test_a_text_tower_and_captions_of_other_lengths(pooling: str, graphs: Graphs) -> None:
    torch.manual_seed(0)
    tower = clipfast.TextTransformer(20, 100, 32, 2, 2, output_dim=16, pool_type=pooling).eval().requires_grad_(False)
    encoded = clipfast.graphed(tower, SIZES)
    for length in (20, 17, 16, 9, 8, 5, 20):
        ids = tokens(3, length, seed=length)
        assert_close(encoded(ids), tower(ids))
        assert_close(encoded(ids.int()), tower(ids.int()))
    # 8, 16 and the context, for both kinds of ids
    assert graphs.captures == 6
    if pooling == "argmax":
        # the largest id of a caption without an end, where a longer caption left ends behind it
        encoded(tokens(3, 8, seed=5))
        ids = torch.tensor([[4, 9, 3], [1, 1, 1]])
        assert_close(encoded(ids), tower(ids))


def test_captions_whose_padding_counts_are_not_padded_on(graphs: Graphs) -> None:
    torch.manual_seed(0)
    for options in ({"no_causal_mask": True, "pool_type": "last"}, {"pool_type": "last"}, {"no_causal_mask": True}):
        tower = clipfast.TextTransformer(20, 100, 32, 2, 2, output_dim=16, **options).eval().requires_grad_(False)
        encoded = clipfast.graphed(tower, SIZES)
        for length in (20, 17, 9):
            ids = tokens(3, length, seed=length)
            assert_close(encoded(ids), tower(ids))
    assert graphs.captures == 9


def test_an_image_tower(graphs: Graphs) -> None:
    torch.manual_seed(0)
    tower = clipfast.ModifiedResNet((1, 1, 1, 1), 16, 2, 32, 8).eval().requires_grad_(False)
    pictures = torch.randn(3, 3, 32, 32)
    encoded = clipfast.graphed(tower, SIZES)
    assert_close(encoded(pictures), tower(pictures))
    assert graphs.replays == 1


def test_checks_of_values_still_hold(graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    encoded.encode_text(tokens(2))
    for wrong in (tokens(2).clamp(max=98), torch.full((2, 20), 100), tokens(2).float(), tokens(2, 21)):
        with pytest.raises((TypeError, ValueError)) as error:
            encoded.encode_text(wrong)
        with pytest.raises(type(error.value)) as own:
            encoded.model.encode_text(wrong)
        assert str(error.value) == str(own.value)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 16, 16), torch.zeros(2, 3, 16, 16).long(), torch.zeros(2)]
)
def test_wrong_images_are_the_models_to_refuse(wrong: Tensor, graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    with pytest.warns(FallbackWarning, match="rehearsal failed"), pytest.raises((TypeError, ValueError)) as error:
        encoded.encode_image(wrong)
    with pytest.raises(type(error.value)) as own:
        encoded.model.encode_image(wrong)
    assert str(error.value) == str(own.value)
    check(encoded)
    assert graphs.captures == 2


# ----------------------------------------------------------------------------------------------------------------------
# what a user did counts


def blocks(model: clipfast.CLIP) -> nn.ModuleList:
    return model.visual.transformer.resblocks


def mlp(model: clipfast.CLIP) -> nn.Module:
    return blocks(model)[0].mlp


def grow(weight: Tensor) -> None:
    weight.mul_(1.5)


CHANGES: dict[str, tuple[Callable[[clipfast.CLIP], object], bool]] = {
    "a weight is written to": (lambda m: grow(m.visual.conv1.weight.data), False),
    "a state dict is loaded": (lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}), False),
    "a weight is another tensor": (lambda m: setattr(m.visual.proj, "data", 2 * m.visual.proj.data), True),
    "a parameter is replaced": (lambda m: setattr(m.visual, "proj", nn.Parameter(2 * m.visual.proj, False)), True),
    "weights are assigned": (
        lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True),
        True,
    ),
    "a module is replaced": (
        lambda m: setattr(
            m.visual.transformer.resblocks[0].mlp, "c_fc", nn.Linear(32, 128).eval().requires_grad_(False)
        ),
        True,
    ),
    "blocks change places": (
        lambda m: m.visual.transformer.resblocks.append(m.visual.transformer.resblocks.pop(0)),
        True,
    ),
    "an attribute": (lambda m: setattr(blocks(m)[0].ln_1, "eps", 0.5), True),
    "a method": (lambda m: setattr(mlp(m), "forward", lambda x, *_, **__: x), True),
    "the whole method": (lambda m: setattr(m, "encode_image", lambda image: image.flatten(1)[:, :16] * 3), True),
}


@pytest.mark.parametrize(("change", "anew"), CHANGES.values(), ids=CHANGES)
def test_changes_of_the_model(change: Any, anew: bool, graphs: Graphs) -> None:
    model = model_of()
    encoded = clipfast.graphed(model, SIZES)
    before = encoded.encode_image(images(3))
    change(model)
    expected = model.encode_image(images(3))
    assert float((expected - before).abs().max()) > 1e-3, "the change changes nothing"
    assert_close(encoded.encode_image(images(3)), expected)
    assert_close(encoded.encode_image(images(3, 2)), model.encode_image(images(3, 2)))
    assert graphs.captures == 1 + anew
    assert graphs.replays == 3


def test_a_change_of_one_tower_is_not_the_others(graphs: Graphs) -> None:
    model = model_of()
    encoded = clipfast.graphed(model, SIZES)
    check(encoded)
    model.visual.proj.data = 2 * model.visual.proj.data
    check(encoded)
    assert graphs.captures == 3


def test_a_model_that_goes_on_changing(graphs: Graphs) -> None:
    model = model_of()
    encoded = clipfast.graphed(model, SIZES)
    for _ in range(9):
        model.visual.proj.data = model.visual.proj.data * 1.1
        compare_images(encoded, images(3))
    model.visual.proj.data = model.visual.proj.data * 1.1
    with pytest.warns(FallbackWarning, match="changed more than 8 times"):
        compare_images(encoded, images(3), images(3, 2))
    assert graphs.captures == 9


SETTINGS: dict[str, Callable[[], Any]] = {
    "backend": lambda: clipfast.backend("reference"),
    "shortcuts": lambda: clipfast.exact_shortcuts(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings_have_graphs_of_their_own(setting: Callable[[], Any], graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    plain = encoded.encode_image(images(3))
    with setting():
        inside = encoded.encode_image(images(3))
        torch.testing.assert_close(inside, encoded.model.encode_image(images(3)), rtol=2e-2, atol=2e-2)
        assert inside.dtype == encoded.model.encode_image(images(3)).dtype
    assert torch.equal(encoded.encode_image(images(3)), plain)
    assert graphs.captures == 2


# ----------------------------------------------------------------------------------------------------------------------
# the model itself


def hooked(model: clipfast.CLIP) -> Any:
    return model.visual.transformer.resblocks[1].register_forward_hook(lambda module, args, out: out * 2)


REFUSALS: dict[str, tuple[Callable[[clipfast.CLIP], Any], int, str]] = {
    "training": (lambda m: m.train(), 3, "training mode"),
    "a part in training": (lambda m: m.visual.transformer.resblocks[0].train(), 3, "training mode"),
    "a hook": (hooked, 3, "a hook waits"),
    "gradients": (lambda m: m.requires_grad_(True), 3, "gradients are recorded"),
    "too many rows": (lambda m: None, 9, "a batch of 9 rows"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("change", "rows", "why"), REFUSALS.values(), ids=REFUSALS)
def test_who_gets_no_graph(change: Any, rows: int, why: str, when: str, graphs: Graphs) -> None:
    model = model_of()
    encoded = clipfast.graphed(model, SIZES)
    if when == "after":
        encoded.encode_image(images(3))
    captured = graphs.captures, graphs.replays
    change(model)
    with pytest.warns(FallbackWarning, match=why) as told:
        compare_images(encoded, *[images(rows)] * 3)
    assert len(told) == 1
    assert (graphs.captures, graphs.replays) == captured
    assert list(encoded.fallbacks.values()) == [3]
    assert why in repr(encoded)


def test_gradients_flow_where_they_are_recorded(graphs: Graphs) -> None:
    model = model_of().requires_grad_(True)
    encoded = clipfast.graphed(model, SIZES)
    with pytest.warns(FallbackWarning, match="gradients"):
        encoded.encode_image(images(3)).sum().backward()
    assert model.visual.proj.grad is not None
    with torch.no_grad():
        check(encoded)
    assert graphs.replays == 2


def test_hooks_of_all_modules_and_of_the_whole(graphs: Graphs) -> None:
    model, seen = model_of(), []
    encoded = clipfast.graphed(model, SIZES)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(FallbackWarning, match="a hook waits"):
        encoded.encode_image(images(3))
    handle.remove()
    assert seen
    handle = model.register_forward_hook(lambda module, args, out: "hooked")
    assert encoded(images(3), tokens(3)) == "hooked"
    handle.remove()
    check(encoded)
    assert graphs.replays == 2


def test_results_that_may_not_depend_on_the_batch(graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    with clipfast.deterministic(), pytest.warns(FallbackWarning, match="may not depend on the batch"):
        encoded.encode_image(images(3))
    assert not graphs.captures


def test_a_transformed_call(graphs: Graphs) -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    with pytest.warns(FallbackWarning, match="traced or transformed"):
        derivative = torch.func.grad(lambda x: encoded.encode_image(x).sum())(images(3))
    assert derivative.abs().sum() > 0


def test_a_model_that_reads_values_cannot_be_captured(graphs: Graphs) -> None:
    model = model_of()
    forward = model.visual.ln_post.forward
    model.visual.ln_post.forward = lambda x: forward(x) * (1 if x.sum().item() < 1e9 else 2)
    encoded = clipfast.graphed(model, SIZES)
    with pytest.warns(FallbackWarning, match="its capture failed .*not permitted when stream is capturing") as told:
        compare_images(encoded, images(3), images(3), images(1))
    assert len(told) == 1
    assert graphs.replays == 0
    assert_close(encoded.encode_text(tokens(3)), model.encode_text(tokens(3)))
    assert graphs.replays == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("illegal memory access")])
def test_what_no_fallback_mends(error: Exception, graphs: Graphs) -> None:
    graphs.error = error
    with pytest.raises(type(error)):
        clipfast.graphed(model_of(), SIZES).encode_image(images(3))


def test_a_model_on_the_cpu() -> None:
    encoded = clipfast.graphed(model_of(), SIZES)
    with pytest.warns(FallbackWarning, match="the model is on cpu") as told:
        check(encoded)
    assert sum("the model is on cpu" in str(w.message) for w in told) == 1


def test_an_output_that_is_no_tensor(graphs: Graphs) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_size, self.linear = 16, nn.Linear(768, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x.flatten(1)), x

    tower = Pair().eval()
    with pytest.warns(FallbackWarning, match="no tensor"):
        found = clipfast.graphed(tower, SIZES)(images(3))
    assert torch.equal(found[0], tower(images(3))[0])


def test_many_shapes(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_GRAPHS", 2)
    encoded = clipfast.graphed(model_of(), SIZES)
    check(encoded, 2)
    check(encoded, 4)
    with pytest.warns(FallbackWarning, match="2 graphs already"):
        check(encoded, 8)
    check(encoded, 2)
    assert graphs.captures == 4


@pytest.mark.parametrize("sizes", [(), (0,), (2, -1), (2.0,), (True,), "8", None])
def test_sizes_that_make_no_sense(sizes: Any) -> None:
    with pytest.raises(ValueError, match=r"graphed\(batch_sizes\): got .* expected positive whole numbers"):
        clipfast.graphed(model_of(), sizes)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"graphed\(model\): got str"):
        clipfast.graphed("ViT-B-32", SIZES)
    assert clipfast.graphed(model_of(), (8, 2, 8)).batch_sizes == (2, 8)
    assert clipfast.graphed(model_of(), 4).batch_sizes == (4,)
    assert copy.copy(clipfast.graphed(model_of(), 4)).batch_sizes == (4,)
