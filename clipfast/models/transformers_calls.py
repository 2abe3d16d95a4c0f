"""What a call of transformers' towers asks for, and the outputs that answer it: shared by all families."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip import modeling_clip
from transformers.utils import output_capturing

from clipfast.models.accelerated import Accelerated
from clipfast.models.later import Later, can_wait
from clipfast.models.lazy_output import lazy
from clipfast.models.twins import TwinTransformer
from clipfast.modules import plainness

Result = BaseModelOutputWithPooling | tuple[Tensor, ...]

_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_HIDDEN = "output_hidden_states"
# those of the first versions 5 know no selection: all hidden states are returned
_selected = getattr(output_capturing, "selected_hidden_states", lambda value: None)
_resolve = getattr(output_capturing, "resolve_hidden_states_indices", None)


def refusal(tower: nn.Module, kwargs: dict[str, Any], causal: bool) -> str | None:
    """Return what a call asks for beside tokens, the pooled output and hidden states, or None.

    Args:
        tower: The accelerated tower.
        kwargs: The call's, without the inputs.
        causal: Whether its tokens attend to themselves and those before them only.
    """
    config = tower.config
    if getattr(config, "output_attentions", False):
        return "output_attentions in the configuration"
    if getattr(config, "tie_last_hidden_states", None):
        return "tie_last_hidden_states in the configuration"
    if getattr(config, "is_causal", None) not in (None, causal):
        return "is_causal in the configuration"
    if config._attn_implementation not in _ATTENTIONS:
        return f"the attention implementation {config._attn_implementation}"
    if not _is_known(config._attn_implementation):
        return f"a patched attention implementation {config._attn_implementation}"
    for name, value in kwargs.items():
        if not (value is None or value is False or name in ("return_dict", _HIDDEN)):
            return name
    if not isinstance(_asked_for(tower, kwargs), bool | int | list | tuple | None):
        return _HIDDEN
    return None


def _is_known(implementation: str | None) -> bool:
    """Return whether an attention implementation is transformers' own: users register others under its names."""
    function = modeling_clip.ALL_ATTENTION_FUNCTIONS.get(implementation)
    return function is None or plainness.is_from(function, "transformers")


def _asked_for(tower: nn.Module, kwargs: dict[str, Any]) -> Any:
    return kwargs.get(_HIDDEN, getattr(tower.config, _HIDDEN, False))


def hidden_states_wanted(tower: nn.Module, kwargs: dict[str, Any], layers: int) -> list[int] | None:
    """Return which hidden states a call asks for, 0 for what goes into the first of the layers; None for no output.

    LLaVA and its like ask for those of the layers that they read, and transformers returns None for all others.
    """
    value = _asked_for(tower, kwargs)
    if not value:
        return None
    selected = _selected(value)
    if selected is None:
        return list(range(layers + 1))
    # negative ones are counted from the configuration's number of layers, which may not be how many there are
    return sorted(i for i in _resolve(tower, selected) if 0 <= i <= layers)


def wants_dict(tower: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Return whether a call wants an output with names, not a tuple."""
    return kwargs.get("return_dict", getattr(tower.config, "return_dict", True)) is not False


def output_of(
    tower: nn.Module,
    kwargs: dict[str, Any],
    tokens: Tensor | None,
    pooled: Tensor | None,
    states: tuple[Tensor | None, ...] | None = None,
) -> Result:
    """Return a call's output in the form that it wants."""
    output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled, hidden_states=states)
    return output if wants_dict(tower, kwargs) else output.to_tuple()


def with_hidden_states(
    tower: Accelerated,
    twin: nn.Module,
    kwargs: dict[str, Any],
    x: Tensor,
    wanted: list[int],
    *,
    finish: Callable[[Tensor], Tensor],
    pool: Callable[[Tensor], Tensor] | None,
    waits: bool = True,
    cu_seqlens: Tensor | None = None,
    show: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    transformer: TwinTransformer | None = None,
) -> Result:
    """Return the output of a call that asks for hidden states.

    The layers behind the last of them wait, where that is exact, until somebody reads what they give.

    Args:
        tower: The accelerated tower.
        twin: Its twin, with the blocks ``twin.transformer``.
        kwargs: The call's.
        x: What goes into the first block, as that takes it.
        wanted: The hidden states, ascending.
        finish: Makes of the last block's tokens those of which the output is made.
        pool: Makes of these the pooled output; None where there is none.
        waits: Whether nobody would notice that ``finish`` and ``pool`` are called later.
        cu_seqlens: Of packed tokens.
        show: Makes of tokens what is returned of them.
        transformer: The blocks, where they are others than ``twin.transformer``.
    """
    transformer = transformer or twin.transformer
    done, found = 0, {}
    for index in wanted:
        x = transformer.between(x, done, index, cu_seqlens)
        done, found[index] = index, show(x)
    states = tuple(found.get(i) for i in range(transformer.layers + 1))
    with_tokens = tower._clipfast_options["token_outputs"]
    if not (waits and (with_tokens or pool) and wants_dict(tower, kwargs) and can_wait(tower)):
        last = finish(transformer.between(x, done, transformer.layers, cu_seqlens))
        tokens = show(last) if with_tokens else None
        return output_of(tower, kwargs, tokens, None if pool is None else pool(last), states)
    if any(x is state for state in found.values()):
        # who was given it may write to it
        x = x.clone()
    last = functools.cache(lambda: finish(transformer.between(x, done, transformer.layers, cu_seqlens)))
    pooled = functools.cache(lambda: None if pool is None else pool(last()))

    def tokens() -> Tensor:
        pooled()  # before who reads them may write to them
        return show(last())

    later, waiting = Later(tower, twin), {}
    if with_tokens:
        waiting["last_hidden_state"] = later.of("last_hidden_state", tokens)
    if pool is not None:
        waiting["pooler_output"] = later.of("pooler_output", pooled)
    return lazy(BaseModelOutputWithPooling(hidden_states=states), waiting)


def can_be_read(mask: Any, tokens: Tensor) -> bool:
    """Return whether a mask has a value for every token, and it can be read now, as transformers reads it."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(mask, Tensor)
        and mask.shape == tokens.shape[:2]
        and not mask.is_meta
        and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def hides_nothing(mask: Tensor | None, read: Tensor | None = None) -> bool:
    """Return whether a mask ``[B, L]`` hides nothing; with ``read``, nothing up to those positions ``[B]``."""
    if mask is None:
        return True
    shown = mask.bool()
    if read is not None:
        shown = shown | (torch.arange(mask.shape[1], device=mask.device) > read.to(mask.device)[:, None])
    return bool(shown.all())
