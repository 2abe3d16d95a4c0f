"""clipfast.accelerate on transformers' SigLIP, SigLIP 2 and MetaCLIP 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import peft
import pytest
import tiny_towers as tiny
import torch
from acceleration import (
    Case,
    assert_close,
    assert_same_gradients,
    comparable,
    counted,
    loss_of,
    tensors_of,
)
from acceleration_checks import (
    COMMON,
    check_changed,
    check_checkpointed_gradients,
    check_compiled,
    check_ddp,
    check_float32_outputs,
    check_freed,
    check_hooked,
    check_loaded_by_assignment,
    check_outputs_and_gradients,
    check_packed_inference,
    parametrize,
)
from torch import Tensor, nn
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2

import clipfast
from clipfast.models.accelerate import AccelerateWarning

POOLED = {"token_outputs": False}
SIGLIP = Case("SigLIP", tiny.siglip, tiny.pair, towers=2)
SIGLIP_2 = Case("SigLIP 2", tiny.siglip2, tiny.patches_and_ids, towers=2)


def eos_at_2(dtype: torch.dtype) -> dict[str, Any]:
    """Captions in which the EOS id is 2, as MetaCLIP 2's is, and the largest id comes before it."""
    tokens = tiny.ids(dtype)["input_ids"].clone()
    tokens[tokens == 2] = 3
    tokens[:, 0] = 98
    return {"input_ids": tokens.masked_fill(tokens == 99, 2)}


def larger(dtype: torch.dtype) -> dict[str, Any]:
    return tiny.images(dtype, 48) | {"interpolate_pos_encoding": True}


def as_tuple(inputs: Callable[[torch.dtype], dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    return inputs(dtype) | {"return_dict": False}


def same_grids(dtype: torch.dtype) -> dict[str, Any]:
    """Pictures of one length, and of one grid: nothing is padded."""
    return tiny.patches(dtype, [(4, 4), (2, 8), (4, 4)])


def again(dtype: torch.dtype) -> dict[str, Any]:
    """Grids that come twice, in no order."""
    return tiny.patches(dtype, [(3, 5), (4, 4), (3, 5), (2, 3), (4, 4)], most=20)


METACLIP_2 = Case("MetaCLIP 2", tiny.metaclip_2, lambda d: tiny.images(d) | eos_at_2(d) | {"return_loss": True}, 2)
NAFLEX = Case("NaFlex tower", tiny.siglip2_vision, tiny.patches)


def metaclip_2(kind: str, inputs: Callable[[torch.dtype], dict[str, Any]], **options: Any) -> Case:
    return Case(f"{kind} {options}", partial(tiny.metaclip_2_tower, kind), inputs, options=options)


CASES = [
    METACLIP_2,
    metaclip_2("MetaClip2TextModelWithProjection", eos_at_2),
    metaclip_2("MetaClip2VisionModelWithProjection", tiny.images, **POOLED),
    metaclip_2("MetaClip2ForImageClassification", tiny.images, **POOLED),
    Case("SigLIP pooled", tiny.siglip, tiny.pair, 2, POOLED),
    Case("SigLIP text", tiny.siglip_text, tiny.ids),
    Case("SigLIP images", tiny.siglip_vision, partial(as_tuple, tiny.images)),
    Case("head_dim 72", partial(tiny.siglip_vision, hidden_size=144), tiny.images),
    Case("larger images", tiny.siglip_vision, larger),
    Case("no head", partial(tiny.siglip_vision, vision_use_head=False), tiny.images),
    Case("classifier", tiny.siglip_classifier, tiny.images),
    Case("SigLIP 2 pooled", tiny.siglip2, tiny.patches_and_ids, 2, POOLED),
    Case("NaFlex tuple", tiny.siglip2_vision, partial(as_tuple, tiny.patches)),
    Case("NaFlex pooled", tiny.siglip2_vision, again, options=POOLED),
    Case("NaFlex no head", partial(tiny.siglip2_vision, vision_use_head=False), again),
    Case("NaFlex one length", tiny.siglip2_vision, same_grids),
    Case("NaFlex one length, no mask", tiny.siglip2_vision, lambda d: same_grids(d) | {"pixel_attention_mask": None}),
    Case("NaFlex twice", tiny.siglip2_vision, again),
    Case("NaFlex classifier", tiny.siglip2_classifier, tiny.patches),
]


@parametrize([SIGLIP, SIGLIP_2], COMMON)
def test_accelerated(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize(CASES, (check_outputs_and_gradients, check_float32_outputs))
def test_accelerated_kinds(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize(
    [SIGLIP, SIGLIP_2],
    (
        check_loaded_by_assignment,
        check_ddp,
        check_hooked,
        check_changed,
        check_freed,
        check_packed_inference,
        check_checkpointed_gradients,
    ),
)
def test_accelerated_rarely(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([SIGLIP], (check_compiled,))
def test_compiled(check: Callable[[Case], None], case: Case) -> None:
    check(case)
