"""What tuning found, for others with the same card: a record for benchmarks/results/ and an entry for measured.py.

A record is JSON: the device, the versions, and for every shape class who was timed, how long a call took and who won.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipfast.benchmark.machine import commit_name, folder_name
from clipfast.files import write_atomically
from clipfast.ops import dispatch, identity
from clipfast.ops.measured import Measurements
from clipfast.tuning.run import Report

FORMAT = 1
KIND = "clipfast tune"
_TEXTS = ("commit", "date")
_FIELDS = {"format", "kind", "commit", "date", "device", "versions", "models", "lines"}
_LINE = {"op", "shape_class", "backend", "rule", "lead", "rounds", "why", "seconds", "sources"}


def record_of(report: Report, date: str) -> dict[str, Any]:
    """Return what a report holds, for a file.

    Args:
        report: Of :func:`clipfast.tune`.
        date: ``YYYY-MM-DD``.
    """
    lines = [
        {"op": line.op, "shape_class": line.key, **asdict(line.verdict)}
        | {"lead": round(line.verdict.lead, 4), "sources": list(line.sources)}
        | {"seconds": {name: float(f"{s:.4g}") for name, s in line.seconds.items()}}
        for line in report.lines
    ]
    return {
        "format": FORMAT,
        "kind": KIND,
        "commit": commit_name(Path(__file__).parents[2] / "benchmarks"),
        "date": date,
        "device": identity.of_device(report.device),
        "versions": identity.of_software(report.device.type),
        "models": list(report.models),
        "lines": lines,
    }


def path_of(record: Mapping[str, Any]) -> Path:
    """Return where a record belongs below ``benchmarks/results/``."""
    return Path(folder_name(record["device"]["name"])) / "tuned" / f"{record['commit']}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: It is none, or says what it should not; the message names the place.
        OSError: It cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _check(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected a record of clipfast tune, got one that is not: {error}") from error
    return record


def fastest_of(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the backends that are to serve in the place of the rule's, by op and shape class."""
    found: dict[str, dict[str, str]] = {}
    for line in record["lines"]:
        if line["backend"] != line["rule"]:
            found.setdefault(line["op"], {})[line["shape_class"]] = line["backend"]
    return found


def entry_of(record: Mapping[str, Any]) -> str | None:
    """Return a card's entry for ``clipfast/ops/measured.py`` as source, or None for a CPU.

    A card's name says what it is. A CPU's does not: its threads decide, and what a virtual machine shows of it.
    """
    if record["device"]["type"] != "cuda":
        return None
    versions = record["versions"]
    lines = [f"CARDS[{record['device']['name']!r}] = Measurements("]
    lines += [f"    {name}={value!r}," for name, value in zip(("torch", "triton"), _of(versions), strict=True)]
    lines += [f"    commit={record['commit']!r},", "    fastest={"]
    for op, of_op in fastest_of(record).items():
        lines.append(f"        {op!r}: {{")
        lines += [f"            {key!r}: {backend!r}," for key, backend in of_op.items()]
        lines.append("        },")
    return "\n".join([*lines, "    },", ")"])


def _of(versions: Mapping[str, str]) -> tuple[str, str]:
    return versions["torch"], versions.get("triton", "none")


def _check(record: Any) -> None:
    if not isinstance(record, dict) or record.get("kind") != KIND or record.get("format") != FORMAT:
        raise ValueError(f"expected kind {KIND!r} and format {FORMAT}")
    if record.keys() != _FIELDS:
        raise ValueError(f"fields: {', '.join(sorted(record.keys() ^ _FIELDS))}")
    for name in _TEXTS:
        _expect(isinstance(record[name], str) and record[name], name, record[name])
    for name, needed in (("device", {"type", "name"}), ("versions", {"clipfast", "torch"})):
        texts = all(isinstance(v, str) and v for v in record[name].values())
        _expect(record[name].keys() >= needed and texts, name, record[name])
    models = record["models"]
    _expect(isinstance(models, list) and models and all(isinstance(m, str) for m in models), "models", models)
    _expect(isinstance(record["lines"], list) and record["lines"], "lines", record["lines"])
    seen = set()
    for line in record["lines"]:
        if line.keys() != _LINE:
            raise ValueError(f"fields of a line: {', '.join(sorted(line.keys() ^ _LINE))}")
        _check_line(line)
        _expect((line["op"], line["shape_class"]) not in seen, "a line of its own for", line["shape_class"])
        seen.add((line["op"], line["shape_class"]))


def _check_line(line: Mapping[str, Any]) -> None:
    known = dispatch.plannable(line["op"]) if line["op"] in dispatch.operations() else ()
    for name in ("backend", "rule"):
        _expect(line[name] in known, f"{line['op']}.{name}", line[name])
    _expect(isinstance(line["shape_class"], str) and line["shape_class"], "shape_class", line["shape_class"])
    _expect(type(line["lead"]) in (float, int) and 0 < line["lead"] < math.inf, "lead", line["lead"])
    # who leads was timed; but for one who stands in for what computes wrong results
    if line["backend"] != line["rule"] and line["rule"] in line["seconds"]:
        _expect(line["lead"] >= 1, "lead", line["lead"])
        _expect(line["backend"] in line["seconds"], "seconds", line["seconds"])
    _expect(type(line["rounds"]) is int and line["rounds"] >= 0, "rounds", line["rounds"])
    for name, seconds in line["seconds"].items():
        _expect(name in dispatch.backends(line["op"]), "seconds", name)
        _expect(type(seconds) in (float, int) and 0 < seconds < math.inf, "seconds", seconds)
    _expect(isinstance(line["sources"], list) and all(isinstance(s, str) for s in line["sources"]), "sources", line)
    _expect(isinstance(line["why"], str), "why", line["why"])


def check_entry(card: str, entry: Measurements) -> None:
    """Raise a ValueError where an entry of ``measured.CARDS`` is none that can serve."""
    _expect(isinstance(card, str) and card, "card", card)
    for name in ("torch", "triton", "commit"):
        _expect(isinstance(getattr(entry, name), str) and getattr(entry, name), f"{card}: {name}", getattr(entry, name))
    _expect(isinstance(entry.fastest, dict), f"{card}: fastest", entry.fastest)
    for op, of_op in entry.fastest.items():
        _expect(op in dispatch.operations(), f"{card}: op", op)
        for key, backend in of_op.items():
            _expect(isinstance(key, str) and key, f"{card}: {op}: shape class", key)
            _expect(backend in dispatch.plannable(op), f"{card}: {op}: {key}", backend)


def _expect(fact: object, name: str, value: object) -> None:
    if not fact:
        raise ValueError(f"{name}: got {str(value)[:80]!r}")
