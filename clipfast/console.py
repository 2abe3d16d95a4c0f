"""What commands say on a terminal: data is printed as it is, and a terminal that cannot show a character gets ASCII.

Captions, names of classes and paths hold brackets, colons and control characters. Here nothing in them is read as
rich's markup, none of them moves the cursor, and no character ends a command because an encoding lacks it.
"""

from __future__ import annotations

import codecs
import os
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

# clipfast's own signs, and the frames that rich draws around tables and help
_ASCII = {
    **dict.fromkeys("─━═╌╍╸╺‐‑‒–—−", "-"),
    **dict.fromkeys("│┃║╎╏", "|"),
    **dict.fromkeys("┌┏╭╔┐┓╮╗└┗╰╚┘┛╯╝├┣┡┠╞╟┤┫┩┨╡╢┬┳┯┰┴┻┷┸┼╋╇╈╪╫", "+"),
    **dict.fromkeys("·•", "*"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "×": "x",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "…": "...",
}
_HANDLER = "clipfast.ascii"


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks: a sign by its like, anything else by its number, as ``backslashreplace`` does."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = (_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking)
    return "".join(shown), error.end


codecs.register_error(_HANDLER, _in_ascii)


def degrade_streams() -> None:
    """Let standard output and error write ASCII in the place of what their encoding cannot show.

    Lone surrogates, which stand for the bytes of names that are not UTF-8, become ``\\udce9``.
    """
    for stream in (sys.stdout, sys.stderr):
        _degrade(stream)


def _degrade(stream: TextIO) -> None:
    # standard error writes numbers by itself; streams of no encoding, such as StringIO, show everything
    usual = ("strict", "surrogateescape", "backslashreplace")
    if getattr(stream, "errors", None) in usual and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors=_HANDLER)


def counted(count: int, noun: str) -> str:
    """Return ``"1 thread"`` or ``"2 threads"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def visible(text: str) -> str:
    """Return a text whose control characters are written out: an escape sequence in a caption colours no terminal.

    Ends of lines and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        sign if sign in "\n\t" or not (ord(sign) < 32 or 127 <= ord(sign) < 160) else f"\\x{ord(sign):02x}"
        for sign in text
    )


class PlainConsole(Console):
    """rich's console, to which every string is a text: no markup, no ``:emoji:``, no highlighting.

    Tables and progress bars that it draws take their cells' strings alike. Markup of our own is a ``rich.text.Text``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, but strings as they are, with control characters written out."""
        _degrade(self.file)
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **options)

    def on_broken_pipe(self) -> None:
        """Fall silent where nobody reads any more; rich's own would end the process.

        Ctrl-C on ``clipfast train | tee log`` ends ``tee`` first, and the run has yet to be saved.
        """
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # what is still in the stream's buffer goes there, too
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)

    def notice(self, words: str) -> None:
        """Print a line to read, whole: it is not cut or wrapped where a terminal or a log file ends."""
        tell(self, words)


def tell(console: Console, words: str) -> None:
    """Print a line to read, whole and as it is, on whatever console a caller gave: rich's own reads markup."""
    _degrade(console.file)
    console.print(Text(visible(words)), soft_wrap=True)


def echo(words: object, *, err: bool = False) -> None:
    """Print a result to standard output, or an error to standard error: ``print`` that is safe for data."""
    stream = sys.stderr if err else sys.stdout
    _degrade(stream)
    print(visible(str(words)), file=stream, flush=True)


def make_console(*, stderr: bool = False, quiet: bool = False) -> PlainConsole:
    """Return the console of a command.

    Args:
        stderr: Whether it writes to standard error, as notices and progress do beside results.
        quiet: Whether it says nothing, as ranks after the first do.
    """
    return PlainConsole(stderr=stderr, quiet=quiet)
