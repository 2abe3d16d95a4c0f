"""Pictures as the tower of a model wants them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast.data.input_transform import transform_of
from clipfast.data.options import DataOptions
from clipfast.models.config import get_config


def picture(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(640, 427), (31, 200), (224, 224)], ids=str)
def test_pictures_of_siglip_are_those_of_open_clips_weights(size):
    """open_clip's own record of those weights: squashed, bicubic, mean and standard deviation 0.5."""
    transform, pretrained = pytest.importorskip("open_clip.transform"), pytest.importorskip("open_clip.pretrained")
    record = pretrained.get_pretrained_cfg("ViT-B-16-SigLIP2", "webli")
    keys = ("mean", "std", "interpolation", "resize_mode")
    theirs = transform.image_transform(224, is_train=False, **{key: record[key] for key in keys})
    ours = transform_of(get_config("ViT-B-16-SigLIP2").vision_cfg)
    assert torch.equal(ours(picture(size)), theirs(picture(size)))
    torch.manual_seed(0)
    trained = transform_of(get_config("ViT-B-16-SigLIP2").vision_cfg, train=True)(picture(size))
    torch.manual_seed(0)
    kept = {key: value for key, value in record.items() if key in ("mean", "std")}
    assert torch.equal(trained, transform.image_transform(224, is_train=True, **kept)(picture(size)))


def test_each_kind_of_tower_gets_its_own():
    classic, flexible = (get_config(name).vision_cfg for name in ("ViT-B-32", "ViT-B-16-SigLIP2-NaFlex"))
    assert transform_of(classic) == clipfast.image_transform(224)
    assert transform_of(flexible) == clipfast.naflex_transform(256)
    options = DataOptions(as_open_clip=True, apply_orientation=True)
    found = transform_of(flexible, options, train=True, max_patches=64)
    assert found == clipfast.naflex_transform(64, train=True, as_open_clip=True, apply_orientation=True)
    found = transform_of(classic, options, train=True)
    assert found == clipfast.image_transform(224, True, as_open_clip=True, apply_orientation=True)
