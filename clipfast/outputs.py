"""What commands write to: checked before anything is computed, and results in the form that a name's ending says."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfast.files import write_atomically

#: The endings of files of results.
RESULTS = (".json", ".csv")


def check_output_file(path: Path, endings: Sequence[str], argument: str = "output") -> None:
    """Find out whether a file can be written, as far as can be known before; nothing is made yet.

    Args:
        path: The file, which may be there.
        endings: What its name may end with.
        argument: What errors call it.

    Raises:
        OSError: It is a folder, or its folder can neither be written to nor made.
        ValueError: Its name ends otherwise.
    """
    if path.suffix not in endings:
        raise ValueError(f"{argument}: got {path}, expected a name that ends with {' or '.join(endings)}")
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: got {path}, which is a folder, expected the name of a file")
    check_output_folder(path.parent, argument)


def check_output_folder(folder: Path, argument: str = "output") -> None:
    """Find out whether a folder is, or can be made, one that can be written to; nothing is made yet.

    Raises:
        OSError: It cannot.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{argument}: got {folder}, expected a folder: {place} is a file")
    try:
        # whom permissions do not bind may yet be on a filesystem that takes no files
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise PermissionError(
            f"{argument}: got {folder}, expected a folder that can be written to: {place} cannot ({error.strerror})"
        ) from error


def write_results(path: Path, values: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results at once or not at all.

    Args:
        path: A ``.json`` file gets ``values``, a ``.csv`` file ``rows`` below a header of their names.
        values: What JSON holds.
        rows: What a table holds; a row leaves the cells empty whose names it lacks.

    Raises:
        OSError: It cannot be written.
        ValueError: Its name ends otherwise.
    """
    check_output_file(path, RESULTS)
    if path.suffix == ".json":
        text = json.dumps(values, indent=2) + "\n"
    else:
        table = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(table, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    # names of files that are not UTF-8 have lone surrogates
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
