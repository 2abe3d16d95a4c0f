"""Reading :mod:`torch.distributed.checkpoint`'s files without running code that somebody wrote into them."""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another run."""


# What DCP's list of contents is made of. It is a pickle, which could name any function to call; these are all.
_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}


class _ContentsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("pathlib", "PosixPath"):
            return pathlib.PurePosixPath
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, expected nothing but tensors")


class ContentsReader(FileSystemReader):
    """Reads contents without running what they name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """Return the contents.

        Raises:
            CheckpointError: They cannot be read, or name something else than tensors.
        """
        path = Path(self.path) / ".metadata"
        try:
            contents = _ContentsUnpickler(io.BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not isinstance(contents, dcp.Metadata):
            raise CheckpointError(f"{path}: got {type(contents).__name__}, expected the contents of a checkpoint")
        if contents.storage_meta is None:
            contents.storage_meta = dcp.metadata.StorageMeta()
        contents.storage_meta.load_id = self.load_id
        return contents


class TensorsOnly(DefaultLoadPlanner):
    """Loads tensors, and nothing that would have to be unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse."""
        raise CheckpointError(f"got {read_item.dest_index.fqn}, which is no tensor, expected nothing but tensors")
