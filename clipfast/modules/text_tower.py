"""What a text tower is made of, and what it computes of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.modules import few_rows, inference, plainness
from clipfast.modules.block import LayerNorm, Read, take_tokens
from clipfast.modules.locking import set_trainable, unlock_last
from clipfast.modules.packing import pack
from clipfast.modules.plainness import is_untouched
from clipfast.modules.shortcuts import is_observed
from clipfast.modules.transformer import Transformer
from clipfast.ops import capturing, transfer

#: Where a caption is read.
POOLINGS = ("eos", "argmax", "last", "first")

_HOST = torch.device("cpu")


class TextTower(nn.Module):
    """The parameters of the text tower and what they compute, for the modules that hold them at their root.

    OpenAI's key layout puts the text tower's parameters beside ``visual`` and not under a name of their own, so
    both :class:`TextTransformer` and ``CLIP`` hold them like this.
    """

    def _add_text_tower(
        self,
        context_length: int,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        output_dim: int | None,
        approximate: str,
        eos_id: int | None,
        pool_type: str = "eos",
        no_causal_mask: bool = False,
        proj_bias: bool = False,
        **block_options: Any,
    ) -> None:
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.eos_id = vocab_size - 1 if eos_id is None else eos_id
        if not 0 <= self.eos_id < vocab_size:
            raise ValueError(f"TextTransformer(eos_id): got {eos_id}, expected an id below vocab_size = {vocab_size}")
        if pool_type not in POOLINGS:
            raise ValueError(
                f"TextTransformer(pool_type): got {pool_type!r}, expected one of {', '.join(map(repr, POOLINGS))}"
            )
        self.pooling = pool_type
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        if output_dim is None:
            self.text_projection = None
        elif proj_bias:
            self.text_projection = nn.Linear(width, output_dim)
        else:
            self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        self.transformer = Transformer(
            width, layers, heads, mlp_ratio, approximate, causal=not no_causal_mask, **block_options
        )
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = LayerNorm(width, eps=block_options.get("norm_eps", 1e-5))
        self._init_text_tower()

    @torch.no_grad()
    def _init_text_tower(self) -> None:
        """Draw the weights as OpenAI and open_clip do."""
        width, layers = self.transformer.width, self.transformer.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    @property
    def attn_mask(self) -> Tensor | None:
        """What the blocks' attention amounts to: ``[L, L]``, 0 where a token attends and −inf where it does not.

        open_clip's towers hold it as a buffer. Here it is made when it is read: no block needs it. None where every
        token attends to all.
        """
        if not self._is_causal(unknown=True):
            return None
        like = self.positional_embedding
        shape = (self.context_length, self.context_length)
        return torch.full(shape, -torch.inf, dtype=like.dtype, device=like.device).triu_(1)

    @attn_mask.setter
    def attn_mask(self, mask: object) -> None:
        own = self.attn_mask
        same = mask is own if own is None else isinstance(mask, Tensor) and torch.equal(mask.to(own), own)
        if not same:
            came = tuple(mask.shape) if isinstance(mask, Tensor) else mask
            expected = "None" if own is None else f"the causal one of {self.context_length} tokens"
            raise ValueError(
                f"attn_mask: got {came}, expected {expected}: there is no other here; clipfast.accelerate serves "
                f"open_clip's models, whose mask can be changed"
            )

    def _lock_text_tower(self, unlocked_layers: int, freeze_layer_norm: bool) -> None:
        if not freeze_layer_norm:
            raise ValueError(
                "freeze_layer_norm: got False, expected True: a LayerNorm is frozen with its layer, as in open_clip"
            )
        embeddings = [self.token_embedding, self.positional_embedding]
        *blocks, last = self.transformer.resblocks
        groups = [embeddings, *([b] for b in blocks), [last, self.ln_final], [self.text_projection]]
        if self.text_projection is None:
            groups.pop()
        for group in groups:
            set_trainable(group, False)
        unlock_last(groups, min(unlocked_layers, len(groups)))

    def _text_intermediates(
        self, tokens: Tensor, indices: int | Sequence[int] | None, stop_early: bool, norm: bool, features: bool
    ) -> dict[str, Tensor | list[Tensor]]:
        x, chosen = self.transformer.intermediates(self._all_tokens(tokens), indices, stop_early=stop_early)
        output: dict[str, Tensor | list[Tensor]] = {
            "text_intermediates": [self.ln_final(t) for t in chosen] if norm else chosen
        }
        if features:
            pooled = self.ln_final(take_tokens(x, self._read(self._sent(tokens))))
            output["text_features"] = inference.project(self, pooled, self.text_projection)
        return output

    def _text_features(self, tokens: Tensor) -> Tensor:
        """Return ``[B, E]`` from ``[B, L]``: the token that is read, after the last LayerNorm and projection."""
        self._check_tokens(tokens)
        return inference.each_alone(self._features_of, tokens, self._is_batch_invariant)

    def _is_batch_invariant(self) -> bool:
        # a projection that somebody watches is called
        watched = isinstance(self.text_projection, nn.Module) and is_observed(self.text_projection)
        return not watched and self.transformer.packed_encoder(self.token_embedding.weight) is not None

    def _features_of(self, tokens: Tensor) -> Tensor:
        # behind the last token there is nothing to leave out
        if self.pooling == "last" or _cannot_read_values(tokens) or not self._takes_packed_rows():
            tokens = self._sent(tokens)
            read = self._read(tokens)
            pooled = self.ln_final(self.transformer(self._embed_tokens(tokens), read=read))
        else:
            # the mask hides what lies behind the token that is read: it is left out
            read = self._read_positions(tokens)
            packing = pack(tokens, read, self._place_of(tokens), self._captions_to_add(read))
            x = self.token_embedding(packing.tokens)
            x = x + F.embedding(packing.positions, self.positional_embedding)
            x = self.transformer(x, packing.cu_seqlens, packing.ends)
            # LayerNorm works row by row: the rows that are read suffice
            pooled = self.ln_final(x)[packing.order]
        return inference.project(self, pooled, self.text_projection)

    @property
    def ignores_padding(self) -> bool:
        """Whether tokens behind the one that is read change nothing: none is, or the mask hides them."""
        return self.pooling != "last" and self._is_causal(unknown=False)

    def _is_causal(self, unknown: bool) -> bool:
        """Return whether all blocks are causal; somebody else's block, of which nothing is known, counts as told."""
        attentions = (getattr(block, "attn", None) for block in self.transformer.resblocks)
        return all(getattr(attention, "causal", unknown) for attention in attentions)

    def _takes_packed_rows(self) -> bool:
        """Return whether nothing would notice that captions are cut at the token that is read."""
        return is_untouched(self.token_embedding, plainness.EMBEDDINGS) and self.transformer.can_pack()

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    def _all_tokens(self, tokens: Tensor) -> Tensor:
        """Return ``[B, L, W]``, what goes into the first block."""
        self._check_tokens(tokens)
        return self._embed_tokens(self._sent(tokens))

    def _captions_to_add(self, read: Tensor) -> int:
        """Return how many captions of a token should be packed too, for products as exact as those of all tokens."""
        weight = self.token_embedding.weight
        if read.device.type != "cpu" or weight.device.type != "cpu":
            return 0
        return few_rows.missing(int(read.sum()) + len(read), weight)

    def _sent(self, tokens: Tensor) -> Tensor:
        """Return tokens where they are computed, on their way there if they lie in host memory."""
        return transfer.to_device(tokens, self._place_of(tokens))

    def _place_of(self, tokens: Tensor) -> torch.device:
        """Return where tokens are computed: on the model's card if they lie in host memory, else where they are."""
        device = self.token_embedding.weight.device
        # weights that are offloaded have no device until they are needed
        return tokens.device if tokens.device != _HOST or device.type == "meta" else device

    def _read(self, tokens: Tensor) -> Read:
        """Return the position of the token that rows are read at: one for all, or one each ``[B]``."""
        if self.pooling in ("first", "last"):
            return 0 if self.pooling == "first" else tokens.shape[1] - 1
        return self._read_positions(tokens)

    def _read_positions(self, tokens: Tensor) -> Tensor:
        """Return ``[B]``, the position of the token that each row is read at."""
        if self.pooling == "argmax":
            return tokens.argmax(dim=-1)
        if self.pooling != "eos":
            return torch.full_like(tokens[:, 0], self._read(tokens))
        return (tokens == self.eos_id).to(torch.uint8).argmax(dim=-1)

    def _check_tokens(self, tokens: Tensor) -> None:
        expected = f"expected token ids [B, L] (int64 or int32) with 1 ≤ L ≤ {self.context_length}"
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: got {type(tokens).__name__}, {expected}; clipfast.tokenize makes them of strings")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: got {tokens.dtype}, {expected}")
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, {expected}")
        device = self.token_embedding.weight.device
        if device != self._place_of(tokens):
            raise ValueError(
                f"tokens: got device {tokens.device}, expected {device}, where the model is, or host memory"
            )
        # values are checked in host memory only: elsewhere that would wait for the device
        if tokens.device.type == "cpu" and not _cannot_read_values(tokens):
            low, high = tokens.aminmax()
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"tokens: got ids {int(low)} to {int(high)}, expected 0 to {self.vocab_size - 1}")
            if self.pooling == "eos" and (missing := (tokens != self.eos_id).all(dim=-1)).any():
                rows = missing.nonzero().flatten().tolist()
                raise ValueError(
                    f"tokens: got {len(rows)} rows without the EOS id {self.eos_id} (the first is row {rows[0]}), "
                    f"expected one in every row: the text's features are read there"
                )


def _cannot_read_values(tokens: Tensor) -> bool:
    """Return whether values cannot be read now: they are being traced, captured in a graph, or are none."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or tokens.is_meta
        or capturing.is_rehearsed()
        or (tokens.is_cuda and torch.cuda.is_current_stream_capturing())
        or tokens.numel() == 0
    )
