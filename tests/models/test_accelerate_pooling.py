"""clipfast.accelerate on timm's pooling by attention, in SigLIP's tower and alone: what it serves and what it obeys."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import peft
import pytest
import timm
import tiny
import torch
from acceleration import assert_close, assert_same_gradients, counted, loss_of
from oracle import relative_error
from timm.layers import AttentionPoolLatent
from timm.layers import attention_pool as timm_pooling
from torch import Tensor, nn
from torch.nn.utils import parametrize
from user_actions import wrapped, wrapped_method

import clipfast
from clipfast.models.accelerate import AccelerateWarning
from clipfast.models.twin_pooling import TwinAttentionPool

pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def pooled() -> Iterator[list[int]]:
    """Count the calls of twins' poolings."""
    calls: list[int] = []
    forward = TwinAttentionPool.forward

    def count(self: nn.Module, *args: Any) -> Tensor:
        calls.append(1)
        return forward(self, *args)

    with mock.patch.object(TwinAttentionPool, "forward", count):
        yield calls


def pair(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a tower with random weights, the same accelerated, and images."""
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 8}
    torch.manual_seed(0)
    plain = tiny.drawn(timm.create_model("vit_base_patch16_siglip_224", **(sizes | changes))).to(dtype).eval()
    return plain, clipfast.accelerate(copy.deepcopy(plain)), torch.randn(3, 3, 32, 32).to(dtype)


def alone(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"num_heads": 2, "norm_layer": nn.LayerNorm} | changes
    torch.manual_seed(0)
    return tiny.drawn(AttentionPoolLatent(64, **options)).to(dtype)


def test_what_is_served_is_said() -> None:
    _, model, x = pair()
    assert clipfast.acceleration(model).accelerated == ("", "attn_pool")
    assert not clipfast.acceleration(model).left_alone
    with pooled() as pools, counted() as towers:
        model(x)
        model.forward_head(model.forward_features(x))
        model.pool(model.forward_features(x))
    assert (len(pools), len(towers)) == (3, 3)
    with pooled() as pools, counted() as towers:
        final, _ = model.forward_intermediates(x)
        model.forward_head(final)
    assert (len(pools), len(towers)) == (1, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": True, "reg_tokens": 1},
        {"class_token": True, "pool_include_prefix": True},
        {"qkv_bias": False},
    ],
)
def test_every_way_to_the_head(changes: dict[str, Any]) -> None:
    plain, model, x = pair(**changes)
    for m in (plain, model):
        m.features = m.forward_features(x)
        m.outputs = [m(x), m.features, m.pool(m.features), m.forward_head(m.features, pre_logits=True)]
        m.outputs += [m.forward_intermediates(x, output_fmt="NLC")[0]]
        loss_of(m.outputs).backward()
    assert_close(model.outputs, plain.outputs, 1e-12)
    assert_same_gradients(model, plain)


ALONE: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"pool_type": "avg"}, None),
    ({"qkv_bias": False}, None),
    ({"out_features": 32}, None),
    ({"act_layer": timm.layers.GELUTanh}, None),
    ({"qk_norm": True}, "its q_norm is a .*LayerNorm"),
    ({"latent_len": 2}, "it has 2 latents"),
    ({"pos_embed": "abs", "feat_size": 4}, "pos_embed"),
    ({"q_proj": False}, "its q is a .*Identity"),
    ({"latent_dim": 32}, "are not of 2 heads of 32"),
    ({"pool_type": ""}, "it pools its latent by ''"),
    ({"out_features": 0}, "its proj is a .*Identity"),
    ({"norm_layer": None}, "its norm is a .*Identity"),
    ({"act_layer": nn.ReLU}, "its activation is a ReLU"),
]


@pytest.mark.parametrize(("changes", "reason"), ALONE)
def test_alone(changes: dict[str, Any], reason: str | None) -> None:
    plain = alone(**changes)
    model = copy.deepcopy(plain)
    if reason is None:
        clipfast.accelerate(model)
    else:
        with pytest.raises(ValueError, match=reason):
            clipfast.accelerate(model)
        # behind blocks that are served, it is timm's own
        tower = pair()[0]
        tower.attn_pool = model
        with pytest.warns(AccelerateWarning, match=f"attn_pool: .*{reason}"):
            clipfast.accelerate(tower)
        assert clipfast.acceleration(tower).accelerated == ("",)
    x = torch.randn(3, 4, 64, dtype=torch.float64)
    with pooled() as calls:
        outputs = [model(x), plain(x)]
    assert len(calls) == (reason is None)
    assert_close(outputs[:1], outputs[1:], 1e-12)


def test_calls_that_the_original_serves() -> None:
    plain, tokens = alone(), torch.randn(3, 4, 64, dtype=torch.float64)
    model = clipfast.accelerate(copy.deepcopy(plain))
    mask = torch.zeros(3, 1, 1, 4, dtype=torch.float64)
    mask[..., 2:] = -torch.inf
    with pooled() as calls:
        assert_close([model(tokens, attn_mask=mask)], [plain(tokens, attn_mask=mask)], 0)
        assert model(tokens[:0]).shape == plain(tokens[:0]).shape
        for wrong in (tokens[0], tokens[..., :32], tokens.float(), "tokens"):
            with pytest.raises(Exception) as expected:  # noqa: PT011
                plain(wrong)
            with pytest.raises(type(expected.value)) as actual:
                model(wrong)
            assert str(actual.value) == str(expected.value)
    assert clipfast.acceleration(model).fell_back == {"": {"attn_mask": 1}}
    assert len(calls) == 2  # those whose linear layers raise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    exact = alone()
    plain = copy.deepcopy(exact).to(dtype)
    model = clipfast.accelerate(copy.deepcopy(plain))
    x = torch.randn(8, 16, 64).to(dtype)
    oracle = exact(x.double())
    for autocast in (False, dtype == torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad(), pooled() as calls:
            actual, expected = model(x), plain(x)
        assert len(calls) == 1
        assert actual.dtype == expected.dtype
        eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
        assert relative_error(actual, oracle) <= 2 * relative_error(expected, oracle) + 2 * eps


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x)]


def assert_followed(plain: nn.Module, model: nn.Module, x: Tensor, before: list[Tensor], served: int = 0) -> None:
    """Check that a change counts at the next call, that blocks are served still, and whether the pooling is."""
    expected = outputs_of(plain, x)
    assert relative_error(expected[0], before[0]) > 1e-6  # otherwise nothing is tested
    with pooled() as pools, counted() as towers:
        assert_close(outputs_of(model, x), expected, 1e-12)
    assert (len(pools), len(towers)) == (served, 1)


PARTS = ("", ".q", ".kv", ".q_norm", ".k_norm", ".proj", ".proj_drop", ".norm", ".mlp", ".mlp.fc1", ".mlp.act")


@pytest.mark.parametrize("part", [f"attn_pool{p}" for p in (*PARTS, ".mlp.drop1", ".mlp.norm", ".mlp.fc2")])
def test_a_patched_forward_and_a_hook_are_obeyed(part: str) -> None:
    plain, model, x = pair()
    before = outputs_of(plain, x)
    itself = part == "attn_pool"
    for m in (plain, model):
        module = m.get_submodule(part)
        module.forward = wrapped(module.forward)
    assert_followed(plain, model, x, before, served=int(itself))
    if not itself:
        assert "its forward was set on the instance" in clipfast.acceleration(model).left_alone["attn_pool"]
    for m in (plain, model):
        del m.get_submodule(part).forward
    handles = [m.get_submodule(part).register_forward_hook(lambda m, args, y: 1.1 * y + 0.1) for m in (plain, model)]
    assert_followed(plain, model, x, before, served=int(itself))
    for handle in handles:
        handle.remove()
    with pooled() as calls:
        assert_close(outputs_of(model, x), before, 1e-12)
    assert len(calls) == 1
    assert not clipfast.acceleration(model).left_alone


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("", "num_heads", 1),
        ("", "pool", "avg2"),
        ("", "latent_len", 2),
        ("", "head_dim", 64),
        ("", "pos_embed", nn.Parameter(torch.full((4, 64), 0.1, dtype=torch.float64))),
        ("", "proj", nn.Identity()),
        ("", "norm", nn.Identity()),
        ("", "mlp", None),
        (".norm", "eps", 0.5),
        (".mlp", "act", nn.GELU("tanh")),
        (".mlp.act", "approximate", "tanh"),
        (".mlp", "norm", nn.LayerNorm(256, dtype=torch.float64)),
    ],
)
def test_changed_attributes_count_at_the_next_call(part: str, name: str, value: Any) -> None:
    plain, model, x = pair()
    before = outputs_of(plain, x)
    outputs_of(model, x)
    for m in (plain, model):
        setattr(m.get_submodule(f"attn_pool{part}"), name, copy.deepcopy(value))
    try:
        expected = outputs_of(plain, x)
    except Exception as error:
        with pytest.raises(type(error)):
            outputs_of(model, x)
        return
    if name == "pool":  # [B, 1, W] where it was [B, W]
        assert expected[0].shape != before[0].shape
        assert_close(outputs_of(model, x), expected, 1e-12)
        return
    assert_followed(plain, model, x, before, served=int(part != "" and name in ("eps", "act", "approximate")))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(AttentionPoolLatent, "forward"), (timm_pooling.F, "scaled_dot_product_attention"), (timm.layers.Mlp, "forward")],
)
def test_patched_classes_and_functions_are_obeyed(owner: Any, name: str, when: str) -> None:
    plain, model, x = pair()
    before = outputs_of(plain, x)
    if when == "before":
        clipfast.restore(model)
    old = getattr(owner, name)
    with mock.patch.object(owner, name, wrapped_method(old) if isinstance(owner, type) else wrapped(old)):
        if when == "before":
            try:
                clipfast.accelerate(model)
            except ValueError as error:
                assert "was replaced" in str(error)  # noqa: PT017
        expected = outputs_of(plain, x)
        assert relative_error(expected[0], before[0]) > 1e-6
        with pooled() as calls:
            assert_close(outputs_of(model, x), expected, 1e-12)
        assert not calls
    clipfast.accelerate(model)
    with pooled() as calls:
        assert_close(outputs_of(model, x), before, 1e-12)
    assert len(calls) == 1


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda pool: pool.latent.data.mul_(1.5),
    "another Parameter": lambda pool: setattr(pool, "latent", nn.Parameter(-pool.latent.detach())),
    "a subclass": lambda pool: setattr(pool, "latent", nn.Parameter((2 * pool.latent.detach()).as_subclass(_Subclass))),
    "two latents": lambda pool: setattr(pool, "latent", nn.Parameter(pool.latent.detach().repeat(1, 2, 1))),
    "parametrised": lambda pool: parametrize.register_parametrization(pool, "latent", _Twice()),
    "parametrised weight": lambda pool: parametrize.register_parametrization(pool.kv, "weight", _Twice()),
    "another linear layer": lambda pool: setattr(pool, "kv", nn.Linear(64, 128, dtype=torch.float64)),
    "a wider latent": lambda pool: setattr(pool, "latent", nn.Parameter(torch.ones(1, 1, 65, dtype=torch.float64))),
}


class _Subclass(Tensor):
    pass


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("how", WRITES)
def test_written_weights_count(how: str) -> None:
    plain, model, x = pair()
    before = outputs_of(plain, x)
    outputs_of(model, x)
    for m in (plain, model):
        torch.manual_seed(3)
        WRITES[how](m.attn_pool)
    try:
        expected = outputs_of(plain, x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            outputs_of(model, x)
        return
    assert relative_error(expected[0], before[0]) > 1e-6
    assert_close(outputs_of(model, x), expected, 1e-12)


@pytest.mark.parametrize("targets", [["kv"], ["attn_pool.q", "attn_pool.proj"], ["kv", "mlp.fc1", "mlp.fc2", "qkv"]])
def test_lora_stays_accelerated(targets: list[str]) -> None:
    plain, model, x = pair()
    before = outputs_of(plain, x)
    adapted = [peft.get_peft_model(m, peft.LoraConfig(target_modules=targets, r=2)) for m in (plain, model)]
    generator = torch.Generator().manual_seed(0)
    for parts in zip(*(a.named_parameters() for a in adapted), strict=True):
        if "lora_" in parts[0][0]:
            values = 0.3 * torch.randn(parts[0][1].shape, generator=generator)
            for _, parameter in parts:
                parameter.data = values.double()
    assert_followed(plain, model, x, before, served=1)
    for m in (plain, model):
        loss_of([m(x)]).backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, model)]
    assert gradients[0].keys() == gradients[1].keys()
    assert any("attn_pool" in name and "lora_A" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) <= 1e-11, name
    for a in adapted:
        a.merge_and_unload()
    assert_followed(plain, model, x, before, served=1)


def test_frozen_parts_have_no_gradients() -> None:
    plain, model, x = pair()
    for m in (plain, model):
        for p in (m.attn_pool.latent, *m.attn_pool.kv.parameters(), *m.blocks.parameters()):
            p.requires_grad_(False)
        loss_of([m(x)]).backward()
    assert model.attn_pool.kv.weight.grad is None
    assert_same_gradients(model, plain)


def test_a_tower_that_loses_its_pooling() -> None:
    plain, model, x = pair(class_token=True)
    before = outputs_of(plain, x)
    for m in (plain, model):
        torch.manual_seed(0)
        m.reset_classifier(8, "avg")
        m.double()
    assert_followed(plain, model, x, before)
    assert clipfast.acceleration(model).accelerated == ("",)


def test_dropout_in_training_runs_the_original() -> None:
    plain = alone(drop=0.5)
    model, x = clipfast.accelerate(copy.deepcopy(plain)), torch.randn(3, 4, 64, dtype=torch.float64)
    results = []
    with pooled() as calls:
        for m in (plain, model):
            torch.manual_seed(0)
            results.append(m.train()(x))
        assert_close(results[:1], results[1:], 0)
        assert not calls
        assert_close([model.eval()(x)], [plain.eval()(x)], 1e-12)
    assert len(calls) == 1


def test_copies_pickles_and_restored_towers() -> None:
    _, model, x = pair()
    expected = outputs_of(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pooled() as calls:
            assert_close(outputs_of(other, x), expected, 0)
        assert len(calls) == 1
        with torch.no_grad():
            other.attn_pool.latent.add_(1)
        assert relative_error(outputs_of(other, x)[0], expected[0]) > 1e-6
    assert_close(outputs_of(model, x), expected, 0)
    clipfast.restore(model)
    assert type(model.attn_pool) is AttentionPoolLatent
    assert not [name for name in model.attn_pool.__dict__ if "clipfast" in name]
    with pooled() as calls:
        assert_close(outputs_of(model, x), expected, 1e-12)
    assert not calls


def test_naflex_is_named() -> None:
    model = timm.create_model("naflexvit_base_patch16_siglip", depth=1, embed_dim=64, num_heads=2, num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    expected = outputs_of(model.eval(), images)
    with pytest.warns(AccelerateWarning, match="the model: NaFlexVit: its pictures .* are padded and masked"):
        clipfast.accelerate(model)
    assert clipfast.acceleration(model).accelerated == ("attn_pool",)
    assert_close(outputs_of(model, images), expected, 1e-6)
