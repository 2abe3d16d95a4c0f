"""The pre-norm transformer that both towers are made of, in OpenAI's key layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfast import ops
from clipfast.modules import inference, plainness
from clipfast.modules.block_states import ADAPTED, CHANGED, PLAIN, BlockStates, is_as_defined, is_rowwise, states_of
from clipfast.modules.plainness import is_untouched
from clipfast.modules.shortcuts import is_observed, shortcuts_enabled
from clipfast.ops.attention import attention_weights
from clipfast.ops.bias_gelu import check_approximate, kernel_adds_bias
from clipfast.ops.dispatch import leaves_clipfast
from clipfast.ops.encoder import BlockWeights, PackedEncoder, encode, refusal

# the token of every sequence that is read: one position for all, or one each [S]
Read = int | Tensor


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension with float32 statistics, in and out in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., C]`` from ``[..., C]``."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


_NORMS = {LayerNorm: LayerNorm.forward}


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of ``nn.MultiheadAttention``.

    Args:
        width: The width W of tokens.
        heads: The number of heads.
        causal: Whether a token attends to itself and those before it only.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"SelfAttention(heads): got {heads} for width {width}, expected a divisor of the width")
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return ``[B, N, W]`` from ``[B, N, W]``; ``[total, W]`` with offsets ``[S + 1]`` of packed sequences."""
        return self.out_proj(ops.attention(self._qkv(x), self.heads, causal=self.causal, cu_seqlens=cu_seqlens))

    def forward_one(self, x: Tensor, query: Tensor, read: Read, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return ``[S, W]``, the rows of :meth:`forward` for one token a sequence.

        Args:
            x: As for :meth:`forward`: every token gives a key and a value.
            query: ``[S, W]``, the tokens that ask.
            read: Their positions, one for all or one each ``[S]``; packed sequences are asked by their last token.
            cu_seqlens: As for :meth:`forward`.
        """
        query, key, value = self._project_one(x, query, read)
        lengths = None
        if self.causal and cu_seqlens is None:
            if isinstance(read, int):
                key, value = key[:, : read + 1], value[:, : read + 1]
            else:
                lengths = read + 1
        return self.out_proj(
            ops.single_query_attention(query, key, value, self.heads, lengths=lengths, cu_seqlens=cu_seqlens)
        )

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights ``[B, H, N, N]`` (query, key) for ``[B, N, W]``."""
        return attention_weights(self._qkv(x), self.heads, causal=self.causal)

    def qkv_parameters(self) -> tuple[Tensor, Tensor]:
        """Return the weight ``[3·W, W]`` and bias ``[3·W]`` of the projection to queries, keys and values."""
        return self.in_proj_weight, self.in_proj_bias

    def _qkv(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.qkv_parameters())

    def _project_one(self, x: Tensor, query: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries ``[S, W]`` of the tokens that ask, and keys and values of all."""
        width = x.shape[-1]
        # two views by one split: their gradients come together without a sum over the whole
        weights, biases = (t.split([width, 2 * width]) for t in self.qkv_parameters())
        key, value = F.linear(x, weights[1], biases[1]).chunk(2, dim=-1)
        return F.linear(query, weights[0], biases[0]), key, value


class MLP(nn.Module):
    """Two linear layers with a GELU between them.

    Args:
        width: The width W of tokens.
        hidden: The width between the layers.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
    """

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = check_approximate(approximate, "MLP")
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., W]`` from ``[..., W]``."""
        if _is_plain(self.c_fc) and kernel_adds_bias(x, self.c_fc.bias, self.approximate):
            hidden = ops.bias_gelu(F.linear(x, self.c_fc.weight), self.c_fc.bias, self.approximate)
        else:
            hidden = ops.bias_gelu(self.c_fc(x), None, self.approximate)
        return self.c_proj(hidden)


def _is_plain(linear: nn.Module) -> bool:
    """Return whether nobody would notice that a layer's product is taken without calling the layer."""
    return is_untouched(linear, plainness.LINEARS) and linear.bias is not None


class ResidualAttentionBlock(nn.Module):
    """``x + attention(LayerNorm(x))``, then ``x + MLP(LayerNorm(x))``.

    Args:
        width: The width W of tokens.
        heads: The number of heads.
        mlp_ratio: The MLP's hidden width over W.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
        causal: Whether a token attends to itself and those before it only.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, approximate: str = "none", causal: bool = False
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), approximate)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, read: Read | None = None) -> Tensor:
        """Return ``[B, N, W]`` from ``[B, N, W]``.

        Args:
            x: ``[B, N, W]``; ``[total, W]`` with ``cu_seqlens``.
            cu_seqlens: Offsets ``[S + 1]`` of sequences that are packed one behind the other.
            read: The token of each sequence that is asked for: a position, or one each ``[B]``; with
                ``cu_seqlens``, the rows ``[S]`` of the sequences' last tokens. None asks for all tokens.

        Returns:
            As ``x``; ``[S, W]`` with ``read``: keys and values are computed for all tokens, the rest for one.
        """
        y = self.ln_1(x)
        if read is None:
            y = self.attn(y, cu_seqlens)
        else:
            x, query = take_tokens(x, read), take_tokens(y, read)
            y = self.attn.forward_one(y, query, read, cu_seqlens)
        if self._adds_in_norm():
            y, x = ops.add_layer_norm(y, x, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps)
        else:
            x = x + y
            y = self.ln_2(x)
        return x + self.mlp(y)

    def _adds_in_norm(self) -> bool:
        """Return whether the second LayerNorm may be computed without a call of its own."""
        return is_untouched(self.ln_2, _NORMS)

    def weights(self) -> BlockWeights:
        """Return the parameters as :class:`~clipfast.ops.encoder.PackedEncoder` takes them."""
        out, fc, proj = self.attn.out_proj, self.mlp.c_fc, self.mlp.c_proj
        return BlockWeights(
            (self.ln_1.weight, self.ln_1.bias),
            self.attn.qkv_parameters(),
            (out.weight, out.bias),
            (self.ln_2.weight, self.ln_2.bias),
            (fc.weight, fc.bias),
            (proj.weight, proj.bias),
        )


class Transformer(nn.Module):
    """A stack of :class:`ResidualAttentionBlock`.

    Args:
        width: The width W of tokens.
        layers: The number of blocks.
        heads: The number of heads.
        mlp_ratio: The MLPs' hidden width over W.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
        causal: Whether a token attends to itself and those before it only.

    Attributes:
        grad_checkpointing: Whether training keeps only each block's input and computes the rest again in the
            backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        approximate: str = "none",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, approximate, causal) for _ in range(layers)
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, read: Read | None = None) -> Tensor:
        """Return what the last block gives; arguments and result as :meth:`ResidualAttentionBlock.forward`.

        ``cu_seqlens`` wants blocks that :meth:`can_pack`. ``read`` is a shortcut where :meth:`can_read_one`, and
        otherwise a choice among all tokens.
        """
        encoder = self.packed_encoder(x)
        if encoder is not None:
            return self._encode(encoder, x, cu_seqlens, read)
        shorten = read is not None and self.can_read_one() and not _rounds_worse_alone(x, cu_seqlens)
        for block in self.resblocks[:-1] if shorten else self.resblocks:
            x = self._run(block, x, cu_seqlens)
        if shorten:
            return self._run(self.resblocks[-1], x, cu_seqlens, read)
        return x if read is None else take_tokens(x, read)

    def can_pack(self) -> bool:
        """Return whether the blocks take packed sequences: they are clipfast's, and nobody watches them."""
        return (
            shortcuts_enabled()
            and "forward" not in self.__dict__
            and self._takes_rows(range(self.layers))
            # what lies behind the token that is read is hidden from it
            and all(block.attn.causal for block in self.resblocks)
        )

    def can_read_one(self) -> bool:
        """Return whether the last block may compute one token alone: it is clipfast's, and nobody watches it."""
        return shortcuts_enabled() and self.layers > 0 and self._takes_rows(range(self.layers - 1, self.layers))

    def packed_encoder(self, x: Tensor) -> PackedEncoder | None:
        """Return the packed weights that compute the blocks for ``x`` on the CPU, or None where the modules do."""
        if not self.layers or inference.product_dtype(x) is None or plainness.is_transformed():
            return None
        if not self._is_packable():
            return None
        first = self.resblocks[0]
        made = inference.kept(
            self,
            self.parameters(),
            x,
            lambda dtype: PackedEncoder([b.weights() for b in self.resblocks], *_options_of(first)[:4], dtype),
        )
        if made is not None:
            made.set_options(*_options_of(first)[:4])
        return None if made is None or refusal(made) is not None else made

    def _takes_rows(self, indices: Iterable[int]) -> bool:
        """Return whether blocks compute what this file says, for whichever rows they are given."""
        if torch.compiler.is_compiling():
            return all(_is_own(b) and not is_observed(b) for b in (self.resblocks[i] for i in indices))
        state = self._states()
        return not state.is_observed(indices) and all(state.blocks[i] != CHANGED for i in indices)

    def _is_packable(self) -> bool:
        """Return whether the blocks' parameters say all that they compute, and nobody watches them compute."""
        state = self._states()
        return state.all_plain and not state.is_observed(range(self.layers)) and self._is_uniform()

    def _is_uniform(self) -> bool:
        """Return whether the first block's heads, mask, GELU and epsilon are those of all."""
        return len({_options_of(b) for b in self.resblocks}) == 1 and len({*_options_of(self.resblocks[0])[3:]}) == 1

    def _states(self) -> BlockStates:
        return states_of(self, self.resblocks, _state_of)

    def _encode(self, encoder: PackedEncoder, x: Tensor, cu_seqlens: Tensor | None, read: Read | None) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return self._encode_packed(encoder, x, cu_seqlens, read)
        # autocast leaves the residual stream in its dtype
        with torch.autocast("cpu", enabled=False):
            return self._encode_packed(encoder, x.to(encoder.dtype), cu_seqlens, read).to(x.dtype)

    def _encode_packed(self, encoder: PackedEncoder, x: Tensor, cu_seqlens: Tensor | None, read: Read | None) -> Tensor:
        one = read is not None and shortcuts_enabled()
        if cu_seqlens is not None:
            out = encode(x, encoder, cu_seqlens=cu_seqlens, read=-1 if one else None)
            return out if one or read is None else take_tokens(out, read)
        batch, tokens = x.shape[:2]
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, device="cpu")
        # a causal encoder is read at the last token, where that is the one that is asked for
        one = one and isinstance(read, int) and (not encoder.causal or read == tokens - 1)
        position = None if not one else -1 if encoder.causal else read
        out = encode(x.flatten(0, 1), encoder, cu_seqlens=offsets, read=position)
        if one:
            return out
        out = out.unflatten(0, (batch, tokens))
        return out if read is None else take_tokens(out, read)

    def intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last block's output and those of chosen blocks.

        Args:
            x: ``[B, N, W]``.
            indices: Which blocks: the last n (an int), those named (a sequence; negative counts from the end), or
                all (None).
            stop_early: Whether the blocks behind the last chosen one are left out; ``final`` is then its output.

        Returns:
            ``(final, chosen)``: ``[B, N, W]`` and a list of ``[B, N, W]`` in the order of the blocks.

        Raises:
            ValueError: An index is outside the blocks.
        """
        wanted = chosen_indices(indices, self.layers)
        chosen = []
        for i, block in enumerate(self.resblocks):
            if stop_early and i > max(wanted, default=-1):
                break
            x = self._run(block, x)
            if i in wanted:
                chosen.append(x)
        return x, chosen

    def attention_maps(self, x: Tensor) -> Tensor:
        """Return every block's attention weights, ``[layers, B, H, N, N]`` (query, key), for ``[B, N, W]``."""
        maps = []
        for block in self.resblocks:
            maps.append(block.attn.weights(block.ln_1(x)))
            x = block(x)
        return torch.stack(maps)

    def get_cast_dtype(self) -> torch.dtype:
        """Return the dtype of the blocks' weights, as open_clip's transformer does."""
        return self.resblocks[0].mlp.c_fc.weight.dtype

    def _run(self, block: nn.Module, x: Tensor, *rest: Tensor | int | None) -> Tensor:
        if all(argument is None for argument in rest):
            rest = ()  # a block of somebody else's takes nothing but tokens
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, *rest, use_reentrant=False)
        return block(x, *rest)


def chosen_indices(indices: int | Sequence[int] | None, count: int) -> set[int]:
    """Return which of ``count`` blocks are meant by the last n (an int), a sequence, or None for all.

    Raises:
        ValueError: An index is outside the blocks.
    """
    if indices is None:
        return set(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices: got {indices}, expected the number of last blocks, 1 to {count}")
        return set(range(count - indices, count))
    wrong = [i for i in indices if not -count <= i < count]
    if wrong:
        raise ValueError(f"indices: got {wrong}, expected block indices within {-count}..{count - 1}")
    return {i % count for i in indices}


def take_tokens(x: Tensor, read: Read) -> Tensor:
    """Return ``[S, W]``: from each sequence of ``[S, N, W]`` the token at ``read``, or those rows of ``[total, W]``."""
    if isinstance(read, int):
        return x[:, read]
    if x.dim() == 2:
        return x.index_select(0, read)
    return x[torch.arange(x.shape[0], device=x.device), read]


def _rounds_worse_alone(x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Return whether one row a sequence would cost digits of the gradients.

    BLAS sums the products of fewer than 12 float32 rows term by term, unless there are 4 or 8, and that rounds four
    times as much as the kernels that many rows get.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.is_grad_enabled() or leaves_clipfast():
        return False  # what is exported for every batch may not ask how many there are
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences < 12 and sequences % 4 != 0


def _options_of(block: nn.Module) -> tuple[int, bool, str, float, float]:
    return block.attn.heads, block.attn.causal, block.mlp.approximate, block.ln_1.eps, block.ln_2.eps


def _state_of(block: nn.Module) -> str:
    """Return whether a block's parameters say all that it computes, or which of its parts have to be called."""
    if not (
        is_as_defined(block, ResidualAttentionBlock, weights=False)
        and is_as_defined(block.attn, SelfAttention, weights=False)
        and is_as_defined(block.mlp, MLP, weights=False)
        and all(is_as_defined(norm, LayerNorm, weights=False) for norm in (block.ln_1, block.ln_2))
    ):
        return CHANGED
    linears = (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)
    parts = ((block, ResidualAttentionBlock), (block.attn, SelfAttention), (block.mlp, MLP))
    norms = ((norm, LayerNorm) for norm in (block.ln_1, block.ln_2))
    if all(is_as_defined(*part) for part in (*parts, *norms)) and all(_is_plain_now(linear) for linear in linears):
        return PLAIN
    return ADAPTED if all(is_rowwise(linear) for linear in linears) else CHANGED


def _is_plain_now(linear: nn.Module) -> bool:
    return type(linear) in plainness.LINEARS and linear.bias is not None and plainness.departure(linear) is None


def _is_own(block: nn.Module) -> bool:
    """Return to a compiler whether a block and its attention compute what this file says."""
    return (
        isinstance(block, ResidualAttentionBlock)
        and type(block).forward is ResidualAttentionBlock.forward
        and isinstance(block.forward, MethodType)
        and isinstance(block.attn, SelfAttention)
        and type(block.attn).forward is SelfAttention.forward
        and type(block.attn).forward_one is SelfAttention.forward_one
        and isinstance(block.attn.forward, MethodType)
        and isinstance(block.mlp.forward, MethodType)
    )
