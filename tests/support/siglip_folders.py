"""Folders of small SigLIP models as transformers and open_clip leave them, each with a tokenizer made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_siglip
import transformers
import vocabularies
from torch import nn

TOKENS = tiny_siglip.TOKENS


def siglip(folder: Path) -> tuple[nn.Module, Any, Any]:
    """Return transformers' SigLIP in float32, what reads its texts and what reads its pictures."""
    kept = {
        "spiece.model": vocabularies.spm(),
        "tokenizer_config.json": vocabularies.SIGLIP_CONFIG | {"model_max_length": TOKENS},
    }
    vocabularies.folder(folder, kept)
    tokenizer = transformers.SiglipTokenizer.from_pretrained(str(folder))
    side = {"height": tiny_siglip.SIDE, "width": tiny_siglip.SIDE}
    return _saved(
        folder,
        transformers.SiglipModel,
        tiny_siglip.siglip_config(),
        tokenizer,
        transformers.SiglipImageProcessorPil(size=side),
    )


def siglip2(folder: Path) -> tuple[nn.Module, Any, Any]:
    """Return transformers' SigLIP 2 with NaFlex in float32, what reads its texts and what reads its pictures."""
    kept = {
        "tokenizer.json": vocabularies.gemma_json(),
        "tokenizer_config.json": vocabularies.SIGLIP2_CONFIG | {"model_max_length": TOKENS},
    }
    vocabularies.folder(folder, kept)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    most = (tiny_siglip.SIDE // tiny_siglip.PATCH) ** 2
    return _saved(
        folder,
        transformers.Siglip2Model,
        tiny_siglip.siglip2_config(),
        tokenizer,
        transformers.Siglip2ImageProcessorPil(patch_size=tiny_siglip.PATCH, max_num_patches=most, do_convert_rgb=True),
    )


def _saved(folder: Path, kind: type, config: Any, tokenizer: Any, pictures: Any) -> tuple[nn.Module, Any, Any]:
    config.text_config.vocab_size = len(tokenizer)
    model = tiny_siglip.drawn(kind(config)).float()
    model.save_pretrained(folder)
    pictures.save_pretrained(folder)

    def ids_of(texts: list[str]) -> Any:
        read = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return read["input_ids"]

    return model.eval(), ids_of, lambda images: pictures(images, return_tensors="pt")
