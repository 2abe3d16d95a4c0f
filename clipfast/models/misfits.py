"""What does not fit when weights are loaded, in words that can be read: ten keys of each kind, and how many more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

#: Keys that an error names before it counts the others.
SHOWN = 10


def listed(keys: Sequence[str], most: int = SHOWN) -> str:
    """Return the first keys, and how many more there are: ``a, b, … and 140 more``."""
    more = len(keys) - most
    return ", ".join(keys[:most]) + (f", … and {more} more" if more > 0 else "")


def check_fit(model: nn.Module, state: Mapping[str, Tensor], what: Callable[[], str | None]) -> None:
    """Raise ValueError unless weights are all that a model has, of its shapes and no others.

    Args:
        model: The module.
        state: The weights, by its own keys.
        what: Says what the weights are, where that explains why keys are missing: a sentence. It is asked only then.
    """
    own = model.state_dict(keep_vars=True)
    shared = [k for k in own if k in state]
    # BatchNorm's step counters came later than some checkpoints, frozen ones have none, and nothing reads them
    counter = ("num_batches_tracked", "running_mean")
    faults = {
        "missing": [k for k in own if k not in state and not k.endswith(counter[0])],
        "unexpected": [k for k in state if k not in own and k.replace(*counter) not in own],
        "misshapen": [
            f"{k} (got {tuple(state[k].shape)}, expected {tuple(own[k].shape)})"
            for k in shared
            if state[k].shape != own[k].shape
        ],
        "not floating point": [
            f"{k} (got {state[k].dtype}, expected {own[k].dtype})"
            for k in shared
            if own[k].is_floating_point() and not state[k].is_floating_point()
        ],
        "on the meta device, where nothing can be loaded": [k for k, v in own.items() if v.is_meta],
    }
    if any(faults.values()):
        told = what() if faults["missing"] else None
        lines = [f"  {told}"] if told else []
        lines += [f"  {len(keys)} {fault}: {listed(keys)}" for fault, keys in faults.items() if keys]
        raise ValueError(
            f"weights do not fit this {type(model).__name__}; nothing was loaded (keys in OpenAI's layout)\n"
            + "\n".join(lines)
        )
