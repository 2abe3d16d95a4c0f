"""``clipfast.warm_up`` runs a model once and leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipfast
from clipfast.ops import dispatch, keys, plan

TEXT = {"context_length": 8, "vocab_size": 50, "width": 64, "layers": 2, "heads": 2}
VIT = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}


def model_of(vision: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return clipfast.create_model({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("vision", [VIT | {"patch_dropout": 0.5}, RESNET], ids=["ViT", "ResNet"])
def test_the_model_is_left_as_it_was(vision: dict[str, Any], training: bool) -> None:
    model = model_of(vision).train()
    before, random = state_of(model), torch.get_rng_state()
    gradient = torch.ones_like(model.logit_scale)
    model.logit_scale.grad = gradient
    clipfast.warm_up(model, training=training)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert model.logit_scale.grad is gradient
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["logit_scale"]
    for name, value in state_of(model).items():
        assert torch.equal(value, before[name]), name


def calls_of(model: nn.Module) -> list[tuple[int, ...]]:
    """Record the shape of what goes into every part with a hook."""
    shapes: list[tuple[int, ...]] = []
    for part in (model.visual, model.token_embedding):
        part.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def test_inputs_are_those_that_are_given() -> None:
    model = model_of(VIT)
    shapes = calls_of(model)
    tokens = torch.tensor([[1, 49, 0, 0, 0]] * 3)
    with clipfast.exact_shortcuts(False):
        clipfast.warm_up(model, images=torch.zeros(5, 3, 16, 16), tokens=tokens)
    assert shapes == [(5, 3, 16, 16), (3, 5)]


def test_a_few_samples_get_ready_what_large_batches_will_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(VIT)
    monkeypatch.setattr(keys, "_SIZED", {"cpu"})
    dispatch.forget_choices()
    asked: dict[bool | None, set[str]] = {}
    decision = plan.decision

    def ask(op: str, key: Any, *rest: Any) -> plan.Decision:
        asked.setdefault(key.large, set()).add(op)
        return decision(op, key, *rest)

    monkeypatch.setattr(plan, "decision", ask)
    # with gradients no encoder takes a whole tower
    clipfast.warm_up(model, training=True)
    monkeypatch.undo()
    dispatch.forget_choices()
    assert asked[True] == asked[False] == {"layer_norm", "add_layer_norm", "bias_gelu", "attention"}
    assert not dispatch.are_calls_large()


def test_towers_alone_and_wrapped_models() -> None:
    model = model_of(VIT)
    for each in (model.visual, clipfast.TextTransformer(8, 50, 64, 1, 2, output_dim=16), torch.compile(model)):
        assert clipfast.warm_up(each, training=True).device == torch.device("cpu")


def test_models_of_other_libraries() -> None:
    import open_clip
    import transformers

    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        text_config=vision | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49},
    )
    theirs = [
        transformers.CLIPModel(config),
        open_clip.CLIP(16, {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}, TEXT),
    ]
    for model in theirs:
        seen = state_of(model)
        clipfast.warm_up(clipfast.accelerate(model), training=True)
        assert all(torch.equal(v, seen[k]) for k, v in state_of(model).items())


def test_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match=r"warm_up\(model\): got str, expected a torch.nn.Module"):
        clipfast.warm_up("ViT-B-32")
    with pytest.raises(ValueError, match=r"warm_up\(model\): got a Identity without parameters"):
        clipfast.warm_up(nn.Identity())
    with pytest.raises(ValueError, match=r"warm_up\(images\): got none, and a Linear does not tell its image_size"):
        clipfast.warm_up(nn.Linear(3, 3))
