"""The Triton kernels of LayerNorm as PyTorch operators with gradients; what they serve, and how they are checked."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import kernel_ops, layer_norm_torch, trust
from clipfast.ops.probes import probe_rows, random

# the widest row that a program of the kernels holds
MAX_KERNEL_WIDTH = 4096


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_statistics(x)


def _fake_add_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype), *_statistics(x)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _fake_add_backward(
    dy: Tensor,
    dstream: Tensor,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    other = stream.new_empty(0 if x_dtype == residual_dtype else stream.shape, dtype=residual_dtype)
    parameters = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    total = stream.new_empty(0) if sum_dtype is None else weight.new_empty(weight.shape, dtype=sum_dtype)
    return stream.new_empty(stream.shape, dtype=x_dtype), other, *parameters, total


# every launch on a card asks for it: its name is put together once
@functools.cache
def _trial(
    device: torch.device,
    width: int,
    x: torch.dtype,
    residual: torch.dtype,
    weight: torch.dtype,
    add: bool,
    backward: bool,
    total: torch.dtype | None = None,
) -> trust.Trial:
    """Return how the kernels that rows of a width and these dtypes get are checked.

    ``total`` is the dtype of the sum over rows that a backward pass gives too, if any.
    """
    key = (width, x, residual, weight)
    op, direction = "add_layer_norm" if add else "layer_norm", "backward" if backward else "forward"
    dtypes = ", ".join(dict.fromkeys(str(t).removeprefix("torch.") for t in (x, residual, weight)))
    sums = "" if total is None else f", sums {str(total).removeprefix('torch.')}"
    name = f"{op} {direction}, width {width}, {dtypes}{sums}"
    key = key if total is None else (*key, total)
    return trust.Trial(
        name, key, lambda programs: _probe(device, programs, width, x, residual, weight, add, backward, total)
    )


def _probe(
    device: torch.device,
    programs: int,
    width: int,
    x: torch.dtype,
    residual: torch.dtype,
    weight: torch.dtype,
    add: bool,
    backward: bool,
    total: torch.dtype | None,
) -> trust.Probe:
    stream = torch.promote_types(x, residual)
    # 21 rows leave a tile of several rows unfilled; a program has 8 rows at the most
    copies = max(2, 8 * programs // 21)
    inputs = [random(1, device, x, 21, width) + 0.5, random(2, device, residual, 21, width)][: 1 + add]
    shared = (1 + random(3, device, weight, width) / 8, random(4, device, weight, width) / 8)
    if total is not None:
        shared += (torch.zeros(width, device=device, dtype=total),)
    d_outputs = tuple(random(5 + i, device, stream, 21, width) for i in range(1 + add)) if backward else ()
    family = functools.partial(kernel_ops.kernel, "layer_norm")

    def launch(rows: tuple[Tensor, ...], shared: tuple[Tensor, ...], d_outputs: tuple[Tensor, ...]) -> list[Tensor]:
        forward = list(family("add_forward" if add else "forward")(*rows, *shared[:2], 1e-5))
        outputs, statistics = forward[:-2], forward[-2:]
        if not d_outputs:
            return outputs
        if not add:
            return list(family("backward")(*d_outputs, rows[0], shared[0], *statistics))
        arguments = (*d_outputs, outputs[1], shared[0], *statistics, x, residual, total)
        dx, dresidual, *sums = family("add_backward")(*arguments)
        return [dx, dx if x == residual else dresidual, *sums[: len(shared)]]

    def reference(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not add:
            return layer_norm_torch.reference(*tensors, 1e-5)
        return layer_norm_torch.reference_add(*tensors[:4], 1e-5, *tensors[4:])

    return probe_rows(tuple(inputs), shared, d_outputs, copies, launch, reference)


def _forward_trials(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[trust.Trial]:
    return [_trial(x.device, x.shape[-1], x.dtype, x.dtype, weight.dtype, False, False)]


def _backward_trials(dy: Tensor, x: Tensor, weight: Tensor, *_: object) -> list[trust.Trial]:
    return [_trial(x.device, x.shape[-1], x.dtype, x.dtype, weight.dtype, False, True)]


def _add_forward_trials(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[trust.Trial]:
    return [_trial(x.device, x.shape[-1], x.dtype, residual.dtype, weight.dtype, True, False)]


def _add_backward_trials(
    dy: Tensor, dstream: Tensor, stream: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, x: torch.dtype,
    residual: torch.dtype, total: torch.dtype | None = None,
) -> list[trust.Trial]:  # fmt: skip
    return [_trial(stream.device, stream.shape[-1], x, residual, weight.dtype, True, True, total)]


kernel_ops.define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    "layer_norm",
    "layer_norm",
    "forward",
    _fake_forward,
    layer_norm_torch.forward,
    _forward_trials,
)
kernel_ops.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    "layer_norm",
    "layer_norm",
    "backward",
    _fake_backward,
    layer_norm_torch.backward,
    _backward_trials,
)
kernel_ops.define(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "add_layer_norm",
    "layer_norm",
    "add_forward",
    _fake_add_forward,
    layer_norm_torch.add_forward,
    _add_forward_trials,
)
kernel_ops.define(
    "add_layer_norm_backward(Tensor dy, Tensor dstream, Tensor stream, Tensor weight, Tensor mean, Tensor rstd,"
    " ScalarType x_dtype, ScalarType residual_dtype, ScalarType? sum_dtype=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "add_layer_norm",
    "layer_norm",
    "add_backward",
    _fake_add_backward,
    layer_norm_torch.add_backward,
    _add_backward_trials,
)


# the overloads themselves: a name that may mean several is resolved at every call
_forward = torch.ops.clipfast.layer_norm_forward.default
_backward = torch.ops.clipfast.layer_norm_backward.default
_add_forward = torch.ops.clipfast.add_layer_norm_forward.default
_add_backward = torch.ops.clipfast.add_layer_norm_backward.default


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(dy, *ctx.saved_tensors), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        bias_of_x: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, stream, mean, rstd = _add_forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(stream, weight, mean, rstd)
        ctx.dtypes = x.dtype, residual.dtype, None if bias_of_x is None else bias_of_x.dtype
        return y, stream

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor, dstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dresidual, dweight, dbias, dsum = _add_backward(dy, dstream, *ctx.saved_tensors, *ctx.dtypes)
        # the gradient of a sum is that of both terms
        same = ctx.dtypes[0] == ctx.dtypes[1]
        return dx, dx if same else dresidual, dweight, dbias, None, None if ctx.dtypes[2] is None else dsum


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return ``layer_norm(x)`` by the Triton kernels."""
    return _LayerNorm.apply(x, weight, bias, eps) if kernel_ops.is_recorded() else _forward(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(layer_norm(x + residual), x + residual)`` by the Triton kernels, and the way back to ``bias_of_x``."""
    if kernel_ops.is_recorded():
        return _AddLayerNorm.apply(x, residual, weight, bias, eps, bias_of_x)
    y, stream, _, _ = _add_forward(x, residual, weight, bias, eps)
    return y, stream


def refusal(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    """Return why the kernels cannot serve a call of ``layer_norm``, or None."""
    return _unservable(x, weight, bias) or kernel_ops.refusal(
        "layer_norm", lambda: _trials(x, x, weight, add=False), x, weight, bias
    )


def add_refusal(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor | None = None
) -> str | None:
    """Return why the kernels cannot serve a call of ``add_layer_norm``, or None."""
    total = None if bias_of_x is None else bias_of_x.dtype
    return _unservable(x, weight, bias) or kernel_ops.refusal(
        "add_layer_norm",
        lambda: _trials(x, residual, weight, add=True, total=total),
        *(x, residual, weight, bias, bias_of_x),
    )


def _unservable(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if not 0 < x.shape[-1] <= MAX_KERNEL_WIDTH:
        return f"width {x.shape[-1]} is not served (1 to {MAX_KERNEL_WIDTH} are)"
    return "weight and bias differ in dtype" if weight.dtype != bias.dtype else None


def _trials(
    x: Tensor, residual: Tensor, weight: Tensor, add: bool, total: torch.dtype | None = None
) -> list[trust.Trial]:
    shape = x.device, x.shape[-1], x.dtype, residual.dtype, weight.dtype
    trials = [_trial(*shape, add, False)]
    if torch.is_grad_enabled():
        trials.append(_trial(*shape, add, True, total))
    return trials
