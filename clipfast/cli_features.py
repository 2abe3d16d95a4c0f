"""What a trained model is used for, on the command line: ``clipfast eval | embed | search | show``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipfast.cli_data import with_data_options
from clipfast.commands import USE, errors_told
from clipfast.console import echo, make_console
from clipfast.data.options import DataOptions
from clipfast.notices import error_console, say
from clipfast.outputs import RESULTS, check_output_file, check_output_folder, write_results

if TYPE_CHECKING:
    import os

    from clipfast.data.tokenizer_base import AnyTokenizer
    from clipfast.models.clip import CLIP

# the groups of options in the help of these commands
_DATA, _MODEL, _MEASURED, _OUTPUT, _SPEED = "Data", "Model", "What is measured", "Output", "Speed and memory"

_Model = Annotated[
    str,
    typer.Argument(
        help="The folder of a training run, or of an open_clip or transformers model; or, with --weights, a name "
        "of clipfast.list_models() or a .json configuration."
    ),
]
_Weights = Annotated[
    Path | None,
    typer.Option(help="A file or folder of weights, of any layout that is known.", rich_help_panel=_MODEL),
]
_Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="For another vocabulary than CLIP's: a tokenizer.json, a SentencePiece .model, or a folder with one.",
        show_default="the model's folder's",
        rich_help_panel=_MODEL,
    ),
]
_Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.", rich_help_panel=_SPEED)]
_Precision = Annotated[
    str,
    typer.Option(help="fp32, bf16 or fp16: of the weights and what is computed with them.", rich_help_panel=_SPEED),
]
_BatchSize = Annotated[int, typer.Option(help="Pictures or texts at once.", rich_help_panel=_SPEED)]
_Workers = Annotated[int, typer.Option(help="Threads that read and decode.", rich_help_panel=_SPEED)]
_Results = Annotated[Path | None, typer.Option(help="A .json or .csv file for the results.", rich_help_panel=_OUTPUT)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON in the place of a table.", rich_help_panel=_OUTPUT)]


@with_data_options
def eval_(
    model: _Model,
    data: Annotated[
        str,
        typer.Option(
            help="Pictures with classes (a folder for each class, shards with .cls, or 'digits') or with captions "
            "(shards, a .csv or .tsv table, a folder with .txt files, 'emoji', or 'scikit-image').",
            rich_help_panel=_DATA,
        ),
    ],
    task: Annotated[
        str,
        typer.Option(help="zero-shot, retrieval, linear-probe, or auto: by the data.", rich_help_panel=_MEASURED),
    ] = "auto",
    weights: _Weights = None,
    tokenizer: _Tokenizer = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="A file with the names of classes, one a line or JSON; or imagenet.",
            show_default="the folders'",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(
            help="Prompts: name, photo, simple, imagenet, or a file with one a line.",
            show_default="imagenet for ImageNet, else simple",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A .json file: each class' prompts, as CuPL has them, or a list of templates.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            help="What a linear probe learns from.",
            show_default="half of --data, which is not tested on",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    c: Annotated[
        float | None,
        typer.Option(
            "--C",
            help="Of the linear probe.",
            show_default="chosen on a fifth of what it learns from",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    output: _Results = None,
    as_json: _Json = False,
    batch_size: _BatchSize = 64,
    workers: _Workers = 2,
    precision: _Precision = "fp32",
    device: _Device = "auto",
    *,
    data_options: Callable[[], DataOptions],
) -> None:
    """Measure a model: zero-shot accuracy, retrieval recall, or a linear probe. Nothing is downloaded."""
    with errors_told(extra="train"):
        if output is not None:
            check_output_file(output, RESULTS)
        from clipfast import __version__
        from clipfast.evaluate.linear_probe import SWEEP
        from clipfast.evaluate.results import metrics_table, write_evaluation
        from clipfast.evaluate.run import Reading, evaluate

        clip, read_by = _open(model, tokenizer, weights, device, precision)
        reading = Reading(batch_size, workers, error_console())
        result = evaluate(
            clip,
            data,
            task,  # type: ignore[arg-type]  # checked there
            class_names=classes,
            templates=templates,
            prompts=prompts,
            train_data=train_data,
            c=SWEEP if c is None else c,
            reading=reading,
            options=data_options(),
            tokenizer=read_by,
        )
        about = {"clipfast": __version__, "model": model, "data": data, "precision": precision}
        if output is not None:
            write_evaluation(result, output, **about)
        _print_result(metrics_table(result), about | result.to_dict(), as_json)
        _tell_skipped(list(result.skipped.items()))


@with_data_options
def embed(
    model: _Model,
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a .txt list (paths, or texts line by line), a .parquet file, .tar shards, or a .csv or "
            ".tsv table, or 'emoji'."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="A .parquet or .npy file.")],
    kind: Annotated[
        str,
        typer.Option(help="image or text: what SOURCE holds, or is to be taken of it.", rich_help_panel=_DATA),
    ] = "image",
    column: Annotated[
        str | None,
        typer.Option(help="Of Parquet.", show_default="path, image, text, caption, …", rich_help_panel=_DATA),
    ] = None,
    weights: _Weights = None,
    tokenizer: _Tokenizer = None,
    dtype: Annotated[
        str, typer.Option(help="float32 or float16: of the features in the file.", rich_help_panel=_OUTPUT)
    ] = "float32",
    normalize: Annotated[bool, typer.Option(help="Whether features get unit length.", rich_help_panel=_OUTPUT)] = True,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an earlier run left.", rich_help_panel=_OUTPUT)
    ] = False,
    batch_size: _BatchSize = 64,
    workers: _Workers = 2,
    precision: _Precision = "fp32",
    device: _Device = "auto",
    *,
    data_options: Callable[[], DataOptions],
) -> None:
    """Write the features of many pictures or texts. A run that was killed goes on where it was, with the same bits."""
    with errors_told(extra="embed"):
        from clipfast.embed.embed import embed as compute
        from clipfast.embed.writer import check_features_output

        check_features_output(output)
        clip, read_by = _open(model, tokenizer, weights, device, precision)
        result = compute(
            clip,
            source,
            output,
            kind=kind,  # type: ignore[arg-type]  # checked there
            column=column,
            options=data_options(),
            dtype=dtype,  # type: ignore[arg-type]
            normalize=normalize,
            batch_size=batch_size,
            workers=workers,
            restart=restart,
            tokenizer=read_by,
            model_source=_where(model, weights, tokenizer),
            console=error_console(),
        )
        words = "wrote {}: {} rows" if result.computed else "{} is complete: {} rows"
        echo(words.format(result.output, result.rows))
        _tell_skipped([(name, reason) for _, name, reason in result.skipped])


def search(
    features: Annotated[Path, typer.Argument(help="A .parquet or .npy file of features.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help=r"What to look for; several words are one text. [red]\[required, or --image][/red]", show_default=False
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help=r"A picture to look for. [red]\[required, or WORDS][/red]")] = None,
    k: Annotated[int, typer.Option("-k", "--nearest", help="How many to list.")] = 10,
    model: Annotated[
        str | None,
        typer.Option(help="As for clipfast embed.", show_default="what FEATURES was made with", rich_help_panel=_MODEL),
    ] = None,
    weights: _Weights = None,
    tokenizer: _Tokenizer = None,
    output: _Results = None,
    as_json: _Json = False,
    device: _Device = "auto",
) -> None:
    """List the pictures or texts that are nearest to a text or a picture."""
    with errors_told(extra="embed"):
        if output is not None:
            check_output_file(output, RESULTS)
        from clipfast.embed.find import search as find
        from clipfast.embed.search import hits_table, meaning_of_scores

        text = " ".join(words) if words else None
        hits = find(features, text, image=image, k=k, model=model, weights=weights, tokenizer=tokenizer, device=device)
        query = text if text is not None else str(image)
        rows = [hit.to_dict() for hit in hits]
        found = {"query": query, "features": str(features), "hits": rows}
        if output is not None:
            write_results(output, found, [{"query": query} | row for row in rows])
        _print_result(hits_table(hits, query), found, as_json)
        if not as_json:
            echo(meaning_of_scores(features, hits, text=text is not None))


def show(
    model: _Model,
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    output: Annotated[Path, typer.Option(help="The folder for PNGs and report.html.", rich_help_panel=_OUTPUT)],
    text: Annotated[
        list[str] | None, typer.Option(help="A text to compare them with; as often as you like, in order.")
    ] = None,
    weights: _Weights = None,
    tokenizer: _Tokenizer = None,
    method: Annotated[
        str, typer.Option(help="tsne, or umap where umap-learn is installed.", rich_help_panel=_OUTPUT)
    ] = "tsne",
    block: Annotated[int, typer.Option(help="Whose heads are drawn; -1 is the last.", rich_help_panel=_OUTPUT)] = -1,
    dark: Annotated[
        bool,
        typer.Option("--dark", help="PNGs for dark pages; the report follows its reader.", rich_help_panel=_OUTPUT),
    ] = False,
    device: _Device = "auto",
) -> None:
    """Draw where a model looks, how pictures and texts fit, and how a run went; as PNGs and one HTML page."""
    with errors_told(extra="train"):
        check_output_folder(output)
        from clipfast.visualize.show import show as draw

        clip, read_by = _open(model, tokenizer, weights, device, "fp32")
        place = Path(model)
        log = (place if place.is_dir() else place.parent) / "log.jsonl"
        has_log = place.exists() and log.is_file()
        files = draw(
            clip,
            images,
            output,
            texts=text or [],
            log=log if has_log else None,
            method=method,
            block=block,
            dark=dark,
            tokenizer=read_by,
            model_source={"spec": model} | ({} if weights is None else {"weights": str(weights)}),
        )
        for file in files:
            echo(file)


def add_feature_commands(app: typer.Typer) -> None:
    """Put these commands behind those that ``app`` has."""
    app.command("eval", rich_help_panel=USE)(eval_)
    for command in (embed, search, show):
        app.command(rich_help_panel=USE)(command)


def _open(
    spec: str, tokenizer: Path | None, weights: Path | None, device: str, precision: str
) -> tuple[CLIP, AnyTokenizer | str | os.PathLike[str] | None]:
    """Return a model, and where its tokenizer lies; None for CLIP's."""
    from clipfast.data.model_inputs import model_and_tokenizer
    from clipfast.models.open_model import PRECISIONS

    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    return model_and_tokenizer(spec, tokenizer, weights, device, PRECISIONS[precision])


def _where(model: str, weights: Path | None, tokenizer: Path | None) -> dict[str, str]:
    """Say where a model lies so that it is found from any folder."""
    where = {"spec": str(Path(model).resolve()) if Path(model).exists() else model}
    files = {"weights": weights, "tokenizer": tokenizer}
    return where | {name: str(file.resolve()) for name, file in files.items() if file is not None}


def _print_result(table: object, values: object, as_json: bool) -> None:
    import json

    if as_json:
        echo(json.dumps(values, indent=1))
    else:
        make_console().print(table)


def _tell_skipped(skipped: list[tuple[str, str]], shown: int = 5) -> None:
    if not skipped:
        return
    say(f"skipped {len(skipped)} that cannot be read:")
    for name, reason in skipped[:shown]:
        say(f"  {name}: {reason}")
    if len(skipped) > shown:
        say(f"  and {len(skipped) - shown} more")
