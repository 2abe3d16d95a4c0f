"""clipfast.accelerate on sentence-transformers' CLIP models."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from acceleration import counted
from PIL import Image
from sentence_transformers.sentence_transformer.modules import CLIPModel
from tokenizers.pre_tokenizers import ByteLevel

import clipfast

SENTENCES = ["a photo of a cat", "two dogs", "a red house on a hill, seen from the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small CLIP with its processor, as they are published."""
    path = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=sizes | text | {"pad_token_id": len(words) - 1, "max_position_embeddings": 77},
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        projection_dim=32,
    )
    transformers.CLIPModel(config).eval().save_pretrained(path)
    return path


def test_embeddings_of_sentences_and_images(folder: Path) -> None:
    original = sentence_transformers.SentenceTransformer(modules=[CLIPModel(str(folder))], device="cpu")
    model = clipfast.accelerate(copy.deepcopy(original))
    found = clipfast.acceleration(model)
    assert [path.rpartition(".")[2] for path in found.accelerated] == ["text_model", "vision_model"]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for inputs in (SENTENCES, [Image.fromarray(pixels)]):
        expected = original.encode(inputs)
        with counted() as calls:
            actual = model.encode(inputs)
        # the pooled output alone, behind the tokenizer's mask too
        assert len(calls) == 1
        assert actual.shape == (len(inputs), 32)
        np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max())
    assert clipfast.acceleration(model).fell_back == {}
    with torch.no_grad():
        features = model.preprocess(SENTENCES)
        assert not features["attention_mask"].all()
    clipfast.restore(model)
    np.testing.assert_array_equal(model.encode(SENTENCES), original.encode(SENTENCES))
