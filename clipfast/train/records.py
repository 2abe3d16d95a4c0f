"""What a run writes down: a JSON line for every step, TensorBoard's logs, and the pairs that were skipped."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipfast.data.batches import Batch
from clipfast.extras import remedy
from clipfast.files import write_atomically
from clipfast.train.config import RunConfig
from clipfast.train.engine import StepRecord
from clipfast.train.paths import start_from


class JsonLog:
    """A file with one JSON object a line, which a run that goes on continues where it goes on.

    Args:
        path: The file; folders on the way are made.
        step: The step that the run goes on from: lines of later steps, and one that a killed process left half
            written, are removed.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step] if path.exists() else []
        write_atomically(path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line, at once."""
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            if "step" in json.loads(line):
                yield line
        except (ValueError, TypeError):
            continue


class TensorBoardLog:
    """TensorBoard's event files.

    Args:
        folder: Where to.
        step: The step that the run goes on from: events of later ones are hidden.

    Raises:
        ImportError: ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """Write the numbers of one step."""
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def open_logs(folder: Path, config: RunConfig, step: int) -> list[JsonLog | TensorBoardLog]:
    """Write a run's settings into its folder, and open its logs from a step on.

    Args:
        folder: Of the run; made if it is missing.
        config: The settings; ``tensorboard`` asks for TensorBoard's log, which is left out, with a warning, where
            TensorBoard is not installed.
        step: The step that the run goes on from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # whoever reads them does not know the folder that the run was started in
    settings = start_from(asdict(config), Path.cwd())
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    logs: list[JsonLog | TensorBoardLog] = [JsonLog(folder / "log.jsonl", step)]
    if config.tensorboard:
        try:
            logs.append(TensorBoardLog(folder / "tensorboard", step))
        except ImportError as error:
            warnings.warn(f"no logs for TensorBoard: {error}: {remedy('tensorboard')}", stacklevel=2)
    return logs


class SkippedLog:
    """Writes down which pairs could not be used, and why, as batches go by.

    Args:
        path: A file of this rank; it is made when the first pair is skipped, and an old one is continued.
        most: Lines that are written at most; what comes after is counted alone.
    """

    def __init__(self, path: Path, *, most: int = 100_000) -> None:
        self.path, self.most = path, most
        self.count = 0

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on."""
        for batch in batches:
            if batch.skipped and self.count < self.most:
                with self.path.open("a", encoding="utf-8") as file:
                    for key, reason in batch.skipped:
                        file.write(json.dumps({"pair": key, "reason": reason}) + "\n")
            self.count += len(batch.skipped)
            yield batch


def step_values(record: StepRecord) -> dict[str, float | int]:
    """Return a step's record as numbers by name."""
    return record.to_dict()
