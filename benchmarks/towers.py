"""What benchmarks of whole towers share: sides that compute otherwise, the oracle, operations of a dense pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import clipfast

# a whole tower adds up the roundings of every layer in another order: four times DESIGN's bound for one op
DEPTH = 4.0


def compiled(module: Callable[..., Tensor] | str) -> Callable[..., Tensor] | str:
    """Return a module that torch.compile froze the weights of."""
    if isinstance(module, str):
        return module
    import torch._inductor.config as config

    config.freezing = True
    return torch.compile(module)


def operations(call: Callable[[], object]) -> float:
    """Return the operations of the products of a dense pass."""
    with torch.no_grad(), clipfast.backend("reference"), clipfast.exact_shortcuts(False):
        counter = FlopCounterMode(display=False)
        with counter:
            call()
    return float(counter.get_total_flops())


def in_inference_mode(sides: dict) -> dict:
    return {name: side if isinstance(side, str) else torch.inference_mode()(side) for name, side in sides.items()}


def exact_features(encode: Callable[[clipfast.CLIP], Tensor], mine: clipfast.CLIP) -> Tensor:
    with torch.no_grad(), clipfast.backend("reference"), clipfast.exact_shortcuts(False):
        return encode(copy.deepcopy(mine).double())


def reference(function: Callable[..., object]) -> Callable[..., object]:
    """Return clipfast's specification: every token, in plain PyTorch operators."""

    def run(*arguments: object) -> object:
        with clipfast.backend("reference"), clipfast.exact_shortcuts(False):
            return function(*arguments)

    return run
