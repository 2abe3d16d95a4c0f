"""What a class is called in sentences: one set of templates for all classes, or prompts of its own for each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfast.data.text_files import read_text

Template = str | Callable[[str], str]


def class_prompts(
    class_names: Sequence[str], templates: Sequence[Template] | Mapping[str, Sequence[str]]
) -> list[tuple[str, ...]]:
    """Return the prompts of each class.

    Args:
        class_names: C names.
        templates: Strings with a ``{}`` for the name, or functions of the name; or each class' prompts by its name,
            which are taken as they are.

    Raises:
        ValueError: No classes, no templates, a template without ``{}``, or a class without prompts.
    """
    if not class_names or not templates:
        raise ValueError(
            f"class_names, templates: got {len(class_names)} and {len(templates)}, expected at least one of each"
        )
    if not isinstance(templates, Mapping):
        return [tuple(_fill(template, name) for template in templates) for name in class_names]
    missing = list(dict.fromkeys(name for name in class_names if not templates.get(name)))
    if missing:
        raise ValueError(
            f"prompts: got none for the class {missing[0]!r} and {len(missing) - 1} more of {len(class_names)}, "
            f"expected a list of them for every class, by its name"
        )
    return [tuple(templates[name]) for name in class_names]


def load_prompts(
    path: str | os.PathLike[str], encoding: str | None = None
) -> dict[str, tuple[str, ...]] | tuple[str, ...]:
    """Read a JSON file of prompts.

    Args:
        path: An object with a list of prompts for each class, by its name (CuPL's files), or a list of templates for
            all classes.
        encoding: Of the file; None is UTF-8.

    Returns:
        Prompts by class, or templates; ``{c}`` in a template is read as ``{}``.

    Raises:
        FileNotFoundError: No file is there.
        ValueError: It is no JSON, names a class twice, or holds something else than texts.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"prompts: got {place}, expected a JSON file: none is there")
    held = read_json(place, "prompts", encoding)
    if isinstance(held, list):
        return checked_templates(held, place)
    if not isinstance(held, dict) or not held:
        raise ValueError(
            f"prompts: got {place}, expected an object of lists of prompts by class, or a list of templates"
        )
    for name, prompts in held.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"prompts: got {json.dumps(prompts)[:60]} for {name!r} in {place}, expected a list of at least one text"
            )
    return {name: tuple(prompts) for name, prompts in held.items()}


def checked_templates(lines: Any, place: Path) -> tuple[str, ...]:
    """Return templates that were read from a file.

    Raises:
        ValueError: They are no list of texts, or one has no place for the name.
    """
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"templates: got {place} without templates, expected one a line, or a JSON list")
    templates = tuple(line.replace("{c}", "{}") for line in lines)
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"templates: got {template!r} in {place}, expected a {{}} where the class name goes")
    return templates


def read_json(place: Path, argument: str, encoding: str | None = None) -> Any:
    """Read a JSON file of a user's.

    Args:
        place: The file.
        argument: What an error calls it.
        encoding: Of the file; None is UTF-8.

    Raises:
        ValueError: It is no JSON, in another encoding, or an object has a name twice.
    """
    text = read_text(place, encoding)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: got {place}, expected JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} comes twice, and the first would be lost")
        found[name] = value
    return found


def _fill(template: Template, name: str) -> str:
    if callable(template):
        return template(name)
    if "{}" not in template:
        raise ValueError(f"templates: got {template!r}, expected a {{}} where the class name goes")
    return template.replace("{}", name)
