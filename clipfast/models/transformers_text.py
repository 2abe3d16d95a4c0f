"""transformers' text towers of CLIP, MetaCLIP 2, SigLIP and SigLIP 2, accelerated, in a whole model or alone.

Their outputs carry ``last_hidden_state``. Without gradients a tower computes its pooled output alone, and the tokens
when they are first read; otherwise every token is computed. With ``token_outputs=False`` it is None, and what only
other tokens need is left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clipfast.models.accelerated import Accelerated
from clipfast.models.fallbacks import count
from clipfast.models.later import Later, can_wait
from clipfast.models.lazy_output import lazy
from clipfast.models.transformers_blocks import NORMS, family_of, transformer_of
from clipfast.models.transformers_calls import (
    Result,
    can_be_read,
    hidden_states_wanted,
    hides_nothing,
    output_of,
    refusal,
    wants_dict,
    with_hidden_states,
)
from clipfast.models.twin_blocks import TwinLayerNorm, of_type, require
from clipfast.models.twin_state import Twin
from clipfast.models.twins import TwinText
from clipfast.modules.block import take_tokens
from clipfast.modules.plainness import LINEARS, is_untouched
from clipfast.modules.shortcuts import shortcuts_enabled


class TextTower(Accelerated):
    """``CLIPTextModel`` and ``MetaClip2TextModel``: causal, read at the EOS."""

    replaced_children = ("embeddings", "encoder", "final_layer_norm")

    def baked_attributes(self) -> tuple[Any, ...]:
        """Return whether positions are counted from 0; see the base class."""
        return _position_state(self.embeddings.position_ids)

    def make_twin(self) -> Twin:
        """Return the twin of embeddings, blocks and the last LayerNorm."""
        require(hasattr(self, "final_layer_norm"), "it is not laid out as in transformers 5")
        family = family_of(self.encoder)
        if family.is_clip:
            require(isinstance(self.eos_token_id, int), f"its eos_token_id is {self.eos_token_id}, expected one id")
        of_type(self.embeddings, family.text_embeddings, "embeddings")
        ids = self.embeddings.position_ids
        require(
            ids.is_meta or torch.equal(ids[0], torch.arange(ids.shape[1], device=ids.device)),
            "embeddings: its position_ids do not count from 0",
        )
        positions = of_type(self.embeddings.position_embedding, nn.Embedding, "position_embedding")
        twin = TwinText(
            self.embeddings.token_embedding,
            lambda: positions.weight,
            transformer_of(self.encoder, family.is_clip, self.config),
            TwinLayerNorm(self.final_layer_norm, NORMS, "final_layer_norm"),
            self._read_id(),
            None if family.is_clip else "last",
        )
        return Twin(self, twin, self.replaced_children)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Result:
        """Return what transformers returns; the tokens are computed when they are first read where that is exact."""
        twin = self.serving_twin()
        if twin is None:
            return self._original(input_ids, attention_mask, position_ids, **kwargs)
        reason = self._refusal(twin, input_ids, attention_mask, position_ids, kwargs)
        if reason is not None:
            count(self, reason)
            return self._original(input_ids, attention_mask, position_ids, **kwargs)
        options = self._clipfast_options
        read = twin.read_positions(input_ids)
        whole = hides_nothing(attention_mask)
        # what lies behind the token that is read does not matter where it is not seen
        served = whole or (_is_causal(twin) and hides_nothing(attention_mask, read))
        wanted = hidden_states_wanted(self, kwargs, twin.transformer.layers)
        if wanted is not None and whole:
            return self._with_hidden_states(twin, input_ids, read, wanted, kwargs)
        if wanted is None and not options["token_outputs"] and served:
            return output_of(self, kwargs, None, self._features(twin(input_ids)))
        if wanted is None and served and options["lazy"] and self._can_wait(kwargs):
            return self._waiting(twin, input_ids, attention_mask, whole, kwargs)
        if wanted is not None or not options["token_outputs"] or not whole:
            count(self, "attention_mask hides tokens" + (" of last_hidden_state" if served else " before the one read"))
            return self._original(input_ids, attention_mask, position_ids, **kwargs)
        tokens = twin.tokens(input_ids)
        return output_of(self, kwargs, tokens, self._features(take_tokens(tokens, read)))

    def _read_id(self) -> int | None:
        """Return the id that the tower is read at; None: the largest, or at a place that no id tells."""
        family = family_of(self.encoder)
        return self.eos_token_id if family.is_clip and self.eos_token_id != family.largest_id_for else None

    def _features(self, pooled: Tensor) -> Tensor:
        """Return the pooled output of the token that is read, after the last LayerNorm."""
        return pooled

    def _head(self) -> nn.Module | None:
        """Return what makes the pooled output of the token that is read."""
        return None

    def _refusal(
        self, twin: TwinText, input_ids: Any, attention_mask: Any, position_ids: Any, kwargs: dict[str, Any]
    ) -> str | None:
        """Return what a call asks for that the twin does not give, or None."""
        if position_ids is not None:
            return "position_ids"
        if not twin.takes(input_ids):
            return "input_ids are no ids [B, L] of int64 or int32"
        if twin.eos_id != self._read_id():
            return "another eos_token_id"
        if attention_mask is not None and not can_be_read(attention_mask, input_ids):
            return "an attention_mask that is not [B, L], or whose values cannot be read"
        return refusal(self, kwargs, _is_causal(twin))

    def _original(self, input_ids: Any, attention_mask: Any, position_ids: Any, **kwargs: Any) -> Result:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    def _with_hidden_states(
        self, twin: TwinText, input_ids: Tensor, read: Tensor, wanted: list[int], kwargs: dict[str, Any]
    ) -> Result:
        head = self._head()
        return with_hidden_states(
            self,
            twin,
            kwargs,
            twin.embedded(input_ids),
            wanted,
            finish=twin.ln_final,
            pool=lambda tokens: self._features(take_tokens(tokens, read)),
            waits=head is None or is_untouched(head, LINEARS),
        )

    def _can_wait(self, kwargs: dict[str, Any]) -> bool:
        """Return whether tokens may be computed later: the model will be the same, and the pooled output takes less."""
        return shortcuts_enabled() and wants_dict(self, kwargs) and can_wait(self)

    def _waiting(
        self, twin: TwinText, input_ids: Tensor, attention_mask: Tensor | None, whole: bool, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPooling:
        """Return an output whose tokens wait until they are read; who read those of the last call gets them at once."""
        options = self._clipfast_options
        ids, mask = input_ids.clone(), None if whole else attention_mask.clone()

        def tokens() -> Tensor:
            if mask is None:
                return twin.tokens(ids)
            # what those behind the mask are is left to transformers' code
            count(self, "last_hidden_state was read behind an attention_mask")
            return self._original(ids, mask, None, **kwargs | {"return_dict": True}).last_hidden_state

        if options.get("tokens_are_read"):
            # all at once costs less than twice
            found = tokens()
            pooled = take_tokens(found, twin.read_positions(ids))
            later = lambda: found  # noqa: E731
        else:
            pooled = twin(input_ids)
            later = Later(self, twin, just_used=True).of("last_hidden_state", tokens)
        options["tokens_are_read"] = False

        def first_read() -> Tensor:
            result = later()
            options["tokens_are_read"] = True
            return result

        output = BaseModelOutputWithPooling(pooler_output=self._features(pooled))
        return lazy(output, {"last_hidden_state": first_read})


class SiglipTextTower(TextTower):
    """``SiglipTextModel`` and ``Siglip2TextModel``: in both directions, read at the last token, with a head behind it.

    Texts are seen with their padding, as they were in training: no mask, or one that hides nothing.
    """

    def _features(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)

    def _head(self) -> nn.Module | None:
        return self.head


def _is_causal(twin: TwinText) -> bool:
    return twin.transformer.resblocks[0].attn.causal


def _position_state(ids: Tensor) -> tuple[Any, ...]:
    """Return what tells whether ids of positions are what they were: on the CPU their values."""
    if torch.compiler.is_compiling() or ids.is_meta:
        return ()
    if ids.device.type != "cpu":
        return id(ids), -1 if ids.is_inference() else ids._version
    return (torch.equal(ids[0], _count(ids.shape[1])),)


@lru_cache(maxsize=8)
def _count(tokens: int) -> Tensor:
    return torch.arange(tokens, device="cpu")
