"""The report, the table and the exponents, from runs that are made up."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipfast.benchmark.cli import app
from clipfast.benchmark.markdown import markdown_table
from clipfast.benchmark.report import report_html
from clipfast.benchmark.results import DENSE, Limits, Row, Run, Side, read_run, write_run
from clipfast.benchmark.summary import (
    best_rival,
    bytes_text,
    lines_of,
    series_of,
    share_of_limit,
    shortcut_gain,
    speed_ups,
    time_text,
)

ROOT = Path(__file__).parent.parent.parent


def side(seconds: float, **figures: object) -> Side:
    times = [seconds * factor for factor in (1.0, 1.1, 0.9, 1.3, 0.8)]
    return Side(times, times, **figures)


def row(op: str, name: str, **figures: object) -> Row:
    return Row(op, name, name, "forward", "float32", "items", 4, **figures)


def make_run() -> Run:
    rows = [
        row(
            "contrastive_loss", f"loss, B = {b}", flops=1e9 * b**2, bytes=1e6 * b, limit_s=1e-9 * b**2, series="loss",
            axis="batch", at=b, law={"time": 2, "memory": 1},
            sides={
                "clipfast": side(1e-6 * b**2, peak_bytes=2000 * b, saved_bytes=10, error=1e-7),
                "open_clip": side(2e-6 * b**1.5, peak_bytes=30 * b**2, error=2e-7),
            },
            missing={"memeff": "not installed"},
        )
        for b in (512, 1024, 2048, 4096)
    ]  # fmt: skip
    tower = {"clipfast": side(0.1), DENSE: side(0.2), "open_clip": side(0.3), "<b>timm & co</b>": side(0.25)}
    rows.append(row("towers", "ViT, 16 images", flops=1e10, bytes=1e8, limit_s=0.1, sides=tower))
    rows.append(row("tokenizer", "tokenizer", sides={"clipfast": side(0.001)}))
    details = {"threads": "2", "torch": "2.13.0"}
    limits = Limits(30.0, {"float32": 0.2, "bfloat16": 0.4})
    return Run("A CPU", "cpu", details, "abc1234567", "2026-01-02", "short", True, limits, rows)


class Page(HTMLParser):
    """The tags of a page, its words, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.words, self.loads = [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_stands_alone():
    html = report_html(make_run())
    page = Page(html)
    assert page.loads == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html
    words = " ".join(page.words)
    for expected in (
        "clipfast on A CPU, 2 threads", "2026-01-02", "abc1234567", "no GPU was there", "not installed",
        "<b>timm & co</b>", "Contrastive loss", "Roofline", "Scaling", "Dense and with exact shortcuts",
        "torch 2.13.0", "30 GB/s",
    ):  # fmt: skip
        assert expected in words, expected


def test_the_page_is_the_same_bytes(tmp_path):
    write_run(tmp_path / "run.json", make_run())
    html = report_html(read_run(tmp_path / "run.json"))
    assert report_html(read_run(tmp_path / "run.json")) == html
    code = f"""
from pathlib import Path
from clipfast.benchmark.report import write_report
from clipfast.benchmark.results import read_run
write_report(read_run(Path({str(tmp_path / "run.json")!r})), Path({str(tmp_path / "page.html")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "page.html").read_text() == html


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("block", "one side", sides={"clipfast": side(1.0)})],
        [row("block", "no rival", sides={"clipfast": side(1.0), DENSE: side(2.0)})],
        [row("block", "not ours", sides={"open_clip": side(1.0)})],
        [row("block", "nobody", missing={"timm": "not installed"})],
        [row("new op", "one round", sides={"clipfast": Side([1.0], [1.0]), "timm": Side([2.0], [2.0])})],
        [row("block", "alone", series="s", axis="batch", at=1, law={"time": 1}, sides={"clipfast": side(1.0)})],
        [row("block", "limits", flops=1.0, bytes=1.0, limit_s=1e-9, sides={"clipfast": side(1.0)})],
    ],
    ids=lambda rows: rows[0].name if rows else "empty",
)
def test_runs_with_little_in_them(rows):
    run = replace(make_run(), rows=rows, complete=False)
    html, table = report_html(run), markdown_table(run)
    assert "a part of it" in html
    for r in rows:
        assert r.name in html
        assert (r.name in table) == ("clipfast" in r.sides)


def test_exponents():
    run = make_run()
    assert series_of(run) == ["loss"]
    ours, theirs = lines_of(run, "loss", "time")
    assert (ours.side, theirs.side) == ("clipfast", "open_clip")
    assert ours.at == [512, 1024, 2048, 4096]
    assert ours.slope == pytest.approx(2, abs=1e-9)
    assert ours.upper_slope == pytest.approx(2, abs=1e-9)
    assert theirs.slope == pytest.approx(1.5, abs=1e-9)
    assert ours.law == 2
    ours, theirs = lines_of(run, "loss", "memory")
    assert ours.slope == pytest.approx(1, abs=1e-9)
    assert theirs.slope == pytest.approx(2, abs=1e-9)
    assert ours.law == 1


def test_a_fixed_cost_bends_the_lower_half():
    run = make_run()
    for r in run.rows[:4]:
        r.sides["clipfast"] = side(1e-6 * r.at**2 + 1.0)
    line = lines_of(run, "loss", "time")[0]
    assert line.slope < line.upper_slope < 2


def test_a_side_that_could_not_do_the_largest():
    run = make_run()
    del run.rows[3].sides["open_clip"]
    assert lines_of(run, "loss", "time")[1].at == [512, 1024, 2048]


def test_speed_ups():
    run = make_run()
    tower = run.rows[4]
    found = speed_ups(tower)
    assert [f.rival for f in found] == ["open_clip", "<b>timm & co</b>"]
    assert found[0].ratio == pytest.approx(3)
    assert best_rival(tower).ratio == pytest.approx(2.5)
    assert best_rival(tower, DENSE).ratio == pytest.approx(1.25)
    assert shortcut_gain(tower) == pytest.approx(2)
    assert shortcut_gain(run.rows[0]) is None
    assert share_of_limit(tower, DENSE) == pytest.approx(0.5)
    assert share_of_limit(tower, "clipfast") is None  # it does less than the operations that the limit counts
    assert share_of_limit(run.rows[0], "clipfast") == pytest.approx(1e-3)
    assert best_rival(run.rows[5]) is None


def test_quartiles_are_of_paired_rounds():
    sides = {"clipfast": Side([1.0, 2.0, 4.0], []), "other": Side([2.0, 8.0, 4.0], [])}
    (found,) = speed_ups(row("block", "r", sides=sides))
    assert (found.low, found.ratio, found.high) == (1.5, 2.0, 3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23 s"), (0.01234, "12.3 ms"), (4.5e-5, "45.0 µs"), (3e-8, "30.0 ns"), (1234, "1,234 s")],
)
def test_times(value, text):
    assert time_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0, "0 kB"), (2.5e6, "2.50 MB"), (3.21e10, "32.1 GB")])
def test_bytes(value, text):
    assert bytes_text(value) == text


def test_the_table():
    table = markdown_table(make_run())
    assert "Measured on 2026-01-02 at commit `abc1234567`: A CPU, 2 threads, PyTorch 2.13.0, the short set." in table
    assert "| ViT, 16 images | 100 ms | – | &lt;b>timm & co&lt;/b> | 2.50 × | 1.25 × |" in table
    assert "| tokenizer | 1.00 ms | – | none was there | – |  |" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_commands(tmp_path):
    path, page, other = tmp_path / "run.json", tmp_path / "folder" / "page.html", tmp_path / "no run"
    write_run(path, make_run())
    other.write_text("nothing\n")
    run = CliRunner()
    assert (
        run.invoke(app, ["report", str(path), "--output", str(page), "--markdown", str(tmp_path / "t.md")]).exit_code
        == 0
    )
    assert page.read_text() == report_html(read_run(path))
    assert (tmp_path / "t.md").read_text() == markdown_table(read_run(path))
    assert run.invoke(app, ["compare", str(path), str(path)]).exit_code == 0
    slow = make_run()
    slow.rows[4].sides["clipfast"] = side(0.15)
    write_run(tmp_path / "slow.json", slow)
    result = run.invoke(app, ["compare", str(path), str(tmp_path / "slow.json")])
    assert result.exit_code == 1
    assert "slower" in result.output.splitlines()[0]
    assert run.invoke(app, ["compare", str(tmp_path / "slow.json"), str(path)]).exit_code == 0
    for i in range(4):
        write_run(tmp_path / "before" / f"{i}.json", make_run())
        write_run(tmp_path / "after" / f"{i}.json", slow)
    result = run.invoke(app, ["compare", str(tmp_path / "before"), str(tmp_path / "after")])
    assert result.exit_code == 1
    assert "slower" in result.output.splitlines()[0]
    assert "One run" not in result.output
    for arguments in (
        ["report", str(tmp_path / "none.json")],
        ["report", str(other)],
        ["report", str(path), "--output", str(tmp_path / "page.txt")],
        ["report", str(path), "--output", str(tmp_path / "page.html"), "--markdown", str(tmp_path / "t.html")],
        ["compare", str(path), str(other)],
    ):
        result = run.invoke(app, arguments)
        assert result.exit_code == 2
        assert result.output.startswith("error: ")
        assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("page.*"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/*/*.json")), ids=lambda path: path.stem)
def test_committed_results_can_be_drawn(path):
    if path.stem.endswith("-status"):
        pytest.skip("the tests' status, not a run")
    run = read_run(path)
    assert report_html(run) == report_html(run)
    assert run.rows
