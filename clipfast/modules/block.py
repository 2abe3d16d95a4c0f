"""The pre-norm block of attention and MLP that both towers are made of, in OpenAI's key layout.

A block leaves its last addition to the LayerNorm that comes next, where a stack lets it: see
:meth:`ResidualAttentionBlock.carry`. What was computed and not yet added is a :class:`Branch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast import ops
from clipfast.modules import few_rows, plainness
from clipfast.modules.norm import LayerNorm, LayerScale
from clipfast.modules.plainness import is_untouched
from clipfast.ops.attention import attention_weights
from clipfast.ops.bias_gelu import check_approximate, kernel_adds_bias
from clipfast.ops.bias_gradients import through_attention, with_bias_gradient
from clipfast.ops.encoder import BlockWeights
from clipfast.ops.layer_norm import kernel_sums_bias_gradient

# the token of every sequence that is read: one position for all, or one each [S]
Read = int | Tensor


class Branch(NamedTuple):
    """What a block has computed and not yet added to the residual stream.

    Attributes:
        x: ``[..., W]``.
        bias: A bias ``[W]`` that is in ``x``, where its gradient is left to whoever adds ``x`` up: the sum over rows of
            a gradient that the addition's backward pass holds anyway.
    """

    x: Tensor
    bias: Tensor | None = None

    def added_to(self, stream: Tensor) -> Tensor:
        """Return ``stream + x``."""
        return stream + (self.x if self.bias is None else with_bias_gradient(self.x, self.bias))


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of ``nn.MultiheadAttention``.

    Args:
        width: The width W of tokens.
        heads: The number of heads.
        causal: Whether a token attends to itself and those before it only.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
    """

    def __init__(self, width: int, heads: int, causal: bool = False, qkv_bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"SelfAttention(heads): got {heads} for width {width}, expected a divisor of the width")
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.register_parameter("in_proj_bias", nn.Parameter(torch.zeros(3 * width)) if qkv_bias else None)
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return ``[B, N, W]`` from ``[B, N, W]``; ``[total, W]`` with offsets ``[S + 1]`` of packed sequences."""
        return self.out_proj(self._attend(self._qkv(x), cu_seqlens))

    def branch(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Branch:
        """Return what :meth:`forward` does, with the gradients of biases left to whoever adds it to the stream."""
        out, (weight, bias) = self.out_proj, self.qkv_parameters()
        if bias is None or not bias.requires_grad:
            return _product(out, self._attend(self._qkv(x), cu_seqlens), out.bias)
        qkv, out_bias = through_attention(F.linear(x, weight, bias.detach()), bias, out.weight, out.bias)
        return _product(out, self._attend(qkv, cu_seqlens), out_bias)

    def _attend(self, qkv: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return ops.attention(qkv, self.heads, causal=self.causal, cu_seqlens=cu_seqlens)

    def forward_one(self, x: Tensor, query: Tensor, read: Read, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return ``[S, W]``, the rows of :meth:`forward` for one token a sequence.

        Args:
            x: As for :meth:`forward`: every token gives a key and a value.
            query: ``[S, W]``, the tokens that ask. More rows are given back as what they come to, unasked.
            read: Their positions, one for all or one each ``[S]``; packed sequences are asked by their last token.
            cu_seqlens: As for :meth:`forward`.
        """
        rows = query.shape[0]
        query, key, value = self._project_one(x, query, read)
        # what was added to the rows for their products' sake asks for nothing
        query = query[: x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1]
        lengths = None
        if self.causal and cu_seqlens is None:
            if isinstance(read, int):
                key, value = key[:, : read + 1], value[:, : read + 1]
            else:
                lengths = read + 1
        out = ops.single_query_attention(query, key, value, self.heads, lengths=lengths, cu_seqlens=cu_seqlens)
        return self.out_proj(few_rows.filled_up(out, rows))

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights ``[B, H, N, N]`` (query, key) for ``[B, N, W]``."""
        return attention_weights(self._qkv(x), self.heads, causal=self.causal)

    def qkv_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight ``[3·W, W]`` and bias ``[3·W]``, or None, of the projection to queries, keys and values."""
        return self.in_proj_weight, self.in_proj_bias

    def _qkv(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.qkv_parameters())

    def _project_one(self, x: Tensor, query: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries ``[S, W]`` of the tokens that ask, and keys and values of all."""
        width = x.shape[-1]
        # two views by one split: their gradients come together without a sum over the whole
        weights, biases = ((None, None) if t is None else t.split([width, 2 * width]) for t in self.qkv_parameters())
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
        return self.c_proj(self._expand(x))

    def branch(self, x: Tensor) -> Branch:
        """Return what :meth:`forward` does, with its last bias' gradient left to whoever adds it to the stream."""
        return _product(self.c_proj, self._expand(x), self.c_proj.bias)

    def _expand(self, x: Tensor) -> Tensor:
        if _is_plain(self.c_fc) and kernel_adds_bias(x, self.c_fc.bias, self.approximate):
            return ops.bias_gelu(F.linear(x, self.c_fc.weight), self.c_fc.bias, self.approximate)
        return ops.bias_gelu(self.c_fc(x), None, self.approximate)


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
        norm_eps: The LayerNorms' epsilon.
        ls_init_value: Where the factors of :class:`LayerScale` behind attention and MLP start; None leaves them out.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
    """

    # of the class, so that a block without them pays for no more than this
    has_layer_scale = False

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        approximate: str = "none",
        causal: bool = False,
        *,
        norm_eps: float = 1e-5,
        ls_init_value: float | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, eps=norm_eps)
        self.attn = SelfAttention(width, heads, causal, qkv_bias)
        if ls_init_value is not None:
            self.has_layer_scale = True
            self.ls_1 = LayerScale(width, ls_init_value)
        self.ln_2 = LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), approximate)
        if ls_init_value is not None:
            self.ls_2 = LayerScale(width, ls_init_value)

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
        x, branch = self.carry(x, None, cu_seqlens, read)
        return branch.added_to(x)

    def carry(
        self,
        x: Tensor,
        branch: Branch | None,
        cu_seqlens: Tensor | None = None,
        read: Read | None = None,
        following: LayerNorm | None = None,
    ) -> tuple[Tensor, Branch]:
        """Do what :meth:`forward` does, but for the last addition, and for what another block has left to be added.

        A LayerNorm that adds reads and writes the stream once, where an addition and a LayerNorm do so twice.

        Args:
            x: As for :meth:`forward`, without ``branch``.
            branch: What is to be added to ``x`` first, or None.
            cu_seqlens, read: As for :meth:`forward`.
            following: The LayerNorm that will do the last addition, if it is known.

        Returns:
            ``(x, branch)``, whose sum :meth:`forward` returns.
        """
        y, x = self._add_norm(self.ln_1, x, branch)
        if read is not None:
            x, query = take_tokens(x, read), take_tokens(y, read)
            sequences = x.shape[0]
            rows = sequences + few_rows.missing(sequences, x)
            x, query = few_rows.filled_up(x, rows), few_rows.filled_up(query, rows)
            attended = few_rows.filled_up(self.attn.forward_one(y, query, read, cu_seqlens), rows)
            y, x = self._add_norm(self.ln_2, x, Branch(self.ls_1(attended) if self.has_layer_scale else attended))
            y = self.ls_2(self.mlp(y)) if self.has_layer_scale else self.mlp(y)
            x, y = (t if rows == sequences else t[:sequences] for t in (x, y))
            return x, Branch(y)
        if self.has_layer_scale:
            y, x = self._add_norm(self.ln_2, x, Branch(self.ls_1(self.attn(y, cu_seqlens))))
            return x, Branch(self.ls_2(self.mlp(y)))
        if self._leaves_bias(self.attn, "out_proj", self.ln_2, y, x):
            branch = self.attn.branch(y, cu_seqlens)
        else:
            branch = Branch(self.attn(y, cu_seqlens))
        y, x = self._add_norm(self.ln_2, x, branch)
        if following is not None and self._leaves_bias(self.mlp, "c_proj", following, y, x):
            return x, self.mlp.branch(y)
        return x, Branch(self.mlp(y))

    def carries(self) -> bool:
        """Return whether nobody would notice that :meth:`carry` is called in the block's place."""
        return is_untouched(self, _FORWARDS)

    def _may_skip(self, part: nn.Module) -> bool:
        """Return whether nobody would notice that a part of the block is computed without a call of its own."""
        return is_untouched(part, _FORWARDS)

    def _add_norm(self, norm: nn.Module, x: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
        """Return ``(norm(x), x)`` of the stream ``x`` with a branch added."""
        if branch is None:
            return norm(x), x
        # what somebody put in the place of a part may give a row for many
        if self._may_skip(norm) and branch.x.shape == x.shape:
            return ops.add_layer_norm(branch.x, x, norm.weight, norm.bias, norm.eps, branch.bias)
        x = branch.added_to(x)
        return norm(x), x

    def _leaves_bias(self, part: nn.Module, last: str, norm: nn.Module, y: Tensor, x: Tensor) -> bool:
        """Return whether a part's last layer leaves its bias' gradient to the norm that adds the part's result.

        Args:
            part: The part, which is given ``y``.
            last: The layer's name in it.
            norm: Adds to the stream ``x``.
        """
        # that nobody sums is known soonest
        linear = getattr(part, last, None)
        bias = getattr(linear, "bias", None)
        return (
            torch.is_grad_enabled()
            and isinstance(bias, Tensor)
            and self._may_skip(norm)
            and kernel_sums_bias_gradient(y, x, norm.weight, norm.bias, norm.eps, bias)
            and self._may_skip(part)
            and _is_plain(linear)
        )

    def weights(self) -> BlockWeights:
        """Return the parameters as :class:`~clipfast.ops.encoder.PackedEncoder` takes them."""
        out, fc, proj = self.attn.out_proj, self.mlp.c_fc, self.mlp.c_proj
        weight, bias = self.attn.qkv_parameters()
        return BlockWeights(
            (self.ln_1.weight, self.ln_1.bias),
            (weight, weight.new_zeros(weight.shape[0]) if bias is None else bias),
            (out.weight, out.bias),
            (self.ln_2.weight, self.ln_2.bias),
            (fc.weight, fc.bias),
            (proj.weight, proj.bias),
        )


def _product(linear: nn.Module, x: Tensor, bias: Tensor) -> Branch:
    """Return a linear layer's result as a branch, and its bias with the way back to be taken by whoever adds that."""
    return Branch(F.linear(x, linear.weight, bias.detach()), bias)


def take_tokens(x: Tensor, read: Read) -> Tensor:
    """Return ``[S, W]``: from each sequence of ``[S, N, W]`` the token at ``read``, or those rows of ``[total, W]``."""
    if isinstance(read, int):
        return x[:, read]
    if x.dim() == 2:
        return x.index_select(0, read)
    return x[torch.arange(x.shape[0], device=x.device), read]


# the parts, and what they computed first
_FORWARDS = {kind: kind.forward for kind in (LayerNorm, SelfAttention, MLP, ResidualAttentionBlock)}
