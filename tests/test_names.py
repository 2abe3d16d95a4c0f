"""Names that users of other libraries type: served, or answered with the one that they mean."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import open_clip
import pytest
import small
import torch
from PIL import Image
from safetensors.torch import save_file

import clipfast
from clipfast.models.foreign_config import config_of
from clipfast.train.config import RunConfig


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ClipLoss", "clipfast.ContrastiveLoss?"),
        ("vit", "clipfast.ViT?"),
        ("create_modle", "clipfast.create_model?"),
        ("SimpleTokenizer", "clipfast.Tokenizer?"),
        ("available_models", "clipfast.list_models()?"),
        ("sigliploss", "clipfast.SigLipLoss?"),
    ],
)
def test_a_wrong_name_says_which_is_meant(name: str, meant: str) -> None:
    with pytest.raises(AttributeError) as told:
        getattr(clipfast, name)
    assert str(told.value) == f"module 'clipfast' has no attribute {name!r}; did you mean {meant}"


def test_a_name_far_from_all_gets_no_hint() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'zebra'$"):
        clipfast.zebra  # noqa: B018
    assert dir(clipfast) == sorted(clipfast.__all__)
    # what tools probe for is not imported for
    assert not hasattr(clipfast, "__wrapped__")


@pytest.mark.parametrize(
    ("function", "keyword", "meant"),
    [
        (clipfast.image_transform, "is_train", "; did you mean train?"),
        (clipfast.create_model, "checkpoint_path", "; did you mean weights?"),
        (clipfast.create_model, "wieghts", "; did you mean weights?"),
        (clipfast.create_model, "force_image_size", "; did you mean image_size?"),
        (clipfast.create_model_and_transforms, "dtype", ", expected model_name, "),
        (clipfast.create_model, "zebra", ", expected name_or_config, weights, "),
    ],
)
def test_a_wrong_keyword_says_which_is_meant(function: object, keyword: str, meant: str) -> None:
    with pytest.raises(TypeError) as told:
        function(224, **{keyword: 1})
    assert f"{function.__name__}: got an unknown keyword {keyword!r}{meant}" in str(told.value)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("hf-hub:timm/ViT-B-16-SigLIP",), {}, "looks like a model hub's"),
        (("openai/clip-vit-base-patch32",), {}, "looks like a model hub's"),
        (("ViT-B-32",), {"pretrained": "laion2b_s34b_b79k"}, "expected a file or folder of weights"),
    ],
)
def test_what_would_be_downloaded_is_refused(arguments: tuple, keywords: dict, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{message}.*nothing is downloaded.*hf download OWNER/NAME"):
        clipfast.create_model(*arguments, **keywords)


def test_whoever_takes_a_model_says_so() -> None:
    name = "hf-hub:timm/ViT-B-16-SigLIP"
    for function in (clipfast.open_model, clipfast.get_tokenizer, config_of):
        with pytest.raises(FileNotFoundError, match=r"looks like a model hub's.*nothing is downloaded.*hf download"):
            function(name)


def test_pretrained_is_weights_by_another_name(tmp_path: Path) -> None:
    model = clipfast.create_model(small.CONFIG)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for given in (tmp_path / "weights.safetensors", model.state_dict()):
        made = clipfast.create_model(small.CONFIG, pretrained=given)
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="pretrained: got it beside weights"):
        clipfast.create_model(small.CONFIG, weights=model.state_dict(), pretrained=model.state_dict())


def test_open_clips_three() -> None:
    """``create_model_and_transforms`` gives a model and both transforms, which a model of that name knows too."""
    model, of_training, of_evaluation = clipfast.create_model_and_transforms(
        small.CONFIG, force_image_size=64, image_mean=(0.1, 0.2, 0.3), image_resize_mode="squash", precision="bf16"
    )
    picture = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB")
    how = {"mean": (0.1, 0.2, 0.3), "resize_mode": "squash"}
    assert torch.equal(of_evaluation(picture), open_clip.image_transform(64, is_train=False, **how)(picture))
    torch.manual_seed(0)
    drawn = of_training(picture)
    torch.manual_seed(0)
    assert torch.equal(drawn, open_clip.image_transform(64, is_train=True, mean=how["mean"])(picture))
    assert (model.transform(), model.transform(train=True)) == (of_evaluation, of_training)
    assert model.visual.image_size == (64, 64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    plain = clipfast.create_model(small.CONFIG)
    assert plain.transform() == clipfast.image_transform(small.CONFIG["vision_cfg"]["image_size"])
    with pytest.raises(ValueError, match="precision: got 'int8', expected one of fp32"):
        clipfast.create_model_and_transforms(small.CONFIG, precision="int8")


def test_commands_have_functions(tmp_path: Path) -> None:
    """``clipfast.train``, ``.evaluate``, ``.embed``, ``.search`` and ``.visualize``, one behind the other."""
    data = tmp_path / "pairs"
    data.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 128)).save(data / f"{i:02}.png")
        (data / f"{i:02}.txt").write_text(f"colour number {i}")
    (tmp_path / "model.json").write_text(json.dumps(small.CONFIG))
    (tmp_path / "run.toml").write_text(f'data = "{data}"\nmodel = "{tmp_path / "model.json"}"\nsteps = 50\n')
    run = tmp_path / "run"
    clipfast.train(tmp_path / "run.toml", steps=2, batch_size=4, output=str(run), device="cpu", workers=0)
    assert (run / "model.safetensors").is_file()
    result = clipfast.evaluate(run, data)
    assert result.task == "retrieval"
    assert result.counts
    done = clipfast.embed(run, data, tmp_path / "features.npy")
    assert done.rows == 12
    hits = clipfast.search(tmp_path / "features.npy", "colour number 3", k=3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    nearest = clipfast.search(tmp_path / "features.npy", image=data / "05.png", k=1)[0]
    assert nearest.name.endswith("05.png")
    assert nearest.cosine > 0.9999
    with pytest.raises(ValueError, match="query, image: got both"):
        clipfast.search(tmp_path / "features.npy", "a", image=data / "05.png")
    files = clipfast.visualize(run, [data / "00.png"], tmp_path / "pictures", texts=["colour"])
    assert files[-1].name == "report.html"


def test_rooms_stay_packages() -> None:
    import clipfast.train.config

    assert clipfast.train.config.RunConfig is RunConfig
    assert list(inspect.signature(clipfast.evaluate).parameters)[:3] == ["model", "data", "task"]
    with pytest.raises(TypeError, match="config: got int, expected a RunConfig"):
        clipfast.train(3)


def test_a_checker_knows_every_name_and_no_other() -> None:
    """What runs finds names late; a checker reads them from imports, and no ``__getattr__`` makes up others for it."""
    tree = ast.parse(Path(clipfast.__file__).read_text())
    seen: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            seen |= {alias.asname or alias.name for part in node.body for alias in part.names}
        assert getattr(node, "name", "") != "__getattr__"
    assert seen == set(clipfast.__all__) - {"__version__"}
