"""The command line: ``clipfast demo`` and what follows it.

Commands import what they need when they run: ``clipfast --help`` should not wait for PyTorch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from clipfast.train.config import RunConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


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


def _print_version(wanted: bool) -> None:
    if wanted:
        import clipfast

        typer.echo(f"clipfast {clipfast.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Fast CLIP training and inference that computes exactly what CLIP computes."""


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="'small', a name that clipfast.list_models() gives, or a JSON file.")
    ] = "small",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Picture-caption pairs a step.")] = 256,
    image_size: Annotated[int | None, typer.Option(help="Pixels a side.", show_default="the model's")] = None,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up; a cosine takes it to 0.")] = 1e-3,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for autocast.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the hold-out, the weights and the order of batches.")] = 0,
    output: Annotated[Path, typer.Option(help="The folder for report, checkpoint and log.")] = Path("runs/demo"),
) -> None:
    """Train a small CLIP on emoji and their names, and report what it learned.

    Takes about four minutes on two CPU cores. Ctrl-C ends training early and keeps what was learned.
    """
    try:
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
    except ModuleNotFoundError as error:
        typer.echo(f"error: the demo needs {error.name}: pip install 'clipfast[demo]'", err=True)
        raise typer.Exit(1) from error
    except (ImportError, ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
@settings_as_options
def train(
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings; flags go before it.")] = None,
    **flags: Any,
) -> None:
    """Train a CLIP on pictures and captions, alone or under torchrun; run it again to go on where it stopped.

    Each setting is a flag, or a line such as 'batch_size = 256' in the TOML file. Ctrl-C and SIGTERM end training after
    the step in progress and keep what was learned.
    """
    try:
        from clipfast.train.config import make_run_config, read_settings
        from clipfast.train.run import run_training

        settings = read_settings(config) if config else {}
        run_training(make_run_config(settings | {name: value for name, value in flags.items() if value is not None}))
    except ModuleNotFoundError as error:
        typer.echo(f"error: training needs {error.name}: pip install 'clipfast[train]'", err=True)
        raise typer.Exit(1) from error
    except (ImportError, ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        typer.echo(f"error: {rank}{error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def shards(
    source: Annotated[str, typer.Argument(help="'emoji' for the demo's pairs, a .csv or .tsv table, or a folder.")],
    output: Annotated[Path, typer.Argument(help="The folder for the shards; it may hold none yet.")],
    shard_size: Annotated[int, typer.Option(help="Pairs a shard.")] = 10_000,
    image_size: Annotated[int, typer.Option(help="Pixels a side of the emoji.")] = 64,
) -> None:
    """Write pictures and captions as WebDataset shards, which training reads.

    The emoji become two folders, OUTPUT/train and OUTPUT/held_out: compositions that training does not see.
    """
    try:
        if source == "emoji":
            from clipfast.data.emoji_pairs import write_emoji_shards

            written = write_emoji_shards(output, image_size=image_size, shard_size=shard_size)
        else:
            from clipfast.data.shards import write_shards
            from clipfast.data.sources import open_pairs

            pairs = open_pairs(source)
            written = write_shards((pairs.read(i) for i in range(len(pairs))), output, shard_size=shard_size)
    except ModuleNotFoundError as error:
        typer.echo(f"error: shards need {error.name}: pip install 'clipfast[demo]'", err=True)
        raise typer.Exit(1) from error
    except (ImportError, ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {len(written)} shards to {output}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A file of weights, or a folder of transformers' or open_clip's.")],
    target: Annotated[Path, typer.Argument(help="A .safetensors, .pt or .bin file; replaced if it exists.")],
    layout: Annotated[str, typer.Option(help="openai (open_clip's too), transformers, or timm (the image tower).")],
) -> None:
    """Write CLIP weights with the keys of another library, bit for bit.

    The layout of SOURCE is told by its keys. OpenAI's TorchScript archives are read, but their code is not run.
    """
    try:
        from clipfast.models.weights import convert_weights

        convert_weights(source, target, layout)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"wrote {target} in the layout of {layout}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
) -> None:
    """Say what this machine has and what clipfast uses of it, and test every op in a few seconds.

    Exits with 0 when every op computes what it should, with 1 when one does not. What is missing (the op library,
    Triton on a GPU machine) is a warning: PyTorch serves in its place.
    """
    import json

    from clipfast.doctor import diagnose, exit_code, render

    report = diagnose()
    typer.echo(json.dumps(report, indent=1) if as_json else render(report))
    raise typer.Exit(exit_code(report, strict))
