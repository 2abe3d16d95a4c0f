"""Checkpoints of training runs: whole or not there, shared by any number of ranks, read without running code.

A checkpoint is a folder ``step-000000100`` with the shards that :mod:`torch.distributed.checkpoint` writes, every rank
its own, and ``checkpoint.json`` with the SHA-256 of each. It is written under another name, synced to disk and renamed,
so that it either is all there or has no such name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from clipfast.files import sync_folder, write_atomically
from clipfast.train.checkpoint_reader import CheckpointError, ContentsReader, TensorsOnly
from clipfast.train.workplace import Workplace

_FORMAT = "clipfast.checkpoint.2"
_RECORD = "checkpoint.json"


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: Where they lie; made when the first is written.
        workplace: The ranks that write and read them together.
        keep: The last ones that are kept, beside the one with the best score.
    """

    def __init__(self, folder: str | os.PathLike[str], workplace: Workplace, *, keep: int = 3) -> None:
        self.folder = Path(folder)
        self.workplace = workplace
        self.keep = keep

    def list(self) -> list[Path]:
        """Return the checkpoints that are whole, the last one first."""
        found = [p for p in self.folder.glob("step-*") if (p / _RECORD).is_file()]
        return sorted(found, key=lambda p: p.name, reverse=True)

    def check_room(self, state: Mapping[str, Tensor]) -> None:
        """Find out before training whether checkpoints of ``state`` can be written.

        Raises:
            OSError: The folder cannot be written to, or the disk has no room for as many as are kept.
        """
        self.workplace.together("output", lambda: self._check_room(state) if self.workplace.leads else None)

    def _check_room(self, state: Mapping[str, Tensor]) -> None:
        write_atomically(self.folder / "probe", lambda file: file.write(b"clipfast"))
        (self.folder / "probe").unlink()
        size = sum(value.numel() * value.element_size() for value in state.values())
        # the last ones, the best, and the one that is being written
        wanted = size * max(1, self.keep + 2 - len(self.list()))
        free = shutil.disk_usage(self.folder).free
        if free < wanted:
            raise OSError(
                f"output: got {free / 1e9:.2f} GB free in {self.folder}, expected {wanted / 1e9:.2f} GB for "
                f"checkpoints of {size / 1e9:.2f} GB: make room, or keep fewer"
            )

    # --- writing ------------------------------------------------------------------------------------------

    def save(self, state: Mapping[str, Tensor], facts: Mapping[str, Any], *, score: float | None = None) -> Path:
        """Write a checkpoint, and remove those that need not be kept.

        Args:
            state: Tensors by name, the same names on every rank; shards where a rank holds no more.
            facts: What JSON can hold, ``step`` among it.
            score: Smaller is better; the checkpoint with the smallest is kept.

        Raises:
            OSError, RuntimeError: It could not be written, on whatever rank. Those before it are as they were.
        """
        target = self.folder / f"step-{facts['step']:09d}"
        part = target.with_name(f".{target.name}.part")
        place = self.workplace
        place.together("checkpoint", lambda: _make_empty(part) if place.leads else None)
        try:
            # DCP's own errors are on all ranks at once
            place.together("checkpoint", lambda: self._write(state, part))
            sums = place.together("checkpoint", lambda: _sums(p for p in part.iterdir() if self._is_mine(p)))
            sums = {name: digest for of_rank in place.gather(sums) for name, digest in of_rank.items()}
            record = {"format": _FORMAT, "score": score, "files": sums, "facts": dict(facts)}
            place.together("checkpoint", lambda: self._finish(part, target, record) if place.leads else None)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return target

    def _write(self, state: Mapping[str, Tensor], part: Path) -> None:
        try:
            with warnings.catch_warnings():
                # it tells of its own deprecations
                warnings.simplefilter("ignore")
                writer = FileSystemWriter(part, sync_files=True)
                dcp.save(dict(state), storage_writer=writer, process_group=self.workplace.group, no_dist=self._alone)
        except dcp.api.CheckpointException as error:
            causes = ", ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
            raise OSError(f"checkpoint: {part.name} could not be written: {causes}") from error

    def _finish(self, part: Path, target: Path, record: Mapping[str, Any]) -> None:
        write_atomically(part / _RECORD, lambda file: file.write(json.dumps(record, indent=1).encode()))
        sync_folder(part)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            target.replace(old)
        part.replace(target)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        scored = {p: score for p in self.list() if (score := _record(p)["score"]) is not None}
        kept = {*self.list()[: self.keep], *([min(scored, key=scored.__getitem__)] if scored else [])}
        for path in set(self.list()) - kept:
            shutil.rmtree(path, ignore_errors=True)

    def _is_mine(self, path: Path) -> bool:
        if path.name.startswith("__"):
            return path.name.startswith(f"__{self.workplace.rank}_")
        return self.workplace.leads

    @property
    def _alone(self) -> bool:
        return self.workplace.group is None

    # --- reading ------------------------------------------------------------------------------------------

    def load_last(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Copy the last checkpoint that is whole into ``state``; return its facts, or None where there is none.

        One that is damaged is passed over, with a warning.

        Raises:
            CheckpointError: It is a checkpoint of another model.
        """
        for path in self.workplace.gather(self.list())[0]:
            problem = self.damage(path)
            if problem is None:
                return self.load(path, state)
            warnings.warn(f"{path} is damaged and passed over: {problem}", stacklevel=2)
        return None

    def load(self, path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Copy a checkpoint into the tensors of ``state``, on as many ranks as there are now; return its facts.

        Raises:
            FileNotFoundError: There is none.
            CheckpointError: It is damaged, or of another model.
        """
        if not (path / _RECORD).is_file():
            raise FileNotFoundError(f"checkpoint: got {path}, expected a folder with {_RECORD}")
        problem = self.damage(path)
        if problem is not None:
            raise CheckpointError(f"{path} is damaged: {problem}")

        def read() -> None:
            reader = ContentsReader(path)
            _compare(reader.read_metadata().state_dict_metadata, state, path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(
                    dict(state),
                    storage_reader=reader,
                    planner=TensorsOnly(),
                    process_group=self.workplace.group,
                    no_dist=self._alone,
                )

        self.workplace.together("checkpoint", read)
        return _record(path)["facts"]

    def damage(self, path: Path) -> str | None:
        """Return what is wrong with a checkpoint's files; each rank looks at its share of them."""
        problem = None
        try:
            sums = sorted(_record(path)["files"].items())
            for name, digest in sums[self.workplace.rank :: self.workplace.world_size]:
                if not (path / name).is_file():
                    problem = f"{name} is missing"
                elif _sums([path / name])[name] != digest:
                    problem = f"{name} is not what was written"
        except (OSError, CheckpointError) as error:
            problem = str(error)
        return next((p for p in self.workplace.gather(problem) if p is not None), None)


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts that a checkpoint was written with.

    Raises:
        CheckpointError: It has none that can be read.
    """
    return _record(path)["facts"]


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / _RECORD}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CheckpointError(f"{path / _RECORD}: got no {_FORMAT!r}, expected what clipfast wrote as a checkpoint")
    return record


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sums(paths: Any) -> dict[str, str]:
    sums = {}
    for path in paths:
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest() if _HAS_DIGEST else _digest(file)
    return sums


_HAS_DIGEST = hasattr(hashlib, "file_digest")


def _digest(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _compare(saved: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if name not in saved:
            raise CheckpointError(f"{path}: got no {name}, expected a checkpoint of this model and these settings")
        if tuple(saved[name].size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: got {name} of shape {tuple(saved[name].size)}, expected {tuple(tensor.shape)}"
            )
        if saved[name].properties.dtype != tensor.dtype:
            raise CheckpointError(f"{path}: got {name} in {saved[name].properties.dtype}, expected {tensor.dtype}")
    if more := sorted(saved.keys() - state.keys()):
        raise CheckpointError(f"{path}: got {more[0]}, expected a checkpoint of this model and these settings")
