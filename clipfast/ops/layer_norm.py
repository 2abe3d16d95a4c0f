"""LayerNorm, alone and with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipfast.ops import dispatch, keys, layer_norm_native, layer_norm_torch, layer_norm_triton
from clipfast.ops.call_classes import LARGE, Key


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise every row of ``x`` over its last dimension, then scale and shift it.

    Args:
        x: ``[..., C]``, floating point.
        weight: ``[C]``.
        bias: ``[C]``.
        eps: Added to the variance.

    Returns:
        ``[..., C]`` in the dtype of ``x``. Statistics are taken in float32 at least.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``weight`` or ``bias`` is not ``[C]``.

    Source: Ba et al., "Layer Normalization" (2016).
    """
    return dispatch.call("layer_norm", x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, bias_of_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum.

    Args:
        x: ``[..., C]``, what a block adds to the stream.
        residual: ``[..., C]``, the stream.
        weight: ``[C]``.
        bias: ``[C]``.
        eps: Added to the variance.
        bias_of_x: ``[C]``, a bias that ``x`` has already got, without a gradient of its own: this gives the gradient,
            the sum over rows of that of ``x``, which the kernels hold as they compute it.

    Returns:
        ``(layer_norm(x + residual), x + residual)``, both ``[..., C]`` in the dtype of the sum.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``residual`` has not the shape of ``x``, or ``weight``, ``bias`` or ``bias_of_x`` is not ``[C]``.
    """
    if bias_of_x is None:
        return dispatch.call("add_layer_norm", x, residual, weight, bias, eps)
    return dispatch.call("add_layer_norm", x, residual, weight, bias, eps, bias_of_x)


def kernel_sums_bias_gradient(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor
) -> bool:
    """Return whether a kernel sums the gradient of a linear layer's bias, where :func:`add_layer_norm` adds its result.

    Elsewhere the layer's own backward pass does it.

    Args:
        x: The input of the layer or of what ends with it, in whose dtype it is computed outside autocast.
        residual, weight, bias, eps: As for :func:`add_layer_norm`.
        bias_of_x: ``[C]``, the layer's.
    """
    if not (torch.is_grad_enabled() and bias_of_x.requires_grad):
        return False
    return dispatch.remembered(
        "add_layer_norm", _signature_of_layer, _kernel_sums, x, residual, weight, bias, eps, bias_of_x
    )


def _signature_of_layer(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Any, ...]:
    return "sums", type(x), x.dtype, *_signature_add(residual, residual, *rest)


def _kernel_sums(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor) -> bool:
    # what the layer's result will look like, without its memory
    result = residual.new_empty((), dtype=keys.autocast_dtype(x) or x.dtype).expand(residual.shape)
    return dispatch.chosen("add_layer_norm", result, residual, weight, bias, eps, bias_of_x) in ("triton", "native")


def _prepare(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor, float]:
    if not x.is_floating_point():
        raise TypeError(f"layer_norm(x): got {x.dtype}, expected a floating-point dtype")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm({name}): got shape {tuple(parameter.shape)}, expected {tuple(x.shape[-1:])}, "
                f"the last dimension of x"
            )
    return x, weight, bias, eps


def _prepare_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, bias_of_x: Tensor | None = None
) -> tuple[Any, ...]:
    if residual.shape != x.shape:
        raise ValueError(
            f"add_layer_norm(residual): got shape {tuple(residual.shape)}, expected {tuple(x.shape)}, that of x"
        )
    x, weight, bias, eps = _prepare(x, weight, bias, eps)
    if bias_of_x is None:
        return x, residual, weight, bias, eps
    if bias_of_x.shape != x.shape[-1:]:
        raise ValueError(
            f"add_layer_norm(bias_of_x): got shape {tuple(bias_of_x.shape)}, expected {tuple(x.shape[-1:])}, "
            f"the last dimension of x"
        )
    return x, residual, weight, bias, eps, bias_of_x


def _key(x: Tensor, weight: Tensor, *_: object) -> Key:
    return keys.of_rows("layer_norm", x, weight)


def _key_add(x: Tensor, residual: Tensor, weight: Tensor, *_: object) -> Key:
    return keys.of_rows("add_layer_norm", x, residual, weight)


def _signature(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Any, ...]:
    # numbers, because sizes take longer to hash
    return (
        x.shape[-1], x.dtype, weight.dim(), weight.numel(), weight.dtype, bias.dim(), bias.numel(), bias.dtype,
        keys.place(x, LARGE, weight, bias), keys.moment(x),
    )  # fmt: skip


def _signature_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor | None = None
) -> tuple[Any, ...]:
    shape = x.shape
    others = () if bias_of_x is None else (bias_of_x.shape, bias_of_x.dtype, bias_of_x.get_device(), type(bias_of_x))
    return (
        shape == residual.shape, shape[-1], x.dtype, residual.dtype, weight.dim(), weight.numel(), weight.dtype,
        bias.dim(), bias.numel(), bias.dtype, keys.place(x, LARGE, residual, weight, bias),
        keys.moment(x), *others,
    )  # fmt: skip


dispatch.register(
    "layer_norm",
    _prepare,
    dispatch.Implementation(
        "native", "one pass over the rows", layer_norm_native.layer_norm, layer_norm_native.refusal
    ),
    dispatch.Implementation(
        "triton", "one pass over the rows", layer_norm_triton.layer_norm, layer_norm_triton.refusal
    ),
    dispatch.Implementation("reference", "F.layer_norm", layer_norm_torch.reference),
    key=_key,
    signature=_signature,
)
dispatch.register(
    "add_layer_norm",
    _prepare_add,
    dispatch.Implementation(
        "native",
        "addition and norm in one pass",
        layer_norm_native.add_layer_norm,
        layer_norm_native.add_refusal,
    ),
    dispatch.Implementation(
        "triton",
        "addition and norm in one pass",
        layer_norm_triton.add_layer_norm,
        layer_norm_triton.add_refusal,
    ),
    dispatch.Implementation("reference", "addition, then F.layer_norm", layer_norm_torch.reference_add),
    key=_key_add,
    signature=_signature_add,
)
