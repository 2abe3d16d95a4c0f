"""Parquet by pyarrow, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipfast.data.options import usual_name
from clipfast.extras import missing


def require_pyarrow() -> tuple[Any, Any]:
    """Return the modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        ImportError: They are missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing("Parquet needs", "pyarrow") from error
    return pyarrow, parquet


def open_parquet(path: Path, *, mapped: bool = True) -> Any:
    """Return a ``pyarrow.parquet.ParquetFile``.

    Args:
        path: The file.
        mapped: Whether it is mapped into memory. A mapped file that is cut while it is read ends the process.

    Raises:
        ImportError: pyarrow is missing.
        FileNotFoundError: There is no such file.
        ValueError: It is no Parquet, or damaged.
    """
    pyarrow, parquet = require_pyarrow()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return parquet.ParquetFile(path, memory_map=mapped)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: got no whole Parquet file: {str(error).splitlines()[0]}") from error


def find_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], path: Path) -> str:
    """Return the column that was asked for, or the first of the usual ones.

    Raises:
        ValueError: It is not there.
    """
    found = (wanted if wanted in columns else None) if wanted else usual_name(columns, usual)
    if found is not None:
        return found
    expected = repr(wanted) if wanted else f"one of {', '.join(usual)}, or --image-column, --caption-column"
    raise ValueError(f"column: got {', '.join(columns)} in {path}, expected {expected}")
