"""Zero-shot classifiers that are kept: the texts of a thousand classes are encoded once for a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from clipfast.data.cache import cache_folder
from clipfast.data.model_inputs import tokenizer_of
from clipfast.data.tokenizer import Tokenizer
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.evaluate.prompts import class_prompts
from clipfast.evaluate.zero_shot import zero_shot_classifier
from clipfast.files import write_atomically
from clipfast.models.clip import CLIP
from clipfast.models.open_model import weights_digest

# raised when the same model and prompts would give another classifier
_LAYOUT = 2


def cached_classifier(
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None,
    batch_size: int = 256,
    folder: Path | None = None,
    on_prompts: Callable[[int], None] | None = None,
) -> Tensor:
    """Return :func:`clipfast.evaluate.zero_shot.zero_shot_classifier`, from the cache folder where it is there.

    The file's name is a digest of the text tower's weights and sizes, the tokenizer and the prompts: a model that was
    trained on, or another name, is another file. One that is damaged is made anew.

    Args:
        model: In ``eval()``.
        class_names: C names.
        templates: Strings with a ``{}``, or the prompts of each class by its name.
        tokenizer: As of :func:`clipfast.data.choose_tokenizer.tokenizer_for`.
        batch_size: The most prompts encoded at once.
        folder: Where it is kept; :func:`clipfast.data.cache.cache_folder` by default. Where nothing can be written
            nothing is kept.
        on_prompts: As of :func:`~clipfast.evaluate.zero_shot.zero_shot_classifier`; not called where it was kept.

    Returns:
        float32 ``[E, C]`` on the CPU.

    Raises:
        ValueError: As :func:`~clipfast.evaluate.zero_shot.zero_shot_classifier`, or the tokenizer does not fit.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    path = None
    with contextlib.suppress(OSError):
        path = (folder or cache_folder()) / f"classes-{_key(model, tokenizer, class_names, templates)}.safetensors"
        shape = (model.config.embed_dim, len(class_names))
        with contextlib.suppress(safetensors.SafetensorError, KeyError):
            kept = safetensors.torch.load_file(path)["classifier"]
            if kept.shape == shape and kept.isfinite().all():
                return kept
    device = model.logit_scale.device
    made = zero_shot_classifier(
        model.encode_text,
        tokenizer,
        class_names,
        templates,
        batch_size=batch_size,
        device=device,
        on_prompts=on_prompts,
    )
    made = made.contiguous()
    if path is not None:
        with contextlib.suppress(OSError):
            write_atomically(path, lambda file: file.write(safetensors.torch.save({"classifier": made})))
    return made


def _key(
    model: CLIP,
    tokenizer: AnyTokenizer,
    class_names: Sequence[str],
    templates: Sequence[str] | Mapping[str, Sequence[str]],
) -> str:
    text_tower = {name: v for name, v in model.state_dict().items() if not name.startswith("visual.")}
    facts = [_LAYOUT, weights_digest(text_tower), model.config.to_dict(), class_prompts(class_names, templates)]
    if not isinstance(tokenizer, Tokenizer):
        facts.append(tokenizer.identity)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
