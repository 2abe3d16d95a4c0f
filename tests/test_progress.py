from __future__ import annotations

import contextlib
import io

import pytest
import small
import torch
from rich.console import Console

from clipfast import progress as module
from clipfast.console import PlainConsole
from clipfast.embed.embed import embed
from clipfast.evaluate.run import Reading, evaluate
from clipfast.progress import RowProgress, draws, in_words, rate_in_words


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_line_a_minute_in_a_file(clock):
    file = io.StringIO()
    with RowProgress("pictures", 100_000, PlainConsole(file=file, width=40), done=40_000) as progress:
        for _ in range(59):
            clock.now += 10
            progress(1000)
        clock.now += 10
        progress(1000)
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "pictures 46000/100000 · 100 a second · 9 min 0 s left"
    assert lines[-2] == "pictures 94000/100000 · 100 a second · 1 min 0 s left"
    assert lines[-1] == "pictures 100000/100000 · 100 a second · took 10 min 0 s"


def test_what_is_quick_says_nothing_in_a_file(clock):
    file = io.StringIO()
    with RowProgress("texts", 10, PlainConsole(file=file)) as progress:
        clock.now += 30
        progress(10)
    progress = RowProgress("texts", 10, PlainConsole(file=file))
    with contextlib.suppress(KeyError), progress:
        clock.now += 59
        progress(5)
        clock.now += 5
        raise KeyError
    with RowProgress("texts", 10, None) as progress:
        clock.now += 100
        progress(10)
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    "environment", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"FORCE_COLOR": "3", "TERM": "xterm"}]
)
def test_a_file_is_no_terminal_whatever_colours_are_asked_for(environment, clock, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    with RowProgress("pictures", 100, PlainConsole(file=file)) as progress:
        clock.now += 60
        progress(50)
    assert (
        file.getvalue()
        == "pictures 50/100 · 0.83 a second · 1 min 0 s left\npictures 50/100 · 0.83 a second · took 1 min 0 s\n"
    )


def test_a_dumb_terminal_gets_lines(monkeypatch, clock):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    assert not draws(PlainConsole(file=file))
    with RowProgress("pictures", 100, PlainConsole(file=file)) as progress:
        clock.now += 61
        progress(50)
    assert "\r" not in file.getvalue()
    assert "50/100" in file.getvalue()


def test_a_bar_with_rate_and_time_left_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    console = Console(file=file, width=100, force_terminal=True, legacy_windows=False)
    assert draws(console)
    with RowProgress("pictures", 100, console) as progress:
        for _ in range(4):
            progress(25)
    shown = file.getvalue()
    for part in ("pictures", "100/100", "a second", "left"):
        assert part in shown
    assert "took" not in shown


def test_a_bar_of_nothing_is_not_drawn(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with RowProgress("prompts", 100, Console(file=file, force_terminal=True), at_once=False):
        pass
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_rates_in_words():
    assert [rate_in_words(rate) for rate in (0, 0.031, 7.25, 9.99, 1204.4)] == [
        "0 a second", "0.031 a second", "7.2 a second", "10 a second", "1204 a second"
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["eval", "embed"])
def test_commands_of_many_rows_write_a_line_a_minute(command, tmp_path, clock, monkeypatch):
    """With the rate and the time left, counted by rows that are computed; rows of an earlier run cost no time."""
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    small.write_pictures(tmp_path / "pictures", 12)
    model, file = small.model(), io.StringIO()
    console = PlainConsole(file=file, width=40)
    encode = model.encode_image

    def encode_slowly(images: torch.Tensor) -> torch.Tensor:
        clock.now += 20 * len(images)
        return encode(images)

    monkeypatch.setattr(model, "encode_image", encode_slowly)
    if command == "eval":
        evaluate(model, tmp_path / "pictures", reading=Reading(2, 0, console))
    else:
        embed(model, tmp_path / "pictures", tmp_path / "f.npy", batch_size=2, console=console)
    lines = file.getvalue().splitlines()
    word = "pictures" if command == "eval" else "images"
    assert lines == [
        f"{word} 4/12 · 0.05 a second · 2 min 40 s left",
        f"{word} 8/12 · 0.05 a second · 1 min 20 s left",
        f"{word} 12/12 · 0.05 a second · took 4 min 0 s",
    ]
    assert "\r" not in file.getvalue()
