from __future__ import annotations

import csv
import io
import json

import pytest
import small
import torch
import torch.nn.functional as F
from rich.console import Console

import clipfast
from clipfast.data.model_inputs import picture_loader
from clipfast.data.shards import write_shards
from clipfast.data.sources import open_pairs
from clipfast.evaluate.results import metrics_table, write_evaluation
from clipfast.evaluate.retrieval import retrieval_recall
from clipfast.evaluate.run import Reading, evaluate
from clipfast.evaluate.zero_shot import zero_shot_accuracy, zero_shot_classifier


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("task", "given", "used_by"),
    [
        ("auto", {"train_data": "digits"}, "linear-probe"),
        ("retrieval", {"templates": "photo"}, "zero-shot"),
        ("retrieval", {"c": 1.0}, "linear-probe"),
        ("zero-shot", {"train_data": "digits"}, "linear-probe"),
        ("linear-probe", {"prompts": "p.json"}, "zero-shot"),
    ],
)
def test_what_a_task_does_not_use_is_refused(tmp_path, task, given, used_by):
    small.write_pictures(tmp_path, 2)
    (name,) = given
    with pytest.raises(ValueError, match=f"^{name}: got one for .*, which does not use it; {used_by} does"):
        evaluate(small.model(), tmp_path, task, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "digits"), "model: got NoneType"),
        (("no model", ["digits"]), "data: got list"),
        (("no model", None), "data: got NoneType"),
    ],
)
def test_a_wrong_type_names_the_argument(arguments, message):
    with pytest.raises(TypeError, match=message):
        clipfast.evaluate(*arguments)


def test_retrieval_is_that_of_the_features(tmp_path):
    model = small.model()
    small.write_pictures(tmp_path, 12)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    (tmp_path / "broken.txt").write_text("a thing")
    (tmp_path / "empty.png").write_bytes((tmp_path / "00.png").read_bytes())
    (tmp_path / "empty.txt").write_text(" \n")
    result = evaluate(model, tmp_path, reading=Reading(batch_size=5))
    pictures = [small.picture(i) for i in range(12)]
    images = model.encode_image(torch.stack([picture_loader(model)(p) for p in pictures]))
    captions = [(tmp_path / f"{i:02d}.txt").read_text() for i in range(12)]
    texts = model.encode_text(clipfast.tokenize(captions, 16))
    assert result.task == "retrieval"
    assert result.metrics == pytest.approx(retrieval_recall(images, texts))
    assert result.counts == {"pictures": 12, "texts": 12}
    assert set(result.skipped) == {str(tmp_path / "broken.png"), str(tmp_path / "empty.png")}
    assert "empty caption" in " ".join(result.skipped.values())
    assert "→ text recall@5" in printed(metrics_table(result))


def test_shards_and_folders_give_the_same(tmp_path):
    model = small.model()
    small.write_pictures(tmp_path / "pairs", 7)
    source = open_pairs(tmp_path / "pairs")
    write_shards((source.read(i) for i in range(7)), tmp_path / "shards", shard_size=3)
    assert evaluate(model, tmp_path / "shards").metrics == evaluate(model, tmp_path / "pairs").metrics


def test_a_picture_with_several_captions_is_one_picture(tmp_path):
    model = small.model()
    paths = small.write_pictures(tmp_path, 6)
    rows = [(path.name, f"caption {j} of {path.stem}") for j in range(3) for path in paths]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    result = evaluate(model, tmp_path / "table.csv", reading=Reading(batch_size=4))
    assert result.counts == {"pictures": 6, "texts": 18}
    images = model.encode_image(torch.stack([picture_loader(model)(small.picture(i)) for i in range(6)]))
    texts = model.encode_text(clipfast.tokenize([caption for _, caption in rows], 16))
    expected = retrieval_recall(images, texts, image_of_text=torch.arange(6).repeat(3))
    assert result.metrics == pytest.approx(expected)


@pytest.fixture
def classes(tmp_path):
    for label, name in enumerate(("red_fox", "owl")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(6):
            small.picture(10 * label + index).save(tmp_path / "classes" / name / f"{index}.png")
    return tmp_path / "classes"


def test_zero_shot_is_that_of_the_features(classes):
    model = small.model()
    (classes / "owl" / "broken.png").write_bytes(b"no")
    result = evaluate(model, classes, templates="photo")
    pictures = [small.picture(i) for i in (*range(10, 16), *range(6))]  # owls come first
    images = model.encode_image(torch.stack([picture_loader(model)(p) for p in pictures]))
    tokenizer = clipfast.Tokenizer(16)
    classifier = zero_shot_classifier(model.encode_text, tokenizer, ["owl", "red fox"], ["a photo of a {}."])
    labels = torch.tensor([0] * 6 + [1] * 6)
    assert result.task == "zero-shot"
    assert result.metrics == pytest.approx(zero_shot_accuracy(images, classifier, labels, ks=(1,)))
    assert result.settings == {"templates": ["a photo of a {}."]}
    assert list(result.skipped) == [str(classes / "owl" / "broken.png")]


def test_a_linear_probe_learns_from_half_or_from_other_data(classes):
    model = small.model()
    half = evaluate(model, classes, "linear-probe", c=1.0)
    assert half.counts == {"pictures": 6, "trained_on": 6, "classes": 2}
    other = evaluate(model, classes, "linear-probe", train_data=classes, c=1e4)
    assert other.counts == {"pictures": 12, "trained_on": 12, "classes": 2}
    assert other.metrics["top1"] == 1  # what it was trained on
    assert "C = 1e+04" in printed(metrics_table(other))
    with pytest.raises(ValueError, match="train_data: got the classes zero, one"):
        evaluate(model, classes, "linear-probe", train_data="digits", c=1.0)


def test_results_as_json(classes, tmp_path):
    result = evaluate(small.model(), classes)
    write_evaluation(result, tmp_path / "new" / "r.json", model="m")
    read = json.loads((tmp_path / "new" / "r.json").read_text())
    assert read == {"model": "m"} | result.to_dict()
    assert read["metrics"]["top1"] == result.metrics["top1"]


def test_pictures_that_libraries_ship():
    assert evaluate(small.model(), "scikit-image").counts == {"pictures": 8, "texts": 8}


def test_nothing_that_can_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"got no picture that could be read.*a\.png"):
        evaluate(small.model(), tmp_path)
    with pytest.raises(ValueError, match="task: got 'both'"):
        evaluate(small.model(), tmp_path, "both")


def test_several_captions_of_each_picture(tmp_path):
    """Lines of a .txt are captions of one picture, which is right as clip-benchmark counts."""
    model = small.model()
    paths = small.write_pictures(tmp_path / "pairs", 6)
    captions = [[f"caption {j} of {path.stem}" for j in range(1 + index % 4)] for index, path in enumerate(paths)]
    captions[4][0] = captions[1][0]  # one text of two pictures
    for path, lines in zip(paths, captions, strict=True):
        path.with_suffix(".txt").write_text("\n".join(lines))
    result = evaluate(model, tmp_path / "pairs", reading=Reading(batch_size=4, workers=3))
    texts = [text for lines in captions for text in lines]
    assert result.counts == {"pictures": 6, "texts": len(texts)} == {"pictures": 6, "texts": 13}
    images = model.encode_image(torch.stack([picture_loader(model)(small.picture(i)) for i in range(6)]))
    image_of_text = torch.tensor([i for i, lines in enumerate(captions) for _ in lines])
    scores = F.normalize(model.encode_text(clipfast.tokenize(texts, 16)), dim=-1) @ F.normalize(images, dim=-1).T
    for way, of_way, right in (
        ("text_to_image", scores, image_of_text[:, None] == torch.arange(6)),
        ("image_to_text", scores.T, torch.arange(6)[:, None] == image_of_text),
    ):
        for k in (1, 5, 10):
            order = of_way.sort(dim=1, descending=True, stable=True).indices[:, :k]
            expected = right.gather(1, order).any(dim=1).double().mean().item()
            assert result.metrics[f"{way}_r{k}"] == pytest.approx(expected)


def test_ranks_do_not_depend_on_batches_and_threads(tmp_path):
    """Copies of a picture and captions that come twice are equal: their order is that of the rows."""
    model = small.model()
    (tmp_path / "p").mkdir()
    rows = []
    for index in range(24):
        small.picture(index % 5).save(tmp_path / "p" / f"{index:02d}.png")
        rows += [(f"p/{index:02d}.png", f"caption {index % 3}"), (f"p/{index:02d}.png", f"a {index} thing")]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows[::2], *rows[1::2]])
    found = [
        evaluate(model, tmp_path / "table.csv", reading=Reading(batch_size=batch_size, workers=workers)).metrics
        for batch_size, workers in ((64, 0), (1, 4), (7, 2))
    ]
    assert all(metrics == found[0] for metrics in found)
    assert 0 < found[0]["text_to_image_r5"] < 1
