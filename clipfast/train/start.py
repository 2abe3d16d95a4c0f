"""Training from Python: what ``clipfast train`` does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from clipfast.train.config import RunConfig, make_run_config, read_settings

if TYPE_CHECKING:
    from clipfast.train.run import RunResult


def train(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    console: Console | None = None,
    **settings: Any,
) -> RunResult:
    """Train a CLIP on pictures and captions, alone or as one of the processes that ``torchrun`` started.

    Workers are processes that import the script which calls this: put the call below ``if __name__ == "__main__":``, or
    set ``workers=0``.

    Args:
        config: A TOML file, settings by name, or a :class:`~clipfast.train.config.RunConfig`.
        console: Where rank 0 reports; standard output by default.
        **settings: Of :class:`~clipfast.train.config.RunConfig`; they go before those in ``config``.

    Returns:
        What became of the run; see :func:`clipfast.train.run.run_training`.

    Raises:
        TypeError: ``config`` is none of these.
        ValueError: A setting is unknown, missing, of the wrong type or out of range, or as for
            :func:`clipfast.train.run.run_training`.
    """
    from clipfast.train.run import run_training

    if isinstance(config, RunConfig):
        values: Mapping[str, Any] = vars(config)
    elif isinstance(config, Mapping):
        values = config
    elif isinstance(config, (str, os.PathLike)):
        values = read_settings(Path(config))
    elif config is None:
        values = {}
    else:
        raise TypeError(f"config: got {type(config).__name__}, expected a RunConfig, settings by name or a TOML file")
    return run_training(make_run_config({**values, **settings}), console=console)
