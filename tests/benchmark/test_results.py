"""The file of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from clipfast.benchmark.limits import best_of, limit_seconds
from clipfast.benchmark.machine import commit_name, details, folder_name, machine_name
from clipfast.benchmark.results import Limits, Row, Run, Side, read_run, read_runs, write_run


def make_run() -> Run:
    side = Side([0.123456789, 0.2, 0.4], [0.1, 0.1, 0.1], 100, None, 1e-7)
    other = Side([0.246913578, 0.3, 0.2], [0.1, 0.1, 0.1])
    row = Row(
        "attention", "a row", "a", "forward", "float32", "images", 4, 8e12, 4e9, 1.0, "s", "batch", 4, {"time": 2},
        {"clipfast": side, "PyTorch": other}, {"Liger": "not installed"}, {"backward": False},
    )  # fmt: skip
    limits = Limits(2.0, {"float32": 4.0})
    return Run("A CPU", "cpu", {"threads": "2"}, "abc", "2026-01-02", "short", True, limits, [row])


def test_a_run_comes_back(tmp_path):
    path = tmp_path / "folder" / "run.json"
    write_run(path, make_run())
    run = read_run(path)
    assert run.rows[0].sides["clipfast"].device_s == [0.123457, 0.2, 0.4]  # six digits
    run.rows[0].sides["clipfast"].device_s[0] = 0.123456789
    run.rows[0].sides["PyTorch"].device_s[0] = 0.246913578
    assert run == make_run()
    write_run(tmp_path / "again.json", make_run())
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "rows": [{"sides": 3}]}', "null"]
)
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="run.json: expected a file of a benchmark run, got one that is not"):
        read_run(path)


def test_a_run_with_more_than_this_format_knows_is_refused(tmp_path):
    path = tmp_path / "run.json"
    write_run(path, make_run())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 1}))
    with pytest.raises(ValueError, match="more"):
        read_run(path)


def test_figures_that_are_none_are_not_written(tmp_path):
    run = make_run()
    run.rows[0].sides["clipfast"].device_s[0] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_run(tmp_path / "run.json", run)
    assert not list(tmp_path.iterdir())


def test_ratios_are_of_the_same_round():
    row = make_run().rows[0]
    assert row.ratio("PyTorch") == pytest.approx(1.5)  # of 2, 1.5 and a half
    assert row.sides["clipfast"].seconds == 0.2
    assert row.rivals == ["PyTorch"]


def test_the_limit_is_the_slower_of_the_two():
    row = make_run().rows[0]
    assert limit_seconds(row, Limits(2.0, {"float32": 4.0})) == pytest.approx(2.0)  # 8 over 4, and 4 over 2
    assert limit_seconds(row, Limits(1.0, {"float32": 4.0})) == pytest.approx(4.0)
    assert limit_seconds(row, Limits(2.0, {"float32": 1.0})) == pytest.approx(8.0)
    assert limit_seconds(row, Limits(2.0, {"bfloat16": 1.0})) == pytest.approx(2.0)
    best = best_of(Limits(2.0, {"float32": 4.0}), Limits(3.0, {"float32": 1.0}))
    assert best == Limits(3.0, {"float32": 4.0})


def test_names(tmp_path, monkeypatch):
    assert folder_name("NVIDIA H100 80GB HBM3") == "NVIDIA-H100-80GB-HBM3"
    assert folder_name("???") == "machine"
    assert machine_name("cpu")
    assert details("cpu")["threads"].isdigit()
    monkeypatch.delenv("CLIPFAST_COMMIT", raising=False)
    assert commit_name(tmp_path).startswith("v")  # no repository: the version
    monkeypatch.setenv("CLIPFAST_COMMIT", "0123456789")
    assert commit_name(tmp_path) == "0123456789"


def test_a_folder_of_runs(tmp_path):
    for name, commit in (("b.json", "second"), ("a.json", "first")):
        write_run(tmp_path / name, replace(make_run(), commit=commit))
    (tmp_path / "notes.txt").write_text("not a run")
    assert [run.commit for run in read_runs(tmp_path)] == ["first", "second"]
    assert [run.commit for run in read_runs(tmp_path / "b.json")] == ["second"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="expected a folder with files of benchmark runs"):
        read_runs(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="absent.json"):
        read_runs(tmp_path / "absent.json")
