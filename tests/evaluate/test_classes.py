"""What classes are called in zero-shot evaluation: ImageNet's folders, prompts of each, and names that come twice."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path

import pytest
import small
import torch

from clipfast.data.model_inputs import picture_loader, tokenizer_of
from clipfast.evaluate.classes import Classes, EvaluationWarning, effect_of_likeness
from clipfast.evaluate.imagenet import imagenet_names
from clipfast.evaluate.run import evaluate
from clipfast.evaluate.zero_shot import zero_shot_accuracy, zero_shot_classifier

# "tench", "missile" (two), "sunglasses" (two), "plate"
SYNSETS = ("n01440764", "n03773504", "n04008634", "n04355933", "n04356056", "n07579787")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_folders(place: Path, names: tuple[str, ...], each: int = 4) -> Path:
    for label, name in enumerate(names):
        (place / name).mkdir(parents=True)
        for index in range(each):
            small.picture(100 * label + index).save(place / name / f"{index}.JPEG", format="JPEG")
    return place


def argmax_of(model, place: Path, names: list[str], templates) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the plain computation names for each picture, and the labels."""
    paths = sorted(place.rglob("*.JPEG"))
    labels = torch.tensor([sorted({p.parent for p in paths}).index(p.parent) for p in paths])
    images = model.encode_image(torch.stack([picture_loader(model)(p.read_bytes()) for p in paths]))
    classifier = zero_shot_classifier(model.encode_text, tokenizer_of(model), names, templates)
    return (torch.nn.functional.normalize(images, dim=-1) @ classifier).argmax(dim=1), labels


def test_imagenet_needs_no_other_file(tmp_path):
    import open_clip

    model = small.model()
    with pytest.warns(EvaluationWarning) as told:
        result = evaluate(model, write_folders(tmp_path / "val", SYNSETS))
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    names = ["tench", "missile", "missile", "sunglasses", "sunglasses", "plate"]
    named, labels = argmax_of(model, tmp_path / "val", names, templates)
    assert result.counts == {"pictures": 24, "classes": 6}
    assert result.metrics["top1"] == pytest.approx((named == labels).double().mean().item())
    alike = torch.tensor([0, 1, 1, 3, 3, 5])
    as_one = (alike[named] == alike[labels]).double().mean().item()
    assert result.settings == {
        "class_names": "imagenet",
        "templates": templates,
        "classes_alike": [[1, 2], [3, 4]],
        "top1_if_alike_were_one": pytest.approx(as_one),
    }
    assert len(told) == 1
    words = str(told[0].message)
    assert "missile (n03773504, n04008634); sunglasses (n04355933, n04356056)" in words
    assert "the first is taken, as in published figures, so the others" in words
    assert f"top1 is {result.metrics['top1']:.4f}, and {as_one:.4f} if" in words


def test_the_effect_of_a_name_that_comes_twice():
    """Half of the pictures of the two classes are wrong, and right if they are one; others change nothing."""
    classifier = torch.eye(4)[:, [0, 1, 2, 1]]
    labels = torch.tensor([0, 0, 1, 1, 3, 3, 2, 2])
    images = torch.eye(4)[[0, 2, 1, 1, 1, 1, 2, 2]]
    assert zero_shot_accuracy(images, classifier, labels, ks=(1,))["top1"] == 5 / 8
    settings, words = effect_of_likeness(Classes(["a", "[b]", "c", "[b]"], [], ()), images, classifier, labels, 5 / 8)
    assert settings == {"classes_alike": [[1, 3]], "top1_if_alike_were_one": 7 / 8}
    assert "[b] (1, 3)" in words
    assert "top1 is 0.6250, and 0.8750 if each group counts as one class" in words
    many = Classes([f"c{i}" for i in range(30)], [], ())
    _, words = effect_of_likeness(many, torch.ones(1, 4), torch.ones(4, 30), torch.zeros(1, dtype=torch.long), 1.0)
    assert "c0/c1/c2/c3/c4 (0, 1, 2, 3, 4 and 25 more). Their" in words
    assert effect_of_likeness(Classes(["a", "b", "c", "d"], [], ()), images, torch.eye(4), labels, 0.5) == ({}, "")


def test_a_class_of_each_name_is_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvaluationWarning)
        result = evaluate(small.model(), write_folders(tmp_path / "val", ("owl", "red_fox"), 1))
    assert "classes_alike" not in result.settings


def test_synsets_that_are_not_imagenets(tmp_path):
    place = write_folders(tmp_path / "val", ("n01440764", "n00000001"), 1)
    with pytest.raises(ValueError, match="class_names: got 'n00000001' of 2 classes, expected ImageNet's 1,000"):
        evaluate(small.model(), place)
    # names that a file gives are taken as they are, and a probe needs none
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert evaluate(small.model(), place, class_names=tmp_path / "names.txt").counts["classes"] == 2


def test_shards_of_imagenet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    small.picture(0).save(buffer, format="PNG")
    with tarfile.open("a.tar", "w") as tar:
        for name, content in (("0.png", buffer.getvalue()), ("0.cls", b"999")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match="class_names: got none for a.tar, expected a file of names, 'imagenet', or"):
        evaluate(small.model(), "a.tar")
    with pytest.warns(EvaluationWarning, match=r"missile \(657, 744\); sunglasses \(836, 837\)"):
        result = evaluate(small.model(), "a.tar", class_names="imagenet", templates="name")
    assert result.counts == {"pictures": 1, "classes": 1000}
    assert result.settings["classes_alike"] == [[657, 744], [836, 837]]
    # a file of that name is a file
    Path("imagenet").write_text("".join(f"{name} {i}\n" for i, name in enumerate(imagenet_names())))
    assert "class_names" not in evaluate(small.model(), "a.tar", class_names="imagenet", templates="name").settings


def test_prompts_of_each_class_by_name_or_by_folder(tmp_path):
    model = small.model()
    place = write_folders(tmp_path / "val", ("n03773504", "n04008634"))
    prompts = {"missile": ["a missile", "a guided missile flies"], "other": ["x"]}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    with pytest.warns(EvaluationWarning):  # CuPL's files know names and not synsets
        result = evaluate(model, place, prompts=tmp_path / "p.json")
    assert (result.settings["prompts"], result.settings["prompt_count"]) == (str(tmp_path / "p.json"), 4)
    prompts["n04008634"] = ["a projectile"]
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    result = evaluate(model, place, prompts=tmp_path / "p.json")
    named, labels = argmax_of(model, place, ["missile", "n04008634"], prompts)
    assert result.metrics["top1"] == pytest.approx((named == labels).double().mean().item())
    assert "classes_alike" not in result.settings
    (tmp_path / "list.json").write_text('["a {c}."]')
    with pytest.warns(EvaluationWarning):
        assert evaluate(model, place, prompts=tmp_path / "list.json").settings["templates"] == ["a {}."]
    with pytest.raises(ValueError, match="templates, prompts: got 'simple' and"):
        evaluate(model, place, prompts=tmp_path / "p.json", templates="simple")
