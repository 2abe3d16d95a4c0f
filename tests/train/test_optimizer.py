from __future__ import annotations

import itertools

import pytest
import torch

import clipfast
from clipfast.train.optimizer import make_optimizer, parameter_groups, warmup_cosine

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


def test_every_parameter_is_in_one_group_and_matrices_decay():
    model = clipfast.create_model(TINY)
    model.visual.conv1.weight.requires_grad = False
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, sparing = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert sparing["weight_decay"] == 0.0
    decaying, sparing = ({names[id(p)] for p in group["params"]} for group in (decaying, sparing))
    assert not decaying & sparing
    assert decaying | sparing == set(names.values()) - {"visual.conv1.weight"}
    assert {"visual.proj", "text_projection", "token_embedding.weight"} <= decaying
    assert {"transformer.resblocks.0.mlp.c_fc.weight", "visual.transformer.resblocks.0.attn.in_proj_weight"} <= decaying
    assert {"logit_scale", "positional_embedding", "visual.positional_embedding", "visual.class_embedding"} <= sparing
    assert {"visual.ln_pre.weight", "ln_final.bias", "transformer.resblocks.0.mlp.c_fc.bias"} <= sparing


def test_only_decaying_parameters_move_without_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make_optimizer(model, learning_rate=0.5, weight_decay=0.1).step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 0.95)
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[name], before[name])


def test_warmup_then_cosine():
    shares = [warmup_cosine(step, 110, 10) for step in range(110)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1.0
    assert shares[60] == pytest.approx(0.5)
    assert shares[35] == pytest.approx(0.5 + 0.5**1.5)
    assert 0 < shares[-1] < 0.001
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))


def test_a_run_of_warm_up_only():
    assert [warmup_cosine(step, 2, 2) for step in range(3)] == [0.5, 1.0, 1.0]
