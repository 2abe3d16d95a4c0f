"""Pairs of a JSON with annotations beside a folder of pictures: COCO's captions, and Karpathy's splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from clipfast.data.captions import captions_of_value
from clipfast.data.options import DataOptions
from clipfast.data.pairs import Captions, PairError, Pairs
from clipfast.data.places import find_base, read_picture
from clipfast.data.text_files import read_text

# how COCO names the file; others are given by name
ANNOTATIONS = ("captions_*.json", "dataset_*.json")


class _Picture(NamedTuple):
    name: str
    captions: list[Any]


class AnnotatedPairs(Pairs):
    """The pictures of COCO's ``captions_*.json``, each with all its captions.

    ``images`` name the files (``file_name``, or Karpathy's ``filepath`` and ``filename``); ``annotations`` give each
    ``image_id`` a ``caption``; Karpathy's files have ``sentences`` in the place of them.

    Raises:
        ValueError: It is no such JSON, two pictures have one ``id``, or there are none with captions.
    """

    def __init__(self, path: Path, options: DataOptions | None = None) -> None:
        options = options or DataOptions()
        try:
            found = json.loads(read_text(path, options.encoding))
            self._pictures = _pictures(found, options.caption_key)
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(
                f"data: got {path}, expected COCO's JSON with 'images' and 'annotations', or Karpathy's with 'images' "
                f"and their 'sentences': {type(error).__name__}: {error}"
            ) from error
        if not self._pictures:
            raise ValueError(f"data: got no picture with a caption in {path}, expected at least one")
        self.files = (path,)
        names = [picture.name for picture in self._pictures]
        part = path.stem.removeprefix("captions_")  # captions_val2017.json is of val2017
        tops = (path.parent, path.parent.parent)
        places = [top / folder / part for top in tops for folder in ("", "images")]
        places += [top / folder for top in tops for folder in ("images", "")]
        self._base = find_base(path.parent, names, places)
        self.groups = (len(self._pictures),)

    def key(self, index: int) -> str:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return str(self._base / self._pictures[index].name)

    def image(self, index: int) -> bytes:
        """See :class:`clipfast.data.pairs.PairSource`."""
        try:
            return read_picture(self._base / self._pictures[index].name)
        except OSError as error:
            raise PairError(f"{self.key(index)}: {error}") from error

    def captions(self, index: int) -> Captions:
        """See :class:`clipfast.data.pairs.PairSource`."""
        try:
            return captions_of_value(self._pictures[index].captions)
        except PairError as error:
            raise PairError(f"{self.key(index)}: {error}") from error


def _pictures(found: Any, caption_key: str | None) -> list[_Picture]:
    key = caption_key or "caption"
    images = found["images"]
    if "annotations" not in found:
        return [
            _Picture("/".join(filter(None, (image.get("filepath"), image["filename"]))), list(image["sentences"]))
            for image in images
        ]
    by_id: dict[Any, _Picture] = {}
    for image in images:
        picture = by_id.setdefault(image["id"], _Picture(image["file_name"], []))
        if picture.name != image["file_name"]:
            raise ValueError(
                f"data: got the id {image['id']} for {picture.name} and {image['file_name']}, expected an id for each"
            )
    for annotation in found["annotations"]:
        # a null or a number stays what it is: it is no caption, and is counted
        if annotation["image_id"] in by_id:
            by_id[annotation["image_id"]].captions.append(annotation[key])
    # a list of pictures may be longer than that of captions: test sets have none
    return [picture for picture in by_id.values() if picture.captions]
