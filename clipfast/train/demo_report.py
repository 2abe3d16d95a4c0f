"""What the demo prints and writes about a trained model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from clipfast.data.emoji_pairs import ATTRIBUTION
from clipfast.models.clip import CLIP
from clipfast.modules.vit import ViT
from clipfast.train.emoji_batches import normalized_pixels
from clipfast.train.engine import TrainResult
from clipfast.visualize.attention_maps import attention_rollout, plot_attention_maps
from clipfast.visualize.feature_space import plot_feature_space, project_features
from clipfast.visualize.report import Report
from clipfast.visualize.retrieval_sheet import nearest_captions, retrieval_sheet
from clipfast.visualize.training_curves import plot_training_curves

_SHEET_PICTURES = 16
_ATTENTION_PICTURES = 8
_SPACE_PAIRS = 150


def metric_rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Set the metrics as rows of words: what was measured, the result, chance, and how many times chance it is."""
    rows = []
    for direction, words in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        for k in (1, 5, 10):
            rows.append((f"{words}, recall@{k}", metrics[f"{direction}_r{k}"], metrics[f"{direction}_chance{k}"]))
    for name in ("category", "person", "skin_tone"):
        classes = metrics[f"zero_shot_{name}_classes"]
        result, chance = metrics[f"zero_shot_{name}_accuracy"], metrics[f"zero_shot_{name}_chance"]
        rows.append((f"zero-shot {name.replace('_', ' ')}, one of {classes:.0f}", result, chance))
    return [(words, f"{result:.3f}", f"{chance:.3f}", f"{result / chance:.1f}×") for words, result, chance in rows]


_METRIC_HEADER = ("on held-out pairs", "result", "chance", "ratio")


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """Set the metrics as a table for the terminal."""
    table = Table(*_METRIC_HEADER)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in metric_rows(metrics):
        table.add_row(*row)
    return table


@dataclass(frozen=True)
class HeldOutPairs:
    """The N pairs that training did not see, and where the model puts them.

    Attributes:
        pictures: uint8 ``[N, S, S, 3]``.
        captions: N captions.
        image_features: ``[N, D]``.
        text_features: ``[N, D]``.
    """

    pictures: np.ndarray
    captions: list[str]
    image_features: Tensor
    text_features: Tensor


def write_demo_report(
    path: Path,
    clip: CLIP,
    held_out: HeldOutPairs,
    metrics: Mapping[str, float],
    training: TrainResult,
    batch_size: int,
    settings: Mapping[str, str],
) -> None:
    """Write the demo's report.

    Args:
        path: Of the HTML file.
        clip: The trained model, in ``eval()``.
        held_out: What it is measured on.
        metrics: As the demo measured them.
        training: The run's records.
        batch_size: Pairs a step.
        settings: What to list as the configuration, ``pairs`` among it.
    """
    pictures, captions = held_out.pictures, held_out.captions
    # drawn at random and not chosen, so that they show what is usual
    order = np.random.default_rng(0).permutation(len(captions))
    report = Report(
        "A small CLIP, trained on emoji",
        f"It learned from OpenMoji pictures and their English names: {settings['pairs']}. What follows is measured on "
        f"those held out: combinations that it never saw, made of parts that it did.",
    )
    recall, chance = metrics["text_to_image_r5"], metrics["text_to_image_chance5"]
    report.add_tiles(
        [
            (f"{recall:.0%}", f"of captions find their picture among the first five of {len(captions)} (recall@5)"),
            (f"{recall / chance:.0f}×", f"as often as a guess, which finds {chance:.1%}"),
            (f"{metrics['zero_shot_category_accuracy']:.0%}", _category_words(metrics)),
        ]
    )
    report.add_section("Measured")
    report.add_table(_METRIC_HEADER, metric_rows(metrics))
    report.add_text(
        "Of equal scores the first goes first. Chance for retrieval is a random order; for zero-shot questions it is "
        "always naming the commonest answer."
    )
    report.add_section("Five nearest captions", "Held-out pictures drawn at random, with cosine similarities.")
    queries = order[:_SHEET_PICTURES].tolist()
    retrievals = nearest_captions(held_out.image_features, held_out.text_features, queries)
    report.add_html(retrieval_sheet(pictures, captions, queries, retrievals))

    shown = order[:_SPACE_PAIRS]
    report.add_section(
        "The shared space",
        f"{len(shown)} held-out pictures and their captions (dots), each joined with its own, laid out by t-SNE. Short "
        f"lines are pairs that found each other. The mean of either modality is taken out first.",
    )
    image_points, text_points = project_features(held_out.image_features[shown], held_out.text_features[shown])
    report.add_figure(plot_feature_space(image_points, text_points, pictures[shown]), "t-SNE of the shared space")

    history = [asdict(record) for record in training.history]
    report.add_section("Training")
    report.add_figure(plot_training_curves(history, math.log(batch_size)), "loss, logit scale and speed over the steps")

    if isinstance(clip.visual, ViT):
        chosen = order[:_ATTENTION_PICTURES]
        with torch.no_grad():
            images = normalized_pixels(pictures[chosen]).to(clip.logit_scale.device)
            read = clip.visual.get_pool_weights(images).mean(dim=1)
            shares = attention_rollout(clip.visual.get_attention_maps(images), read, clip.visual.prefix_tokens)
        report.add_section("Where it looks", "Attention from what is read, followed through all blocks (rollout).")
        report.add_figure(plot_attention_maps(pictures[chosen], shares, clip.visual.grid_size), "attention maps")

    report.add_section("Configuration")
    report.add_table((), list(settings.items()))
    report.write(path, footer=ATTRIBUTION)


def _category_words(metrics: Mapping[str, float]) -> str:
    classes, chance = metrics["zero_shot_category_classes"], metrics["zero_shot_category_chance"]
    return f"named the right one of {classes:.0f} categories, zero-shot (the commonest is {chance:.0%})"
