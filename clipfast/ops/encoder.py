"""A whole pre-norm transformer without gradients, from weights that were packed once: inference on the CPU."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import dispatch, keys, library, plan
from clipfast.ops.attention import attention
from clipfast.ops.attention_packed import check_offsets
from clipfast.ops.bias_gelu import APPROXIMATIONS, bias_gelu
from clipfast.ops.call_classes import WIDTHS, Key, bound
from clipfast.ops.encoder_weights import ONEDNN_CHUNK, BlockWeights, PackedEncoder, folds_quick_gelu
from clipfast.ops.layer_norm import layer_norm
from clipfast.ops.single_query_attention import single_query_attention

__all__ = ["BlockWeights", "PackedEncoder", "encode", "native_unable", "prefers_onednn", "refusal", "release_workspace"]

# the least that the op library's own products need, on x86 and on Arm
_INSTRUCTIONS = {torch.float32: ("AVX2", "NEON"), torch.bfloat16: ("AVX512_BF16", "BF16")}


def encode(x: Tensor, encoder: PackedEncoder, *, cu_seqlens: Tensor, read: int | None = None) -> Tensor:
    """Run a transformer's blocks without gradients.

    Args:
        x: Packed tokens ``[total, W]`` in host memory, in the dtype of the weights.
        encoder: The weights.
        cu_seqlens: Offsets ``[S + 1]`` (int64, host memory) of the sequences, none of them empty.
        read: The position of the token that is read of every sequence, -1 for the last; None for all. A causal
            encoder is read at the last.

    Returns:
        ``[S, W]``, or ``[total, W]`` where all are read, in the dtype of ``x``.

    Raises:
        ValueError: The shapes, dtypes or offsets do not fit.
    """
    return dispatch.call("encoder", x, encoder, cu_seqlens, read)


def refusal(encoder: PackedEncoder) -> str | None:
    """Return why the modules compute these weights' blocks, and no implementation of this op, or None."""
    for name in ("reference", "triton"):
        if dispatch.is_wanted(name):
            return f"the {name} backend was asked for, which the modules' own ops have"
    reason = _native_unable(encoder)
    # oneDNN's sums depend on the batch
    if reason is None or dispatch.is_deterministic() or _onednn_unable(encoder) is None:
        return reason if dispatch.is_deterministic() else None
    return f"{reason}; {_onednn_unable(encoder)}"


def release_workspace() -> int:
    """Give back the memory that encoders on the CPU keep for their next call; return how many bytes that were.

    They keep at most 8 blocks and 256 MB.
    """
    return torch.ops.clipfast.release_workspace() if library.unavailable() is None else 0


def _prepare(
    x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None = None
) -> tuple[Tensor, PackedEncoder, Tensor, int | None]:
    if x.dim() != 2 or x.shape[1] != encoder.width or x.dtype != encoder.dtype or x.device.type != "cpu":
        raise ValueError(
            f"encode(x): got {x.dtype} {tuple(x.shape)} on {x.device}, expected {encoder.dtype} "
            f"[total, {encoder.width}] on the CPU"
        )
    if cu_seqlens.dtype != torch.int64 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"encode(cu_seqlens): got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int64 offsets [S + 1]"
        )
    _check_values(x, encoder, cu_seqlens, read)
    return x, encoder, cu_seqlens, read


def _check_values(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> None:
    offsets = cu_seqlens.tolist()
    shortest = min(map(operator.sub, offsets[1:], offsets), default=1)
    if shortest < 1 or offsets[0] != 0 or offsets[-1] != x.shape[0]:
        check_offsets(offsets, x.shape[0], "encode", may_be_empty=False)
    if read is not None and not -1 <= read < shortest:
        raise ValueError(f"encode(read): got {read}, expected -1 to {shortest - 1}, the last of the shortest sequence")
    if encoder.causal and read is not None and read != -1:
        raise ValueError(f"encode(read): got {read}, expected -1 or None for a causal encoder")


def _signature(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> tuple[Any, ...]:
    return (
        x.dim(), x.shape[1], x.dtype, x.is_cpu, encoder.width, encoder.hidden, encoder.heads, encoder.dtype,
        cu_seqlens.dtype, cu_seqlens.dim(), cu_seqlens.numel() > 0, keys.moment(x),
    )  # fmt: skip


def _bind(run: Callable[..., Tensor], *_: object) -> Callable[..., Tensor]:
    def bound(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> Tensor:
        _check_values(x, encoder, cu_seqlens, read)
        return run(x, encoder, cu_seqlens, read)

    return bound


def native_unable(dtype: torch.dtype) -> str | None:
    """Return why the op library's own products cannot serve a dtype here, or None."""
    if library.unavailable() is not None:
        return library.unavailable()
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} is not served (float32 and bfloat16 are)"
    if not torch.ops.clipfast.can_encode(dtype == torch.bfloat16):
        return f"this CPU lacks the instructions ({_INSTRUCTIONS[dtype][plan.machine_of(torch.device('cpu')).arm]})"
    return None


def _native_unable(encoder: PackedEncoder) -> str | None:
    reason = native_unable(encoder.dtype)
    if reason is not None:
        return reason
    for name, got, step in (
        ("width", encoder.width, 32),
        ("head_dim", encoder.width // encoder.heads, 2),
        ("hidden width", encoder.hidden, 2),
    ):
        if got % step:
            return f"{name} {got} is not served (multiples of {step} are)"
    return None


def _native_refusal(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> str | None:
    return _native_unable(encoder)


def prefers_onednn(dtype: torch.dtype, width: int) -> bool:
    """Return whether the plan takes oneDNN's products here, and not the library's own, for terms of a width."""
    # asked for by name, or held to one order of sums: the library's own
    if dispatch.is_wanted("native") or dispatch.is_deterministic():
        return False
    return plan.decision("encoder", _key_of(dtype, width), torch.device("cpu")).backend == "torch"


def _key_of(dtype: torch.dtype, width: int) -> Key:
    return Key("encoder", (keys.name_of(dtype),), width=bound(width, WIDTHS))


def _key(x: Tensor, encoder: PackedEncoder, *_: object) -> Key:
    return _key_of(encoder.dtype, encoder.width)


def _native(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> Tensor:
    return torch.ops.clipfast.encode(
        x.contiguous(),
        cu_seqlens.contiguous(),
        encoder.native_weights(),
        encoder.heads,
        encoder.causal,
        APPROXIMATIONS.index(encoder.approximate),
        encoder.eps,
        -2 if read is None else read,
    )


def _onednn_unable(encoder: PackedEncoder) -> str | None:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    if encoder.dtype == torch.bfloat16:
        return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "oneDNN has no bfloat16 on this CPU"
    return None if encoder.dtype == torch.float32 else f"oneDNN packs no {encoder.dtype}"


def _onednn_refusal(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> str | None:
    if dispatch.is_deterministic():
        return "oneDNN's sums depend on the batch"
    return _onednn_unable(encoder)


def _onednn(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> Tensor:
    """Products by oneDNN from its packed weights, with bias, GELU and residual in them."""
    offsets, parts, first = cu_seqlens.tolist(), [], 0
    while first < len(offsets) - 1:
        last = first + 1
        while last < len(offsets) - 1 and offsets[last + 1] - offsets[first] <= ONEDNN_CHUNK:
            last += 1
        rows = slice(offsets[first], offsets[last])
        parts.append(_onednn_chunk(x[rows], encoder, cu_seqlens[first : last + 1] - offsets[first], read))
        first = last
    return torch.cat(parts) if parts else x


def _onednn_chunk(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    add = linear.binary
    heads, width = encoder.heads, encoder.width
    for block, packed in zip(encoder.blocks, encoder.onednn_weights(), strict=True):
        y = layer_norm(x, *block.ln_1, encoder.eps)
        if read is None or block is not encoder.blocks[-1]:
            qkv = linear(y, packed[0], block.qkv[1], "none", [], "")
            y = _attention(qkv, encoder, cu_seqlens)
        else:
            rows = cu_seqlens[1:] - 1 if read == -1 else cu_seqlens[:-1] + read
            weight, bias = block.qkv
            query = F.linear(y[rows], weight[:width], bias[:width])
            key, value = linear(y, packed[4], bias[width:], "none", [], "").chunk(2, dim=-1)
            y, x = single_query_attention(query, key, value, heads, cu_seqlens=cu_seqlens), x[rows]
        x = add(y, x, packed[1], block.out[1], "add")
        y = layer_norm(x, *block.ln_2, encoder.eps)
        bias = block.fc[1]
        if folds_quick_gelu(encoder.approximate, encoder.dtype):
            hidden = linear(y, packed[2], bias * 1.702, "swish", [], "")
        elif encoder.approximate == "quick":
            hidden = bias_gelu(linear(y, packed[2], bias, "none", [], ""), None, "quick")
        else:
            hidden = linear(y, packed[2], bias, "gelu", [], encoder.approximate)
        x = add(hidden, x, packed[3], block.proj[1], "add")
    return x


def _attention(qkv: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor) -> Tensor:
    sequences = cu_seqlens.shape[0] - 1
    tokens = qkv.shape[0] // sequences
    # sequences of one length, as images are, need no packing
    if torch.equal(cu_seqlens, torch.arange(0, (sequences + 1) * tokens, tokens, device="cpu")):
        return attention(qkv.unflatten(0, (sequences, tokens)), encoder.heads, causal=encoder.causal).flatten(0, 1)
    return attention(qkv, encoder.heads, causal=encoder.causal, cu_seqlens=cu_seqlens)


def _reference(x: Tensor, encoder: PackedEncoder, cu_seqlens: Tensor, read: int | None) -> Tensor:
    """The specification: block by block in plain PyTorch, every token computed."""
    for block in encoder.blocks:
        qkv = F.linear(layer_norm(x, *block.ln_1, encoder.eps), *block.qkv)
        x = x + F.linear(attention(qkv, encoder.heads, causal=encoder.causal, cu_seqlens=cu_seqlens), *block.out)
        hidden = F.linear(layer_norm(x, *block.ln_2, encoder.eps), *block.fc)
        x = x + F.linear(bias_gelu(hidden, None, encoder.approximate), *block.proj)
    if read is None:
        return x
    return x[cu_seqlens[1:] - 1 if read == -1 else cu_seqlens[:-1] + read]


dispatch.register(
    "encoder",
    _prepare,
    dispatch.Implementation("native", "the op library's own products, all steps fused", _native, _native_refusal),
    dispatch.Implementation("torch", "oneDNN's packed weights", _onednn, _onednn_refusal),
    dispatch.Implementation("reference", "block by block in plain PyTorch", _reference),
    key=_key,
    signature=_signature,
    bind=_bind,
)
