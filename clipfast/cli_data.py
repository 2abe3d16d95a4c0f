"""The options of commands that read pictures and captions: which of the data is which."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

from clipfast.data.options import DataOptions


def with_data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every field of :class:`DataOptions`, in the place of its parameter ``data_options``.

    The command gets a function: what is wrong with a flag is raised where it is called.
    """
    own, hints = get_type_hints(command, include_extras=True), get_type_hints(DataOptions, include_extras=True)
    defaults = {field.name: field.default for field in fields(DataOptions)}

    @functools.wraps(command)
    def with_flags(*args: Any, **flags: Any) -> None:
        values = {name: flags.pop(name) for name in defaults}
        command(*args, data_options=lambda: DataOptions(**values), **flags)

    parameters = [
        parameter.replace(annotation=own[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
        if parameter.name != "data_options"
    ]
    for name, default in defaults.items():
        kind, words = get_args(hints[name])
        shown = "the usual ones" if "column" in name or "key" in name else False
        option = typer.Option(help=words, show_default=shown, rich_help_panel="Data")
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, option]
            )
        )
    with_flags.__signature__ = inspect.Signature(parameters)
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags
