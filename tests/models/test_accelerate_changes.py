"""What a user did to an accelerated model counts: patches, attributes, adapters, offloading, quantisation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import open_clip
import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from acceleration import assert_close, counted, tensors_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.models.clip import modeling_clip
from user_actions import scaled, wrapped, wrapped_method
from user_libraries import LIBRARIES, TORCHVISION, images

import clipfast
from clipfast.models.accelerate import AccelerateWarning

pytestmark = pytest.mark.filterwarnings("ignore")

# a block, its attention, MLP, activation, LayerNorm and linear layer, and what holds the blocks
PLACES = {
    "open_clip": [
        "visual.transformer.resblocks.0" + p for p in ("", ".attn", ".mlp", ".mlp.gelu", ".ln_1", ".mlp.c_fc")
    ]
    + ["visual.transformer", "visual.ln_post", "token_embedding", "transformer.resblocks.1.mlp.c_proj"],
    "transformers": ["vision_model.encoder.layers.0" + p for p in ("", ".self_attn", ".mlp", ".mlp.activation_fn")]
    + ["vision_model.encoder", "text_model.embeddings", "text_model.encoder.layers.1.self_attn.q_proj"]
    + ["vision_model.post_layernorm", "text_model.final_layer_norm"],
    "timm": ["blocks.0" + p for p in ("", ".attn", ".attn.qkv", ".mlp", ".mlp.act", ".norm1", ".ls1")]
    + ["blocks", "norm"],
    "torchvision": ["encoder.layers.encoder_layer_0" + p for p in ("", ".self_attention", ".mlp", ".mlp.1", ".ln_1")]
    + ["encoder", "encoder.layers", "encoder.ln"],
}


def pair(library: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return the plain model and the accelerated one, in eval(), and the arguments of a call."""
    subject = LIBRARIES[library]()
    plain, model = (m.to(dtype).eval() for m in subject.models)
    return plain, model, subject.inputs(dtype)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model(**inputs))


def assert_followed(plain: nn.Module, model: nn.Module, x: dict[str, Any], before: list[Tensor]) -> None:
    expected = outputs(plain, x)
    # otherwise nothing is tested
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-6
    assert_close(outputs(model, x), expected, 1e-12)


@pytest.mark.parametrize(("library", "place"), [(name, p) for name, places in PLACES.items() for p in places])
def test_a_patched_forward_is_obeyed_and_named(library: str, place: str) -> None:
    plain, model, x = pair(library)
    before = outputs(plain, x)
    towers = len(clipfast.acceleration(model).accelerated)
    for m in (plain, model):
        part = m.get_submodule(place)
        part.forward = wrapped(part.forward)
    assert_followed(plain, model, x, before)
    reasons = clipfast.acceleration(model).left_alone.values()
    assert any(place.endswith(r.split(": ")[0]) and "its forward was set on the instance" in r for r in reasons), (
        reasons
    )
    with counted() as calls:
        outputs(model, x)
    assert len(calls) == towers - 1
    del model.get_submodule(place).forward
    with counted() as calls:
        assert_close(outputs(model, x), before, 1e-12)
    # and once more where transformers' tokens are computed when they are read
    assert len(calls) >= towers
    assert not clipfast.acceleration(model).left_alone


@contextmanager
def replaced(owner: Any, name: str) -> Iterator[None]:
    own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrapped_method(old) if isinstance(owner, type) else wrapped(old))
    try:
        yield
    finally:
        setattr(owner, name, old) if own else delattr(owner, name)


CODE = [
    ("open_clip", open_clip.transformer.ResidualAttentionBlock, "forward"),
    ("open_clip", open_clip.transformer.ResidualAttentionBlock, "attention"),
    ("open_clip", open_clip.transformer.LayerNorm, "forward"),
    ("open_clip", open_clip.CLIP, "encode_text"),
    ("open_clip", open_clip.transformer.VisionTransformer, "forward"),
    ("open_clip", open_clip.model, "text_global_pool"),
    ("open_clip", nn.ModuleList, "__iter__"),
    ("open_clip", F, "multi_head_attention_forward"),
    ("open_clip", F, "scaled_dot_product_attention"),
    ("transformers", modeling_clip, "eager_attention_forward"),
    ("transformers", modeling_clip.CLIPMLP, "forward"),
    ("transformers", modeling_clip.CLIPEncoderLayer, "__call__"),
    ("transformers", modeling_clip.CLIPTextModel, "forward"),
    ("timm", nn.Linear, "forward"),
    ("timm", nn.GELU, "forward"),
    ("timm", nn.Sequential, "forward"),
    ("torchvision", nn.LayerNorm, "forward"),
    ("torchvision", nn.MultiheadAttention, "forward"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("library", "owner", "name"), [c for c in CODE if c[2] != "__iter__"])
def test_patched_classes_and_functions_are_obeyed(library: str, owner: Any, name: str, when: str) -> None:
    plain, model, x = pair(library)
    if name == "eager_attention_forward":
        for m in (plain, model):
            m.set_attn_implementation("eager")
    before = outputs(plain, x)
    if when == "before":
        clipfast.restore(model)
    with replaced(owner, name):
        if when == "before":
            try:
                clipfast.accelerate(model)
            except ValueError as error:
                assert "was replaced" in str(error) or "is not that of" in str(error)  # noqa: PT017
        assert_followed(plain, model, x, before)
        assert name in str(clipfast.acceleration(model))
    clipfast.accelerate(model)
    with counted() as calls:
        # transformers' eager attention rounds its weights to float32
        assert_close(outputs(model, x), before, 1e-6 if name == "eager_attention_forward" else 1e-12)
    assert calls


def test_another_attention_under_a_known_name() -> None:
    plain, model, x = pair("transformers")
    for m in (plain, model):
        m.set_attn_implementation("sdpa")
    before = outputs(plain, x)
    functions = modeling_clip.ALL_ATTENTION_FUNCTIONS
    sdpa = functions["sdpa"]
    functions["sdpa"] = wrapped(sdpa)
    try:
        assert_followed(plain, model, x, before)
    finally:
        functions["sdpa"] = sdpa


ATTRIBUTES: list[tuple[str, str, str, Any]] = [
    ("open_clip", "visual.transformer.resblocks.0.ln_1", "eps", 0.5),
    ("open_clip", "visual.transformer.resblocks.0.attn", "num_heads", 1),
    ("open_clip", "transformer.resblocks.0.mlp.gelu", "approximate", "tanh"),
    ("open_clip", "", "attn_mask", None),
    ("transformers", "vision_model.encoder.layers.0.self_attn", "head_dim", 16),
    ("transformers", "vision_model.encoder.layers.0.self_attn", "scale", 0.5),
    ("transformers", "vision_model.encoder.layers.0.self_attn", "is_causal", True),
    ("transformers", "text_model.final_layer_norm", "eps", 0.5),
    ("transformers", "text_model.encoder.layers.0.mlp.activation_fn", "act", torch.tanh),
    ("timm", "norm", "eps", 0.5),
    ("timm", "", "global_pool", "avg"),
    ("torchvision", "encoder.ln", "eps", 0.5),
    ("torchvision", "encoder.layers.encoder_layer_1.self_attention", "num_heads", 1),
]


@pytest.mark.parametrize(("library", "place", "name", "value"), ATTRIBUTES)
def test_changed_attributes_count_at_the_next_call(library: str, place: str, name: str, value: Any) -> None:
    plain, model, x = pair(library)
    before = outputs(plain, x)
    outputs(model, x)
    for m in (plain, model):
        setattr(m.get_submodule(place), name, value)
    assert_followed(plain, model, x, before)


def test_a_mask_that_is_written_to_counts() -> None:
    plain, model, x = pair("open_clip")
    before = outputs(plain, x)
    for m in (plain, model):
        m.attn_mask.data[:, 1] = 0.0
    assert_followed(plain, model, x, before)


def test_changed_dropout_counts() -> None:
    plain, model, x = pair("torchvision")
    for m in (plain.train(), model.train()):
        for part in m.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.5
    results = []
    for m in (plain, model):
        torch.manual_seed(0)
        results.append(outputs(m, x))
    assert_close(*results, 0)
    assert "drops values at random" in str(clipfast.acceleration(model))


TARGETS = {
    "open_clip": ["attn", "c_fc", "c_proj"],
    "transformers": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
    "timm": ["qkv", "attn.proj", "fc1", "fc2"],
    "torchvision": ["self_attention", "mlp.0"],
    "clipfast": ["out_proj", "c_fc", "c_proj"],
}


@pytest.mark.parametrize("library", TARGETS)
def test_lora_stays_accelerated(library: str) -> None:
    plain, model, x = pair(library)
    before = outputs(plain, x)
    own = library == "clipfast"
    towers = 0 if own else len(clipfast.acceleration(model).accelerated)
    adapted = [peft.get_peft_model(m, peft.LoraConfig(target_modules=TARGETS[library], r=2)) for m in (plain, model)]
    generator = torch.Generator().manual_seed(0)
    for parts in zip(*(a.named_parameters() for a in adapted), strict=True):
        if "lora_" in parts[0][0]:
            values = 0.2 * torch.randn(parts[0][1].shape, generator=generator)
            for _, parameter in parts:
                parameter.data.copy_(values)
    for a in adapted:
        a.double()
    for train in (False, True):
        for a in adapted:
            a.train(train)
        with counted() as calls:
            if own:
                with clipfast.exact_shortcuts(False):
                    expected = tensors_of(plain(**x))
            else:
                expected = tensors_of(plain(**x))
            actual = tensors_of(model(**x))
        assert len(calls) == towers
        assert_close(actual, expected, 1e-12)
        assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-6
        for found in (expected, actual):
            sum(
                (t * torch.linspace(1, 2, t.numel()).reshape(t.shape)).sum() for t in found if t.requires_grad
            ).backward()
    gradients = [{n: p.grad for n, p in a.named_parameters() if p.grad is not None} for a in adapted]
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lora_A" in n for n in gradients[0])
    scale = max(g.abs().max() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-11 * scale, name
    for a in adapted:
        a.base_model.disable_adapter_layers()
    assert_close(outputs(model.eval(), x), before, 1e-12)
    for a in adapted:
        a.base_model.enable_adapter_layers()
        a.merge_and_unload()
    assert_close(outputs(model, x), outputs(plain.eval(), x), 1e-12)
    if not own:
        assert not clipfast.acceleration(model).left_alone
        # the packed encoder serves again: nothing has to be called any more
        twins = [m.serving_twin() for m in model.modules() if hasattr(m, "serving_twin")]
        assert all(twin.transformer._is_packable() for twin in twins)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_offloaded(library: str) -> None:
    plain, model, x = pair(library)
    before = outputs(plain, x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).is_meta
    with counted() as calls:
        assert_close(outputs(model, x), before, 0)
    assert not calls
    assert "its forward was set on the instance" in str(clipfast.acceleration(model))


@pytest.mark.parametrize("library", ["open_clip", "torchvision"])
def test_offloading_fails_as_in_the_original(library: str) -> None:
    """``accelerate`` cannot offload ``nn.MultiheadAttention``, whose output projection is not called."""
    errors = []
    for m, x in zip(pair(library)[:2], [pair(library)[2]] * 2, strict=True):
        accelerate.cpu_offload(m, execution_device="cpu")
        with pytest.raises(RuntimeError) as error:
            outputs(m, x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_quantised(library: str, when: str) -> None:
    plain, model, x = pair(library, torch.float32)
    before = outputs(plain, x)
    if when == "before":
        clipfast.restore(model)
    for m in (plain, model):
        quantize_(m, Int8WeightOnlyConfig())
    if when == "before" and library != "clipfast":
        with pytest.raises(ValueError, match="Int8Tensor, no plain Parameter"):
            clipfast.accelerate(model)
    expected = outputs(plain, x)
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-6
    assert_close(outputs(model, x), expected, 0)


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("library", PLACES)
def test_weights_of_another_kind_are_left_to_the_original(library: str) -> None:
    plain, model, x = pair(library)
    before = outputs(plain, x)
    linear = next(m for n, m in model.named_modules() if type(m) is nn.Linear and ".0" in n)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(_Subclass))
    assert_close(outputs(model, x), before, 1e-12)
    assert "_Subclass, no plain Parameter" in str(clipfast.acceleration(model))


class _Adapter(nn.Module):
    on = True

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5 if self.on else weight


@pytest.mark.parametrize("library", ["open_clip", "clipfast"])
def test_an_adapter_that_is_switched_off_is_off(library: str) -> None:
    plain, model, x = pair(library, torch.float32)
    for m in (plain, model):
        adapter = _Adapter()
        parametrize.register_parametrization(m.visual.transformer.resblocks[0].attn, "in_proj_weight", adapter)
    with_it = outputs(model, x)
    assert_close(with_it, outputs(plain, x), 1e-6)
    _Adapter.on = False
    try:
        without = outputs(model, x)
        assert_close(without, outputs(plain, x), 1e-6)
    finally:
        _Adapter.on = True
    assert max((a - b).abs().max() for a, b in zip(with_it, without, strict=True)) > 1e-4


OWN_PLACES = ["", ".attn", ".mlp", ".ln_1", ".ln_2", ".attn.out_proj", ".mlp.c_fc", ".mlp.c_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", OWN_PLACES)
@pytest.mark.parametrize("tower", ["visual.transformer", "transformer"])
def test_own_towers_obey_with_gradients_and_without(tower: str, part: str, dtype: torch.dtype) -> None:
    model = tiny.clip().to(dtype).eval()
    x = {"image": images(dtype), "text": LIBRARIES["clipfast"]().inputs(dtype)["text"]}
    before = outputs(model, x)
    last = max(int(n.split(".")[0]) for n, _ in model.get_submodule(tower).resblocks.named_modules() if n)
    for i in (0, last):
        module = model.get_submodule(f"{tower}.resblocks.{i}{part}")
        module.forward = wrapped(module.forward)
        with clipfast.exact_shortcuts(False):
            expected = [t.detach() for t in tensors_of(model(**x))]
        assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-5
        assert_close(outputs(model, x), expected, 1e-12 if dtype == torch.float64 else 2e-6)
        assert_close(tensors_of(model(**x)), expected, 1e-12 if dtype == torch.float64 else 2e-6)
        del module.forward
        assert_close(outputs(model, x), before, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.ln_1, "eps", 0.5),
        lambda block: setattr(block.ln_2, "eps", 0.5),
        lambda block: setattr(block.attn, "heads", 1),
        lambda block: setattr(block.mlp, "approximate", "quick"),
        lambda block: setattr(block.attn, "causal", not block.attn.causal),
    ],
)
@pytest.mark.parametrize("every", [True, False])
def test_own_attributes_count(change: Callable[[nn.Module], None], every: bool) -> None:
    model = tiny.clip().eval()
    x = {"image": images(torch.float32), "text": LIBRARIES["clipfast"]().inputs(torch.float32)["text"]}
    before = outputs(model, x)
    for stack in (model.visual.transformer, model.transformer):
        for block in stack.resblocks if every else stack.resblocks[-1:]:
            change(block)
    with clipfast.exact_shortcuts(False):
        expected = [t.detach() for t in tensors_of(model(**x))]
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-5
    assert_close(outputs(model, x), expected, 2e-6)


def test_what_a_user_notes_on_a_module_changes_nothing() -> None:
    _, model, x = pair("timm")
    twin = model.serving_twin()
    model.blocks[0].layer_id = 3
    outputs(model, x)
    assert model.serving_twin() is twin
    model.train()
    assert model.serving_twin() is twin


def test_changes_are_told_once() -> None:
    _, model, x = pair("timm")
    model.blocks[0].forward = wrapped(model.blocks[0].forward)
    with pytest.warns(AccelerateWarning, match=r"blocks.0: its forward was set on the instance"):
        outputs(model, x)
    outputs(model, x)


def test_a_kept_method_goes_on_after_restore() -> None:
    plain, model, x = pair("torchvision")
    model.forward = wrapped(model.forward)
    clipfast.restore(model)
    with torch.no_grad():
        assert_close([model(**x)], [scaled(plain(**x))], 0)


def test_hooks_and_refusals_are_named() -> None:
    _, model, _ = pair("open_clip")
    model.visual.transformer.resblocks[1].ln_2.register_forward_hook(lambda *args: None)
    assert "visual: a hook waits for transformer.resblocks.1.ln_2" in str(clipfast.acceleration(model))
    alone = copy.deepcopy(TORCHVISION().models[0])
    assert "could be" in str(clipfast.acceleration(alone))
    alone.encoder.ln.forward = wrapped(alone.encoder.ln.forward)
    assert "encoder.ln: its forward was set on the instance" in str(clipfast.acceleration(alone))
