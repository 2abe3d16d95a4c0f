"""The contrastive losses and their gradients by their formulas in float64, and the scales of their sums."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from clipfast import ops
from clipfast.ops import contrastive_kernels

BIAS = -3.0
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        contrastive_kernels.native is None, reason=f"no op library: {contrastive_kernels.native_unavailable}"
    ),
)
TILED = ["torch", NATIVE]
BACKENDS = ["reference", *TILED]
LOSSES = {"contrastive": ops.contrastive_loss, "siglip": ops.siglip_loss}


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
    raw = [t.detach().double().cpu().numpy() for t in (image, text)]
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


def oracle_in_chunks(name: str, image: Tensor, text: Tensor, scale: float, bias: float, rows: int = 1024) -> Oracle:
    """Compute what :func:`oracle` does, some rows at a time and on the features' device: for batches of many thousands.

    The entries at the labels lose digits that :func:`oracle` keeps, which float64 has to spare beside any other dtype.
    """
    exact = torch.float64 if image.dtype == torch.float64 else torch.float32
    s, b = (torch.tensor(v, dtype=exact).item() for v in (scale, bias))
    i, t = image.detach().double(), text.detach().double()
    batch = i.shape[0]
    chunks = [slice(first, min(first + rows, batch)) for first in range(0, batch, rows)]
    d_image, d_text, moved_text = torch.empty_like(i), torch.zeros_like(t), torch.zeros_like(t)
    sums = dict.fromkeys(("loss", "d_scale", "d_bias", "of loss", "of d_scale", "of d_bias", "of d_image"), 0.0)
    if name == "contrastive":
        row_lse = torch.cat([(s * i[c] @ t.T).logsumexp(1) for c in chunks])
        column_lse = torch.full_like(row_lse, -torch.inf)
        for c in chunks:
            column_lse = torch.logaddexp(column_lse, (s * i[c] @ t.T).logsumexp(0))
    for c in chunks:
        cosines, products = i[c] @ t.T, i[c].abs() @ t.abs().T
        own = torch.zeros_like(cosines, dtype=torch.bool)
        own.diagonal(c.start).fill_(True)
        if name == "contrastive":
            x = s * cosines
            p, q = (x - row_lse[c, None]).exp(), (x - column_lse).exp()
            losses = (row_lse[c] + column_lse[c]) / 2 - x[own]
            g, slope = (p + q) / 2 - own.double(), (p * (1 - p) + q * (1 - q)) / 2
        else:
            y = torch.where(own, -1.0, 1.0) * (s * cosines + b)
            losses = torch.nn.functional.softplus(y, threshold=40).sum(1)
            wrong = y.sigmoid()
            g, slope = torch.where(own, -wrong, wrong), wrong * (1 - wrong)
        g, slope = g / batch, slope / batch
        moved = g.abs() + slope * (s * products + abs(b)) + own.double() / batch
        d_image[c], d_text = s * (g @ t), d_text + s * (g.T @ i[c])
        moved_text += s * (moved.T @ i[c].abs())
        for key, value in (
            ("loss", losses.sum() / batch),
            ("d_scale", (g * cosines).sum()),
            ("d_bias", g.sum()),
            ("of loss", (g.abs() * (s * products + abs(b))).sum()),
            ("of d_scale", (moved * products).sum()),
            ("of d_bias", moved.sum()),
        ):
            sums[key] += float(value)
        sums["of d_image"] = max(sums["of d_image"], float(s * (moved @ t.abs()).max()))
    scales = {
        "loss": max(1, abs(sums["loss"]), sums["of loss"]),
        "d_scale": max(1, sums["of d_scale"]),
        "d_bias": max(1, sums["of d_bias"]),
        "d_image": sums["of d_image"],
        "d_text": float(moved_text.max()),
    }
    d_bias = 0.0 if name == "contrastive" else sums["d_bias"]
    scalars = (np.asarray(v) for v in (sums["d_scale"], d_bias))
    return Oracle(np.asarray(sums["loss"]), d_image.cpu().numpy(), d_text.cpu().numpy(), *scalars, scales)


def run(loss: object, image: Tensor, text: Tensor, scale: float, **options: object) -> list[Tensor]:
    """Return a loss and its gradients of both features, the scale and (SigLIP) the bias."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    inputs = [t.detach().clone().requires_grad_() for t in (image, text)]
    scalars = [torch.tensor(v, dtype=dtype, device=image.device, requires_grad=True) for v in (scale, BIAS)]
    value = loss(*inputs, scalars[0], logit_bias=scalars[1], **options)
    value.sum().backward()
    return [value.detach(), *(t.grad for t in (*inputs, *scalars))]


def compare(
    name: str,
    backend: str,
    image: Tensor,
    text: Tensor,
    scale: float,
    cancels: bool = False,
    exact: Oracle | None = None,
    **options: object,
) -> None:
    """Hold a backend to the rule: at most twice the reference's error and two units of rounding.

    Units are of ``max|oracle|``; of the sum behind it for scalars, for gradients that cancel, and for SigLIP's, whose
    sigmoids turn a logit's rounding into their own. In float64, where the oracle has no more digits than what it is
    compared with, 1e-13 takes the place of the two units.
    """
    exact = exact or oracle(name, image, text, scale, BIAS, **options)
    with ops.backend("reference"):
        reference = run(LOSSES[name], image, text, scale, **options)
    with warnings.catch_warnings(), ops.backend(backend):
        warnings.simplefilter("error")
        fast = run(LOSSES[name], image, text, scale, **options)
    for what, mine, theirs, value in zip(exact._fields, fast, reference, exact, strict=False):
        assert mine.dtype == theirs.dtype
        natural = float(np.abs(value).max())
        if natural == 0 or cancels or name == "siglip" or what in ("loss", "d_scale", "d_bias"):
            natural = exact.scales[what]
        error, of_reference = (float(np.abs(t.double().cpu().numpy() - value).max()) for t in (mine, theirs))
        limits = torch.finfo(mine.dtype)
        allowed = 2 * of_reference + 2 * limits.eps * natural
        if mine.dtype == torch.float64:
            allowed = 2 * of_reference + 1e-13 * natural
        # under the normal range digits are lost in any case
        allowed += 2 * limits.tiny
        assert error <= allowed, (
            f"{name} {what}: error {error:.3e}, of the reference {of_reference:.3e}, {allowed=:.3e}"
        )
