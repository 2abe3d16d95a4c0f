"""The stack of blocks that both towers are made of."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfast.modules import inference, plainness
from clipfast.modules.block import MLP, LayerNorm, Read, ResidualAttentionBlock, SelfAttention, take_tokens
from clipfast.modules.block_judge import is_own, options_of, state_of
from clipfast.modules.block_states import CHANGED, BlockStates, states_of
from clipfast.modules.shortcuts import is_observed, shortcuts_enabled
from clipfast.ops import library_notice
from clipfast.ops.dispatch import leaves_clipfast
from clipfast.ops.encoder import PackedEncoder, encode, refusal

# models that were pickled whole look for a block's parts here
__all__ = ["MLP", "LayerNorm", "ResidualAttentionBlock", "SelfAttention", "Transformer", "chosen_indices"]


class Transformer(nn.Module):
    """A stack of :class:`ResidualAttentionBlock`.

    Args:
        width: The width W of tokens.
        layers: The number of blocks.
        heads: The number of heads.
        mlp_ratio: The MLPs' hidden width over W.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
        causal: Whether a token attends to itself and those before it only.
        norm_eps, ls_init_value, qkv_bias: Of the blocks; see :class:`ResidualAttentionBlock`.

    Attributes:
        grad_checkpointing: Whether training keeps only each block's input and computes the rest again in the
            backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    """

    # twice: a stack's arguments are its blocks', told by name and default to who reads or completes the call
    def __init__(
        self,
        width: int,
        layers: int,
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
        library_notice.tell()
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(
                width, heads, mlp_ratio, approximate, causal,
                norm_eps=norm_eps, ls_init_value=ls_init_value, qkv_bias=qkv_bias,
            )
            for _ in range(layers)
        )  # fmt: skip

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, read: Read | None = None) -> Tensor:
        """Return what the last block gives; arguments and result as :meth:`ResidualAttentionBlock.forward`.

        ``cu_seqlens`` wants blocks that :meth:`takes_rows`. ``read`` is a shortcut where :meth:`can_read_one`, and
        otherwise a choice among all tokens.
        """
        encoder = self.packed_encoder(x)
        if encoder is not None:
            return self._encode(encoder, x, cu_seqlens, read)
        shorten = read is not None and self.can_read_one()
        x, _ = self._through(list(self.resblocks), x, cu_seqlens, read if shorten else None)
        return x if shorten or read is None else take_tokens(x, read)

    def takes_rows(self) -> bool:
        """Return whether the blocks take packed sequences: they are clipfast's, and nobody watches them."""
        as_defined = "forward" not in self.__dict__ and type(self).forward is Transformer.forward
        return as_defined and self._takes_rows(range(self.layers))

    def can_pack(self) -> bool:
        """Return whether the blocks take packed captions, cut at the token that is read: so and causal."""
        return (
            shortcuts_enabled()
            and self.takes_rows()
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
            lambda dtype: PackedEncoder([b.weights() for b in self.resblocks], *options_of(first)[:4], dtype),
        )
        if made is not None:
            made.set_options(*options_of(first)[:4])
        return None if made is None or refusal(made) is not None else made

    def _takes_rows(self, indices: Iterable[int]) -> bool:
        """Return whether blocks compute what this file says, for whichever rows they are given."""
        if torch.compiler.is_compiling():
            return all(is_own(b) and not is_observed(b) for b in (self.resblocks[i] for i in indices))
        state = self._states()
        return not state.is_observed(indices) and all(state.blocks[i] != CHANGED for i in indices)

    def _is_packable(self) -> bool:
        """Return whether the blocks' parameters say all that they compute, and nobody watches them compute."""
        state = self._states()
        return state.all_plain and not state.is_observed(range(self.layers)) and self._is_uniform()

    def _is_uniform(self) -> bool:
        """Return whether the first block's heads, mask, GELU and epsilon are those of all."""
        return len({options_of(b) for b in self.resblocks}) == 1 and len({*options_of(self.resblocks[0])[3:]}) == 1

    def _states(self) -> BlockStates:
        return states_of(self, self.resblocks, state_of)

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
        blocks = list(self.resblocks)
        return self._through(blocks[: max(wanted, default=-1) + 1] if stop_early else blocks, x, wanted=wanted)

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

    def _through(
        self,
        blocks: list[nn.Module],
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        read: Read | None = None,
        wanted: Container[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Return what comes out of the last of some blocks, and out of each that is wanted.

        A block's last addition is left to the next one's first LayerNorm where nobody looks at what lies between.
        """
        carries, branch, outputs = self._carries(blocks), None, []
        for i, block in enumerate(blocks):
            last = i + 1 == len(blocks)
            if carries[i]:
                following = None if last or i in wanted or not carries[i + 1] else blocks[i + 1].ln_1
                x, branch = block.carry(x, branch, cu_seqlens, read if last else None, following)
                if following is None:
                    x, branch = branch.added_to(x), None
            else:
                x = self._run(block, x, cu_seqlens, read if last else None)
            if i in wanted:
                outputs.append(x)
        return x, outputs

    def _carries(self, blocks: list[nn.Module]) -> list[bool]:
        """Return for each block whether it may be run without being called."""
        if self._checkpoints_now() or leaves_clipfast():
            # what is kept is a block's whole input; and who exports finds the blocks by their calls
            return [False] * len(blocks)
        return [isinstance(block, ResidualAttentionBlock) and block.carries() for block in blocks]

    def _checkpoints_now(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()

    def _run(self, block: nn.Module, x: Tensor, *rest: Tensor | int | None) -> Tensor:
        if all(argument is None for argument in rest):
            rest = ()  # a block of somebody else's takes nothing but tokens
        if self._checkpoints_now():
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
