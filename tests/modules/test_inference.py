"""Inference on the CPU from packed weights: the modules' numbers, weights that follow every change, and independence
of the batch."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_reference
from torch import Tensor, nn

import clipfast
from clipfast.modules import inference, transformer
from clipfast.ops import library

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 2, "layers": 3},
}
EOS = 99


def model_of(dtype: torch.dtype = torch.float32, **changes: object) -> clipfast.CLIP:
    torch.manual_seed(0)
    model = clipfast.create_model(CONFIG | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def images_of(batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def captions_of(lengths: list[int]) -> Tensor:
    tokens = torch.randint(1, 98, (len(lengths), 77), generator=torch.Generator().manual_seed(2))
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = EOS
    return tokens


TOKENS = captions_of([5, 77, 2, 30, 5])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the calls of the packed encoder."""
    calls: list[str] = []
    original = transformer.encode

    def counting(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(f"{x.shape[0]} tokens")
        return original(x, *args, **kwargs)

    monkeypatch.setattr(transformer, "encode", counting)
    return calls


def native_serves(dtype: torch.dtype) -> bool:
    return (
        dtype != torch.float64
        and library.unavailable() is None
        and torch.ops.clipfast.can_encode(dtype == torch.bfloat16)
    )


def by_modules(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad(), clipfast.backend("reference"):
        return function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("approximate", ["none", "quick"])
def test_the_same_numbers(dtype: torch.dtype, shortcuts: bool, approximate: str, encoded: list[str]) -> None:
    model = model_of(dtype, approximate=approximate)
    oracle = copy.deepcopy(model).double()
    images = images_of(dtype=dtype)
    with torch.no_grad(), clipfast.exact_shortcuts(shortcuts):
        fast = model.encode_image(images), model.encode_text(TOKENS)
    assert encoded == ["51 tokens", f"{TOKENS.numel() if not shortcuts else 5 + 77 + 2 + 30 + 5} tokens"]
    for actual, name, inputs in zip(fast, ("encode_image", "encode_text"), (images, TOKENS), strict=True):
        reference = by_modules(lambda name=name, inputs=inputs: getattr(model, name)(inputs))
        exact = by_modules(
            lambda name=name, inputs=inputs: getattr(oracle, name)(
                inputs.double() if inputs.is_floating_point() else inputs
            )
        )
        assert_as_exact_as_reference(actual, reference, exact, name)


def test_tokens_and_intermediates_are_those_of_the_modules() -> None:
    model, images = model_of(), images_of()
    with torch.no_grad():
        torch.testing.assert_close(
            model.visual.forward_features(images), by_modules(lambda: model.visual.forward_features(images))
        )
        output = model.visual.forward_intermediates(images)
        torch.testing.assert_close(output["image_features"], model.visual(images))
        assert len(output["image_intermediates"]) == 3


def test_gradients_go_through_the_modules(encoded: list[str]) -> None:
    model = model_of()
    model.encode_image(images_of()).sum().backward()
    assert not encoded
    model.requires_grad_(False)
    model.encode_image(images_of())
    assert encoded
    encoded.clear()
    images = images_of().requires_grad_()
    model.encode_image(images).sum().backward()
    assert not encoded
    assert images.grad is not None


def step(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: object) -> nn.Module:
    optimizer = kind(model.parameters(), lr=0.1, **options)
    model.encode_image(images_of()).sum().backward()
    optimizer.step()
    return model


def fused_step(model: nn.Module) -> nn.Module:
    return step(model, torch.optim.AdamW, fused=True)


def fused_sgd_step(model: nn.Module) -> nn.Module:
    return step(model, torch.optim.SGD, fused=True)


def write_through_data(model: nn.Module) -> nn.Module:
    for parameter in model.visual.transformer.parameters():
        parameter.data.mul_(1.5)
    return model


def write_one_through_data(model: nn.Module) -> nn.Module:
    model.visual.transformer.resblocks[1].mlp.c_fc.bias.data.add_(1)
    return model


def write_through_numpy(model: nn.Module) -> nn.Module:
    model.visual.proj.detach().numpy()[:] *= 2
    return model


def zero_heads_through_data(model: nn.Module) -> nn.Module:
    model.visual.transformer.resblocks[0].attn.out_proj.weight.data[:, 32:] = 0
    return model


def write_through_dlpack(model: nn.Module) -> nn.Module:
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(model.visual.conv1.weight.detach()))[3] += 1
    return model


def turned(model: nn.Module) -> nn.Module:
    weight = model.visual.transformer.resblocks[0].mlp.c_fc.weight
    weight.data = weight.detach().T.contiguous().T
    with torch.no_grad():
        model.encode_image(images_of())
    weight.data.mul_(2)
    return model


def load(model: nn.Module) -> nn.Module:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})
    return model


def load_by_assignment(model: nn.Module) -> nn.Module:
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()}, assign=True)
    return model


def write(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.visual.transformer.resblocks[1].mlp.c_fc.bias.add_(1)
    return model


def replace(model: nn.Module) -> nn.Module:
    layer = model.visual.transformer.resblocks[0].attn.out_proj
    layer.weight = nn.Parameter(2 * layer.weight.detach())
    return model


def write_patches_and_projection(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.visual.conv1.weight.mul_(1.5)
        model.visual.proj.mul_(1.5)
    return model


def data(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    return model


@pytest.mark.parametrize(
    "change",
    [
        step,
        fused_step,
        fused_sgd_step,
        write_through_data,
        write_one_through_data,
        write_through_numpy,
        write_through_dlpack,
        zero_heads_through_data,
        turned,
        load,
        load_by_assignment,
        write,
        replace,
        write_patches_and_projection,
        data,
        copy.deepcopy,
        nn.Module.double,
    ],
)
def test_packed_weights_follow(change: Callable[[nn.Module], nn.Module]) -> None:
    model, images = model_of(), images_of()
    with torch.no_grad():
        before = model.encode_image(images)
    model = change(model)
    images = images.to(model.visual.proj.dtype)
    with torch.no_grad():
        after = model.encode_image(images)
    torch.testing.assert_close(after, by_modules(lambda: model.encode_image(images)))
    if change not in (copy.deepcopy, nn.Module.double):
        assert not torch.allclose(after, before)


def wide_model(dtype: torch.dtype) -> clipfast.CLIP:
    """Return a model whose matrices have the sizes of ViT-B-32's."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 1, "width": 768, "head_width": 64, "patch_size": 32}
    return clipfast.create_model(CONFIG | {"vision_cfg": vision}, dtype=dtype).eval()


def as_numpy(weight: Tensor) -> Tensor:
    array = weight.detach().view({2: torch.int16, 4: torch.int32}[weight.element_size()]).numpy()
    return torch.from_numpy(array).view(weight.dtype)


WRITERS: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda weight: weight.data,
    "numpy": as_numpy,
    "dlpack": lambda weight: torch.from_dlpack(torch.utils.dlpack.to_dlpack(weight.detach())),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("writer", WRITERS)
def test_large_writes_count_at_once(writer: str, dtype: torch.dtype) -> None:
    """Heads, rows, columns and blocks of 1/64 of a matrix and more, wherever they are."""
    model, random = wide_model(dtype), torch.Generator().manual_seed(len(writer))
    images = torch.randn(1, 3, 64, 64, generator=random).to(dtype)
    weights = [p for name, p in model.visual.named_parameters() if p.dim() > 1 and "embedding" not in name]
    assert len(weights) == 6

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=random))

    with torch.no_grad():
        model.encode_image(images)
        for i in range(18):
            matrix = WRITERS[writer](weights[i % 6]).flatten(1)
            rows, columns = matrix.shape
            top, left = draw(0, rows - rows // 64), draw(0, columns - columns // 64)
            tall = draw(rows // 64, rows - top)
            broad = -(-rows * columns // 64 // tall)
            first = draw(0, columns - broad)
            heads = torch.randperm(rows // 64, generator=random)[: draw(1, rows // 64)]
            parts = {
                "rows": (slice(top, top + rows // 64),),
                "columns": (slice(None), slice(left, left + columns // 64)),
                "block": (slice(top, top + tall), slice(first, first + broad)),
                "heads": ((heads[:, None] * 64 + torch.arange(64)).flatten(),),
            }
            kind = [*parts][(i + i // 6) % 4]
            matrix[parts[kind]] *= 0.5
            fresh = copy.deepcopy(model)
            assert torch.equal(model.encode_image(images), fresh.encode_image(images)), (i % 6, kind, parts[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_write_counts_in_the_end(dtype: torch.dtype) -> None:
    """A single value that nobody counts is found within 256 calls, and at once after forget_packed_weights."""
    model, images = wide_model(dtype), torch.randn(1, 3, 64, 64).to(dtype)
    weight = model.visual.transformer.resblocks[0].mlp.c_proj.weight
    with torch.no_grad():
        before = model.encode_image(images)
        stale = 0
        for i, forgets in enumerate((True, False, True)):
            weight.data[7 * i, 5] += 50
            expected = copy.deepcopy(model).encode_image(images)
            assert not torch.equal(expected, before)
            stale += torch.equal(model.encode_image(images), before)
            if forgets:
                clipfast.forget_packed_weights(model)
            seen = [torch.equal(model.encode_image(images), expected) for _ in range(1 if forgets else 256)]
            assert seen[-1]
            before = expected
    if native_serves(dtype):
        # otherwise this tests nothing
        assert stale


def test_only_the_weights_that_are_named_are_forgotten() -> None:
    model, other = model_of(), model_of()
    with torch.no_grad():
        for m in (model, other):
            m.encode_image(images_of())
            m.encode_text(TOKENS)
    clipfast.forget_packed_weights(model.visual)
    assert model.visual.transformer not in inference._kept
    assert model.transformer in inference._kept
    assert other.visual.transformer in inference._kept
    with pytest.raises(TypeError, match=r"forget_packed_weights\(model\): got Tensor, expected a torch.nn.Module"):
        clipfast.forget_packed_weights(torch.ones(1))


def test_weights_with_gaps_go_through_the_modules(encoded: list[str]) -> None:
    model, images = model_of(), images_of()
    linear = model.visual.transformer.resblocks[0].mlp.c_fc
    linear.weight = nn.Parameter(torch.cat([linear.weight, linear.weight], dim=1).detach()[:, ::2])
    with torch.no_grad():
        actual = model.encode_image(images)
    assert not encoded
    torch.testing.assert_close(actual, by_modules(lambda: model.encode_image(images)))


def hook(model: nn.Module) -> None:
    model.visual.transformer.resblocks[1].mlp.register_forward_hook(lambda *args: None)


def adapt(model: nn.Module) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model.visual.transformer.resblocks[1].mlp.c_fc.__class__ = Adapted


def quantise(model: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(model.visual.transformer, {nn.Linear}, inplace=True)


def scale_norm(model: nn.Module) -> None:
    class Doubled(transformer.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.visual.transformer.resblocks[0].ln_1.__class__ = Doubled


@pytest.mark.parametrize("change", [hook, adapt, quantise, scale_norm])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.ao.quantization:UserWarning")
def test_changed_blocks_compute_for_themselves(change: Callable[[nn.Module], None], encoded: list[str]) -> None:
    model, images = model_of(), images_of()
    change(model)
    with torch.no_grad():
        actual = model.encode_image(images)
    assert not encoded
    torch.testing.assert_close(actual, by_modules(lambda: model.encode_image(images)))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
def test_backends_of_single_ops_get_single_ops(backend: str, encoded: list[str]) -> None:
    with torch.no_grad(), clipfast.backend(backend):
        model_of().encode_image(images_of(1))
    assert not encoded


def test_dispatch_modes_and_untracked_weights_go_through_the_modules(encoded: list[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, images = model_of(), images_of()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(images)
    assert counter.get_total_flops() > 0
    with torch.inference_mode():
        converted = model_of().to(torch.float64).to(torch.float32)
        converted.encode_image(images)  # made in inference mode: changes would go unnoticed
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        model.encode_image(images)
    assert not encoded


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("approximate", ["none", "quick"])
def test_autocast_takes_packed_weights_in_bfloat16(approximate: str, shortcuts: bool, encoded: list[str]) -> None:
    model, images = model_of(approximate=approximate), images_of()
    oracle = copy.deepcopy(model).double()
    calls: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "features of images": lambda m, images: m.encode_image(images),
        "tokens of images": lambda m, images: m.visual.forward_features(images),
        "features of captions": lambda m, images: m.encode_text(TOKENS),
        "blocks alone": lambda m, images: m.visual.transformer(torch.linspace(-1, 1, 640).view(1, 10, 64).to(images)),
    }
    for name, call in calls.items():
        encoded.clear()
        exact = by_modules(lambda call=call: call(oracle, images.double()))
        with torch.autocast("cpu", torch.bfloat16):
            reference = by_modules(lambda call=call: call(model, images))
            with torch.no_grad(), clipfast.exact_shortcuts(shortcuts):
                actual = call(model, images)
        assert len(encoded) == 1, name
        assert actual.dtype == reference.dtype, name
        assert (actual - exact).abs().max() <= (
            2 * (reference - exact).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        ), name
    with torch.no_grad():
        plain = model.encode_image(images)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.encode_image(images)
        # each has weights of its own, and keeps them
        assert len(inference._kept[model.visual.transformer]) == 2
        torch.testing.assert_close(plain, by_modules(lambda: model.encode_image(images)))
        model.visual.transformer.resblocks[0].mlp.c_fc.weight.data.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(model.encode_image(images), cast)


@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_autocast_on_every_implementation(backend: str) -> None:
    model, images = model_of(), images_of()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = by_modules(lambda: model.encode_image(images))
        with clipfast.backend(backend):
            actual = model.encode_image(images)
    assert actual.dtype == expected.dtype
    assert F.cosine_similarity(actual.double(), expected.double()).min() > 0.999


def test_autocast_of_bfloat16_weights() -> None:
    model, images = model_of(torch.bfloat16), images_of(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.encode_image(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.encode_image(images), expected)


def test_models_are_copied_and_pickled_without_what_was_packed() -> None:
    model, images = model_of(), images_of()
    size = len(pickle.dumps(model))
    with torch.no_grad():
        expected = model.encode_image(images)
        assert len(pickle.dumps(model)) == size
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other.encode_image(images), expected)


def test_packed_weights_go_with_the_model() -> None:
    model = model_of()
    with torch.no_grad():
        model.encode_image(images_of())
    owner = weakref.ref(model.visual.transformer)
    assert owner() in inference._kept
    del model
    gc.collect()
    assert owner() is None


def test_deterministic_embeddings_under_autocast() -> None:
    model, images, tokens = model_of(), images_of(7), captions_of([5, 77, 2, 30])
    with torch.no_grad(), clipfast.deterministic(), torch.autocast("cpu", torch.bfloat16):
        image, text = model.encode_image(images), model.encode_text(tokens)
        for rows in ([0], [3], [2, 1], [3, 0, 1]):
            assert torch.equal(model.encode_image(images[rows]), image[rows]), rows
            assert torch.equal(model.encode_text(tokens[rows]), text[rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_deterministic_embeddings_do_not_depend_on_the_batch(dtype: torch.dtype, encoded: list[str]) -> None:
    model, images = model_of(dtype), images_of(7, dtype)
    lengths = [5, 77, 2, 30, 5, 12, 77]
    tokens = captions_of(lengths)
    with torch.no_grad(), clipfast.deterministic():
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(tokens, normalize=True)
        assert len(encoded) == (2 if native_serves(dtype) else 0)
        for rows in ([0], [3], [6], [1, 2], [6, 0, 3], [5, 4, 3, 2, 1, 0]):
            assert torch.equal(model.encode_image(images[rows], normalize=True), image[rows]), rows
            assert torch.equal(model.encode_text(tokens[rows], normalize=True), text[rows]), rows
    expected = by_modules(lambda: F.normalize(model.encode_image(images), dim=-1))
    assert F.cosine_similarity(image.double(), expected.double()).min() > 1 - 10 * torch.finfo(dtype).eps ** 2 - 1e-12


def test_deterministic_training_takes_rows_alone() -> None:
    model, images = model_of(), images_of(3)
    with clipfast.deterministic():
        together = model.encode_image(images)
        for i in range(3):
            assert torch.equal(model.encode_image(images[i : i + 1])[0], together[i])
        together.square().sum().backward()
    got = model.visual.proj.grad.clone()
    model.zero_grad()
    model.encode_image(images).square().sum().backward()
    torch.testing.assert_close(got, model.visual.proj.grad)


def test_deterministic_resnet() -> None:
    model = model_of(vision_cfg={"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}).eval()
    images = images_of(3)
    with torch.no_grad(), clipfast.deterministic():
        together = model.encode_image(images)
        for i in range(3):
            assert torch.equal(model.encode_image(images[i : i + 1])[0], together[i])
