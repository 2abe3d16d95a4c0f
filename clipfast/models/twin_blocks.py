"""Twins of blocks: clipfast's block and its parts over the very modules and Parameters of another library's.

A twin owns nothing. Linear, convolution and embedding layers are the other tower's own, called where they stand; the
parts that clipfast computes in its own way read the other's Parameters anew at every call. Whatever replaces,
shards or casts a Parameter therefore reaches the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast import ops
from clipfast.modules import plainness
from clipfast.modules.block import MLP, Branch, LayerNorm, Read, ResidualAttentionBlock, SelfAttention, take_tokens
from clipfast.modules.block_states import is_lora
from clipfast.ops.encoder import BlockWeights


class Refusal(Exception):
    """Why a module is left as it is."""


def require(condition: bool, reason: str) -> None:
    """Raise a :class:`Refusal` unless ``condition``."""
    if not condition:
        raise Refusal(reason)


def of_type(module: object, types: type | tuple[type, ...], name: str) -> nn.Module:
    """Return ``module``, or refuse what is not exactly of one of ``types``: a subclass may compute something else."""
    types = types if isinstance(types, tuple) else (types,)
    if type(module) not in types:
        expected = " or ".join(dict.fromkeys(f"{t.__module__.split('.')[0]}'s {t.__name__}" for t in types))
        raise Refusal(f"{name} is a {type(module).__module__}.{type(module).__qualname__}, expected {expected}")
    return module


def gelu_of(module: object, kinds: dict[type, str], name: str) -> str:
    """Return clipfast's name of the GELU that ``module`` computes; ``kinds`` names those beside PyTorch's."""
    if type(module) is nn.GELU:
        return module.approximate
    require(type(module) in kinds, f"{name} is a {type(module).__qualname__}, expected a GELU")
    for function in module.__dict__.values():
        # transformers keeps the function that is called as an attribute
        inner = getattr(function, "func", function)
        own = getattr(inner, "__self__", None) is module or getattr(inner, "__name__", "gelu") == "gelu"
        require(own or not callable(inner), f"{name} calls another function than its own")
    return kinds[type(module)]


class TwinLayerNorm(LayerNorm):
    """clipfast's LayerNorm with the Parameters of another one."""

    def __init__(self, source: nn.Module, types: tuple[type, ...], name: str) -> None:
        nn.Module.__init__(self)
        self.source = of_type(source, types, name)
        require(
            len(source.normalized_shape) == 1 and source.weight is not None and source.bias is not None,
            f"{name} has no weight, no bias, or more than one dimension",
        )
        require(
            tuple(source.normalized_shape) == tuple(source.weight.shape) == tuple(source.bias.shape),
            f"{name} is told to normalise {tuple(source.normalized_shape)} values, and its weight has "
            f"{tuple(source.weight.shape)}",
        )
        self.normalized_shape, self.eps, self.elementwise_affine = source.normalized_shape, source.eps, True

    @property
    def weight(self) -> Tensor:
        """The other's weight, ``[C]``."""
        return self.source.weight

    @property
    def bias(self) -> Tensor:
        """The other's bias, ``[C]``."""
        return self.source.bias


class TwinAttention(SelfAttention):
    """clipfast's attention with the Parameters of another one.

    Args:
        source: What holds the projection of queries, keys and values: an ``nn.MultiheadAttention``, a linear layer for
            all three, or one for each. Linear layers that an adapter wraps are called.
        out_proj: The output projection.
        heads: The number of heads.
        causal: Whether a token attends to itself and those before it only.
        name: The attention's name, for refusals.
    """

    def __init__(
        self, source: Sequence[nn.Module], out_proj: nn.Module, heads: int, causal: bool = False, *, name: str
    ) -> None:
        nn.Module.__init__(self)
        self.heads, self.causal = heads, causal
        self.source = nn.ModuleList(source)
        self.out_proj = out_proj
        self._packed = len(source) == 1 and isinstance(source[0], nn.MultiheadAttention)
        self.is_adapted = any(is_lora(part) for part in source)
        weight = self._joined("weight")
        require(weight is not None, f"{name} has no joint projection")
        biases = [self._packed or base_of(part).bias is not None for part in source]
        require(len({*biases}) == 1, f"{name} projects with biases and without")
        require(
            weight.dim() == 2 and weight.shape[0] == 3 * weight.shape[1] and weight.shape[1] % heads == 0,
            f"{name} projects to {weight.shape[0]} values, expected three times the width {weight.shape[1]}",
        )

    @property
    def in_proj_weight(self) -> Tensor:
        """``[3W, W]``; made of three, it passes its gradient on to them."""
        return self._joined("weight")

    @property
    def in_proj_bias(self) -> Tensor | None:
        """``[3W]``, or None."""
        return self._joined("bias")

    def _joined(self, kind: str) -> Tensor | None:
        if self._packed:
            return getattr(self.source[0], f"in_proj_{kind}")
        parts = [getattr(base_of(part), kind) for part in self.source]
        if any(part is None for part in parts):
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _qkv(self, x: Tensor) -> Tensor:
        if not self.is_adapted:
            return super()._qkv(x)
        parts = [part(x) for part in self.source]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def branch(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Branch:
        """Return what :meth:`SelfAttention.branch` does; adapted projections have the way back of their own."""
        return Branch(self(x, cu_seqlens)) if self.is_adapted else super().branch(x, cu_seqlens)

    def _project_one(self, x: Tensor, query: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        if not self.is_adapted:
            return super()._project_one(x, query, read)
        if len(self.source) == 1:
            asks, key, value = self.source[0](x).chunk(3, dim=-1)
            return take_tokens(asks, read), key, value
        return self.source[0](query), self.source[1](x), self.source[2](x)


class TwinAdaptedAttention(TwinAttention):
    """clipfast's attention with the Parameters of an ``nn.MultiheadAttention`` that peft's LoRA wraps.

    Args:
        wrapper: peft's module.
        causal: Whether a token attends to itself and those before it only.
        name: The attention's name, for refusals.
    """

    def __init__(self, wrapper: nn.Module, causal: bool, name: str) -> None:
        attention = base_of(wrapper)
        super().__init__([attention], base_of(attention.out_proj), attention.num_heads, causal, name=name)
        self.wrapper, self.is_adapted = wrapper, True

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return what :meth:`SelfAttention.forward` does, of the weights with the active adapters' share."""
        (weight, bias), out = self._effective()
        return out(ops.attention(F.linear(x, weight, bias), self.heads, causal=self.causal, cu_seqlens=cu_seqlens))

    def forward_one(self, x: Tensor, query: Tensor, read: Read, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return what :meth:`SelfAttention.forward_one` does, of the weights with the active adapters' share."""
        y = self.forward(x, cu_seqlens)
        return take_tokens(y, read)

    def _effective(self) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor], Tensor]]:
        """Return the weights that peft would put into the attention for one call, and their gradients' way back."""
        wrapper, attention = self.wrapper, base_of(self.wrapper)
        merges = not wrapper.disable_adapters and not wrapper.merged
        if wrapper.disable_adapters and wrapper.merged:
            wrapper.unmerge()
        if merges:
            wrapper.merge(adapter_names=[name for name in wrapper.active_adapters if name in wrapper.lora_A])
        linear = base_of(attention.out_proj)
        weight, bias, out_weight, out_bias = (
            attention.in_proj_weight, attention.in_proj_bias, linear.weight, linear.bias,
        )  # fmt: skip
        if merges and wrapper.merged:
            wrapper.unmerge()
        return (weight, bias), lambda y: F.linear(y, out_weight, out_bias)


def base_of(module: nn.Module) -> nn.Module:
    """Return what an adapter wraps; a module that is no adapter is its own base."""
    return module.base_layer if type(module).__module__.startswith("peft.") else module


def linear_of(module: nn.Module, name: str) -> nn.Module:
    """Return a linear layer, as it is or within peft's LoRA, or refuse it."""
    return module if is_lora(module) else of_type(module, tuple(plainness.LINEARS), name)


def scales_of(first: nn.Module, second: nn.Module, kind: type, name: str) -> tuple[nn.Module, nn.Module] | None:
    """Return both layer scales of a block, or None where it has none."""
    if type(first) is type(second) is nn.Identity:
        return None
    for scale in (first, second):
        of_type(scale, kind, f"{name}'s layer scale")
        require(scale.gamma.dim() == 1, f"{name}'s layer scale is no factor a channel")
    return first, second


def attention_of_pytorch(source: nn.Module, name: str, causal: bool = False) -> TwinAttention:
    """Return the twin of an ``nn.MultiheadAttention`` that attends to its own input."""
    wrapped = type(source).__module__ == "peft.tuners.lora.layer" and type(source).__name__ == "MultiheadAttention"
    attention = of_type(base_of(source) if wrapped else source, nn.MultiheadAttention, name)
    require(attention.bias_k is None and not attention.add_zero_attn, f"{name} adds keys of its own")
    require(attention.batch_first, f"{name} takes the batch second (batch_first)")
    require(
        attention._qkv_same_embed_dim and attention.head_dim * attention.num_heads == attention.embed_dim,
        f"{name} has {attention.num_heads} heads of {attention.head_dim} for a width of {attention.embed_dim}",
    )
    if wrapped:
        require(is_lora(attention.out_proj), f"{name}'s output projection is not adapted as the rest is")
        return TwinAdaptedAttention(source, causal, name)
    of_type(attention.out_proj, tuple(plainness.LINEARS), f"{name}'s output")
    return TwinAttention([source], source.out_proj, source.num_heads, causal, name=name)


class TwinMLP(MLP):
    """clipfast's MLP over another one's layers.

    Args:
        c_fc: The first layer.
        c_proj: The second.
        approximate: The GELU between them.
        name: The MLP's name, for refusals.
    """

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module, approximate: str, name: str) -> None:
        nn.Module.__init__(self)
        self.approximate = approximate
        self.c_fc = linear_of(c_fc, f"{name}'s first linear layer")
        self.c_proj = linear_of(c_proj, f"{name}'s second linear layer")


class TwinBlock(ResidualAttentionBlock):
    """clipfast's block over another one's parts.

    Args:
        ln_1: The LayerNorm before attention.
        attention: The attention.
        ln_2: The LayerNorm before the MLP.
        c_fc: The MLP's first layer.
        c_proj: Its second.
        approximate: The GELU between them.
        name: The block's name, for refusals.
        scales: What multiplies the results of attention and MLP before they are added, or None.
    """

    def __init__(
        self,
        ln_1: TwinLayerNorm,
        attention: TwinAttention,
        ln_2: TwinLayerNorm,
        c_fc: nn.Module,
        c_proj: nn.Module,
        approximate: str,
        name: str,
        scales: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        linear_of(attention.out_proj, f"{name}'s output")
        self.ln_1, self.attn, self.ln_2 = ln_1, attention, ln_2
        if scales is not None:
            self.has_layer_scale = True
            self.ls_1, self.ls_2 = scales
        self.mlp = TwinMLP(c_fc, c_proj, approximate, name)
        # its parameters say all that it computes, and packed weights have a place for them
        self.is_plain = not attention.is_adapted and not any(
            is_lora(linear) or linear.bias is None for linear in (attention.out_proj, c_fc, c_proj)
        )

    def weights(self) -> BlockWeights:
        """Return the parameters as packed weights take them, with the layer scales in those that they multiply."""
        made = super().weights()
        if not self.has_layer_scale:
            return made
        return replace(made, out=_scaled(made.out, self.ls_1.gamma), proj=_scaled(made.proj, self.ls_2.gamma))

    def carries(self) -> bool:
        """Return that it does: whoever watches or changes the other's block is served by the other's code."""
        return True

    def _may_skip(self, part: nn.Module) -> bool:
        """Return that it may, for the same reason, what needs no call of its own."""
        return not isinstance(part, TwinAdaptedAttention)


def _scaled(layer: tuple[Tensor, Tensor], gamma: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in layer)
    return (gamma[:, None] * weight).to(layer[0].dtype).detach(), (gamma * bias).to(layer[1].dtype).detach()
