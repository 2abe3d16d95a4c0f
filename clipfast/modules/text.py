"""The text transformer of CLIP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clipfast.modules.text_tower import POOLINGS, TextTower

__all__ = ["POOLINGS", "TextTower", "TextTransformer"]


class TextTransformer(TextTower):
    """CLIP's text transformer: token ids to features, in OpenAI's key layout.

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
        pool_type: Where features are read: ``"eos"``, at the first EOS token; ``"argmax"``, at the largest id (the
            first of them), as OpenAI's code and open_clip do: the same place, unless a row has no EOS; ``"last"`` and
            ``"first"``, at that token of every row, padding or not.
        no_causal_mask: Whether a token attends to all tokens, padding too, and not only to those before it.
        proj_bias: Whether the projection is a linear layer with a bias.
        norm_eps: The LayerNorms' epsilon.
        ls_init_value: Where LayerScale's factors start; None leaves them out.
        qkv_bias: Whether the projections to queries, keys and values have a bias.

    Raises:
        ValueError: ``heads`` does not divide ``width``, ``eos_id`` is outside the vocabulary, or ``approximate`` or
            ``pool_type`` is not one of its values.

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
        pool_type: str = "eos",
        no_causal_mask: bool = False,
        proj_bias: bool = False,
        norm_eps: float = 1e-5,
        ls_init_value: float | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.output_dim = output_dim
        self._add_text_tower(
            context_length, vocab_size, width, layers, heads, mlp_ratio, output_dim, approximate, eos_id,
            pool_type, no_causal_mask, proj_bias,
            norm_eps=norm_eps, ls_init_value=ls_init_value, qkv_bias=qkv_bias,
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode captions.

        Args:
            tokens: Token ids ``[B, L]``, int64 or int32, L up to the context length, each row with an EOS if that is
                read: best left in host memory where the model is on a GPU, since then nothing has to wait for their
                lengths.

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
