"""What finds the clone of an editable install (``pip install -e``), in the place of setuptools' finder.

Setuptools' finder is asked after Python's own, which takes any folder named clipfast in the working directory for a
namespace package: the clone itself where Python is started in its parent, or a folder of runs. Ours is asked first, and
gives way to every clipfast that has code.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from pathlib import Path

FINDER = '''"""Finds clipfast in the clone that it was installed from; written by that clone's setup.py."""

import sys
from importlib.machinery import PathFinder

CLONE = {clone!r}


class Finder:
    """Asked before Python's own finder, to which a folder without code is a package too."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "clipfast":
            return None
        found = PathFinder.find_spec(name, path)
        return found if found is not None and found.has_location else PathFinder.find_spec(name, [CLONE])


def install():
    sys.meta_path.insert(0, Finder)
'''


def use_our_finder(wheel: Path, clone: Path) -> None:
    """Put our finder in an editable wheel, in the place of the one that setuptools wrote.

    A wheel without one is left as it is: a strict editable install has a folder of links on Python's path.

    Args:
        wheel: The wheel; its file is written anew.
        clone: The folder that holds the package's.
    """
    with zipfile.ZipFile(wheel) as archive:
        held = {info: archive.read(info) for info in archive.infolist()}
    module = next((i.filename[:-3] for i in held if i.filename.endswith("_finder.py") and "/" not in i.filename), None)
    if module is None:
        return
    ours = {
        f"{module}.py": FINDER.format(clone=str(clone.resolve())).encode(),
        f"{module}.pth": f"import {module}; {module}.install()\n".encode(),
    }
    theirs = {info.filename for info in held if info.filename.endswith(".pth")} | set(ours)
    held = {info: content for info, content in held.items() if info.filename not in theirs}
    record = next(info for info in held if info.filename.endswith(".dist-info/RECORD"))
    rows = [row for row in csv.reader(io.StringIO(held.pop(record).decode())) if row and row[0] not in theirs]
    rows[-1:-1] = [[name, f"sha256={_digest(content)}", str(len(content))] for name, content in ours.items()]
    listed = io.StringIO()
    csv.writer(listed, lineterminator="\n").writerows(rows)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in held.items():
            archive.writestr(info, content)
        for name, content in ours.items():
            archive.writestr(name, content)
        archive.writestr(record, listed.getvalue())


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
