"""What the settings of training may be: a rule for each, and what must fit together."""

from __future__ import annotations

from typing import Any

from clipfast.settings import ANY, SOME_TEXT, Rule, above, at_least, between, share

# folders of checkpoints are sorted by names of nine digits
MOST_STEPS = 999_999_999

# torch.compile's modes that capture CUDA graphs, and the nearest that does not
GRAPH_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def patch_counts(text: str) -> tuple[int, ...]:
    """Return the numbers of ``"128,256"``; none where one is no number from 1 up."""
    parts = [part.strip() for part in text.split(",")]
    whole = all(part.isascii() and part.isdecimal() and 1 <= int(part) <= 1_000_000 for part in parts)
    return tuple(int(part) for part in parts) if whole else ()


RULES: dict[str, Rule] = {
    "steps": at_least(1),
    "learning_rate": above(0),
    "schedule": ANY,
    "warmup_steps": at_least(0),
    "weight_decay": at_least(0),
    "max_grad_norm": above(0),
    "precision": ANY,
    "micro_batch_size": at_least(1),
    "ema_decay": share(),
    "grad_checkpointing": ANY,
    "compile": ANY,
    "strategy": ANY,
    "seed": between(0, 2**63 - 1),
    "loss": ANY,
    "decay_positions": ANY,
    "label_smoothing": share(),
    "lock_image": ANY,
    # negative ones count those that are frozen, from the front
    "lock_image_unlocked_groups": ANY,
    "lock_image_freeze_bn_stats": ANY,
    "lock_text": ANY,
    "lock_text_unlocked_layers": ANY,
}

# of a whole run; ``steps`` is 0 where epochs are counted
RUN_RULES: dict[str, Rule] = RULES | {
    "data": SOME_TEXT,
    "steps": between(0, MOST_STEPS),
    "epochs": between(0, 1_000_000),
    "batch_size": at_least(2),
    "model": SOME_TEXT,
    "weights": SOME_TEXT,
    "tokenizer": SOME_TEXT,
    "patch_dropout": share(),
    "naflex_max_patches": Rule(
        "numbers of patches from 1 up, such as '256' or '128,256'", lambda text: bool(patch_counts(text))
    ),
    "naflex_tokens_per_batch": at_least(2),
    "distill_model": SOME_TEXT,
    "distill_weights": SOME_TEXT,
    "caption_key": SOME_TEXT,
    "image_key": SOME_TEXT,
    "caption_column": SOME_TEXT,
    "image_column": SOME_TEXT,
    # a tab is one
    "separator": ANY,
    "quotes": ANY,
    "encoding": SOME_TEXT,
    "as_open_clip": ANY,
    "apply_orientation": ANY,
    "val_data": SOME_TEXT,
    "val_every": at_least(1),
    "val_pairs": at_least(2),
    "output": SOME_TEXT,
    "save_every": at_least(1),
    "keep": at_least(1),
    "resume": SOME_TEXT,
    "workers": between(0, 1000),
    "shuffle_pool": at_least(1),
    "device": SOME_TEXT,
    # a month; NCCL and gloo count milliseconds
    "timeout": Rule("more than 0 and at most 2,592,000 seconds", lambda value: 0 < value <= 2_592_000),
    "tensorboard": ANY,
}


def check_together(values: dict[str, Any], usual_warmup: int) -> None:
    """Check what settings of training say together.

    Args:
        values: By name, each by its own rule already; ``steps`` is 0 where they are not yet known.
        usual_warmup: The warm-up of who sets none: a run with fewer steps takes fewer.

    Raises:
        ValueError: They contradict each other.
    """
    steps, warmup = values["steps"], values["warmup_steps"]
    if 0 < steps < warmup != usual_warmup:
        raise ValueError(f"warmup_steps: got {warmup}, expected at most {steps}, which is steps")
    shrink = values["learning_rate"] * values["weight_decay"]
    if shrink >= 1:
        raise ValueError(
            f"weight_decay: got {values['weight_decay']}, which takes {shrink:.3g} of the weights away in a step with "
            f"the learning rate {values['learning_rate']}, expected less than 1"
        )
    if values["precision"] == "fp16" and values["strategy"] == "fsdp":
        raise ValueError("precision: got 'fp16' with fsdp, expected 'bf16': the scale of fp16 is not shared by ranks")
    graphs = values["compile"] in GRAPH_MODES
    for name, usual, why in (
        ("strategy", "ddp", "a graph keeps the addresses of the weights, which FSDP2 gathers anew"),
        ("micro_batch_size", None, "gradients that add up over parts would lie where the next part's graph writes"),
        ("grad_checkpointing", False, "nobody has shown that a graph can be replayed inside a backward pass"),
    ):
        if graphs and values[name] != usual:
            raise ValueError(
                f"compile: got {values['compile']!r} with {name} = {values[name]!r}, expected a mode without CUDA "
                f"graphs ('default', 'max-autotune-no-cudagraphs'): {why}"
            )
    for lock, names in (
        ("lock_image", ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats")),
        ("lock_text", ("lock_text_unlocked_layers",)),
    ):
        for name in names:
            if values[name] and not values[lock]:
                raise ValueError(f"{name}: got {values[name]} without {lock}, expected both or neither")
    most = values.get("naflex_max_patches")
    if most is not None and len(patch_counts(most)) > 1 and values["naflex_tokens_per_batch"] is None:
        raise ValueError(
            f"naflex_max_patches: got {most!r} without naflex_tokens_per_batch, expected one number, or both: large "
            f"pictures take the place of several small ones"
        )
    teacher, weights = values.get("distill_model"), values.get("distill_weights")
    if (teacher is None) != (weights is None):
        raise ValueError(f"distill_model, distill_weights: got {teacher} and {weights}, expected both or neither")
    if values["loss"] == "siglip":
        check_sigmoid(values["label_smoothing"], teacher is not None)
    if teacher is not None and values["label_smoothing"]:
        raise ValueError(f"label_smoothing: got {values['label_smoothing']} with distill_model, expected 0")


def check_sigmoid(label_smoothing: float, taught: bool) -> None:
    """Check what the sigmoid loss is combined with: a softmax over the batch is what the others are defined on.

    Raises:
        ValueError: It has no such thing.
    """
    if label_smoothing:
        raise ValueError(f"label_smoothing: got {label_smoothing} with the sigmoid loss, expected 0, or loss = 'clip'")
    if taught:
        raise ValueError("distill_model: got a teacher with the sigmoid loss, expected none, or loss = 'clip'")
