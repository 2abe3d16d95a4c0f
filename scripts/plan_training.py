"""What a training step asks of every rank: operations, bytes between ranks, and memory.

    python scripts/plan_training.py [MODEL ...]

prints the tables of docs/distributed.md. The formulas are counts, of what the code does; nothing in them is a time.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

from clipfast.models.config import CLIPConfig, get_config
from clipfast.models.create import create_model

RANKS = (8, 64, 256, 1024)
FP32 = 4


@dataclass(frozen=True)
class Plan:
    """A training run.

    Attributes:
        model: A model's name.
        ranks: W, the processes.
        batch_size: B, pairs a step over all ranks.
        text_tokens: Tokens of a caption on average; what follows its EOS is not computed.
        micro_batch_size: Pairs encoded at once, each twice; 0 encodes all of a rank's pairs at once, and once.
        strategy: ``"ddp"`` or ``"fsdp"``.
        checkpointing: Whether blocks' activations are computed again.
    """

    model: str
    ranks: int
    batch_size: int
    text_tokens: float = 20
    micro_batch_size: int = 0
    strategy: str = "ddp"
    checkpointing: bool = False

    @property
    def config(self) -> CLIPConfig:
        """The model's sizes."""
        return get_config(self.model)

    @property
    def pairs(self) -> int:
        """b, the pairs of one rank."""
        return self.batch_size // self.ranks


def towers(config: CLIPConfig, text_tokens: float) -> list[tuple[int, int, float]]:
    """Return layers, width and tokens of both towers."""
    vision, text = config.vision_cfg, config.text_cfg
    patches = (vision.image_size // vision.patch_size) ** 2
    return [(vision.layers, vision.width, patches + 1), (text.layers, text.width, text_tokens)]


def forward_operations(config: CLIPConfig, text_tokens: float) -> float:
    """Count the multiplications and additions of one pair's way through both towers.

    A block is 24·W² a token in its products, and 4·W·N in attention. The last block of each tower computes keys and
    values of every token, 4·W², and the rest of one. The patches are a product, and so is each projection.
    """
    total = 0.0
    for layers, width, tokens in towers(config, text_tokens):
        total += (layers - 1) * tokens * (24 * width**2 + 4 * width * tokens)
        total += tokens * 4 * width**2 + 20 * width**2 + 4 * width * tokens
        total += 2 * width * config.embed_dim
    vision = config.vision_cfg
    patches = (vision.image_size // vision.patch_size) ** 2
    return total + 2 * patches * 3 * vision.patch_size**2 * vision.width


def step_operations(plan: Plan) -> tuple[float, float]:
    """Return a rank's operations of one step: in the towers, and in the loss.

    Backward is twice forward; gradients by parts and computing activations again add one forward each. The loss is one
    product forward, one again and two backward: 8·b·B·D.
    """
    passes = 3 + (plan.micro_batch_size > 0) + plan.checkpointing
    loss = 8.0 * plan.pairs * plan.batch_size * plan.config.embed_dim
    return passes * plan.pairs * forward_operations(plan.config, plan.text_tokens), loss


def step_bytes(plan: Plan) -> tuple[float, float]:
    """Return the bytes that a rank sends in one step: of weights and gradients, and for the loss.

    A ring's all-gather or reduce-scatter of n bytes sends n·(W−1)/W. DDP reduces float32 gradients (twice that). FSDP2
    gathers weights forward and backward, for gradients by parts three times a part, and scatters gradients once. The
    loss gathers texts and scatters their gradients, B·D each in float32, and reduces two numbers a text (the largest
    logit, and a sum) and gathers one.
    """
    share = (plan.ranks - 1) / plan.ranks
    weights = parameters(plan.config) * FP32
    gathers = 3 * math.ceil(plan.pairs / plan.micro_batch_size) if plan.micro_batch_size else 2
    of_weights = (2 if plan.strategy == "ddp" else gathers + 1) * weights * share
    of_loss = (2 * plan.batch_size * plan.config.embed_dim + 2 * 2 * plan.batch_size + plan.batch_size) * FP32 * share
    return of_weights, of_loss


def memory(plan: Plan) -> tuple[float, float, float]:
    """Return a rank's bytes: for weights and the optimizer, for activations, and for the loss.

    Weights, gradients and two moments are 16 bytes a parameter; FSDP2 shares them, and holds two blocks' weights whole
    (the one that computes and the next). Activations are those of :func:`saved_values`, in two bytes, of a micro-batch;
    with checkpointing, each block's input and one block. The loss holds all texts and their gradients, and this rank's
    images and theirs.
    """
    config = plan.config
    count = parameters(config)
    if plan.strategy == "ddp":
        weights = 16.0 * count
    else:
        block = max(12 * width**2 for _, width, _ in towers(config, plan.text_tokens))
        weights = 16.0 * count / plan.ranks + 2 * block * FP32
    at_once = min(plan.micro_batch_size or plan.pairs, plan.pairs)
    activations = 2.0 * at_once * saved_values(config, plan.text_tokens, plan.checkpointing)
    loss = 2.0 * (plan.batch_size + plan.pairs) * config.embed_dim * FP32
    return weights, activations, loss


def saved_values(config: CLIPConfig, text_tokens: float, checkpointing: bool = False) -> float:
    """Count the values that one pair's blocks keep for the backward pass.

    A block keeps 16·W a token: its input, LayerNorm's output, queries, keys and values, attention's output, the sum,
    the second LayerNorm's output, and four W before and after the GELU.
    """
    total = 0.0
    for layers, width, tokens in towers(config, text_tokens):
        total += (layers + 15 if checkpointing else 16 * layers) * tokens * width
    return total


def parameters(config: CLIPConfig) -> int:
    """Count the parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(config, device="meta").parameters())


CASES = (
    ("ViT-B-32", 32_768, 0, "ddp", False),
    ("ViT-L-14", 32_768, 128, "ddp", False),
    ("ViT-H-14", 65_536, 512, "fsdp", True),
)


def table(model: str, batch_size: int, micro: int, strategy: str, checkpointing: bool) -> str:
    """Set one model's step on all numbers of ranks as a table in Markdown."""
    how = f"{strategy.upper()}, " + (f"{micro} pairs at once" if micro else "all pairs at once")
    how += ", blocks checkpointed" if checkpointing else ""
    lines = [
        f"**{model}**, {batch_size:,} pairs a step, {how}:",
        "",
        "| ranks | pairs a rank | towers, TFLOP | loss, TFLOP | weights and gradients sent | loss sent | "
        "weights, optimizer | activations | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        plan = Plan(model, ranks, batch_size, 20, micro, strategy, checkpointing)
        operations, sent, held = step_operations(plan), step_bytes(plan), memory(plan)
        numbers = [f"{x / 1e12:.3g}" for x in operations] + [_bytes(x) for x in (*sent, *held)]
        lines.append(f"| {ranks:,} | {plan.pairs:,} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    chosen = [case for case in CASES if not sys.argv[1:] or case[0] in sys.argv[1:]]
    print("\n\n".join(table(*case) for case in chosen))
