"""``clipfast export``: a model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfast.commands import FILES, errors_told
from clipfast.console import echo


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="The folder of a training run, or of an open_clip or transformers model; or, with --weights, a name "
            "of clipfast.list_models() or a .json configuration."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="An .onnx file; replaced if it exists.")],
    tower: Annotated[str, typer.Option(help="image, text or both.")] = "both",
    weights: Annotated[Path | None, typer.Option(help="A file or folder of weights, of any layout.")] = None,
    normalize: Annotated[bool, typer.Option(help="Whether features get unit length.")] = True,
    opset: Annotated[int | None, typer.Option(help="Of ONNX's operators.", show_default="the exporter's")] = None,
    tolerance: Annotated[float, typer.Option(help="The largest relative error that is let pass.")] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model as an ONNX file that takes any batch, and compare it in onnxruntime.

    Exits with 0 where every output is within the tolerance of the model in float32, and otherwise with 1 and without
    the file.
    """
    with errors_told(extra="export"):
        import json
        from dataclasses import asdict

        from clipfast.models.export import ExportMismatch
        from clipfast.models.export import export as write
        from clipfast.models.open_model import open_model

        with errors_told(ExportMismatch, extra="export"):
            report = write(
                open_model(model, weights, "cpu"),
                output,
                tower=tower,
                normalize=normalize,
                opset=opset,
                tolerance=tolerance,
            )
    echo(json.dumps(asdict(report) | {"path": str(report.path)}, indent=1) if as_json else str(report))


def add_export_command(app: typer.Typer) -> None:
    """Put the command behind those that ``app`` has."""
    app.command(rich_help_panel=FILES)(export)
