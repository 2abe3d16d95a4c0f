"""Hard texts and names through the commands: brackets, quotes, separators of lines, surrogates, other encodings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import small
from typer.testing import CliRunner

from clipfast.cli import app

NAMES = ["[bold]a[/bold] {1}", "[/]::[red", "$x_$ 猫 :smile: caf\udce9"]
CAPTIONS = ['"a quote', "[bold]a cat[/bold]", "[/]", "a\u2028b", "x\x85y", "a :smile: b", "\x1b[31mred", '12" disk']


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small.run(tmp_path / "run")
    return tmp_path


def run(*arguments: object, charset: str = "utf-8"):
    done = CliRunner(charset=charset).invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def write_pairs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(CAPTIONS):
        small.picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_bytes(caption.encode())


@pytest.mark.skipif(os.name != "posix", reason="such names are POSIX's alone")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name(here, name):
    write_pairs(here / name)
    done = run("eval", "run", "--data", name, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"] == {"pictures": 8, "texts": 8}
    done = run("embed", "run", name, f"{name}.npy")
    assert done.exit_code == 0, done.output
    shown = name.replace("\udce9", "\\udce9")
    assert done.stdout == f"wrote {shown}.npy: 8 rows\n"
    assert run("shards", name, f"{name}.shards").stdout.startswith(f"wrote 1 of 1 shards to {shown}.shards: 8 pairs")
    again = run("eval", "run", "--data", f"{name}.shards/00000.tar", "--json")
    assert json.loads(again.stdout)["counts"] == {"pictures": 8, "texts": 8}


def test_training_says_what_it_is_given(here):
    write_pairs(here / "[b]data")
    done = run(
        "train", "--data", "[b]data", "--model", "run/model.json", "--output", "[bold]out[/]", "--steps", "1",
        "--batch-size", "4", "--workers", "0", "--device", "cpu", "--no-tensorboard",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "model: [bold]out[/]/model.safetensors" in done.stdout


@pytest.mark.parametrize(("text", "word"), [(b"\xef\xbb\xbfsteps = 0", None), (b"data = 'caf\xe9'", "not TOML")])
def test_a_configuration_with_a_mark_or_in_another_encoding(here, text, word):
    (here / "c.toml").write_bytes(text)
    expected = f"c.toml: {word}" if word else "data: got none"
    assert f"error: {expected}" in run("train", "--config", "c.toml").stderr
    (here / "m.json").write_bytes(text)
    done = run("train", "--data", "x", "--steps", "1", "--model", "m.json")
    assert "m.json" in done.stderr or "data: got x" in done.stderr
    done = run("eval", "m.json", "--weights", "run/model.safetensors", "--data", "x")
    assert "error: " in done.stderr
    assert "m.json" in done.stderr


@pytest.mark.parametrize("query", ["[bold]a cat[/bold]", "[/] :smile: [link=x]"])
def test_queries_and_names_are_shown_as_they_are(here, query):
    (here / "t.txt").write_bytes("\n".join([query, *CAPTIONS]).encode())
    run("embed", "run", "t.txt", "t.parquet", "--kind", "text")
    done = run("search", "t.parquet", query, "-k", "9")
    assert done.stdout.count(query) >= 2  # the title, and the row that is the query
    for caption in ("[bold]a cat[/bold]", "[/]", "a :smile: b", '"a quote', "\\x1b[31mred"):
        assert caption in done.stdout
    hits = json.loads(run("search", "t.parquet", query, "--json", "-k", "9").stdout)["hits"]
    assert sorted(hit["row"] for hit in hits) == list(range(9))
    assert {hit["name"] for hit in hits} == {query, *CAPTIONS}


@pytest.mark.parametrize("charset", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_that_cannot_show_a_character(here, charset):
    (here / "猫").mkdir()
    for i in range(4):
        small.picture(i).save(here / "猫" / f"→{i}.png")
    (here / "猫" / "→9.png").write_bytes(b"bad")
    done = run("embed", "run", "猫", "猫.npy", charset=charset)
    assert done.exit_code == 0, done.output
    cat = "猫" if charset == "utf-8" else "\\u732b"
    assert done.stdout == f"wrote {cat}.npy: 4 rows\n"
    assert f"{'→' if charset == 'utf-8' else '->'}9.png: ImageError" in done.stderr
    done = run("search", "猫.npy", "a 猫 …", charset=charset)
    assert f"a {cat} " in done.stdout
    assert ("┏" in done.stdout) == (charset == "utf-8")
    done = run("eval", "run", "--data", "猫猫", charset=charset)
    assert f"error: data: got {cat * 2}, expected" in done.stderr
    assert run("--help", charset=charset).exit_code == 0


def test_tables_whose_captions_begin_with_quotes(here):
    write_pairs(here / "p")
    rows = "".join(f"p/{i}.png\t{caption}\n" for i, caption in enumerate(CAPTIONS))
    (here / "t.tsv").write_bytes(("filepath\ttitle\n" + rows).encode())
    done = run("eval", "run", "--data", "t.tsv", "--json")
    assert json.loads(done.stdout)["counts"] == {"pictures": 8, "texts": 8}
    (here / "t.csv").write_bytes(("filepath,title\n" + rows.replace("\t", ",")).encode())
    for command in (
        ("eval", "run", "--data", "t.csv"),
        ("embed", "run", "t.csv", "f.npy"),
        ("shards", "t.csv", "s"),
        ("train", "--data", "t.csv", "--steps", "1", "--model", "run/model.json"),
    ):
        done = run(*command)
        assert done.exit_code != 0
        assert "t.csv: got no row in lines 2 to 9" in done.stderr, done.output
    done = run("eval", "run", "--data", "t.csv", "--json", "--no-quotes")
    assert json.loads(done.stdout)["counts"] == {"pictures": 8, "texts": 8}


@pytest.mark.parametrize(("encoding", "words"), [("latin-1", "got 0xe9 at byte"), ("utf-16", "at byte 0")])
def test_other_encodings_through_every_command(here, encoding, words):
    write_pairs(here / "p")
    (here / "t.csv").write_bytes("filepath,title\np/0.png,café\np/1.png,crème\np/2.png,x\np/3.png,y\n".encode(encoding))
    (here / "list.txt").write_bytes("café\ncrème\n".encode(encoding))
    (here / "names.txt").write_bytes("café\ncrème\n".encode(encoding))
    for i in range(4):
        (here / "classes" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        small.picture(i).save(here / "classes" / f"c{i % 2}" / f"{i}.png")
    training = ("train", "--data", "t.csv", "--steps", "1", "--model", "run/model.json", "--workers", "0")
    training += ("--batch-size", "4", "--device", "cpu", "--no-tensorboard")
    for number, command in enumerate(
        [
            ("eval", "run", "--data", "t.csv"),
            ("eval", "run", "--data", "classes", "--classes", "names.txt"),
            ("embed", "run", "list.txt", "f.npy", "--kind", "text"),
            ("embed", "run", "t.csv", "g.npy"),
            ("shards", "t.csv", "s"),
            training,
        ]
    ):
        done = run(*command)
        assert done.exit_code != 0, command
        assert words in done.stderr, (command, done.output)
        assert "--encoding" in done.stderr
        assert run(*command, "--encoding", encoding).exit_code == 0, (number, command)
    names = (here / "f.npy.names.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)[1] for line in names] == ["café", "crème"]
    done = run("eval", "run", "--data", "t.csv", "--encoding", "klingon")
    assert "encoding: got 'klingon', expected one that Python knows" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_and_other_kinds_through_every_command(here):
    """Six pictures of six kinds, three of them behind a link; a circle, a picture that is none, and other files."""
    for i, name in enumerate(["p/0.jfif", "p/1.JP2", "p/2.ppm", "far/3.tiff", "far/4.PNG", "far/5.jpe"]):
        (here / name).parent.mkdir(exist_ok=True)
        kind = {".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".tiff": "TIFF", ".ppm": "PPM", ".png": "PNG"}
        small.picture(i).save(here / name, kind[Path(name).suffix.lower()])
        (here / name).with_suffix(".txt").write_text(f"picture {i}")
    (here / "p" / "link").symlink_to(here / "far")
    (here / "p" / "circle").symlink_to(here / "p")
    for name in ("a.heic", "b.heic", "c.mp4"):
        (here / "p" / name).write_bytes(b"x")
    (here / "far" / "bad.png").write_bytes(b"x")
    (here / "far" / "bad.txt").write_text("bad")
    words = "3 files of other kinds (2 .heic, 1 .mp4); 1 links that lead in a circle (circle)"
    done = run("eval", "run", "--data", "p", "--json")
    assert json.loads(done.stdout)["counts"] == {"pictures": 6, "texts": 6}
    assert list(json.loads(done.stdout)["skipped"]) == ["p/link/bad.png"]
    assert words in done.stderr
    done = run("embed", "run", "p", "f.parquet")
    assert done.stdout == "wrote f.parquet: 6 rows\n"
    assert "link/bad.png: ImageError" in done.stderr
    assert "error: data: got nowhere, expected" in run("shards", "nowhere", "s").stderr
    done = run("shards", "p", "s")
    assert done.stdout == "wrote 1 of 1 shards to s: 6 pairs\n"
    training = ("--model", "run/model.json", "--steps", "3", "--batch-size", "6", "--workers", "0", "--no-tensorboard")
    done = run("train", "--data", "p", "--output", "out", "--device", "cpu", *training)
    assert done.exit_code == 0, done.output
    assert "pairs: 7," in done.stdout
    assert "bad.png" in (here / "out" / "skipped-0.jsonl").read_text()
    # and classes
    (here / "classes").mkdir()
    for name in ("one", "two"):
        (here / "classes" / name).symlink_to(here / "p")
    done = run("eval", "run", "--data", "classes", "--task", "zero-shot", "--json")
    assert json.loads(done.stdout)["counts"] == {"pictures": 12, "classes": 2}
    assert "6 files of other kinds (4 .heic, 2 .mp4); 2 links that lead in a circle" in done.stderr


def test_deep_grey_and_orientation_are_settings(here):
    from PIL import Image

    (here / "p").mkdir()
    pixels = np.asarray(small.picture(0, (40, 20)).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(here / "p" / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(here / "p" / "16.png")
    Image.fromarray(pixels).save(here / "p" / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(here / "p" / "upright.png")
    features = {}
    for name, flags in (("usual", ()), ("open_clip", ("--as-open-clip",)), ("exif", ("--apply-orientation",))):
        done = run("embed", "run", "p", f"{name}.npy", *flags)
        assert done.exit_code == 0, done.output
        deep, shallow, turned, upright = np.load(f"{name}.npy")
        features[name] = deep
        assert np.allclose(deep, shallow, atol=1e-6) == (name != "open_clip")
        assert np.allclose(turned, upright, atol=1e-6) == (name == "exif")
        assert np.allclose(turned, shallow, atol=1e-6) == (name != "exif")
    # features of other settings are not taken for these
    done = run("embed", "run", "p", "usual.npy", "--as-open-clip")
    assert "of another run (as_open_clip differ)" in done.stderr
    done = run("embed", "run", "p", "open_clip.npy")
    assert "of another run (as_open_clip differ)" in done.stderr
    # a query is read as the file's pictures were
    for name in ("usual", "open_clip"):
        hits = json.loads(run("search", f"{name}.npy", "--image", "p/16.png", "--json").stdout)["hits"]
        assert (hits[0]["cosine"], hits[0]["row"]) == (pytest.approx(1, abs=1e-6), 0)
