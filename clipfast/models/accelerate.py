"""Models of other libraries made fast in place, with the very Parameters that they have."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from clipfast.models.accelerated import (
    Accelerated,
    AccelerateWarning,
    is_accelerated,
    put_on,
    refusal_of,
    set_options,
    take_off,
)
from clipfast.models.fallbacks import counted
from clipfast.models.twin_blocks import Refusal
from clipfast.modules import plainness
from clipfast.ops import library_notice

Model = TypeVar("Model", bound=nn.Module)

LIBRARIES = ("open_clip", "transformers", "timm", "torchvision")
_SUPPORTED = (
    "open_clip's CLIP, CustomTextCLIP and their towers, transformers' CLIP, MetaCLIP 2, SigLIP and SigLIP 2 and their "
    "towers (version 5), timm's VisionTransformer and torchvision's VisionTransformer, or a model that holds one of "
    "them"
)


class _UnknownLibrary(Refusal):
    pass


@dataclass(frozen=True)
class Acceleration:
    """What was found in a model.

    Attributes:
        accelerated: The accelerated modules' paths; the model's own is ``""``.
        left_alone: The paths of towers that run their original code, and why.
        fell_back: The paths of accelerated modules whose original code served calls, with what those asked for and how
            many there were.
    """

    accelerated: tuple[str, ...]
    left_alone: dict[str, str]
    fell_back: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        done = ", ".join(path or "the model" for path in self.accelerated) or "nothing"
        lines = [f"  {path or 'the model'}: {reason}" for path, reason in self.left_alone.items()]
        calls = [
            f"  {path or 'the model'}: {number} × {reason}"
            for path, reasons in self.fell_back.items()
            for reason, number in reasons.items()
        ]
        parts = [f"accelerated: {done}", *(["left alone:"] if lines else []), *lines]
        return "\n".join([*parts, *(["calls served by the original code:"] if calls else []), *calls])


def accelerate(model: Model, *, token_outputs: bool = True) -> Model:
    """Make a CLIP of open_clip, transformers, timm or torchvision fast, in place.

    Towers are found wherever they are in ``model``. Each keeps its modules, Parameters, state dict, call signatures and
    outputs, and computes with clipfast's: optimizers, checkpoints, EMA, DDP and ``torch.compile`` go on as they are.
    The original code serves calls that ask for what clipfast does not give (``docs/accelerate.md`` lists them) and
    modules with hooks inside.

    Args:
        model: The model. Accelerating it again takes up what could not be done before, with the options given then;
            clipfast's own models are returned as they are.
        token_outputs: Whether the outputs of transformers' models keep ``last_hidden_state``. Without it, it is None in
            them, and the exact shortcuts apply: only what the pooled output needs is computed. The other libraries'
            calls tell whether tokens are wanted.

    Returns:
        ``model``. Its ``isinstance`` checks hold; the towers' classes are subclasses of what they were.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: Nothing in ``model`` can be accelerated; the message names its parts and why.

    Warns:
        AccelerateWarning: Some towers are left alone; each is named with its reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate(model): got {type(model).__name__}, expected a torch.nn.Module: {_SUPPORTED}")
    found = _walk(model, put=True, token_outputs=token_outputs)
    own = any(type(module).__module__.partition(".")[0] == "clipfast" for module in model.modules())
    if not found.accelerated and (found.left_alone or not own):
        parts = "".join(f"\n  {path or 'the model'}: {reason}" for path, reason in found.left_alone.items())
        raise ValueError(
            f"accelerate(model): got a {type(model).__module__}.{type(model).__qualname__} with nothing in it that can "
            f"be accelerated, expected {_SUPPORTED}{parts}"
        )
    if found.accelerated:
        library_notice.tell()
    if found.left_alone:
        parts = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in found.left_alone.items())
        warnings.warn(f"clipfast.accelerate leaves alone {parts}", AccelerateWarning, stacklevel=2)
    return model


def acceleration(model: nn.Module) -> Acceleration:
    """Tell what of a model is accelerated, and what is not and why; printed, it is a list."""
    return _walk(model, put=False)


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: every module is of its original class again and holds what it held.

    Args:
        model: The model; nothing happens where it is not accelerated.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: An accelerated module was wrapped since, such as by FSDP2; restore before that.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore(model): got {type(model).__name__}, expected a torch.nn.Module")
    take_off(model.modules())
    return model


def _walk(model: nn.Module, put: bool, **wanted: Any) -> Acceleration:
    accelerated, left_alone = [], {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent = modules[path.rpartition(".")[0]] if path else None
        try:
            found = _match(module, parent, wanted)
            if found is None:
                continue
            if put and is_accelerated(module):
                set_options(module, found[1])
            elif put:
                put_on(module, *found)
            elif not isinstance(module, Accelerated):
                raise Refusal(refusal_of(module, found[0]) or "it was not accelerated, and could be")
            elif (reason := module.why_not()) is not None:
                raise Refusal(reason)
            accelerated.append(path)
        except Refusal as refusal:
            # a library that is not known is named once, not for each of its modules
            if not (isinstance(refusal, _UnknownLibrary) and str(refusal) in left_alone.values()):
                left_alone[path] = str(refusal)
    fell_back = {path: counted(modules[path]) for path in accelerated if counted(modules[path])}
    return Acceleration(tuple(accelerated), left_alone, fell_back)


def _match(module: nn.Module, parent: nn.Module | None, wanted: dict[str, Any]) -> tuple[type, dict[str, Any]] | None:
    """Return the accelerated form of a module and its options, or None for what is no tower.

    Raises:
        Refusal: It is a tower that cannot be accelerated.
    """
    if isinstance(module, torch.jit.ScriptModule):
        # one reason for a frozen model, not one for each of its parts
        if isinstance(parent, torch.jit.ScriptModule):
            return None
        raise Refusal("it is TorchScript, whose code is fixed")
    library = _library_of(module)
    if library is None:
        return None
    family = _family(library)
    for original, mixin, methods in family.KINDS:
        if isinstance(module, original):
            base = module._original_class if isinstance(module, Accelerated) else type(module)
            for name in methods:
                # what wraps an accelerated method calls it
                wrapped = not isinstance(module, Accelerated) and plainness.is_shadowed(module, name)
                if wrapped or getattr(base, name) is not getattr(original, name):
                    raise Refusal(f"its {name} is not that of {library}'s {original.__name__}")
            return mixin, family.options_for(module, parent, **wanted)
    reason = family.left_alone(module)
    if reason is not None:
        raise Refusal(reason)
    return None


def _library_of(module: nn.Module) -> str | None:
    """Return which of the libraries a module's class, or one it is derived from, comes from."""
    for cls in type(module).__mro__:
        name = cls.__module__.partition(".")[0]
        if name in LIBRARIES:
            return name
    return None


def _family(library: str) -> ModuleType:
    """Import the file that knows a library's towers; the library is loaded already, since a module of it exists."""
    try:
        return importlib.import_module(f"clipfast.models.accelerate_{library}")
    except (ImportError, AttributeError) as error:
        version = getattr(importlib.import_module(library), "__version__", "of this version")
        raise _UnknownLibrary(f"{library} {version} is not known ({error})") from error
