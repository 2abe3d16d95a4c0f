"""The tuned file: what is used of it, what is not and why, and that nobody tears it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import clipfast
from clipfast.ops import identity, plan, tuned

CPU = torch.device("cpu")
# the rule takes torch for it, which every CPU has
KEY = "float32, head_dim 8, ≤ 64 tokens, inference"
OTHER = tuned.Choice("reference", "torch", 1.5, 21, "50% faster in 21 rounds")
SAME = tuned.Choice("torch", "torch", 1.0, 5, "reference: 2% slower")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder that nobody has tuned in."""
    monkeypatch.delenv("CLIPFAST_TUNED", raising=False)
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    plan.reset()
    yield tmp_path / "cache"
    monkeypatch.undo()
    plan.reset()


def explain() -> str:
    plan.reset()
    with torch.no_grad():
        return clipfast.explain("attention", torch.zeros(2, 5, 48), 2)


def is_used() -> bool:
    return explain().startswith("attention: reference")


def edited(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    result = edit(content)
    path.write_text(json.dumps(content if result is None else result), encoding="utf-8")


def test_what_was_written_serves(cache: Path) -> None:
    assert tuned.find(CPU) == (None, tuned.NONE)
    assert not is_used()
    path = tuned.write(CPU, {"attention": {KEY: OTHER, f"{KEY}, autocast": SAME}}, ("ViT-B-32 fp32",))
    found, said = tuned.find(CPU)
    assert path == tuned.path_of(CPU)
    assert found.fastest == {"attention": {KEY: "reference"}}
    assert found.confirmed == {"attention": {f"{KEY}, autocast": "torch"}}
    assert found.models == ("ViT-B-32 fp32",)
    assert found.days == 0
    assert str(path) in said
    assert is_used()
    assert str(path) in explain()
    # what was measured and stays is said too
    tuned.write(CPU, {"attention": {KEY: SAME}})
    assert not is_used()
    assert f"nothing was faster beyond doubt: {path}" in explain()
    path.unlink()
    assert not is_used()


def test_it_is_found_by_the_variable_or_not_at_all(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere" / "mine.json"
    assert tuned.write(CPU, {"attention": {KEY: OTHER}}, path=elsewhere) == elsewhere
    assert not is_used()
    monkeypatch.setenv("CLIPFAST_TUNED", str(elsewhere))
    assert is_used()
    monkeypatch.setenv("CLIPFAST_TUNED", "off")
    assert tuned.find(CPU) == (None, "CLIPFAST_TUNED=off is set")
    assert not is_used()
    monkeypatch.setenv("CLIPFAST_TUNED", str(tmp_path / "nowhere.json"))
    found, why = tuned.find(CPU)
    assert found is None
    assert "nowhere.json (CLIPFAST_TUNED) cannot be read: No such file" in why
    assert not is_used()


def test_the_cache_folder_follows_the_platform(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.path_of(CPU).is_relative_to(tmp_path / "xdg" / "clipfast" / "tuned")


@pytest.mark.parametrize("which", ["torch", "clipfast", "library", "name", "features", "cores", "threads"])
@pytest.mark.parametrize("moved", [False, True])
def test_what_was_measured_elsewhere_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, which: str, moved: bool
) -> None:
    path = tuned.write(CPU, {"attention": {KEY: OTHER}})
    here = identity.of_device(CPU) | identity.of_software("cpu")
    if moved:
        # this process is another one; its own file is not there
        for ask in ("of_device", "of_software"):
            before = getattr(identity, ask)
            monkeypatch.setattr(
                identity, ask, lambda d, f=before: {k: "other" if k == which else v for k, v in f(d).items()}
            )
        expected = f"made for {which} {here[which]}, this is {which} other"
    else:
        edited(path, lambda c: (c["device"] if which in c["device"] else c["versions"]).update({which: "other"}))
        expected = f"made for {which} other, this is {which} {here[which]}"
    found, why = tuned.find(CPU)
    assert found is None
    if which == "name" and moved:
        assert why == tuned.NONE
    else:
        assert expected in why
        assert path.name in why
    assert not is_used()


def test_a_cut_file_is_not_used_wherever_it_ends(cache: Path) -> None:
    path = tuned.write(CPU, {"attention": {KEY: OTHER}})
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        found, why = tuned.find(CPU)
        # without the last line's end it is whole
        assert (found is None) == (length < len(whole) - 1), length
        assert "damaged or cut off" in why, (length, why)
        assert "\n" not in why
        assert len(why) < 400
    assert not is_used()


def damages() -> dict[str, Any]:
    """Return edits of a file's content, each of which makes it none."""

    def choice(content: dict) -> dict:
        return content["choices"]["attention"][KEY]

    return {
        "another format": lambda c: c.update(format=2),
        "true is no format": lambda c: c.update(format=True),
        "no format": lambda c: c.pop("format"),
        "a field too many": lambda c: c.update(more=1),
        "a field too few": lambda c: c.pop("models"),
        "a list": lambda c: [c],
        "a number": lambda c: 7,
        "an unknown op": lambda c: c["choices"].update(conv2d={}),
        "an op's file": lambda c: c["choices"].update({"../attention": {}}),
        "choices as a list": lambda c: c.update(choices=[]),
        "an op's choices as a text": lambda c: c["choices"].update(attention="torch"),
        "an unknown backend": lambda c: choice(c).update(backend="cuda"),
        "a backend of another op": lambda c: choice(c).update(backend="native"),
        "a backend as a list": lambda c: choice(c).update(backend=["torch"]),
        "a backend in an object": lambda c: choice(c).update(backend={"torch": 1}),
        "an unknown rule": lambda c: choice(c).update(rule="os.system"),
        "a choice as a text": lambda c: c["choices"]["attention"].update({KEY: "torch"}),
        "a choice with a field too many": lambda c: choice(c).update(run="rm"),
        "a choice with a field too few": lambda c: choice(c).pop("rule"),
        "a lead of nothing": lambda c: choice(c).update(lead=0),
        "a lead as a text": lambda c: choice(c).update(lead="1.5"),
        "a lead that is no number": lambda c: choice(c).update(lead=float("nan")),
        "an endless lead": lambda c: choice(c).update(lead=float("inf")),
        "half a round": lambda c: choice(c).update(rounds=0.5),
        "minus one round": lambda c: choice(c).update(rounds=-1),
        "words over two lines": lambda c: choice(c).update(why="a\nb"),
        "a terminal's codes": lambda c: choice(c).update(why="\x1b[2J"),
        "a long key": lambda c: c["choices"]["attention"].update({"x" * 1000: choice(c)}),
        "many choices": lambda c: c["choices"]["attention"].update({str(i): choice(c) for i in range(10_001)}),
        "a device as a text": lambda c: c.update(device="cpu"),
        "a version as a number": lambda c: c["versions"].update(torch=2.13),
        "a date that is none": lambda c: c.update(date="yesterday"),
        "a date as a number": lambda c: c.update(date=20261128),
        "models as a text": lambda c: c.update(models="ViT-B-32"),
    }


@pytest.mark.parametrize("name", damages())
def test_a_file_that_says_what_it_should_not_is_refused_whole(cache: Path, name: str) -> None:
    path = tuned.write(CPU, {"attention": {KEY: OTHER, f"{KEY}, autocast": SAME}})
    assert is_used()
    edited(path, damages()[name])
    found, why = tuned.find(CPU)
    assert found is None, name
    assert path.name in why
    assert "\n" not in why
    assert "\x1b" not in why
    assert len(why) < 500
    assert not is_used()
    assert path.name in explain()


def test_random_json_is_never_an_exception(cache: Path) -> None:
    drawn = random.Random(3)
    path = tuned.write(CPU, {"attention": {KEY: OTHER}})
    whole = json.loads(path.read_text(encoding="utf-8"))

    def value(depth: int = 0) -> Any:
        kinds = [None, True, -1, 1e308, 2**70, "", "torch", "é\u2028\x00", KEY]
        if depth < 3 and drawn.random() < 0.5:
            return drawn.choice(
                [[value(depth + 1)], {"backend": value(depth + 1)}, {"attention": {KEY: value(depth + 1)}}, [], {}]
            )
        return drawn.choice(kinds)

    def places(node: Any) -> list[tuple[Any, Any]]:
        found = []
        for key, child in node.items() if isinstance(node, dict) else ():
            found += [(node, key), *places(child)]
        return found

    for _ in range(300):
        content = json.loads(json.dumps(whole))
        holder, key = drawn.choice(places(content))
        before = holder[key]
        holder[key] = value()
        path.write_text(json.dumps(content), encoding="utf-8")
        found, why = tuned.find(CPU)
        assert isinstance(why, str)
        assert found is None or type(holder[key]) in (type(before), int, float), (key, holder[key])


NO_JSON = {
    "empty": b"",
    "null": b"null",
    "another encoding": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
    "a long number": b"9" * 10_000,
    "an empty object": b"{}",
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_refused(cache: Path, content: bytes) -> None:
    path = tuned.write(CPU, {"attention": {KEY: OTHER}})
    path.write_bytes(content)
    found, why = tuned.find(CPU)
    assert found is None
    assert len(why) < 400
    assert not is_used()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "below a file"])
def test_what_is_no_file_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        path.write_text("")
        path = path / "tuned.json"
    monkeypatch.setenv("CLIPFAST_TUNED", str(path))
    found, why = tuned.find(CPU)
    assert found is None
    assert str(path) in why


def test_a_file_that_would_fill_the_memory_is_refused(cache: Path) -> None:
    path = tuned.write(CPU, {"attention": {KEY: OTHER}})
    with path.open("ab") as file:
        file.write(b" " * (4 * 2**20))
    assert tuned.find(CPU) == (None, f"{path}: it has more than {4 * 2**20} bytes")
    assert not is_used()


def test_writing_keeps_what_is_there_for_other_calls(cache: Path) -> None:
    tuned.write(CPU, {"attention": {KEY: OTHER, "another": SAME}}, ("ViT-B-32 fp32",))
    tuned.write(CPU, {"attention": {KEY: SAME}, "encoder": {"k": tuned.Choice("torch", "native")}}, ("ViT-L-14 fp32",))
    found, _ = tuned.find(CPU)
    assert found.models == ("ViT-B-32 fp32", "ViT-L-14 fp32")
    assert found.fastest == {"encoder": {"k": "torch"}}
    assert found.confirmed == {"attention": {KEY: "torch", "another": "torch"}}


def test_a_damaged_file_is_replaced_in_the_cache_and_another_kind_of_file_is_not(cache: Path, tmp_path: Path) -> None:
    path = tuned.write(CPU, {"attention": {KEY: OTHER}})
    path.write_bytes(path.read_bytes()[:100])
    tuned.write(CPU, {"attention": {KEY: OTHER}})
    assert is_used()
    precious = tmp_path / "config.json"
    precious.write_text('{"learning_rate": 1}')
    with pytest.raises(ValueError, match=r"config\.json is there and is no tuned file"):
        tuned.write(CPU, {"attention": {KEY: OTHER}}, path=precious)
    assert precious.read_text() == '{"learning_rate": 1}'


@pytest.mark.parametrize("folder", ["below a file", "/proc"])
def test_a_folder_that_cannot_be_written_to_is_an_os_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "file").write_text("")
    # /proc takes nothing, not even from root
    monkeypatch.setenv("CLIPFAST_CACHE", "/proc/clipfast" if folder == "/proc" else str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="clipfast|file"):
        tuned.write(CPU, {"attention": {KEY: OTHER}})
    assert tuned.find(CPU)[0] is None
    assert not is_used()


def test_a_writer_that_fails_leaves_what_was_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned.write(CPU, {"attention": {KEY: OTHER}})
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipfast.files.os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        tuned.write(CPU, {"attention": {"another": OTHER}})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


WRITER = """
import sys
import torch
import clipfast.ops
from clipfast.ops import tuned
torch.set_num_threads({threads})
print("ready", flush=True)
for i in range(10):
    tuned.write(torch.device("cpu"), {{"attention": {{f"{{sys.argv[1]}} {{i}}": tuned.Choice("reference", "torch")}}}})
"""


def test_two_processes_keep_what_the_other_writes_and_never_tear_the_file(cache: Path) -> None:
    code = WRITER.format(threads=torch.get_num_threads())
    path, torn, done = tuned.path_of(CPU), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if path.exists():
                try:
                    tuned.read(path, CPU)
                except ValueError as error:
                    torn.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with subprocess.Popen([sys.executable, "-c", code, "a"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        for i in range(10):
            tuned.write(CPU, {"attention": {f"b {i}": tuned.Choice("reference", "torch")}})
    done.set()
    watcher.join()
    assert other.returncode == 0
    assert not torn
    found, why = tuned.find(CPU)
    assert found is not None, why
    assert set(found.fastest["attention"]) == {f"{name} {i}" for name in "ab" for i in range(10)}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_importing_reads_nothing(cache: Path) -> None:
    code = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import clipfast, clipfast.ops, torch\n"
        "assert not [p for p in opened if 'tuned' in p and p.endswith('.json')], opened\n"
        "clipfast.ops.attention(torch.zeros(2, 5, 48), 2)\n"
    )
    tuned.write(CPU, {"attention": {KEY: OTHER}})
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_choices_hold_for_a_while(cache: Path) -> None:
    with tuned.instead({"attention": {KEY: OTHER}}, "what is tried"):
        assert is_used()
        with tuned.instead({}, "nothing"):
            assert not is_used()
        assert is_used()
    assert not is_used()
