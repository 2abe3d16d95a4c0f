from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import small
from rich.console import Console
from typer.testing import CliRunner

from clipfast import notices
from clipfast.cli import app
from clipfast.console import PlainConsole
from clipfast.notices import drawing_on, for_workers, notice, say, warnings_as_notices
from clipfast.ops.dispatch import FallbackWarning
from clipfast.ops.fallback import KernelFallbackWarning
from clipfast.progress import RowProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def shown_always():
    """As in a new process: no warning was shown before."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.mark.parametrize("category", [UserWarning, FallbackWarning, KernelFallbackWarning, RuntimeWarning])
def test_a_warning_is_a_line_without_its_source(category, capsys):
    with warnings_as_notices():
        for _ in range(3):
            warnings.warn("clipfast: [b]words[/b]\n  of two lines", category, stacklevel=1)
    assert capsys.readouterr() == ("", "warning: [b]words[/b] of two lines\n")


def test_other_libraries_are_named_and_do_not_flood(capsys):
    with warnings_as_notices():
        for index in range(6):
            warnings.warn_explicit(f"picture {index} [x]", UserWarning, "/lib/site-packages/PIL/Image.py", 12)
            warnings.warn_explicit("said often", UserWarning, "/lib/site-packages/six.py", 3)
    assert capsys.readouterr().err.splitlines() == [
        "warning: PIL: picture 0 [x]",
        "warning: six: said often",
        "warning: PIL: picture 1 [x]",
        "warning: PIL: picture 2 [x] (others of this kind are not shown)",
    ]


def test_the_next_command_says_it_again_and_afterwards_python_does(capsys):
    before = warnings.showwarning
    for _ in range(2):
        with warnings_as_notices():
            warnings.warn("clipfast: words", stacklevel=1)
            notice("warning: words")
    assert capsys.readouterr().err == "warning: words\n" * 2
    assert warnings.showwarning is before
    with pytest.raises(KeyError), warnings_as_notices():
        raise KeyError
    assert warnings.showwarning is before


def test_what_python_ignores_or_raises_stays_so(capsys):
    with warnings_as_notices():
        warnings.simplefilter("ignore")
        warnings.warn("clipfast: words", stacklevel=1)
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            warnings.warn("clipfast: words", stacklevel=1)
    assert capsys.readouterr() == ("", "")


def test_threads_and_ranks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with warnings_as_notices():
        thread = threading.Thread(target=lambda: warnings.warn("clipfast: words", stacklevel=1))
        thread.start()
        thread.join()
    assert capsys.readouterr().err == "rank 3: warning: words\n"


def test_a_notice_goes_above_the_bar(monkeypatch):
    """Both on one terminal: through the console that draws, which puts it above; else the bar would be torn."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    printed = []
    console = PlainConsole(file=terminal, force_terminal=True, width=80)
    monkeypatch.setattr(console, "print", lambda *objects, **options: printed.extend(map(str, objects)))
    with drawing_on(console):
        say("words [b]")
    assert printed == ["words [b]"]
    say("after it")
    assert terminal.getvalue() == "after it\n"


def test_a_bar_on_a_terminal_and_notices_in_a_file(monkeypatch):
    file, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stderr", file)
    with drawing_on(Console(file=terminal, force_terminal=True)):
        say("words")
    assert (file.getvalue(), terminal.getvalue()) == ("words\n", "")


def test_a_forked_worker_leaves_its_parents_bar_alone(monkeypatch):
    file, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "__stderr__", file)
    monkeypatch.setattr(sys, "stderr", terminal)
    with drawing_on(Console(file=terminal, force_terminal=True)):
        monkeypatch.setattr(os, "getpid", lambda: -1)
        say("words [b]")
        monkeypatch.undo()
    assert (file.getvalue(), terminal.getvalue()) == ("words [b]\n", "")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(), ValueError("I/O operation on closed file")]
)
def test_a_notice_that_cannot_be_written_ends_nothing(error, monkeypatch):
    """As Python's own warnings: the run that is warned of a full disk goes on."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(notices, "_notices", notices._Notices())
    with warnings_as_notices():
        warnings.warn("clipfast: words", stacklevel=1)
        warnings.warn("clipfast: others", stacklevel=1)


def test_workers_that_are_started_anew_do_as_their_parent(capfd):
    """As those of a DataLoader: what they call first was pickled."""

    def run_worker() -> None:
        code = f"import pickle, warnings; pickle.loads({pickle.dumps(for_workers())})(); warnings.warn('[b]words')"
        worker = multiprocessing.get_context("spawn").Process(target=exec, args=(code, {}))
        worker.start()
        worker.join(60)
        assert worker.exitcode == 0

    with warnings_as_notices():
        run_worker()
    assert "Warning: [b]words" not in (shown := capfd.readouterr().err)
    assert shown.endswith("[b]words\n")
    run_worker()
    assert "UserWarning: [b]words" in capfd.readouterr().err


def test_commands_say_warnings_as_notices(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    small.run(tmp_path / "run")
    for folder in ("cat", "Cat"):
        (tmp_path / "val" / folder).mkdir(parents=True)
        small.picture(0).save(tmp_path / "val" / folder / "0.png")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--data", str(tmp_path / "val"), "--json"])
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("warning: class_names: got classes that have the same prompts: Cat/cat (0, 1). ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.startswith("{")


def test_every_command_does():
    """The hook is where all commands begin, and in a process of its own: there a warning has its first chance."""
    code = (
        "import sys, warnings; import clipfast.cli as cli\n"
        "@cli.app.command()\n"
        "def warn():\n"
        "    warnings.warn('words', UserWarning)\n"
        "    warnings.warn('later', DeprecationWarning)\n"
        "cli.app(['warn'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].endswith("words")
    assert ".py:" not in done.stderr
    assert "warnings.warn" not in done.stderr


def test_one_console_for_bars_and_notices():
    assert notices.error_console() is notices.error_console()
    with RowProgress("rows", 2, notices.error_console()) as progress:
        progress(1)
