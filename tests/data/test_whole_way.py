"""From a picture's file and a text to a probability: the numbers of the libraries that a model's folder is of."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import siglip_folders
import small
import tiny_siglip
import torch
import vocabularies
from PIL import Image

import clipfast
from clipfast.data.model_inputs import model_and_tokenizer, picture_loader, tokenizer_of

SIZES = [(100, 80), (48, 48), (31, 97), (200, 60)]
TEXTS = ["A photo of a DOG!", "two cats on the mat.", "it's the 2nd naïve café", "", "a river, " * 20]


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(len(SIZES))]
    for index, path in enumerate(paths):
        small.picture(index, SIZES[index]).save(path)
    return paths


def logits_of(folder, pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and logits as clipfast's commands come to them, in float64."""
    model, tokenizer = model_and_tokenizer(folder, device="cpu")
    model = model.double()
    load = picture_loader(model)
    loaded = [load(path.read_bytes()) for path in pictures]
    images = clipfast.NaFlexBatch.of(loaded) if model.config.vision_cfg.naflex else torch.stack(loaded)
    tokens = tokenizer_of(model, tokenizer)(TEXTS)
    with torch.no_grad():
        return tokens, model.get_logits(images.to(torch.float64), tokens)[0]


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_transformers(kind, tmp_path, pictures):
    model, ids_of, read = getattr(siglip_folders, kind)(tmp_path / kind)
    inputs = read([Image.open(path).convert("RGB") for path in pictures])
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    ids = ids_of(TEXTS)
    with torch.no_grad():
        expected = model.double()(input_ids=ids, **inputs).logits_per_image
    tokens, logits = logits_of(tmp_path / kind, pictures)
    assert torch.equal(tokens, ids)
    assert (logits - expected).abs().max() <= 1e-12
    assert logits.std() > 1e-3


def test_open_clip(tmp_path, pictures):
    """``ViT-B-16-SigLIP`` as open_clip keeps it, but smaller: its tokenizer removes punctuation and pads with </s>."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    vocabulary = vocabularies.folder(
        tmp_path / "tokenizer",
        {"spiece.model": vocabularies.spm(), "tokenizer_config.json": vocabularies.SIGLIP_CONFIG},
    )
    reader = open_clip.tokenizer.HFTokenizer(str(vocabulary), context_length=tiny_siglip.TOKENS, clean="canonicalize")
    ids = reader(TEXTS)
    text = tiny_siglip.TEXT | {"vocab_size": len(reader.tokenizer)}
    text = {k: v for k, v in text.items() if k != "norm_eps"} | {"norm_kwargs": {"eps": 1e-6}}
    vision = {"image_size": 48, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "none"}
    model = open_clip.CustomTextCLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, init_logit_bias=-10.0)
    model.visual.trunk = tiny_siglip.timm_vit()
    model = tiny_siglip.drawn(model)
    named = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}
    pixels = {"size": [48, 48], "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    pixels |= {"resize_mode": "squash", "fill_color": 0}
    sizes = tiny_siglip.ERF_SIGLIP | {"text_cfg": text | named, "custom_text": True}
    (vocabulary / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": pixels}))
    state = {name: value.float().contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, vocabulary / "open_clip_model.safetensors")
    transform = image_transform_v2(PreprocessCfg(**pixels), is_train=False)
    images = torch.stack([transform(Image.open(path)) for path in pictures]).double()
    with torch.no_grad():
        expected = model.get_logits(images, ids)[0]
    tokens, logits = logits_of(vocabulary, pictures)
    assert torch.equal(tokens, ids)
    assert (logits - expected).abs().max() <= 1e-12
    assert logits.std() > 1e-3
