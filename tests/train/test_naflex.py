"""What training does for towers that take pictures of any aspect."""

from __future__ import annotations

import pytest

import clipfast
from clipfast.modules.block import ResidualAttentionBlock
from clipfast.train import trainer


@pytest.mark.parametrize("naflex", [True, False])
def test_pictures_of_any_aspect_get_no_graphs_of_one_shape(naflex, monkeypatch):
    vision = {
        "image_size": 8, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16, "class_token": False,
        "pool_type": "map", "naflex": naflex,
    }  # fmt: skip
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    model = clipfast.create_model({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})
    modes = {}
    monkeypatch.setattr(ResidualAttentionBlock, "compile", lambda block, mode: modes.setdefault(block, mode))
    trainer._compile_blocks(model, "reduce-overhead")
    assert modes == {
        model.visual.transformer.resblocks[0]: "default" if naflex else "reduce-overhead",
        model.transformer.resblocks[0]: "default",
    }
