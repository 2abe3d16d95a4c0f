from __future__ import annotations

import io
import os
import sys

import pytest
from rich.console import Console
from rich.table import Table

from clipfast.console import PlainConsole, degrade_streams, echo, make_console, tell, visible

HARD = ["[bold]a cat[/bold]", "[/]", "[link=x]", "a :smile: b", "c[0]", "\\[x]", "[red", "12 1.5 'quoted'"]


def stream(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="")


def written(file: io.TextIOWrapper) -> str:
    file.flush()
    return file.buffer.getvalue().decode(file.encoding)


@pytest.mark.parametrize("words", HARD)
@pytest.mark.parametrize("way", ["print", "notice"])
def test_data_is_printed_as_it_is(words, way):
    file = stream("utf-8")
    getattr(PlainConsole(file=file, force_terminal=True), way)(words)
    assert written(file) == words + "\n"


@pytest.mark.parametrize("words", HARD)
def test_a_console_of_the_caller_reads_no_markup_in_data(words):
    file = stream("ascii")
    tell(Console(file=file, force_terminal=True), words + " 猫")
    assert written(file) == words + " \\u732b\n"


def test_data_in_a_table_is_printed_as_it_is():
    file = stream("utf-8")
    table = Table("name", title=HARD[0], caption=HARD[1])
    for words in HARD:
        table.add_row(words)
    PlainConsole(file=file, width=60).print(table)
    assert all(words in written(file) for words in HARD)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437"])
def test_what_an_encoding_lacks_is_written_in_ascii(encoding):
    file = stream(encoding)
    console = PlainConsole(file=file, width=40)
    console.notice("猫 → caf\udce9 \U0001f600 …")
    table = Table("猫")
    table.add_row("≤ 3")
    console.print(table)
    lines = written(file).splitlines()
    assert lines[0].replace("…", "...").replace("→", "->") == "\\u732b -> caf\\udce9 \\U0001f600 ..."
    assert "\\u732b" in lines[2]


def test_streams_degrade_whoever_writes(monkeypatch):
    out, err = stream("cp1252"), stream("ascii", "surrogateescape")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    degrade_streams()
    print("╭─ 猫")
    make_console(stderr=True).notice("×")
    echo("[b]→\x1b[1m猫", err=True)
    assert written(out) == "+- \\u732b\n"
    assert written(err) == "x\n[b]->\\x1b[1m\\u732b\n"


def test_a_long_notice_stays_on_its_line():
    file = stream("utf-8")
    PlainConsole(file=file, width=20).notice("/a b" * 40)
    assert written(file) == "/a b" * 40 + "\n"


def test_control_characters_are_written_out():
    assert visible("a\x1b[31mred\x07\x85\r\n\tb") == "a\\x1b[31mred\\x07\\x85\\x0d\n\tb"
    file = stream("utf-8")
    PlainConsole(file=file, force_terminal=True).print("\x1b[2J")
    assert written(file) == "\\x1b[2J\n"


def test_a_quiet_console_is_quiet(capsys):
    make_console(quiet=True).notice("words")
    assert capsys.readouterr() == ("", "")


def test_a_console_that_nobody_reads_falls_silent():
    reading, writing = os.pipe()
    with open(writing, "w") as stream:
        os.close(reading)
        console = PlainConsole(file=stream)
        for _ in range(2):
            console.print("a line")
