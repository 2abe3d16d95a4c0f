"""The image tower's options and errors; what it computes is compared with open_clip and timm in tests/models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_reference, relative_error
from torch import Tensor, nn

import clipfast
from clipfast.modules.vit import interpolate_positions

IMAGE = 32


def small_vit(**changes: object) -> clipfast.ViT:
    torch.manual_seed(0)
    sizes = {"image_size": IMAGE, "patch_size": 8, "width": 48, "layers": 3, "heads": 3, "output_dim": 24}
    return clipfast.ViT(**(sizes | changes)).double()


def images(batch: int = 2, size: int = IMAGE) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def test_forward_reads_the_class_token_of_forward_features() -> None:
    model, x = small_vit(), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 16, 48)
    assert relative_error(model(x), tokens[:, 0] @ model.proj) < 1e-13


def test_without_a_projection_features_are_tokens() -> None:
    model, x = small_vit(output_dim=None), images()
    assert relative_error(model(x), model.forward_features(x)[:, 0]) < 1e-13


def all_tokens(output: dict[str, list[Tensor]]) -> list[Tensor]:
    return [
        torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        for prefix, patches in zip(output["image_intermediates_prefix"], output["image_intermediates"], strict=True)
    ]


def test_intermediates_are_the_tokens_after_each_block() -> None:
    model, x = small_vit(), images()
    output = model.forward_intermediates(x, output_extra_tokens=True)
    tokens = all_tokens(output)
    assert len(tokens) == 3
    assert relative_error(output["image_features"], model(x)) < 1e-13
    assert relative_error(model.transformer.resblocks[2](tokens[1]), tokens[2]) < 1e-13
    last = model.forward_intermediates(x, 1, normalize_intermediates=True, output_extra_tokens=True)
    assert relative_error(all_tokens(last)[0], model.forward_features(x)) < 1e-13
    chosen = all_tokens(model.forward_intermediates(x, [-1, 0], output_extra_tokens=True))
    assert torch.equal(chosen[0], tokens[0])
    assert torch.equal(chosen[1], tokens[2])


@pytest.mark.parametrize("indices", [0, 4, [3], [-4]])
def test_indices_outside_the_blocks_are_refused(indices: int | list[int]) -> None:
    with pytest.raises(ValueError, match="indices"):
        small_vit().forward_intermediates(images(), indices)


def test_attention_maps_are_what_attention_applies() -> None:
    model, x = small_vit(), images()
    maps = model.get_attention_maps(x)
    assert maps.shape == (3, 2, 3, 17, 17)
    assert relative_error(maps.sum(-1), torch.ones(3, 2, 3, 17, dtype=torch.float64)) < 1e-13
    block = model.transformer.resblocks[1]
    y = block.ln_1(all_tokens(model.forward_intermediates(x, [0], output_extra_tokens=True))[0])
    value = (y @ block.attn.in_proj_weight[-48:].T + block.attn.in_proj_bias[-48:]).unflatten(-1, (3, 16))
    mixed = torch.einsum("bhnm,bmhd->bnhd", maps[1], value).flatten(2)
    assert relative_error(block.attn.out_proj(mixed), block.attn(y)) < 1e-13


def test_gradient_checkpointing_changes_no_gradient() -> None:
    x = images()
    gradients = []
    for enable in (False, True):
        model = small_vit()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_computes_blocks_again() -> None:
    model = small_vit()
    model.set_grad_checkpointing()
    calls = []
    model.transformer.resblocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model(images()).sum().backward()
    assert len(calls) == 2


def embedded(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    out = model._patches(x)
    return out.detach(), *torch.autograd.grad(out.sin().sum(), (x, model.conv1.weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_patches_are_a_product_in_training_too(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_vit(), images().requires_grad_()
    model.conv1.to(memory_format=layout)
    expected = F.conv2d(x, model.conv1.weight, stride=model.patch_size).flatten(2).transpose(1, 2)
    expected = expected.detach(), *torch.autograd.grad(expected.sin().sum(), (x, model.conv1.weight))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "_conv_forward", lambda *args: pytest.fail("a convolution"))
        found = embedded(model, x)
    for actual, exact in zip(found, expected, strict=True):
        assert relative_error(actual, exact) < 1e-13
    assert found[0].is_contiguous()


def test_patches_under_autocast_are_as_exact_as_the_convolution() -> None:
    model, x = small_vit(), images()
    exact = model._patches(x)
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found, reference = model._patches(x), model.conv1(x).flatten(2).transpose(1, 2)
    assert found.dtype == reference.dtype == torch.bfloat16
    assert_as_exact_as_reference(found, reference, exact, "patches")


def change_by_hook(conv: nn.Module) -> None:
    conv.register_forward_hook(lambda m, args, out: 2 * out)


def change_forward(conv: nn.Module) -> None:
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)


def change_bias(conv: nn.Module) -> None:
    conv.bias = nn.Parameter(torch.ones(conv.out_channels, dtype=torch.float64))


@pytest.mark.parametrize("change", [change_by_hook, change_forward, change_bias])
def test_a_convolution_that_somebody_changed_is_called(change: Callable[[nn.Module], None]) -> None:
    model, x = small_vit(), images().requires_grad_()
    plain = model._patches(x)
    change(model.conv1)
    found = model._patches(x)
    assert relative_error(found, model.conv1(x).flatten(2).transpose(1, 2)) < 1e-13
    assert relative_error(found, plain) > 0.1


def test_patch_dropout_works_in_training_alone() -> None:
    model = small_vit(patch_dropout=0.5)
    assert model.forward_features(images()).shape[1] == 1 + 8
    assert model.eval().forward_features(images()).shape[1] == 1 + 16


def test_interpolated_positions() -> None:
    positions = torch.randn(1 + 4 * 4, 8, dtype=torch.float64)
    same = interpolate_positions(positions, (4, 4), (4, 4))
    assert relative_error(same, positions) < 1e-13
    larger = interpolate_positions(positions, (4, 4), (8, 6))
    assert larger.shape == (1 + 48, 8)
    assert torch.equal(larger[0], positions[0])
    flat = interpolate_positions(torch.ones_like(positions), (4, 4), (7, 7))
    assert relative_error(flat, torch.ones_like(flat)) < 1e-13
    with pytest.raises(ValueError, match=r"17 rows, expected 1 \+ 5·5"):
        interpolate_positions(positions, (5, 5), (4, 4))


def test_another_image_size() -> None:
    model = small_vit()
    before = model(images())
    model.set_image_size(64)
    assert model.positional_embedding.shape == (1 + 64, 48)
    assert model(images(size=64)).shape == before.shape
    with pytest.raises(ValueError, match=r"\[B, 3, 64, 64\]"):
        model(images())
    model.set_image_size((16, 64))
    assert model(torch.randn(2, 3, 16, 64, dtype=torch.float64)).shape == before.shape


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.zeros(2, 3, 40, 40, dtype=torch.float64), ValueError, r"got shape \(2, 3, 40, 40\).*\[B, 3, 32, 32\]"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.float64), ValueError, r"got shape \(2, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32, dtype=torch.float64), ValueError, r"got shape \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32), TypeError, r"got torch.float32, expected torch.float64"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, r"got torch.uint8, expected torch.float64"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64, device="meta"), ValueError, r"got device meta, expected cpu"),
        ([[1.0]], TypeError, "got list, expected a tensor"),
    ],
)
def test_wrong_images(wrong: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_vit()(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size.*30.*multiples of patch_size = 8"),
        ({"heads": 5}, "heads.*got 5 for width 48"),
        ({"approximate": "erf"}, "approximate.*'erf'.*'none', 'tanh', 'quick'"),
        ({"patch_dropout": 1.0}, "prob.*1.0"),
    ],
)
def test_wrong_sizes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_vit(**changes)


def test_an_empty_batch_gives_empty_features() -> None:
    assert small_vit()(images(0)).shape == (0, 24)


def test_autocast_takes_other_dtypes() -> None:
    model = small_vit().float()
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        features = model(x)
    assert relative_error(features.float(), model(x)) < 0.05


def test_compiles_into_one_graph() -> None:
    model, x = small_vit(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    features = compiled(x)
    assert relative_error(features, model(x)) < 1e-12
    features.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
