"""What all commands of a program share: how they begin and end, and what their help looks like.

The exit status says what kind of thing happened, the same for every command (docs/commands.md):

- 0: done; a training run that was told to stop and saved everything, too.
- 1: what was asked for was understood and failed: training diverged, memory or a disk ran out, a check did not pass.
- 2: what was typed or read cannot be used: a wrong option, name, setting, file or data set, a package that is missing.
- 130: Ctrl-C, and something is lost. A process that another signal ends has 128 and its number, as shells say it.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from clipfast.console import degrade_streams, echo
from clipfast.extras import MissingPackage, package_of, remedy
from clipfast.notices import warnings_as_notices

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130

# the groups of `clipfast --help`, in their order
START, TRAIN, USE, FILES, MACHINE = "Start here", "Train", "Use a model", "Files", "This machine"
# begins the help of an option that a command wants, but may get from elsewhere, so that it has a default
REQUIRED = r"[red]\[required][/red]"

_MISTAKES = (ImportError, ValueError, TypeError, OSError)
_FAILURES = (FloatingPointError, MemoryError)
# errors of files and sockets that say nothing against what was typed: full disks, broken ones, lost connections
_ERRNOS_OF_FAILURES = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "ENOMEM", "EMFILE", "ENFILE", "ESTALE", "ETIMEDOUT", "ECONNRESET")
    if hasattr(errno, name)
}


class Commands(TyperGroup):
    """A group of commands; see :func:`make_app`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for command in self.commands.values():
            command.help = _flowing(command.help)

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command that the arguments name."""
        degrade_streams()  # before help and errors of usage are printed too
        with warnings_as_notices():
            return super().main(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with a line and the status that shells give it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # who was to read it may have been stopped too
            with contextlib.suppress(OSError):
                echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error


def make_app() -> typer.Typer:
    """Return a program without commands yet."""
    return typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )


@contextlib.contextmanager
def errors_told(*failures: type[Exception], extra: str | None = None, prefix: str = "") -> Iterator[None]:
    """Tell an error in one line on standard error, and exit with the status of its kind.

    Told are mistakes in what was typed or read (``ImportError``, ``ValueError``, ``TypeError``, ``OSError``) and
    failures (numbers that are not finite, memory or a disk that ran out). Other errors are faults of the program and
    keep their tracebacks.

    Args:
        *failures: More kinds that are failures of this command, also where they are kinds of the above.
        extra: The extra that the command belongs to, which is named if it brings a package that is missing.
        prefix: Put before the error.
    """
    try:
        yield
    except Exception as error:
        status = exit_status(error, failures)
        if status is None:
            raise
        echo(f"error: {prefix}{_words(error, extra)}", err=True)
        raise typer.Exit(status) from error


def exit_status(error: Exception, failures: tuple[type[Exception], ...] = ()) -> int | None:
    """Return the exit status of an error's kind; None for what is not to be told here: a fault of the program, a reader
    that went away, and an end that was told already.
    """
    if isinstance(error, (typer.Exit, typer.Abort, BrokenPipeError)) or _is_own_module(error):
        return None
    out_of_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (*_FAILURES, *failures, out_of_memory)):
        return FAILED
    if isinstance(error, OSError) and error.errno in _ERRNOS_OF_FAILURES:
        return FAILED
    return MISTAKE if isinstance(error, _MISTAKES) else None


def _is_own_module(error: Exception) -> bool:
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    return name is not None and name.partition(".")[0] == "clipfast"


def _flowing(text: str | None) -> str | None:
    """Return a docstring as paragraphs, which are wrapped where a terminal ends and not where the source does."""
    if text is None:
        return None
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


def _words(error: Exception, extra: str | None) -> str:
    if isinstance(error, ModuleNotFoundError) and not isinstance(error, MissingPackage) and error.name:
        return f"this needs {package_of(error.name)}, which is not installed: {remedy(error.name, extra)}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None and error.filename2 is None:
        # Python's own words, "[Errno 2] No such file or directory: 'FILE'", put a number first
        return f"{os.fsdecode(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__
