"""What is known about the blocks of a stack: judged once, and again when one of them was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from torch import nn

from clipfast.modules import plainness
from clipfast.modules.shortcuts import is_observed
from clipfast.modules.watch import Watch, modules_in

# its parameters say all that a block computes
PLAIN = "plain"
# it computes each token's row by itself but for attention, with layers that have to be called
ADAPTED = "adapted"
# it computes something else, or nobody knows what
CHANGED = "changed"


class BlockStates:
    """The states of blocks, as long as they are what they were.

    Args:
        container: What holds the blocks.
        judge: Tells the state of one.
    """

    def __init__(self, container: nn.Module, judge: Callable[[nn.Module], str]) -> None:
        self._roots = tuple(container)
        self.blocks = tuple(judge(block) for block in self._roots)
        self.all_plain = all(state == PLAIN for state in self.blocks)
        self._watch = Watch(modules_in(container))
        # an adapter's: what is drawn hangs on how many rows there are
        self._dropouts = tuple(m for m in self._watch.modules if isinstance(m, nn.modules.dropout._DropoutNd))

    def holds(self, container: nn.Module) -> bool:
        """Return whether the blocks are as they were, hooks and the values of weights apart."""
        return self._watch.modules[0] is container and self._watch.holds()

    def is_observed(self, indices: Iterable[int]) -> bool:
        """Return whether a hook waits for a module of these blocks, or values are dropped at random in any."""
        if any(m.training and m.p for m in self._dropouts):
            return True
        return self._watch.is_hooked() and any(is_observed(self._roots[i]) for i in indices)


# by the stack, so that copying and pickling a model know nothing of it
_states: WeakKeyDictionary[nn.Module, BlockStates] = WeakKeyDictionary()


def states_of(owner: nn.Module, container: nn.Module, judge: Callable[[nn.Module], str]) -> BlockStates:
    """Return what is known about the blocks in ``container``, which ``owner`` holds."""
    known = _states.get(owner)
    if known is None or not known.holds(container):
        known = _states[owner] = BlockStates(container, judge)
    return known


def is_as_defined(module: nn.Module, kind: type, weights: bool = True) -> bool:
    """Return whether a module computes what ``kind`` says: it is one, or a wrapper's subclass with the same methods.

    Args:
        module: The module.
        kind: A class of this package.
        weights: Whether its weights have to be plain Parameters; without, they may be sharded.
    """
    if not isinstance(module, kind):
        return False
    reason = plainness.departure(module, sharded=not weights)
    if reason is not None or (weights and type(module) is not kind):
        return False
    return all(
        getattr(type(module), name) is value for owner, name, value in plainness.references(kind) if owner is kind
    )


def is_rowwise(linear: nn.Module) -> bool:
    """Return whether a layer in the place of a linear one maps each row by itself."""
    if isinstance(linear, nn.Linear):
        plain = plainness.LINEARS.get(nn.Linear)
        return type(linear).forward is plain and plainness.departure(linear, sharded=True) is None
    return is_lora(linear)


def is_lora(linear: nn.Module) -> bool:
    """Return whether a module is peft's LoRA around a linear layer, both as peft and PyTorch made them."""
    if type(linear).__module__ != "peft.tuners.lora.layer" or type(linear).__name__ != "Linear":
        return False
    if set(linear.lora_variant.values()) or type(linear.base_layer) not in plainness.LINEARS:
        return False
    return all(plainness.departure(module) is None for module in modules_in(linear))
