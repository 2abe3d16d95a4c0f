"""What all commands of a program share: output that no terminal is too narrow for, and warnings as notices."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from clipfast.console import degrade_streams
from clipfast.notices import warnings_as_notices


class Commands(TyperGroup):
    """A group of commands, for ``typer.Typer(cls=Commands)``."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command that the arguments name."""
        degrade_streams()  # before help and errors of usage are printed too
        with warnings_as_notices():
            return super().main(*arguments, **options)
