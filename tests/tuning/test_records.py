"""What a pull request with somebody's card brings: every record in the tree is one, and every entry can serve."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipfast.benchmark.machine import folder_name
from clipfast.benchmark.results import read_run
from clipfast.ops import measured, tuned
from clipfast.ops.measured import Measurements
from clipfast.tuning import records
from clipfast.tuning.decide import Verdict
from clipfast.tuning.run import Line, Report

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def check_tree(results: Path, cards: dict[str, Measurements]) -> int:
    """Raise a ValueError for what is wrong with a record in a folder, or with an entry; return how many are right."""
    found: dict[tuple[str, str], dict] = {}
    count = 0
    for path in sorted(results.rglob("*")):
        if path.is_dir():
            continue
        if path.suffix != ".json":
            raise ValueError(f"{path}: expected a .json file")
        if path.parent.name == "tuned":
            record = records.read_record(path)
            if path != results / records.path_of(record):
                raise ValueError(f"{path}: expected it at {records.path_of(record)}")
            found[record["device"]["name"], record["commit"]] = records.fastest_of(record)
        else:
            run = read_run(path)
            if path.parent.name != folder_name(run.machine):
                raise ValueError(f"{path}: expected it in {folder_name(run.machine)}")
        count += 1
    for card, entry in cards.items():
        records.check_entry(card, entry)
        if found.get((card, entry.commit)) != entry.fastest:
            raise ValueError(f"CARDS[{card!r}]: expected a record of {entry.commit} with the same choices")
    return count


def test_every_record_and_entry_in_the_tree() -> None:
    if not RESULTS.is_dir():
        pytest.skip("not a clone")
    assert check_tree(RESULTS, measured.CARDS) >= 1


def record() -> dict[str, Any]:
    """Return what a card's owner would send."""
    line = {
        "op": "layer_norm",
        "shape_class": "bfloat16, width ≤ 1024, large, training, autocast",
        "backend": "triton",
        "rule": "reference",
        "lead": 1.7,
        "rounds": 21,
        "why": "70% faster in 21 rounds",
        "seconds": {"triton": 1e-4, "reference": 1.7e-4},
        "sources": ["image tower of ViT-B-32, bf16, training, 256 at a time"],
    }
    stays = {**line, "op": "attention", "backend": "torch", "rule": "torch", "lead": 1.0, "seconds": {"torch": 1e-4}}
    return {
        "format": 1,
        "kind": "clipfast tune",
        "commit": "0123456789",
        "date": "2026-11-28",
        "device": {"type": "cuda", "name": "NVIDIA Q1", "capability": "9.0", "multiprocessors": "132"},
        "versions": {"clipfast": "0.1.0", "torch": "2.13.0", "triton": "3.9.0", "driver": "580.1", "kernels": "ab"},
        "models": ["ViT-B-32 bf16"],
        "lines": [line, stays],
    }


def entry() -> Measurements:
    fastest = {"layer_norm": {"bfloat16, width ≤ 1024, large, training, autocast": "triton"}}
    return Measurements("2.13.0", "3.9.0", "0123456789", fastest)


def test_a_shared_entry_is_python_and_fits_its_record(tmp_path: Path) -> None:
    records.write_record(tmp_path / records.path_of(record()), record())
    assert (tmp_path / "NVIDIA-Q1" / "tuned" / "0123456789.json").exists()
    names: dict[str, Any] = {"CARDS": {}, "Measurements": Measurements}
    exec(records.entry_of(record()), names)
    assert names["CARDS"] == {"NVIDIA Q1": entry()}
    assert check_tree(tmp_path, names["CARDS"]) == 1


PLANTED = {
    "another kind": lambda r: r.update(kind="notes"),
    "another format": lambda r: r.update(format=2),
    "no commit": lambda r: r.update(commit=""),
    "no device": lambda r: r.pop("device"),
    "a device without a name": lambda r: r["device"].pop("name"),
    "a version that is no text": lambda r: r["versions"].update(torch=2.13),
    "a field too many": lambda r: r.update(notes="fast"),
    "no models": lambda r: r.update(models=[]),
    "no lines": lambda r: r.update(lines=[]),
    "an unknown op": lambda r: r["lines"][0].update(op="conv2d"),
    "an unknown backend": lambda r: r["lines"][0].update(backend="cuda"),
    "a backend of another op": lambda r: r["lines"][0].update(backend="native"),
    "a winner that was not timed": lambda r: r["lines"][0]["seconds"].pop("triton"),
    "a winner that was slower": lambda r: r["lines"][0].update(lead=0.9),
    "no time": lambda r: r["lines"][0]["seconds"].update(triton=0),
    "a time of no backend": lambda r: r["lines"][0]["seconds"].update(cuda=1),
    "a line twice": lambda r: r["lines"].append(r["lines"][0]),
    "a line too short": lambda r: r["lines"][1].pop("why"),
    "a list": lambda r: [r],
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_record_is_found(tmp_path: Path, name: str) -> None:
    path, bad = tmp_path / records.path_of(record()), record()
    result = PLANTED[name](bad)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result if isinstance(result, list) else bad), encoding="utf-8")
    with pytest.raises(ValueError, match=path.name):
        check_tree(tmp_path, {})


def test_a_planted_file_or_entry_is_found(tmp_path: Path) -> None:
    records.write_record(tmp_path / records.path_of(record()), record())
    for bad in (
        {"NVIDIA Q2": entry()},
        {"NVIDIA Q1": Measurements("2.13.0", "3.9.0", "9876543210", entry().fastest)},
        {"NVIDIA Q1": Measurements("2.13.0", "3.9.0", "0123456789", {})},
        {"NVIDIA Q1": Measurements("2.13.0", "3.9.0", "0123456789", {"layer_norm": {"k": "native"}})},
        {"NVIDIA Q1": Measurements("2.13.0", "", "0123456789", entry().fastest)},
        {"NVIDIA Q1": Measurements("2.13.0", "3.9.0", "0123456789", {"conv2d": {"k": "triton"}})},
    ):
        with pytest.raises(ValueError, match="NVIDIA Q"):
            check_tree(tmp_path, bad)
    elsewhere = tmp_path / "Another-card" / "tuned" / "0123456789.json"
    records.write_record(elsewhere, record())
    with pytest.raises(ValueError, match="expected it at"):
        check_tree(tmp_path, {})
    elsewhere.unlink()
    (tmp_path / "AMD-EPYC").mkdir()
    (tmp_path / "AMD-EPYC" / "abc.json").write_text("{}")
    with pytest.raises(ValueError, match=r"abc\.json"):
        check_tree(tmp_path, {})


def test_a_report_becomes_a_record_that_is_one(tmp_path: Path) -> None:
    verdict = Verdict("torch", "native", 1.21, 21, "21% faster in 21 rounds")
    line = Line("encoder", "float32, width ≤ 1024, inference", verdict, {"torch": 0.1, "native": 0.121}, ("a tower",))
    report = Report(torch.device("cpu"), ("ViT-B-32 fp32",), [line])
    made = records.record_of(report, "2026-11-28")
    path = tmp_path / "record.json"
    records.write_record(path, made)
    assert records.read_record(path) == json.loads(json.dumps(made))
    assert records.fastest_of(made) == {"encoder": {line.key: "torch"}}
    # a CPU's name says too little of it
    assert records.entry_of(made) is None
    assert report.choices() == {"encoder": {line.key: tuned.Choice("torch", "native", 1.21, 21, verdict.why)}}
    assert copy.deepcopy(made)["device"]["type"] == "cpu"
