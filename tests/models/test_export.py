"""Models leave clipfast: exports and traces take any batch, hold no operator of ours, and compute the same."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import tiny
import torch
from click.testing import Result
from oracle import relative_error
from rivals import captions
from torch import Tensor, nn
from torch.export import Dim
from typer.testing import CliRunner

import clipfast
from clipfast.cli import app
from clipfast.models import export as exporting
from clipfast.models.model_folder import write_model_folder


def pictures(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def texts(batch: int) -> Tensor:
    return captions(batch, 16, 100, seed=batch)


def both(batch: int) -> tuple[Tensor, ...]:
    return pictures(batch), texts(batch)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "clipfast": (tiny.clip, both),
    "open_clip": (lambda: clipfast.accelerate(tiny.open_clip_clip()), both),
    "open_clip custom": (lambda: clipfast.accelerate(tiny.open_clip_clip(custom_text=True)), both),
    "timm": (lambda: clipfast.accelerate(tiny.timm_vit()), lambda batch: (pictures(batch),)),
}


def tensors(output: object) -> list[Tensor]:
    values = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple) else output.values()
    return [v for v in values if v is not None]


def assert_same(actual: object, expected: object) -> None:
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == e.shape
        assert relative_error(a, e) <= 2e-6


# the others' exports are tested as ONNX files
@pytest.mark.parametrize("name", ["clipfast", "open_clip custom", "timm"])
def test_torch_export_takes_any_batch(name: str) -> None:
    make, inputs = MODELS[name]
    model, example = make().eval(), inputs(3)
    program = torch.export.export(model, example, dynamic_shapes=tuple({0: Dim("batch")} for _ in example))
    assert not [n for n in program.graph.nodes if "clipfast" in str(n.target)]
    for batch in (1, 2, 4, 13):
        assert_same(program.module()(*inputs(batch)), model(*inputs(batch)))


@pytest.mark.parametrize("name", ["clipfast", "open_clip", "timm"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_take_any_batch(name: str) -> None:
    make, inputs = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs(3), check_trace=False)
    assert "clipfast::" not in str(traced.inlined_graph)
    for batch in (1, 4):
        assert_same(traced(*inputs(batch)), model(*inputs(batch)))


def test_a_fast_backend_is_not_exported() -> None:
    model = tiny.text_transformer().eval()
    with clipfast.backend("triton"):
        program = torch.export.export(model, (texts(3),), dynamic_shapes=({0: Dim("batch")},))
        assert not [n for n in program.graph.nodes if "clipfast" in str(n.target)]
    assert_same(program.module()(texts(5)), model(texts(5)))


def test_training_is_exported_too() -> None:
    model = tiny.clip(dtype=torch.float64)
    program = torch.export.export(
        model, (pictures(4).double(), texts(4)), dynamic_shapes=({0: Dim("batch")}, {0: Dim("batch")})
    )
    results = []
    for module in (program.module(), model):
        model.zero_grad()
        image, text, scale = module(pictures(7).double(), texts(7))
        clipfast.ContrastiveLoss()(image, text, scale).backward()
        results.append([p.grad for p in module.parameters()])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1e-3)


def run(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    outputs = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}


def test_onnx_files_of_whole_models(tmp_path: Path) -> None:
    model = tiny.clip().eval()
    report = clipfast.export(model, tmp_path / "new" / "clip.onnx")
    assert report.inputs == {"image": ("images", 3, 32, 32), "text": ("texts", 16)}
    assert report.outputs == {"image_features": ("images", 32), "text_features": ("texts", 32), "logit_scale": ()}
    assert 0 <= max(report.errors.values()) <= 1e-5
    outputs = run(report.path, image=pictures(4), text=texts(7))
    with torch.no_grad():
        image, text = model.encode_image(pictures(4), normalize=True), model.encode_text(texts(7), normalize=True)
    assert relative_error(outputs["image_features"], image) <= 1e-5
    assert relative_error(outputs["text_features"], text) <= 1e-5
    assert relative_error(outputs["logit_scale"], model.logit_scale.exp()) <= 1e-6
    assert {node.domain for node in onnx.load(report.path).graph.node} <= {""}
    assert [p.name for p in report.path.parent.iterdir() if p.suffix not in (".onnx", ".data")] == []


def test_onnx_files_of_accelerated_models(tmp_path: Path) -> None:
    theirs = clipfast.accelerate(tiny.open_clip_clip(quick_gelu=True)).eval()
    clipfast.export(theirs, tmp_path / "image.onnx", tower="image", normalize=False)
    image = run(tmp_path / "image.onnx", image=pictures(4))["image_features"]
    assert relative_error(image, theirs.encode_image(pictures(4))) <= 1e-5
    theirs = clipfast.accelerate(tiny.transformers_clip()).eval()
    clipfast.export(theirs, tmp_path / "text.onnx", tower="text", normalize=False)
    text = run(tmp_path / "text.onnx", text=texts(4))["text_features"]
    assert relative_error(text, theirs.get_text_features(texts(4)).pooler_output) <= 1e-5


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_files_of_one_tower(tmp_path: Path, tower: str) -> None:
    # in training mode, and of another dtype
    model = tiny.clip(tiny.RESNET_CONFIG if tower == "image" else tiny.QUICK_CONFIG, dtype=torch.bfloat16)
    before = tiny.cloned(model.state_dict())
    report = clipfast.export(model, tmp_path / "t.onnx", tower=tower, normalize=False)
    assert model.training
    tiny.assert_same_state(model.state_dict(), before)
    assert list(report.inputs) == [tower]
    assert list(report.outputs) == [f"{tower}_features"]
    exact = copy.deepcopy(model).float().eval()
    x = pictures(3) if tower == "image" else texts(3)
    expected = exact.encode_image(x) if tower == "image" else exact.encode_text(x)
    assert relative_error(run(report.path, **{tower: x})[f"{tower}_features"], expected.detach()) <= 1e-5


def test_onnx_files_of_a_tower_alone(tmp_path: Path) -> None:
    vit = tiny.vit(layers=1).eval()
    assert list(clipfast.export(vit, tmp_path / "t.onnx", normalize=False).inputs) == ["image"]
    assert relative_error(run(tmp_path / "t.onnx", image=pictures(3))["image_features"], vit(pictures(3))) <= 1e-5
    with pytest.raises(ValueError, match="tower: got 'text', expected 'image': the model is a ViT"):
        clipfast.export(vit, tmp_path / "u.onnx", tower="text")
    with pytest.raises(ValueError, match="tower: got 'image', expected 'text'"):
        clipfast.export(tiny.text_transformer(), tmp_path / "u.onnx", tower="image")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = tiny.clip().eval()
    for wrong, error, message in (
        ({"path": tmp_path / "a.pt"}, ValueError, r"path: got .*a\.pt', expected a name that ends with \.onnx"),
        ({"tower": "audio"}, ValueError, "tower: got 'audio', expected one of 'image', 'text', 'both'"),
        ({"model": nn.Linear(2, 2)}, TypeError, "expected a CLIP model"),
        ({"model": "ViT-B-32"}, TypeError, "model: got str"),
    ):
        given = {"model": model, "path": tmp_path / "a.onnx"} | wrong
        with pytest.raises(error, match=message):
            clipfast.export(**given)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"what was there")
    forward = exporting._Exported.forward

    def drifting(self: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = forward(self, *inputs)
        return outputs if torch.compiler.is_exporting() else tuple(1.001 * x for x in outputs)

    monkeypatch.setattr(exporting._Exported, "forward", drifting)
    with pytest.raises(ValueError, match=r"got a relative error of 1\.0e-03 in image_features .* was not kept"):
        clipfast.export(tiny.vit(layers=1).eval(), path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_not_installed_is_named(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"export needs {missing}, .* pip install 'clipfast\[export\]'"):
        clipfast.export(tiny.clip(), tmp_path / "a.onnx")


def test_the_command(tmp_path: Path) -> None:
    model = clipfast.create_model(tiny.CONFIG | {"text_cfg": tiny.CONFIG["text_cfg"] | {"layers": 1}}).eval()
    write_model_folder(tmp_path / "run", model.config, model.state_dict())

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["export", str(tmp_path / "run"), *arguments, "--tower", "text"])

    result = call(str(tmp_path / "o.onnx"))
    assert result.exit_code == 0, result.output
    assert "text [texts, 16] → text_features [texts, 32]" in result.stdout
    assert "text_features: max relative error" in result.stdout
    expected = model.encode_text(texts(3), normalize=True).detach()
    assert relative_error(run(tmp_path / "o.onnx", text=texts(3))["text_features"], expected) <= 1e-5
    result = call(str(tmp_path / "o.pt"))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_the_commands_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = exporting.ExportReport(tmp_path / "o.onnx", {"text": ("texts", 16)}, {}, 20, ((1, 1),), {"x": 0.5}, 1.0)
    monkeypatch.setattr(exporting, "export", lambda *_, **__: report)
    monkeypatch.setattr("clipfast.models.open_model.open_model", lambda *_: None)
    result = CliRunner().invoke(app, ["export", "run", "o.onnx", "--json", "--tolerance", "0.5", "--no-normalize"])
    expected = {"path": str(tmp_path / "o.onnx"), "inputs": {"text": ["texts", 16]}, "outputs": {}, "opset": 20}
    assert json.loads(result.stdout) == expected | {"batches": [[1, 1]], "errors": {"x": 0.5}, "tolerance": 1.0}
