"""How data are to be read where their own names and content do not say it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated

from clipfast.data.text_files import check_encoding


@dataclass(frozen=True)
class DataOptions:
    """What in shards and tables is the picture and what the caption; None takes the usual names.

    Attributes:
        caption_key: In shards and folders: the extension of the file with captions, or a field of the ``.json``
            (``meta.caption`` for one below). Alternatives are separated by ``;``.
        image_key: In shards: the extension of the picture's file.
        caption_column: In tables and Parquet.
        image_column: In tables and Parquet.
        separator: Between a table's columns.
        quotes: Whether quotes around a table's cells count; None: where a comma or semicolon separates them.
        encoding: Of texts; None is UTF-8.
        as_open_clip, apply_orientation: See :func:`clipfast.data.transform.image_transform`.
    """

    caption_key: Annotated[str | None, "Of shards: the extension of captions, or a field of the .json."] = None
    image_key: Annotated[str | None, "Of shards: the extension of pictures."] = None
    caption_column: Annotated[str | None, "Of tables and Parquet."] = None
    image_column: Annotated[str | None, "Of tables and Parquet."] = None
    separator: Annotated[str | None, "Between the columns of a table; 'tab' is one."] = None
    quotes: Annotated[bool | None, "Whether quotes around cells of a table count."] = None
    encoding: Annotated[str | None, "Of texts that are not UTF-8."] = None
    as_open_clip: Annotated[bool, "Cut grey of more than 8 bits off at 255, as open_clip does."] = False
    apply_orientation: Annotated[bool, "Turn pictures as their EXIF orientation says."] = False

    def __post_init__(self) -> None:
        for name in ("caption_key", "image_key", "caption_column", "image_column"):
            if (value := getattr(self, name)) is not None and not value.strip(" .;"):
                raise ValueError(f"{name}: got {value!r}, expected a name")
        check_encoding(self.encoding)
        if self.separator is not None:
            # a tab is hard to type
            character = {"tab": "\t", "\\t": "\t"}.get(self.separator, self.separator)
            if len(character) != 1 or character in '\r\n"':
                raise ValueError(f"separator: got {self.separator!r}, expected one character, or 'tab'")
            object.__setattr__(self, "separator", character)

    def of_pictures(self) -> dict[str, bool]:
        """Return the arguments of :func:`clipfast.data.transform.image_transform` among these."""
        return {"as_open_clip": self.as_open_clip, "apply_orientation": self.apply_orientation}


def alternatives(key: str) -> list[str]:
    """Return the names in ``"jpg;png"``, without the dots of extensions."""
    return [name.strip().removeprefix(".") for name in key.split(";") if name.strip()]


def usual_name(there: Collection[str], usual: Iterable[str]) -> str | None:
    """Return the first of the usual names that is there, ``Caption`` and ``TEXT`` too; None if none is.

    Args:
        there: Names of columns or fields.
        usual: Names in lower case, in the order in which they are looked for.
    """
    by_case: dict[str, str] = {}
    for name in there:
        by_case.setdefault(name.lower(), name)
    return next((name if name in there else by_case[name] for name in usual if name in by_case), None)
