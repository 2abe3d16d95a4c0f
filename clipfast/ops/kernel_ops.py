"""Triton kernels as PyTorch operators, ``torch.ops.clipfast.*``: defined without Triton, which the first call imports.

Operators, and not plain functions, because ``torch.compile`` and fake tensors must not look inside them. ``define``
and ``impl`` with a fake by hand cost a call 2 to 5 µs; ``torch.library.custom_op`` costs 11 to 13.

Every operator has a plain PyTorch form too. It computes where the kernel fails (:mod:`clipfast.ops.fallback`), and on a
card where the kernel did not pass its check (:mod:`clipfast.ops.trust`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipfast.ops import capturing, fallback, trust
from clipfast.ops.dispatch import constant_when_compiled

_library = torch.library.Library("clipfast", "FRAGMENT")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def define(
    schema: str,
    op: str,
    family: str,
    function: str,
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    trials: Callable[..., Iterable[trust.Trial]],
) -> None:
    """Define an operator that runs ``clipfast.kernels.<family>.<function>``.

    Args:
        schema: Its name and signature; the first argument is a tensor, on whose device it runs.
        op: The op of :mod:`clipfast.ops` that it is a part of.
        family: The kernels' file.
        function: The function in it, with the operator's arguments.
        fake: Returns empty results of the right shape, strides and dtype.
        plain: The operator in plain PyTorch.
        trials: Gets the arguments and returns what has to be right on a card before the kernel serves them.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def launch(*arguments: Any) -> Any:
        return kernel(family, function)(*arguments)

    def in_pytorch(*arguments: Any) -> Any:
        # the kernels compute in the dtypes that they are given, also where autocast is on
        with torch.autocast(arguments[0].device.type, enabled=False):
            return plain(*arguments)

    def run(first: Tensor, *rest: Any) -> Any:
        return trust.serve(op, first.device, trials, launch, in_pytorch, first, *rest)

    for device in ("CUDA", "CPU"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"clipfast::{name}", fake, lib=_library)


def is_recorded() -> bool:
    """Return whether a call may be derived, by whichever kind of differentiation, or is traced.

    Elsewhere its operator is called as it is: an autograd function would take as long as the kernel's launch.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch.compiler.is_compiling()


@functools.cache
def kernel(family: str, function: str) -> Callable[..., Any]:
    """Return a function of ``clipfast.kernels`` that launches on the device of its first argument."""
    capturing.forbid_compilation()
    launch = getattr(importlib.import_module(f"clipfast.kernels.{family}"), function)

    def on_its_device(first: Tensor, *rest: Any) -> Any:
        # Triton launches on the current device
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launch(first, *rest)
        return launch(first, *rest)

    return on_its_device


def refusal(op: str, trials: Callable[[], Iterable[trust.Trial]], x: Tensor, *others: Tensor | None) -> str | None:
    """Return why no Triton kernel can serve a call, or None.

    Args:
        op: The op.
        trials: Returns what has to be right on a card before the kernels serve the call.
        x: A tensor of the call, on whose device it runs.
        *others: The other ones.
    """
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} is not served (float32, float16 and bfloat16 are)"
        if tensor is not None and tensor.device != x.device:
            return f"the tensors are on {x.device} and {tensor.device}"
    reason = _unavailable(x.device.type, x.device.index)
    if reason is not None or not trust.is_possible():
        return reason
    if trust.is_required(x.device):
        reason = trust.refusal(op, x.device, trials())
    # a block that keeps tensors for its backward pass must keep the same ones when it is computed again
    if reason is None and not torch.is_grad_enabled():
        reason = fallback.failure(op, x.device)
    return reason


@constant_when_compiled
def _unavailable(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "it runs on NVIDIA GPUs, and on the CPU only with TRITON_INTERPRET=1"
    if device_type != "cuda" or torch.version.cuda is None:
        return f"it runs on NVIDIA GPUs, the tensors are on {device_type}"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"it needs compute capability 8.0, the card has {major}.{minor}"
