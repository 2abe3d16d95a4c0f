"""The contrastive losses and their gradients by their formulas in float64, and the scales of their sums."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Oracle(NamedTuple):
    """A loss and its gradients, and the natural scales of the sums behind them."""

    loss: np.ndarray
    d_image: np.ndarray
    d_text: np.ndarray
    d_scale: np.ndarray
    d_bias: np.ndarray
    scales: dict[str, float]


def oracle(
    name: str,
    image: Tensor,
    text: Tensor,
    scale: float,
    bias: float,
    *,
    reduction: str = "mean",
    normalize: bool = False,
) -> Oracle:
    """Compute the loss ``name`` in float64."""
    raw = [t.detach().double().numpy() for t in (image, text)]
    # scalars as the tested code sees them: rounded to the features' precision of sums
    exact = torch.float64 if image.dtype == torch.float64 else torch.float32
    s, b = (torch.tensor(v, dtype=exact).item() for v in (scale, bias))
    norms = [np.maximum(np.sqrt((x * x).sum(1, keepdims=True)), 1e-12) if normalize else np.ones(1) for x in raw]
    i, t = (x / n for x, n in zip(raw, norms, strict=True))
    batch, cosines = i.shape[0], i @ t.T
    own = np.eye(batch, dtype=bool)
    weight = 1.0 if reduction == "none" else 1.0 / batch
    if name == "contrastive":
        x = s * cosines
        most = [x.max(axis, keepdims=True) for axis in (1, 0)]
        sums = [np.exp(x - m).sum(axis, keepdims=True) for m, axis in zip(most, (1, 0), strict=True)]
        losses = sum((m.ravel() - x.diagonal() + np.log(z).ravel()) / 2 for m, z in zip(most, sums, strict=True))
        g = sum((np.exp(x - m) / z - own) / 2 for m, z in zip(most, sums, strict=True)) * weight
        slope = sum(p * (1 - p) for p in (np.exp(x - m) / z for m, z in zip(most, sums, strict=True))) / 2 * weight
        # at the label 1 - p is taken from the other terms: their sum keeps the digits that the difference loses
        g[own] = 0
        g[own] = (
            -sum(
                (np.where(own, 0, np.exp(x - m)) / z).sum(axis) / 2
                for m, z, axis in zip(most, sums, (1, 0), strict=True)
            )
            * weight
        )
    else:
        x = s * cosines + b
        y = np.where(own, -x, x)
        small = np.exp(-np.abs(y))
        losses = (np.maximum(y, 0) + np.log1p(small)).sum(1)
        g = np.where(own, -1, 1) * np.where(y > 0, 1, small) / (1 + small) * weight
        slope = small / (1 + small) ** 2 * weight
    loss = losses if reduction == "none" else losses.mean()
    # what the terms of a scalar's sum come to without their signs
    products = np.abs(i) @ np.abs(t).T
    # and how a logit's own rounding, in proportion to its terms, moves them
    moved = np.abs(g) + slope * (s * products + abs(b))
    # the label's entry is a difference from 1
    moved[own] += weight
    scales = {
        "loss": max(1, float(np.abs(loss).max()), float((np.abs(g) * (s * products + abs(b))).sum())),
        "d_scale": max(1, float((moved * products).sum())),
        "d_bias": max(1, float(moved.sum())),
        "d_image": float(s * (moved @ np.abs(t)).max()),
        "d_text": float(s * (moved.T @ np.abs(i)).max()),
    }
    d_image, d_text = s * (g @ t), s * (g.T @ i)
    if normalize:
        d_image, d_text = (
            np.where(n > 1e-12, d - y * (d * y).sum(1, keepdims=True), d) / n
            for d, y, n in zip((d_image, d_text), (i, t), norms, strict=True)
        )
    d_bias = 0.0 if name == "contrastive" else g.sum()
    return Oracle(np.asarray(loss), d_image, d_text, np.asarray((g * cosines).sum()), np.asarray(d_bias), scales)
