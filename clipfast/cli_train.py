"""Training on the command line: ``clipfast train``."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from clipfast.commands import INTERRUPTED, TRAIN, errors_told
from clipfast.console import echo
from clipfast.data.workers import ignore_stop_signals
from clipfast.train.config import RunConfig
from clipfast.train.interrupt import Stopped, StopRequest, stop_on_interrupt


def settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting of a run, with its words and default, in the place of ``**flags``."""
    own, hints = get_type_hints(command, include_extras=True), get_type_hints(RunConfig, include_extras=True)
    given = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p.replace(annotation=own[p.name]) for p in given]
    settings = {field.name: field for field in fields(RunConfig)}
    # those of a run before those that it shares with all training
    for name in dict.fromkeys([*RunConfig.__annotations__, *settings]):
        field = settings[name]
        kind, words = get_args(hints[name])
        kinds = [k for k in (get_args(kind) or (kind,)) if isinstance(k, type) and k is not type(None)]
        kind = kinds[0] if kinds and get_origin(kind) is not Literal else str
        shown = "none" if field.default in (None, MISSING) else str(field.default).lower()
        option = typer.Option(help=words, show_default=False if field.default is MISSING else shown)
        annotation = Annotated[kind | None, option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@settings_as_options
def train(
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings; flags go before it.")] = None,
    **flags: Any,
) -> None:
    """Train a CLIP on pictures and captions, alone or under torchrun; run it again to go on where it stopped.

    Each setting is a flag, or a line such as 'batch_size = 256' in the TOML file. Ctrl-C and SIGTERM end training after
    the step in progress and keep what was learned; the exit status is 0 then, too.
    """
    with ending_on_request() as stop:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        with errors_told(RuntimeError, extra="train", prefix=rank):
            # one rank of many may not leave before all have agreed to
            with contextlib.nullcontext() if "RANK" in os.environ else stop.at_once():
                from clipfast.train.config import make_run_config, read_settings
                from clipfast.train.run import run_training

            settings = read_settings(config) if config else {}
            given = {name: value for name, value in flags.items() if value is not None}
            run_training(make_run_config(settings | given))


@contextlib.contextmanager
def ending_on_request() -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM end a command of training as :func:`stop_on_interrupt` does, without a traceback.

    It exits with 0 where nothing is lost, and with 130 where a second SIGINT ended it at once.
    """
    try:
        with stop_on_interrupt() as stop:
            yield stop
            # what is saved is not to look lost because a scheduler repeats itself while the interpreter ends
            atexit.register(ignore_stop_signals)
    except Stopped:
        atexit.register(ignore_stop_signals)
        # who was to read it may have been stopped too
        with contextlib.suppress(OSError):
            echo("stopped before the first step: there is nothing to save")
    except KeyboardInterrupt as error:
        echo("ended at once: what was learned since the last checkpoint is lost", err=True)
        raise typer.Exit(INTERRUPTED) from error


def add_train_commands(app: typer.Typer) -> None:
    """Put the command behind those that ``app`` has."""
    app.command(rich_help_panel=TRAIN)(train)
