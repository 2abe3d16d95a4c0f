"""The command line: ``clipfast demo`` and what follows it.

Commands import what they need when they run: ``clipfast --help`` should not wait for PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli_export import add_export_command as _add_export_command
from clipfast.cli_features import add_feature_commands as _add_feature_commands
from clipfast.cli_shards import add_shards_command as _add_shards_command
from clipfast.cli_train import add_train_commands as _add_train_commands
from clipfast.cli_train import ending_on_request as _ending_on_request
from clipfast.cli_tune import add_tune_command as _add_tune_command
from clipfast.commands import FILES, MACHINE, START, errors_told, make_app
from clipfast.console import echo
from clipfast.openmp import spin_briefly
from clipfast.outputs import check_output_folder

app = make_app()


def _print_version(wanted: bool) -> None:
    if wanted:
        import clipfast

        echo(f"clipfast {clipfast.__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Fast CLIP training and inference that computes exactly what CLIP computes."""
    if context.invoked_subcommand != "tune":  # measures for every program here, and they wait as OpenMP's default says
        spin_briefly()


@app.command(rich_help_panel=START)
def demo(
    model: Annotated[
        str,
        typer.Option(help="'small', a name of clipfast.list_models(), a JSON file, or a model's folder: its sizes."),
    ] = "small",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Picture-caption pairs a step.")] = 256,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side.", show_default="the model's")] = None,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up; a cosine takes it to 0.")] = 1e-3,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for autocast.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the weights and the order of batches.")] = 0,
    output: Annotated[Path, typer.Option(help="The folder for report, model and log.")] = Path("runs/demo"),
) -> None:
    """Train a small CLIP on emoji and their names, and report what it learned.

    Draws some 3,700 pictures (once), takes 200 steps of 256 pairs, and measures on pairs that were held out. The time
    left is shown from the first steps on. Ctrl-C and SIGTERM end training early and keep what was learned.
    """
    with _ending_on_request() as stop, errors_told(extra="demo"):
        with stop.at_once():
            from clipfast.train.demo import run_demo

        run_demo(
            model=model,
            steps=steps,
            batch_size=batch_size,
            image_size=image_size,
            learning_rate=learning_rate,
            precision=precision,
            device=device,
            seed=seed,
            output=output,
        )


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A file of weights (big_vision's .npz too), or a folder of transformers' or open_clip's."),
    ],
    target: Annotated[
        Path, typer.Argument(help="A .safetensors, .pt or .bin file, .npz for big_vision; replaced if it exists.")
    ],
    layout: Annotated[
        str,
        typer.Option(
            help="openai (clipfast's own), open_clip (differs from it for SigLIP), transformers, timm (the image "
            "tower), or big_vision."
        ),
    ],
    naflex: Annotated[
        bool | None,
        typer.Option("--naflex/--no-naflex", help="Write a NaFlex model.", show_default="as the source is"),
    ] = None,
    heads: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Attention heads of image and text tower, for big_vision.", show_default="as known"),
    ] = None,
) -> None:
    """Write CLIP weights with the keys of another library, bit for bit.

    The layout of SOURCE is told by its keys. OpenAI's TorchScript archives are read, but their code is not run.
    """
    with errors_told():
        check_output_folder(target.parent, "target")
        from clipfast.models.weights import convert_weights

        convert_weights(source, target, layout, naflex=naflex, heads=heads)
    echo(f"wrote {target} in the layout of {layout}")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
) -> None:
    """Say what this machine has and what clipfast uses of it, and test every op in a few seconds.

    Exits with 0 when every op computes what it should, with 1 when one does not. What is missing (the op library,
    Triton on a GPU machine) is a warning: PyTorch serves in its place.
    """
    import json

    from clipfast.doctor import diagnose, exit_code
    from clipfast.doctor_report import render

    report = diagnose()
    echo(json.dumps(report, indent=1) if as_json else render(report))
    raise typer.Exit(exit_code(report, strict))


_add_train_commands(app)
_add_shards_command(app)
_add_feature_commands(app)
app.command(rich_help_panel=FILES)(convert)
_add_export_command(app)
app.command(rich_help_panel=MACHINE)(doctor)
_add_tune_command(app)
