"""``clipfast shards``: pictures and captions as WebDataset shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli_data import with_data_options
from clipfast.commands import TRAIN, errors_told
from clipfast.console import echo
from clipfast.data.options import DataOptions
from clipfast.notices import error_console, say
from clipfast.outputs import check_output_folder

_NAMED = 5


@with_data_options
def shards(
    source: Annotated[
        str, typer.Argument(help="'emoji' for the demo's pairs, or what clipfast train reads: a table, a folder, …")
    ],
    output: Annotated[Path, typer.Argument(help="The folder for the shards.")],
    shard_size: Annotated[int, typer.Option(help="Pairs a shard.")] = 10_000,
    picture_format: Annotated[
        str | None,
        typer.Option("--format", help="jpg, png or webp: of all pictures.", show_default="each as it is"),
    ] = None,
    workers: Annotated[int, typer.Option(help="Threads that read and decode.")] = 2,
    image_size: Annotated[int, typer.Option(help="Pixels a side of the emoji.")] = 64,
    *,
    data_options: Callable[[], DataOptions],
) -> None:
    """Write pictures and captions as WebDataset shards, which training reads.

    Pictures that cannot be decoded are left out, counted, and listed in OUTPUT/skipped.jsonl. A run that was stopped
    goes on where it was when it is started again. The emoji become two folders, OUTPUT/train and OUTPUT/held_out:
    compositions that training does not see.
    """
    with errors_told(extra="demo"):
        check_output_folder(output)
        if source == "emoji" and not Path(source).exists():
            from clipfast.data.emoji_pairs import write_emoji_shards

            written = write_emoji_shards(output, image_size=image_size, shard_size=shard_size)
            echo(f"wrote {len(written)} shards to {output}")
            return
        from clipfast.data.input_facts import input_facts
        from clipfast.data.shard_writer import make_shards
        from clipfast.data.sources import open_pairs
        from clipfast.progress import RowProgress

        options = data_options()
        pairs = open_pairs(source, options)
        # of what a package brings there are no files to look at
        shipped = {"count": len(pairs), "digest": pairs.identity}
        facts = shipped if pairs.identity else input_facts(source, but=output)
        with RowProgress("pairs", len(pairs), error_console()) as progress:
            done = make_shards(
                pairs,
                output,
                {"input": facts, "options": vars(options)},
                shard_size=shard_size,
                picture_format=picture_format,
                workers=workers,
                on_rows=progress,
            )
    if done.made:
        echo(f"wrote {done.made} of {len(done.shards)} shards to {output}: {done.pairs} pairs")
    else:
        echo(f"{output} is complete: {len(done.shards)} shards, {done.pairs} pairs")
    if done.unusable:
        say(f"left out {len(done.unusable)} captions that are none, which {output}/skipped.jsonl names")
    if done.skipped:
        say(f"skipped {len(done.skipped)} pairs, which {output}/skipped.jsonl names:")
        for _, key, reason in done.skipped[:_NAMED]:
            say(f"  {key}: {reason}")
        if len(done.skipped) > _NAMED:
            say(f"  and {len(done.skipped) - _NAMED} more")


def add_shards_command(app: typer.Typer) -> None:
    """Put the command behind those that ``app`` has."""
    app.command(rich_help_panel=TRAIN)(shards)
