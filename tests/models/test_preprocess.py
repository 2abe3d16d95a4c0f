"""Pictures become a model's input as its weights were trained: by the named models, and by a folder's own words."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
import transformers
from PIL import Image

import clipfast
from clipfast.data.input_transform import transform_of
from clipfast.models.config import get_config
from clipfast.models.foreign_config import folder_config
from clipfast.models.preprocess import PreprocessConfig

# what is published under a name; of these weights alone it was not read as the others of their name are
UNLIKE = {("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-H-14", "dfn5b"), ("ViT-H-14-quickgelu", "dfn5b")}
PUBLISHED = [
    (name, tag)
    for name in clipfast.list_models()
    if name in open_clip.list_models()
    for tag in open_clip.list_pretrained_tags_by_model(name)
    if (name, tag) not in UNLIKE
]


def picture(width: int = 61, height: int = 40) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def test_named_models_read_pictures_as_open_clips_weights_want() -> None:
    assert len(PUBLISHED) > 40
    for name, tag in PUBLISHED:
        theirs = open_clip.get_pretrained_cfg(name, tag)
        ours = asdict(get_config(name).vision_cfg.preprocess_cfg)
        assert {k: theirs[k] for k in ("mean", "std", "interpolation", "resize_mode")}.items() <= ours.items(), name


def test_siglips_input_is_transformers(tmp_path: Path) -> None:
    """One picture, through both libraries, as a model of that name reads it."""
    vision = get_config("ViT-B-16-SigLIP").vision_cfg
    processor = transformers.SiglipImageProcessorPil(size={"height": 224, "width": 224})
    for image in (picture(), picture(300, 500)):
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(transform_of(vision)(image), expected, rtol=0, atol=1e-6)


def test_a_folders_own_words_count(tmp_path: Path) -> None:
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "longest"}
    values = {"model_cfg": tiny.CONFIG, "preprocess_cfg": given | {"size": 32, "mode": "RGB", "fill_color": 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    config = folder_config(tmp_path)
    assert config.vision_cfg.preprocess_cfg == PreprocessConfig(**given, fill_color=3)
    size = config.vision_cfg.image_size
    expected = open_clip.image_transform(size, is_train=False, **given, fill_color=3)(picture())
    assert torch.equal(transform_of(config.vision_cfg)(picture()), expected)
    # and through the file that a run leaves
    assert clipfast.CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_transformers_folders_say_how_too(tmp_path: Path) -> None:
    tiny.transformers_clip().save_pretrained(tmp_path)
    default = PreprocessConfig()
    assert folder_config(tmp_path).vision_cfg.preprocess_cfg == default
    transformers.SiglipImageProcessorPil(image_mean=[0.2] * 3, resample=2).save_pretrained(tmp_path)
    expected = PreprocessConfig((0.2,) * 3, (0.5,) * 3, "bilinear", "squash")
    assert folder_config(tmp_path).vision_cfg.preprocess_cfg == expected
    transformers.CLIPImageProcessorPil().save_pretrained(tmp_path)
    assert folder_config(tmp_path).vision_cfg.preprocess_cfg == default
    transformers.CLIPImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: do_normalize: got False, expected true"):
        folder_config(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"std": [0, 1, 1]}, r"preprocess_cfg\.std: got \(0\.0, 1\.0, 1\.0\), expected 3 positive"),
        ({"mean": [1, 1]}, r"preprocess_cfg\.mean: got \(1, 1\), expected 3 numbers"),
        ({"interpolation": "nearest"}, "got 'nearest', expected one of 'bicubic', 'bilinear'"),
        ({"resize_mode": "crop"}, "got 'crop', expected one of 'shortest', 'longest', 'squash'"),
        ({"mode": "L"}, r"preprocess_cfg\.mode: got 'L', expected 'RGB'"),
        ({"fill_color": 300}, "got 300, expected 0 to 255"),
        ({"crop": 1}, "got key 'crop', expected one of mean, std"),
    ],
)
def test_what_is_not_served_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipfast.CLIPConfig.from_dict(tiny.CONFIG | {"preprocess_cfg": values})
