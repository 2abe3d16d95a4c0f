"""The Triton kernels of attention as PyTorch operators with gradients; what they serve, and how they are checked."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import attention_packed, attention_torch, kernel_ops, trust
from clipfast.ops.probes import probe_rows, random


def _fake_forward(qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    *lead, _, heads, head_dim = qkv.shape
    rows = lead[0] if len(lead) == 1 else lead[0] * lead[1]
    statistics = 2 if qkv.dtype == torch.float32 else 1
    return qkv.new_empty(*lead, heads * head_dim), qkv.new_empty(statistics, heads, rows, dtype=torch.float32)


def _fake_backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _plain_forward(qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out = attention_torch.attention(qkv, causal, cu_seqlens, scale).contiguous()
    # Only the kernel's backward pass reads it, and that does not follow a forward pass in PyTorch
    _, lse = _fake_forward(qkv, cu_seqlens, causal, scale)
    return out, lse.fill_(torch.nan)


def _plain_backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float
) -> Tensor:
    leaf = qkv.detach().requires_grad_()
    with torch.enable_grad():
        again = attention_torch.attention(leaf, causal, cu_seqlens, scale)
    return torch.autograd.grad(again, leaf, d_out)[0].contiguous()


def _trials(qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float, backward: bool) -> list[trust.Trial]:
    """Return how the kernels that a call gets are checked; a backward pass relies on the forward kernel too."""
    from clipfast.kernels import attention_policy

    tokens, head_dim = None if cu_seqlens is not None else qkv.shape[1], qkv.shape[-1]
    shape = attention_policy.architecture(_capability(qkv.device)), tokens, head_dim, qkv.element_size(), causal
    call = (qkv.device, qkv.dtype, head_dim, tokens, causal, attention_policy.unit(qkv.stride()) == 8)
    sign = attention_policy.sign(scale)
    trials = [_trial(*call, sign, attention_policy.forward_plan(*shape), backward=False)]
    if backward:
        # one kernel for every scale
        trials.append(_trial(*call, 1, attention_policy.backward_plan(*shape), backward=True))
    return trials


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    # the interpreter on the CPU runs what a Hopper card would
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


# every launch on a card asks for it: its name is put together once
@functools.cache
def _trial(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int | None,
    causal: bool,
    aligned: bool,
    sign: int,
    plan: Hashable,
    backward: bool,
) -> trust.Trial:
    # lengths that one plan serves share its check
    key = (dtype, head_dim, tokens is None, tokens == 1, causal, aligned, sign, plan)
    length = "packed" if tokens is None else f"{tokens} tokens"
    what = f"{'causal, ' if causal else ''}{str(dtype).removeprefix('torch.')}{'' if aligned else ', unaligned'}"
    what += {1: "", 0: ", scale 0", -1: ", negative scale"}[sign]
    name = f"attention {'backward' if backward else 'forward'}, {length}, head_dim {head_dim}, {what}"
    return trust.Trial(
        name, key, lambda programs: _probe(device, programs, dtype, head_dim, tokens, causal, aligned, sign, backward)
    )


def _probe(
    device: torch.device,
    programs: int,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int | None,
    causal: bool,
    aligned: bool,
    sign: int,
    backward: bool,
) -> trust.Probe:
    heads, lengths = 2, [1, 9, 30, 77, 5, 17] if tokens is None else [tokens, tokens]
    copies = max(2, programs // (heads * len(lengths)))
    # memory for the copies' queries, keys and values: 64 MB at the most
    copies = min(copies, max(2, (64 << 20) // (sum(lengths) * 3 * heads * head_dim * dtype.itemsize)))
    packed = (sum(lengths),) if tokens is None else (len(lengths), tokens)
    qkv = random(1, device, dtype, *packed, 3, heads, head_dim)
    d_outputs = (random(2, device, dtype, *packed, heads * head_dim),) if backward else ()

    def offsets(count: int) -> Tensor | None:
        if tokens is not None:
            return None
        return torch.tensor([0, *lengths * count]).cumsum(0).to(device, torch.int32)

    all_offsets, scale = offsets(copies), sign * head_dim**-0.5

    def launch(rows: tuple[Tensor, ...], shared: tuple[Tensor, ...], d_outputs: tuple[Tensor, ...]) -> list[Tensor]:
        (qkv,) = rows
        if not aligned:
            # heads that start on no 16 bytes
            qkv = torch.cat([qkv, qkv[..., :1]], dim=-1)[..., :head_dim]
        out, lse = kernel_ops.kernel("attention", "forward")(qkv, all_offsets, causal, scale)
        if not d_outputs:
            return [out]
        arguments = (d_outputs[0], qkv, out, lse, all_offsets, causal, scale)
        return [kernel_ops.kernel("attention", "backward")(*arguments)]

    def reference(qkv: Tensor) -> Tensor:
        return attention_torch.reference(qkv, causal, offsets(1), scale)

    return probe_rows((qkv,), (), d_outputs, copies, launch, reference)


kernel_ops.define(
    "attention(Tensor qkv, Tensor? cu_seqlens, bool causal, float scale) -> (Tensor, Tensor)",
    "attention",
    "attention",
    "forward",
    _fake_forward,
    _plain_forward,
    lambda qkv, cu_seqlens, causal, scale: _trials(qkv, cu_seqlens, causal, scale, backward=False),
)
kernel_ops.define(
    "attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, Tensor? cu_seqlens, bool causal, float scale)"
    " -> Tensor",
    "attention",
    "attention",
    "backward",
    _fake_backward,
    _plain_backward,
    lambda d_out, qkv, out, lse, cu_seqlens, causal, scale: _trials(qkv, cu_seqlens, causal, scale, backward=True),
)


_forward = torch.ops.clipfast.attention.default
_backward = torch.ops.clipfast.attention_backward.default


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float) -> Tensor:
        out, lse = _forward(qkv, cu_seqlens, causal, scale)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _backward(d_out, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return gradient, None, None, None


def attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> Tensor:
    """Return attention's output by the Triton kernels; arguments as those of every implementation.

    The kernels read ``qkv`` in place if its last dimension is contiguous, and a copy of it if not. Offsets are taken
    as int32 on the device of ``qkv``; nothing waits for the device, wherever they lie.
    """
    if cu_seqlens is not None:
        cu_seqlens = attention_packed.on_device(cu_seqlens, qkv.device)
    if kernel_ops.is_recorded():
        return _Attention.apply(qkv, cu_seqlens, causal, scale)
    return _forward(qkv, cu_seqlens, causal, scale)[0]


def refusal(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> str | None:
    """Return why the kernels cannot serve a call, or None."""
    # a row of every head may start on 16 bytes; tiles are powers of two, which wider heads have none of
    if qkv.shape[-1] % 8 or not 32 <= qkv.shape[-1] <= 128:
        return f"head_dim {qkv.shape[-1]} is not served (multiples of 8 from 32 to 128 are)"
    return kernel_ops.refusal(
        "attention", lambda: _trials(qkv, cu_seqlens, causal, scale, backward=torch.is_grad_enabled()), qkv
    )
