"""Prompts for zero-shot classification, by name or from a file.

Source: ``notebooks/Prompt_Engineering_for_ImageNet.ipynb`` of OpenAI's CLIP (MIT).
"""

from __future__ import annotations

import os
from pathlib import Path

from clipfast.data.text_files import read_lines
from clipfast.evaluate.imagenet import imagenet_templates
from clipfast.evaluate.prompts import checked_templates, read_json

TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    # the seven that OpenAI found to do nearly as well as all eighty on ImageNet
    "simple": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    # all eighty, of which published figures on ImageNet are
    "imagenet": imagenet_templates(),
}


def load_templates(name_or_path: str | os.PathLike[str], encoding: str | None = None) -> tuple[str, ...]:
    """Return templates with a ``{}`` for the class' name.

    Args:
        name_or_path: A key of :data:`TEMPLATES`, or a file: one template a line, or a JSON list. clip-benchmark's
            ``{c}`` is read as ``{}``.
        encoding: Of a file; None is UTF-8.

    Raises:
        FileNotFoundError: It is neither.
        ValueError: The file holds no templates, or one without a place for the name.
    """
    name = os.fspath(name_or_path)
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"templates: got {name!r}, expected one of {', '.join(TEMPLATES)}, or a file of templates"
        )
    if path.suffix == ".json":
        return checked_templates(read_json(path, "templates", encoding), path)
    return checked_templates([line for line in read_lines(path, encoding) if line.strip()], path)
