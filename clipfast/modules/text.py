"""The text transformer of CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.modules import few_rows, inference, plainness
from clipfast.modules.block import LayerNorm, take_tokens
from clipfast.modules.locking import set_trainable, unlock_last
from clipfast.modules.packing import pack
from clipfast.modules.plainness import is_untouched
from clipfast.modules.transformer import Transformer
from clipfast.ops import capturing, transfer

POOLINGS = ("eos", "argmax")

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
        pooling: str = "eos",
    ) -> None:
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.eos_id = vocab_size - 1 if eos_id is None else eos_id
        if not 0 <= self.eos_id < vocab_size:
            raise ValueError(f"TextTransformer(eos_id): got {eos_id}, expected an id below vocab_size = {vocab_size}")
        if pooling not in POOLINGS:
            raise ValueError(
                f"TextTransformer(pooling): got {pooling!r}, expected one of {', '.join(map(repr, POOLINGS))}"
            )
        self.pooling = pooling
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.text_projection = None if output_dim is None else nn.Parameter(torch.empty(width, output_dim))
        self.transformer = Transformer(width, layers, heads, mlp_ratio, approximate, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = LayerNorm(width)
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
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    @property
    def attn_mask(self) -> Tensor:
        """What the blocks' attention amounts to: ``[L, L]``, 0 where a token attends and −inf where it does not.

        open_clip's towers hold it as a buffer. Here it is made when it is read: no block needs it.
        """
        like = self.positional_embedding
        shape = (self.context_length, self.context_length)
        return torch.full(shape, -torch.inf, dtype=like.dtype, device=like.device).triu_(1)

    @attn_mask.setter
    def attn_mask(self, mask: object) -> None:
        if not isinstance(mask, Tensor) or not torch.equal(mask.to(self.attn_mask), self.attn_mask):
            came = tuple(mask.shape) if isinstance(mask, Tensor) else mask
            raise ValueError(
                f"attn_mask: got {came}, expected the causal one of {self.context_length} tokens: there is no other "
                f"here; clipfast.accelerate serves open_clip's models, whose mask can be changed"
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
            pooled = self.ln_final(take_tokens(x, self._read_positions(self._sent(tokens))))
            output["text_features"] = inference.project(self, pooled, self.text_projection)
        return output

    def _text_features(self, tokens: Tensor) -> Tensor:
        """Return ``[B, E]`` from ``[B, L]``: the token that is read, after the last LayerNorm and projection."""
        self._check_tokens(tokens)
        embeddings = self.token_embedding.weight
        return inference.each_alone(
            self._features_of, tokens, lambda: self.transformer.packed_encoder(embeddings) is not None
        )

    def _features_of(self, tokens: Tensor) -> Tensor:
        if _cannot_read_values(tokens) or not self._takes_packed_rows():
            tokens = self._sent(tokens)
            read = self._read_positions(tokens)
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

    def _read_positions(self, tokens: Tensor) -> Tensor:
        """Return ``[B]``, the position of the token that each row is read at."""
        if self.pooling == "argmax":
            return tokens.argmax(dim=-1)
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
            missing = (tokens != self.eos_id).all(dim=-1)
            if self.pooling == "eos" and missing.any():
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


class TextTransformer(TextTower):
    """CLIP's causal text transformer: token ids to features, in OpenAI's key layout.

    Args:
        context_length: The longest caption, in tokens.
        vocab_size: The number of token ids.
        width: The width W of tokens.
        layers: The number of blocks.
        heads: The number of heads.
        mlp_ratio: The MLPs' hidden width over W.
        output_dim: The width E of features; None leaves the projection out and gives features of width W.
        approximate: The GELU: ``"none"`` (erf), ``"tanh"`` or ``"quick"`` (OpenAI's weights).
        eos_id: The id of the end-of-text token, where features are read; by default the last id, as in CLIP's
            vocabulary.
        pooling: Where features are read: ``"eos"``, at the first EOS token; ``"argmax"``, at the largest id (the first
            of them), as OpenAI's code and open_clip do: the same place, unless a row has no EOS.

    Raises:
        ValueError: ``heads`` does not divide ``width``, ``eos_id`` is outside the vocabulary, or ``approximate`` or
            ``pooling`` is not one of its values.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    """

    def __init__(
        self,
        context_length: int = 77,
        vocab_size: int = 49408,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        output_dim: int | None = 512,
        *,
        approximate: str = "none",
        eos_id: int | None = None,
        pooling: str = "eos",
    ) -> None:
        super().__init__()
        self.output_dim = output_dim
        self._add_text_tower(
            context_length, vocab_size, width, layers, heads, mlp_ratio, output_dim, approximate, eos_id, pooling
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode captions.

        Args:
            tokens: Token ids ``[B, L]``, int64 or int32, L up to the context length, each row with an EOS:
                best left in host memory where the model is on a GPU, since then nothing has to wait for their lengths.

        Returns:
            Features ``[B, E]``, not normalised.

        Raises:
            TypeError, ValueError: ``tokens`` is not as described (values are checked in host memory only).
        """
        return self._text_features(tokens)

    def forward_features(self, tokens: Tensor) -> Tensor:
        """Return all tokens after the last LayerNorm, ``[B, L, W]``."""
        return self.ln_final(self.transformer(self._all_tokens(tokens)))

    def forward_intermediates(
        self,
        text: Tensor,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NLC",
        output_extra_tokens: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Return features and the tokens after chosen blocks, with open_clip's arguments and names.

        Args:
            text: Token ids ``[B, L]``.
            indices: The last n blocks (an int), those named (a sequence; negative from the end), or all (None).
            stop_early: Whether the blocks behind the last chosen one are left out, for the features too.
            normalize_intermediates: Whether the last LayerNorm is applied to the tokens.
            intermediates_only: Whether features are left out.
            output_fmt: Must be ``"NLC"``.
            output_extra_tokens: Accepted as in open_clip; there are no tokens beside those of the text.

        Returns:
            ``text_intermediates``, a list of ``[B, L, W]`` in the order of the blocks, and ``text_features``
            ``[B, E]``, not normalised.

        Raises:
            ValueError: An index is outside the blocks, or ``output_fmt`` is another.
        """
        if output_fmt != "NLC":
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NLC'")
        return self._text_intermediates(text, indices, stop_early, normalize_intermediates, not intermediates_only)

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze all parameters but those of the last groups, as open_clip does.

        Args:
            unlocked_layers: How many groups still learn. From the last: the projection; the last block with the last
                LayerNorm; the other blocks, each a group; token and position embeddings.
            freeze_layer_norm: Must be True.

        Raises:
            ValueError: ``freeze_layer_norm`` is False.
        """
        self._lock_text_tower(unlocked_layers, freeze_layer_norm)

    def get_attention_maps(self, tokens: Tensor) -> Tensor:
        """Return the attention weights of every block and head, ``[layers, B, H, L, L]`` (query, key)."""
        return self.transformer.attention_maps(self._all_tokens(tokens))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training; see :attr:`Transformer.grad_checkpointing`."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare beside biases and norms."""
        return {"positional_embedding"}
