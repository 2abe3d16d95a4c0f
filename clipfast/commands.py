"""What all commands of a program share: output that any terminal can show, warnings as notices, errors in a line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from clipfast.console import degrade_streams, echo
from clipfast.notices import warnings_as_notices


class Commands(TyperGroup):
    """A group of commands, for ``typer.Typer(cls=Commands)``."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command that the arguments name."""
        degrade_streams()  # before help and errors of usage are printed too
        with warnings_as_notices():
            return super().main(*arguments, **options)


@contextlib.contextmanager
def errors_told(
    *errors: type[Exception], code: int, missing: tuple[str, str] | None = None, prefix: str = ""
) -> Iterator[None]:
    """Tell an error in one line on standard error, and exit.

    Args:
        *errors: The kinds that are told. Others are faults of the program and keep their tracebacks.
        code: The exit status.
        missing: What needs a package that is not installed, such as ``"the demo needs"``, and the extra that brings it;
            None tells a missing package as other errors.
        prefix: Put before the error, but for a missing package.
    """
    try:
        yield
    except errors as error:
        words = f"{prefix}{error}"
        if missing is not None and isinstance(error, ModuleNotFoundError):
            words = f"{missing[0]} {error.name}: pip install 'clipfast[{missing[1]}]'"
        echo(f"error: {words}", err=True)
        raise typer.Exit(code) from error
