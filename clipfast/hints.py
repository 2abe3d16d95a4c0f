"""What was probably meant by a name that clipfast does not have: one of another library's, or one that is near."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# names of open_clip, OpenAI's clip, transformers and timm
_ELSEWHERE = {
    "ClipLoss": "ContrastiveLoss",
    "SigLIPLoss": "SigLipLoss",
    "SiglipLoss": "SigLipLoss",
    "CustomTextCLIP": "CLIP",
    "VisionTransformer": "ViT",
    "SimpleTokenizer": "Tokenizer",
    "HFTokenizer": "Tokenizer.from_file(FILE)",
    "AutoTokenizer": "Tokenizer.from_file(FILE)",
    "load": "create_model(NAME, weights=FILE)",
    "load_model": "create_model(NAME, weights=FILE)",
    "from_pretrained": "create_model(NAME, weights=FILE)",
    "create_model_from_pretrained": "create_model_and_transforms(NAME, pretrained=FILE)",
    "load_checkpoint": "load_weights(model, FILE)",
    "load_openai_model": "create_model('ViT-B-32-quickgelu', weights=FILE)",
    "available_models": "list_models()",
    "list_openai_models": "list_models()",
    "list_pretrained": "list_models()",
    "get_model_config": "CLIPConfig",
    "optimize": "accelerate(model)",
    "compile": "accelerate(model)",
    "eval": "evaluate",
    "show": "visualize",
}
_KEYWORDS = {
    "is_train": "train",
    "checkpoint": "weights",
    "checkpoint_path": "weights",
    "model_path": "weights",
    "pretrained_image": "weights",
    "state_dict": "weights",
    "force_image_size": "image_size",
    "img_size": "image_size",
    "size": "image_size",
    "resolution": "image_size",
    "force_context_length": "context_length",
    "max_length": "context_length",
    "precision": "dtype",
    "torch_dtype": "dtype",
    "cast_dtype": "dtype",
    "model_name": "name_or_config",
    "jit": "export (the command clipfast export)",
}


def for_name(name: str, known: Collection[str]) -> str:
    """Return ``; did you mean …?`` for a name that a module lacks, or nothing where none is near."""
    if name in _ELSEWHERE:
        return f"; did you mean clipfast.{_ELSEWHERE[name]}?"
    by_lower = {k.lower(): k for k in known if not k.startswith("_")}
    near = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(f'clipfast.{by_lower[n]}' for n in near)}?" if near else ""


def keywords_told(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function's ``TypeError`` for a keyword that it does not know say which was probably meant."""
    known = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{function.__name__}: got an unknown keyword {name!r}{_for_keyword(name, known)}")
        return function(*args, **kwargs)

    return told


def _for_keyword(name: str, known: list[str]) -> str:
    meant = _KEYWORDS.get(name)
    if meant is not None and meant.split()[0] in {*known, "export"}:
        return f"; did you mean {meant}?"
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else f", expected {', '.join(known)}"
