"""Twins of towers: clipfast's towers over blocks that stand for others (:mod:`clipfast.models.twin_blocks`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from clipfast.models.twin_blocks import TwinBlock, TwinLayerNorm, of_type, require
from clipfast.modules.text import TextTransformer
from clipfast.modules.transformer import Transformer
from clipfast.modules.vit import ViT
from clipfast.ops.encoder_part import EncoderPart


class TwinTransformer(Transformer):
    """clipfast's stack over another one's blocks.

    Args:
        blocks: The blocks.
        checkpoints: Tells whether blocks are computed again in the backward pass, as the other would now.
    """

    def __init__(self, blocks: Iterable[TwinBlock], checkpoints: Callable[[], bool]) -> None:
        nn.Module.__init__(self)
        self.resblocks = nn.ModuleList(blocks)
        require(len(self.resblocks) > 0, "it has no blocks")
        # clipfast's stacks are of one kind, and the packed encoder takes the first block's word for all
        kinds = {(b.attn.heads, b.mlp.approximate, *(ln.eps for ln in (b.ln_1, b.ln_2))) for b in self.resblocks}
        require(len(kinds) == 1 and len({*next(iter(kinds))[2:]}) == 1, "its blocks differ in heads, GELU or epsilon")
        self.layers = len(self.resblocks)
        self.width = self.resblocks[0].attn.out_proj.out_features
        self._checkpoints = checkpoints

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self._checkpoints()

    def _takes_rows(self, indices: Iterable[int]) -> bool:
        """Return that blocks do: the twin is another one as soon as the blocks that it stands for are changed."""
        return True

    def _is_packable(self) -> bool:
        """Return whether the blocks' parameters say all that they compute."""
        return all(block.is_plain for block in self.resblocks)

    def between(self, x: Tensor, first: int, last: int, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return what comes out of the block before ``last``, given what goes into the block ``first``.

        ``cu_seqlens`` as in :meth:`forward`.
        """
        if first >= last:
            return x
        encoder = self.packed_encoder(x)
        if encoder is not None:
            return self._encode(EncoderPart(encoder, first, last), x, cu_seqlens, None)
        return self._through(list(self.resblocks)[first:last], x, cu_seqlens)[0]


class TwinViT(ViT):
    """clipfast's ViT behind another one's embedding of patches, up to the pooled token, ``[B, W]``.

    Called with the tokens ``[B, N, W]`` that go into the first block, class token first.

    Args:
        transformer: The blocks.
        ln_post: The last LayerNorm, or an identity.
    """

    def __init__(self, transformer: TwinTransformer, ln_post: nn.Module) -> None:
        nn.Module.__init__(self)
        self.transformer, self.ln_post = transformer, ln_post
        self.pool_type, self.proj, self.output_dim = "tok", None, None

    def tokens(self, x: Tensor) -> Tensor:
        """Return the last block's tokens, ``[B, N, W]``, before the last LayerNorm."""
        return self.transformer(x)

    def _embed(self, images: Tensor) -> Tensor:
        """Leave it to the other library's code: its class and position embeddings take many forms."""
        return images


class _Embedding(nn.Module):
    """An embedding in the dtype of a linear layer."""

    def __init__(self, source: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.source = of_type(source, nn.Embedding, "token_embedding")
        require(source.max_norm is None, "token_embedding changes its weight when it is read (max_norm)")
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """``[vocabulary, W]``."""
        return self.source.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[..., W]`` from ``[...]``."""
        return self.source(tokens).to(self.linear.weight.dtype)


class TwinText(TextTransformer):
    """clipfast's text transformer over another one's parts, up to the pooled token, ``[B, W]``.

    Args:
        token_embedding: The embedding of tokens.
        positions: Gives the embeddings ``[L, W]`` of positions.
        transformer: The blocks.
        ln_final: The last LayerNorm.
        eos_id: The id whose first occurrence is read; None reads at the largest id.
        pooling: ``"first"`` or ``"last"``, the token that is read instead, whatever the ids; None reads by them.
    """

    def __init__(
        self,
        token_embedding: nn.Module,
        positions: Callable[[], Tensor],
        transformer: TwinTransformer,
        ln_final: TwinLayerNorm,
        eos_id: int | None,
        pooling: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.transformer, self.ln_final = transformer, ln_final
        self.token_embedding = _Embedding(token_embedding, transformer.resblocks[0].mlp.c_fc)
        self.vocab_size, self.eos_id = token_embedding.num_embeddings, eos_id
        self.pooling = pooling or ("argmax" if eos_id is None else "eos")
        self.text_projection = self.output_dim = None
        self._positions = positions

    @property
    def positional_embedding(self) -> Tensor:
        """``[L, W]`` in the dtype that the blocks compute in."""
        return self._positions().to(self.token_embedding.linear.weight.dtype)

    @property
    def context_length(self) -> int:
        """The longest caption, in tokens."""
        return self._positions().shape[0]

    @property
    def is_causal(self) -> bool:
        """Whether a token attends to itself and those before it only."""
        return self.transformer.resblocks[0].attn.causal

    def _takes_packed_rows(self) -> bool:
        """Return whether captions may be cut: nothing of the other's would notice."""
        return self.transformer.can_pack()

    def takes(self, tokens: object) -> bool:
        """Return whether ``tokens`` are ids ``[B, L]``, of which nothing but the values can be wrong."""
        return (
            isinstance(tokens, Tensor)
            and tokens.dim() == 2
            and 1 <= tokens.shape[1] <= self.context_length
            and tokens.dtype in (torch.int64, torch.int32)
        )

    def tokens(self, tokens: Tensor) -> Tensor:
        """Return all tokens after the last LayerNorm, ``[B, L, W]``."""
        return self.ln_final(self.transformer(self._embed_tokens(tokens)))

    def embedded(self, tokens: Tensor) -> Tensor:
        """Return ``[B, L, W]``, what goes into the first block."""
        return self._embed_tokens(tokens)

    def read_positions(self, tokens: Tensor) -> Tensor:
        """Return ``[B]``, the position of the token that each row is read at."""
        return self._read_positions(tokens)

    def _check_tokens(self, tokens: Tensor) -> None:
        """Leave it to the other library what it takes: rows without an EOS are read at their first token."""
