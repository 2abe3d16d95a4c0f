"""Packed captions and the one-token last block on a GPU: the dense towers' numbers, few waits, and CUDA graphs."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import relative_error
from torch import Tensor, nn

import clipfast

pytestmark = pytest.mark.gpu

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 2, "layers": 3},
}
LENGTHS = [5, 77, 2, 30, 5, 12]


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return clipfast.create_model(CONFIG, dtype=dtype, device="cuda")


def captions_of(lengths: list[int] = LENGTHS) -> Tensor:
    tokens = torch.randint(1, 98, (len(lengths), 77), generator=torch.Generator().manual_seed(2))
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 99
    return tokens.cuda()


def outputs_and_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64).cuda()
    image, text = model.encode_image(images), model.encode_text(captions_of())
    (image.square().sum() + text.pow(3).sum()).backward()
    return [image, text, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_the_same_as_dense() -> None:
    model = model_of()
    short = outputs_and_gradients(model)
    with clipfast.exact_shortcuts(False):
        dense = outputs_and_gradients(model)
    for actual, expected in zip(short, dense, strict=True):
        assert relative_error(actual, expected) <= 1e-12


def test_images_wait_for_nothing() -> None:
    model, images = model_of(torch.float32), torch.randn(4, 3, 32, 32, device="cuda")
    model.encode_image(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.encode_image(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captions_wait_once() -> None:
    model, tokens = model_of(torch.float32), captions_of()
    model.encode_text(tokens).sum().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.encode_text(tokens).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing CUDA operation" in str(w.message)]) == 1


def test_patch_dropout_waits_for_nothing() -> None:
    model = clipfast.ViT(32, 8, 64, layers=2, heads=2, output_dim=32, patch_dropout=0.5).cuda()
    images = torch.randn(4, 3, 32, 32, device="cuda")
    model(images).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_draws_patches_anew() -> None:
    model = clipfast.ViT(32, 8, 64, layers=2, heads=2, output_dim=32, patch_dropout=0.5).cuda()
    images = torch.randn(4, 3, 32, 32, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(images)
        graph.replay()
        first = captured.clone()
        graph.replay()
    assert not torch.equal(first, captured)


def test_captured_in_a_graph() -> None:
    model, tokens = model_of(torch.float32).eval(), clipfast.trim_captions(captions_of([5, 12, 3]), eos_id=99)
    with torch.no_grad():
        expected = model.encode_text(tokens)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model.encode_text(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model.encode_text(tokens)
        tokens.copy_(clipfast.trim_captions(captions_of([7, 4, 9]), eos_id=99)[:, : tokens.shape[1]])
        graph.replay()
        torch.testing.assert_close(captured, model.encode_text(tokens), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(captured, expected)
