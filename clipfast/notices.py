"""What commands say beside their results: one line each on standard error, above a progress bar where one is drawn.

The Python API warns with ``warnings.warn``. While a command runs, its warnings and those of other libraries are notices
here: no file, no line number and no line of source, and none of them twice.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console

from clipfast.console import PlainConsole, tell

# other libraries may warn of every picture in other words
_LINES_OF_A_KIND = 3
_PACKAGE = str(Path(__file__).parent) + os.sep


class _ErrorConsole(PlainConsole):
    """Standard error, which ends no command where nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Be silent from now on; rich's own would end the process."""
        self.quiet = True


class _Notices:
    """What was said in this command, and where lines go."""

    def __init__(self) -> None:
        self.console = _ErrorConsole(stderr=True)
        self.said: set[str] = set()
        self.kinds: Counter[tuple[str, int, type[Warning]]] = Counter()
        self.drawing: list[tuple[Console, int]] = []  # consoles that draw a bar, and whose process they are


_notices = _Notices()


def error_console() -> Console:
    """Return the console for notices, errors and progress beside results, which is one for all of a process."""
    return _notices.console


def say(words: str) -> None:
    """Print a line to read on standard error, as it is. A full disk or a closed stream loses it, and nothing else."""
    with contextlib.suppress(OSError, ValueError):
        _say(words)


def _say(words: str) -> None:
    console, process = _notices.drawing[-1] if _notices.drawing else (_notices.console, os.getpid())
    if process != os.getpid():
        # a worker that was forked while its parent drew: the bar is not the worker's
        tell(_ErrorConsole(file=sys.__stderr__), words)
    elif console.is_terminal and not is_terminal(_notices.console.file):
        tell(_notices.console, words)  # the bar is on a terminal, and standard error goes elsewhere
    else:
        tell(console, words)


def notice(words: str) -> None:
    """Print a line to read on standard error, once a command."""
    if words not in _notices.said:
        _notices.said.add(words)
        say(_of_rank() + words)


@contextlib.contextmanager
def drawing_on(console: Console) -> Iterator[None]:
    """Print notices above what ``console`` draws, while it draws."""
    entry = (console, os.getpid())
    _notices.drawing.append(entry)
    try:
        yield
    finally:
        _notices.drawing.remove(entry)


@contextlib.contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Say warnings as notices. Which are shown, ignored or raised is Python's ``-W``'s choice, as ever."""
    before = warnings.showwarning
    _notices.said.clear()
    _notices.kinds.clear()
    warnings.showwarning = _show
    try:
        yield
    finally:
        warnings.showwarning = before


def for_workers() -> Callable[[], None]:
    """Return what a process that is started anew calls first: it says warnings as this one does. It can be pickled."""
    return _begin if warnings.showwarning is _show else _leave


def _begin() -> None:
    warnings.showwarning = _show


def _leave() -> None:
    pass


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    words = " ".join(str(message).split())
    if _is_ours(category, filename, words):
        notice(f"warning: {words.removeprefix('clipfast: ')}")
        return
    kind = (filename, lineno, category)
    words = f"warning: {_library(filename)}: {words}"
    if words in _notices.said or _notices.kinds[kind] == _LINES_OF_A_KIND:
        return
    _notices.kinds[kind] += 1
    last = _notices.kinds[kind] == _LINES_OF_A_KIND
    notice(words + (" (others of this kind are not shown)" if last else ""))


def _is_ours(category: type[Warning], filename: str, words: str) -> bool:
    # a warning may be put down to who called us
    return category.__module__.startswith("clipfast") or filename.startswith(_PACKAGE) or words.startswith("clipfast")


def _library(filename: str) -> str:
    """Return what a file belongs to: the package under site-packages, or the file's own name."""
    parts = Path(filename).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            return Path(parts[parts.index(folder) + 1]).stem
    return Path(filename).stem


def _of_rank() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def is_terminal(file: object) -> bool:
    """Whether a stream is a terminal."""
    isatty = getattr(file, "isatty", None)
    try:
        return isatty is not None and isatty()
    except ValueError:  # it is closed
        return False
