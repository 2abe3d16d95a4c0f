"""A self-test of every op that takes seconds: each implementation that this machine can run, against float64.

The bound is the one of docs/numerics.md: twice the error of plain PyTorch in the same dtype, and two units of rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import clipfast.ops  # noqa: F401  # registers them
from clipfast.ops import dispatch, numerics
from clipfast.ops.encoder import BlockWeights, PackedEncoder

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# ops whose products in bfloat16 are others than in float32, and may be AMX's
_BFLOAT16_ON_CPU = ("contrastive_loss", "siglip_loss", "encoder")


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: Its name.
        what: What is special about the call.
        inputs: Floating-point tensors, float64 on the CPU; gradients are taken for all of them.
        arguments: Makes the op's arguments of the inputs in some dtype, on some device.
        gradients: Whether the op has a backward pass.
        scales: The natural scales of the outputs and gradients where the largest value is none (docs/numerics.md).
    """

    op: str
    what: str
    inputs: tuple[Tensor, ...]
    arguments: Callable[..., Arguments]
    gradients: bool = True
    scales: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Result:
    """What one implementation gave for one case; ``error`` and ``allowed`` are those of its worst tensor."""

    op: str
    what: str
    backend: str
    device: str
    dtype: str
    passed: bool
    error: float | None
    allowed: float | None
    reason: str | None


def cases(device_type: str) -> list[Case]:
    """Return a few small calls of every op that runs on a kind of device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def offsets(x: Tensor) -> Tensor:
        return torch.tensor([0, 9, 10, 40], dtype=torch.int32, device=x.device)

    qkv, packed, width = normal(2, 50, 3 * 128), normal(40, 3 * 128), 256
    query, keys, values = normal(3, 128), normal(3, 20, 128), normal(3, 20, 128)
    rows, residual, weight, bias = normal(40, width), normal(40, width), 1 + 0.1 * normal(width), normal(width)
    images, texts = (torch.nn.functional.normalize(normal(48, 64), dim=-1) for _ in range(2))
    scale, feature_scale = torch.tensor(20.0, dtype=torch.float64), 20 / 48
    made = [
        Case("attention", "dense", (qkv,), lambda x: ((x, 2), {})),
        Case("attention", "causal", (qkv,), lambda x: ((x, 2), {"causal": True})),
        Case("attention", "packed, causal", (packed,), lambda x: ((x, 2), {"causal": True, "cu_seqlens": offsets(x)})),
        Case("single_query_attention", "dense", (query, keys, values), lambda *x: ((*x, 2), {})),
        Case("layer_norm", "", (rows, weight, bias), lambda *x: (x, {})),
        Case("add_layer_norm", "", (rows, residual, weight, bias), lambda *x: (x, {})),
        *(
            Case("bias_gelu", form, (rows, bias), lambda *x, form=form: ((*x, form), {}))
            for form in ("none", "tanh", "quick")
        ),
        Case(
            "contrastive_loss",
            "",
            (images, texts, scale),
            lambda *x: (x, {}),
            scales=(1.0, feature_scale, feature_scale, 1.0),
        ),
        # both losses are near 6, and targets that are no label double the terms of gradients
        Case(
            "distillation_loss",
            "",
            (images, texts, scale),
            lambda x, y, s: ((x, y, s, y.detach(), x.detach(), 8.0), {}),
            scales=(6.0, 6.0, 2 * feature_scale, 2 * feature_scale, 2.0),
        ),
        # a sum over 48 texts with logits of up to 20
        Case(
            "siglip_loss",
            "",
            (images, texts, scale),
            lambda *x: (x, {}),
            scales=(48.0, 48 * feature_scale, 48 * feature_scale, 48.0),
        ),
        # with gradients, its loss comes from another kernel
        Case(
            "siglip_loss",
            "loss alone",
            (images, texts, scale),
            lambda *x: (x, {}),
            gradients=False,
            scales=(48.0,),
        ),
    ]
    if device_type == "cpu":
        shapes = ((64,), (64,), (192, 64), (192,), (64, 64), (64,), (64,), (64,), (256, 64), (256,), (64, 256), (64,))
        weights = [0.1 * normal(*shape) for shape in shapes * 2]
        made.append(Case("encoder", "two blocks", (normal(40, 64), *weights), _encoder_arguments, gradients=False))
    return made


def _encoder_arguments(x: Tensor, *weights: Tensor) -> Arguments:
    blocks = []
    for first in range(0, len(weights), 12):
        pairs = [(weights[i], weights[i + 1]) for i in range(first, first + 12, 2)]
        blocks.append(BlockWeights(*pairs))
    encoder = PackedEncoder(blocks, heads=2, causal=True, approximate="none", eps=1e-5)
    return (x, encoder), {"cu_seqlens": torch.tensor([0, 9, 10, 40])}


def _compute(case: Case, inputs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    """Return outputs and gradients of one backend."""
    inputs = tuple(x.detach().clone().requires_grad_(case.gradients) for x in inputs)
    args, keywords = case.arguments(*inputs)
    with dispatch.backend(backend), warnings.catch_warnings(), torch.set_grad_enabled(case.gradients):
        # ops that this one calls may have no such implementation
        warnings.simplefilter("ignore", dispatch.FallbackWarning)
        outputs = dispatch.call(case.op, *args, **keywords)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not case.gradients:
            return list(outputs)
        # not a sum alone: that of LayerNorm's gradients is zero
        total = sum((y.double() * _weights(y)).sum() for y in outputs)
        return [y.detach() for y in outputs] + list(torch.autograd.grad(total, inputs))


def _weights(y: Tensor) -> Tensor:
    if y.dim() == 0:
        return torch.ones((), dtype=torch.float64, device=y.device)
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).reshape(y.shape)


def check(case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> Result:
    """Run one implementation forward and backward and compare it with float64. It never raises."""
    about = case.op, case.what, backend, str(device), str(dtype).removeprefix("torch.")
    try:
        # all get the rounded inputs
        inputs = tuple(x.to(device, dtype) for x in case.inputs)
        oracle = _compute(case, tuple(x.double() for x in inputs), "reference")
        reference = _compute(case, inputs, "reference")
        found = _compute(case, inputs, backend)
        error, allowed = numerics.worst(found, reference, oracle, case.scales)
    except Exception as failure:
        message = " ".join(str(failure).split())[:300]
        return Result(*about, False, None, None, f"{type(failure).__name__}: {message}")
    if error <= allowed:
        return Result(*about, True, error, allowed, None)
    return Result(*about, False, error, allowed, f"the error is {error:.2e}, at most {allowed:.2e} is allowed")


def run(device: torch.device) -> list[Result]:
    """Check every implementation of every op that can run on a device.

    The reference is the measure; it is run itself only where nothing else can serve.
    """
    results = []
    for case in cases(device.type):
        # on the CPU, bfloat16 has instructions of its own in the op library alone
        both = device.type != "cpu" or case.op in _BFLOAT16_ON_CPU
        for dtype in (torch.float32, torch.bfloat16) if both else (torch.float32,):
            try:
                args, keywords = case.arguments(*(x.to(device, dtype) for x in case.inputs))
                backends = dispatch.able(case.op, *args, **keywords)
            except Exception as failure:
                reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
                name = str(dtype).removeprefix("torch.")
                results.append(Result(case.op, case.what, "any", str(device), name, False, None, None, reason))
                continue
            others = [b for b in backends if b != "reference"]
            results += [check(case, b, device, dtype) for b in others or backends]
    return results


def explanations(device: torch.device) -> dict[str, str]:
    """Return what ``clipfast.explain`` says of every op's first case on a device, in the dtype of its training."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    said: dict[str, str] = {}
    for case in cases(device.type):
        if case.op not in said:
            args, keywords = case.arguments(*(x.to(device, dtype) for x in case.inputs))
            # what else there is to say of the tuned file, the doctor says once
            said[case.op] = "\n".join(dispatch.explanation(case.op, *args, **keywords)[0])
    return said
