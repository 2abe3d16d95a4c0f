"""The command line: ``clipfast-bench compare | report | readme``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfast.commands import errors_told, make_app
from clipfast.console import echo
from clipfast.outputs import check_output_file

app = make_app()


@app.callback()
def main() -> None:
    """What ``pytest benchmarks/`` measured: compared, and drawn."""


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="The file of a run, or a folder of several, before a change.")],
    after: Annotated[Path, typer.Argument(help="The same after it, on the same machine.")],
    threshold: Annotated[float, typer.Option(help="The smallest change of time that is called one, as a share.")] = 0.1,
    everything: Annotated[bool, typer.Option("--all", help="Name what did not change, too.")] = False,
) -> None:
    """Say what became slower or faster, by clipfast's time over its rivals' in the same rounds.

    Two processes of the same code differ by more than the rounds of one: measure before and after in turn, four times,
    into a folder each.

    Exits with 1 where something became slower, with 2 where the runs cannot be compared.
    """
    from clipfast.benchmark.compare import compare as compare_runs
    from clipfast.benchmark.compare import lines_of
    from clipfast.benchmark.results import read_runs

    with errors_told(extra="bench"):
        changes = compare_runs(read_runs(before), read_runs(after), threshold)
    for line in lines_of(changes, everything=everything):
        echo(line)
    raise typer.Exit(int(any(change.verdict == "slower" for change in changes)))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="The file of a run.")],
    output: Annotated[Path, typer.Option(help="The page, an .html file.")] = Path("benchmark-report.html"),
    markdown: Annotated[Path | None, typer.Option(help="A Markdown table beside it, an .md file.")] = None,
) -> None:
    """Write the report of a run: one HTML file that needs nothing else."""
    with errors_told(extra="bench"):
        check_output_file(output, (".html", ".htm"))
        if markdown is not None:
            check_output_file(markdown, (".md", ".markdown"), "markdown")
        from clipfast.benchmark.markdown import markdown_table
        from clipfast.benchmark.report import write_report
        from clipfast.benchmark.results import read_run

        run = read_run(results)
        write_report(run, output)
        if markdown is not None:
            markdown.write_text(markdown_table(run), encoding="utf-8")
    echo(f"wrote {output}" + (f" and {markdown}" if markdown else ""))


@app.command()
def readme(
    results: Annotated[Path, typer.Argument(help="The file of a run.")],
    page: Annotated[Path, typer.Argument(metavar="README", help="A clone's README, with marks.")],
) -> None:
    """Write what a README says of a run: sentence, chart and table; and the table of all rows, docs/benchmarks.md."""
    from clipfast.benchmark.markdown import regenerated
    from clipfast.benchmark.results import read_run
    from clipfast.files import write_atomically

    with errors_told(extra="bench"):
        files = regenerated(read_run(results), page)
        for file, text in files.items():
            write_atomically(file, lambda opened, text=text: opened.write(text.encode()))
    echo("wrote " + ", ".join(map(str, files)))
