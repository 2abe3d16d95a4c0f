"""``clipfast tune``: this machine measures which implementation of every op is its fastest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipfast.commands import FAILED, INTERRUPTED, MACHINE, errors_told
from clipfast.console import echo, make_console
from clipfast.outputs import check_output_file

if TYPE_CHECKING:
    from clipfast.tuning.run import Report


def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Names of clipfast.list_models(), .json files, or models' folders, one or more.",
            show_default="the most used",
        ),
    ] = None,
    more_models: Annotated[list[str] | None, typer.Argument(metavar="[MORE MODELS]...", help="More of them.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: CUDA where there is one.")] = "auto",
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, bf16 or fp16 (autocast), pure_bf16, pure_fp16; commas or the option again for several.",
            show_default="those that the device is used with",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Another file; CLIPFAST_TUNED=FILE uses it.", show_default="the cache folder's")
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long a model may take.")] = 75.0,
    share: Annotated[bool, typer.Option("--share", help="Print and write what a pull request needs.")] = False,
) -> None:
    """Measure which implementation of every op is the fastest on this machine, and use it from now on.

    Spends about --seconds on a model. What is not faster by 5% and by more than noise stays as it is, and nothing that
    computes wrong results is ever taken. Ctrl-C keeps what is done.

    Exits with 0; with 1 where an implementation computes wrong results here, or where the file cannot be written (the
    results are printed all the same); with 2 where the request is wrong; with 130 after Ctrl-C.
    """
    with errors_told(RuntimeError):
        if output is not None:  # what somebody chose can be chosen again, before anything is measured
            check_output_file(output, (output.suffix,))
        from clipfast.notices import error_console
        from clipfast.tuning.progress import TuningProgress
        from clipfast.tuning.run import tune as measure

        with TuningProgress(error_console()) as progress:
            report = measure(
                [*(model or []), *(more_models or [])] or None,
                device=None if device == "auto" else device,
                precisions=[p for several in precision or [] for p in several.split(",")] or None,
                output=output,
                seconds=seconds,
                progress=progress,
            )
    from clipfast.tuning.progress import render

    make_console().print(render(report))
    if share:
        _share(report)
    raise typer.Exit(_exit_code(report))


def _exit_code(report: Report) -> int:
    if report.interrupted:
        return INTERRUPTED
    return FAILED if report.wrong or report.path is None else 0


def _share(report: Report) -> None:
    """Print the entry, and write the record, or print it where that cannot be."""
    import datetime
    import json

    from clipfast.tuning import records

    if not report.lines:
        echo("nothing to share: nothing was measured")
        return
    record = records.record_of(report, datetime.date.today().isoformat())
    entry = records.entry_of(record)
    if entry is None:
        echo("\nno entry for clipfast/ops/measured.py, because a CPU's name does not say what it is")
    else:
        echo(f"\nto add to clipfast/ops/measured.py:\n\n{entry}")
    place = Path("benchmarks") / "results"
    path = records.path_of(record)
    # from a clone, where it belongs; elsewhere beside the user
    path = place / path if place.is_dir() else Path(f"{path.parts[0]}-{path.name}")
    try:
        records.write_record(path, record)
        echo(f"\nwrote the record {path}; docs/tuning.md says how to send both")
    except OSError as error:
        echo(f"\nthe record cannot be written ({error.strerror or error}); this is it:")
        echo(json.dumps(record, ensure_ascii=False))


def add_tune_command(app: typer.Typer) -> None:
    """Put the command behind those that ``app`` has."""
    app.command(rich_help_panel=MACHINE)(tune)
