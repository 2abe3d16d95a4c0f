"""Training on the command line: ``clipfast train``."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from clipfast.commands import INTERRUPTED, REQUIRED, TRAIN, errors_told
from clipfast.console import echo
from clipfast.data.workers import ignore_stop_signals
from clipfast.train.config import RunConfig
from clipfast.train.interrupt import Stopped, StopRequest, stop_on_interrupt

# the groups of `clipfast train --help`, in their order
GROUPS: dict[str, tuple[str, ...]] = {
    "Data": (
        *("data", "val_data", "val_every", "val_pairs", "workers", "shuffle_pool", "caption_key", "image_key"),
        *("caption_column", "image_column", "separator", "quotes", "encoding", "as_open_clip", "apply_orientation"),
    ),
    "Model": (
        *("model", "weights", "tokenizer", "patch_dropout", "naflex_max_patches", "naflex_tokens_per_batch"),
        *("lock_image", "lock_image_unlocked_groups", "lock_image_freeze_bn_stats"),
        *("lock_text", "lock_text_unlocked_layers", "distill_model", "distill_weights"),
    ),
    "Optimisation": (
        *("steps", "epochs", "batch_size", "learning_rate", "schedule", "warmup_steps", "weight_decay"),
        *("decay_positions", "max_grad_norm", "ema_decay", "loss", "label_smoothing", "seed"),
    ),
    "Checkpoints": ("output", "resume", "save_every", "keep"),
    "Speed and memory": ("device", "precision", "micro_batch_size", "grad_checkpointing", "compile"),
    "Ranks": ("strategy", "timeout"),
    "Logging": ("tensorboard",),
}
# what a run cannot do without, on the command line or in the TOML file
_WANTED = {
    "data": REQUIRED,
    "steps": r"[red]\[required, or epochs][/red]",
    "epochs": r"[red]\[required, or steps][/red]",
}


def settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting of a run, with its words and default, in the place of ``**flags``."""
    own, hints = get_type_hints(command, include_extras=True), get_type_hints(RunConfig, include_extras=True)
    given = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p.replace(annotation=own[p.name]) for p in given]
    settings = {field.name: field for field in fields(RunConfig)}
    for name, group in ((name, group) for group, names in GROUPS.items() for name in names):
        field = settings[name]
        kind, words = get_args(hints[name])
        kinds = [k for k in (get_args(kind) or (kind,)) if isinstance(k, type) and k is not type(None)]
        kind = kinds[0] if kinds and get_origin(kind) is not Literal else str
        wanted = _WANTED.get(name)
        shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        option = typer.Option(
            help=f"{words} {wanted}" if wanted else words,
            show_default=False if wanted or field.default is None else shown,
            rich_help_panel=group,
        )
        annotation = Annotated[kind | None, option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@settings_as_options
def train(
    config: Annotated[
        Path | None,
        typer.Option(help="A TOML file with settings; flags go before it. Relative paths in it start from its folder."),
    ] = None,
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
