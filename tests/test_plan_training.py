"""The plan of docs/distributed.md: its formulas against what the code does, and its tables against the formulas."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import clipfast

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("plan_training", ROOT / "scripts" / "plan_training.py")
plan_training = importlib.util.module_from_spec(spec)
sys.modules["plan_training"] = plan_training
spec.loader.exec_module(plan_training)

SMALL = clipfast.CLIPConfig(
    embed_dim=32,
    vision_cfg=clipfast.VisionConfig(image_size=64, patch_size=8, width=64, layers=3, head_width=32),
    text_cfg=clipfast.TextConfig(context_length=24, vocab_size=100, width=64, heads=2, layers=3),
)
PAIRS, TOKENS = 12, 16


@pytest.fixture
def batch():
    torch.manual_seed(0)
    tokens = torch.randint(1, 98, (PAIRS, TOKENS))
    tokens[:, -1] = 99
    return clipfast.create_model(SMALL), torch.randn(PAIRS, 3, 64, 64), tokens


def test_operations_are_those_that_are_computed(batch):
    model, images, tokens = batch
    with FlopCounterMode(display=False) as counter, clipfast.backend("reference"):
        features = model(images, tokens)[:2]
    expected = plan_training.forward_operations(SMALL, TOKENS) * PAIRS
    # the reference computes attention in a way of its own, which is a few percent of these blocks
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
    with FlopCounterMode(display=False) as counter, clipfast.backend("reference"):
        sum(f.sum() for f in model(images, tokens)[:2]).backward()
    assert counter.get_total_flops() == pytest.approx(3 * expected, rel=0.06)
    assert features[0].shape == (PAIRS, 32)


def test_values_that_are_kept_for_the_backward_pass(batch):
    model, images, tokens = batch
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), clipfast.exact_shortcuts(False):
        model(images, tokens)
    blocks = sum(kept.values()) / 4 / PAIRS
    patches = 64 * 3 * 8 * 8
    assert blocks - patches == pytest.approx(plan_training.saved_values(SMALL, TOKENS), rel=0.15)


def test_parameters_are_the_models():
    assert plan_training.parameters(clipfast.models.config.get_config("ViT-B-32")) == 151_277_313


def test_bytes_between_ranks():
    """Counted by hand for one case."""
    plan = plan_training.Plan("ViT-B-32", 8, 1024)
    weights, loss = plan_training.step_bytes(plan)
    assert weights == 2 * 151_277_313 * 4 * 7 / 8
    assert loss == (2 * 1024 * 512 + 5 * 1024) * 4 * 7 / 8
    fsdp = plan_training.Plan("ViT-B-32", 8, 1024, strategy="fsdp")
    assert plan_training.step_bytes(fsdp)[0] == weights * 1.5
    by_parts = plan_training.Plan("ViT-B-32", 8, 1024, strategy="fsdp", micro_batch_size=32)
    assert plan_training.step_bytes(by_parts)[0] == weights / 2 * (3 * 4 + 1)


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    for case in plan_training.CASES:
        assert plan_training.table(*case) in page, case[0]
