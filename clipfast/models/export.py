"""CLIP as an ONNX file that takes any batch, compared with the model before it is kept."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.extras import missing
from clipfast.modules.resnet import ModifiedResNet
from clipfast.modules.text import TextTransformer
from clipfast.modules.vit import ViT

TOWERS = ("image", "text", "both")
# how far onnxruntime may be from PyTorch in float32, relative to the largest value
TOLERANCE = 1e-4
# batches of pictures and of texts that are compared; the first is the one that is traced
_BATCHES = ((2, 3), (1, 1), (5, 2))
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it is to the model.

    Attributes:
        path: The file.
        inputs: The inputs' shapes by name; a name in the place of a size takes any.
        outputs: The outputs' shapes by name.
        opset: The version of ONNX's operators.
        batches: The batches, ``(pictures, texts)``, that were compared.
        errors: By output, the largest ``max|onnx − model| / max|model|`` over the batches, in float32.
        tolerance: What they had to stay below.
    """

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    opset: int
    batches: tuple[tuple[int, int], ...]
    errors: dict[str, float]
    tolerance: float

    def __str__(self) -> str:
        def listed(shapes: dict[str, tuple[int | str, ...]]) -> str:
            return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())

        lines = [f"{self.path}: {listed(self.inputs)} → {listed(self.outputs)}, ONNX opset {self.opset}"]
        lines += [f"  {name}: max relative error {error:.1e}" for name, error in self.errors.items()]
        batches = ", ".join(map(str, self.batches))
        return "\n".join([*lines, f"  in onnxruntime, batches {batches}, tolerance {self.tolerance:.0e}"])


class ExportMismatch(ValueError):
    """What an exported file computes is not what the model computes."""


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tower: str = "both",
    normalize: bool = True,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a CLIP model, or one of its towers, as an ONNX file that takes any batch.

    The graph has ONNX's own operators alone and computes in float32; weights of another dtype are widened. Inputs are
    ``image`` ``[images, 3, height, width]``, normalised pixels, and ``text`` ``[texts, L]``, int64 token ids, with
    batches of their own; outputs ``image_features`` and ``text_features`` ``[…, E]``, and ``logit_scale``,
    exponentiated, where both towers are there. onnxruntime computes several batches and is compared with the model;
    a file that fails is not kept. Weights of more than 2 GB go to ``<name>.data`` beside the file.

    Args:
        model: A model of clipfast, one of its towers, or a CLIP of open_clip or transformers, accelerated or not. It
            is left as it was.
        path: The ``.onnx`` file; replaced if it exists.
        tower: ``"image"``, ``"text"`` or ``"both"``; a tower alone is exported as what it is.
        normalize: Whether features get unit length, as ``model(image, text)`` gives them.
        opset: The version of ONNX's operators; the exporter's own by default.
        tolerance: The largest relative error that is let pass.

    Returns:
        An :class:`ExportReport`; printed, it is a list.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
        TypeError: ``model`` is no such model.
        ValueError: ``tower`` is none of the three, the model has no such tower, or ``path`` has another ending.
        ExportMismatch: The results of the file differ from the model's.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a name that ends with .onnx")
    if tower not in TOWERS:
        raise ValueError(f"tower: got {tower!r}, expected one of {', '.join(map(repr, TOWERS))}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a CLIP model or one of its towers")
    _check_installed()
    exported = _Exported(_plain_copy(model), tower, normalize).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    # in a folder of its own: large weights lie beside the file, under a name that the file says
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                exported,
                exported.example(*_BATCHES[0]),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=exported.inputs,
                output_names=exported.outputs,
                dynamic_shapes=(tuple({0: torch.export.Dim(batch)} for batch in exported.batch_names),),
            )
            program.save(part)
            report = _compare(part, exported, tolerance, path)
        for file in sorted(Path(folder).iterdir(), key=lambda f: f == part):
            os.replace(file, path.parent / file.name)
    return report


class _Exported(nn.Module):
    """What is exported: the towers that are asked for, with named inputs and outputs."""

    def __init__(self, model: nn.Module, tower: str, normalize: bool) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize
        image, text = isinstance(model, (ViT, ModifiedResNet)), isinstance(model, TextTransformer)
        self.whole = not (image or text)
        if self.whole and not (hasattr(model, "encode_image") or hasattr(model, "get_image_features")):
            raise TypeError(
                f"model: got {type(model).__module__}.{type(model).__qualname__}, expected a CLIP model of clipfast, "
                f"open_clip or transformers, or one of clipfast's towers"
            )
        has = ["image"] * (not text) + ["text"] * (not image)
        if tower != "both" and tower not in has:
            raise ValueError(f"tower: got {tower!r}, expected {has[0]!r}: the model is a {type(model).__name__}")
        self.towers = has if tower == "both" else [tower]
        self.inputs = list(self.towers)
        self.batch_names = [f"{name}s" for name in self.towers]
        self.outputs = [f"{name}_features" for name in self.towers]
        self.scaled = len(self.towers) == 2 and isinstance(getattr(model, "logit_scale", None), Tensor)
        self.biased = self.scaled and isinstance(getattr(model, "logit_bias", None), Tensor)
        self.outputs += ["logit_scale"] * self.scaled + ["logit_bias"] * self.biased

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features = [self._features(tower, x) for tower, x in zip(self.towers, inputs, strict=True)]
        if self.normalize:
            features = [F.normalize(f, dim=-1) for f in features]
        scalars = [self.model.logit_scale.exp()] if self.scaled else []
        return (*features, *scalars, self.model.logit_bias.clone()) if self.biased else (*features, *scalars)

    def _features(self, tower: str, x: Tensor) -> Tensor:
        if not self.whole:
            return self.model(x)
        if hasattr(self.model, "encode_image"):
            return getattr(self.model, f"encode_{tower}")(x)
        output = getattr(self.model, f"get_{tower}_features")(x)
        return output if isinstance(output, Tensor) else output.pooler_output

    def example(self, images: int, texts: int) -> tuple[Tensor, ...]:
        """Return inputs: pictures of noise, and texts of random tokens that end at different places."""
        generator = torch.Generator().manual_seed(images + 8 * texts)
        made = []
        for tower in self.towers:
            if tower == "image":
                made.append(torch.randn(images, 3, *_image_size(self.model), generator=generator))
                continue
            length, vocabulary, eos = _text_sizes(self.model)
            tokens = torch.randint(0, vocabulary, (texts, length), generator=generator)
            tokens[tokens == eos] = 0
            ends = torch.randint(1, length, (texts,), generator=generator) if length > 1 else torch.zeros(texts).long()
            tokens[torch.arange(length) > ends[:, None]] = 0
            tokens[torch.arange(texts), ends] = eos
            if getattr(self.model, "pooling", "argmax") == "argmax":
                # the largest id is read by some: it may be no other than the end
                tokens[tokens > eos] = 0
            made.append(tokens)
        return tuple(made)


def _image_size(model: nn.Module) -> tuple[int, int]:
    config = getattr(getattr(model, "config", None), "vision_config", None)
    size = config.image_size if config is not None else getattr(model, "visual", model).image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _text_sizes(model: nn.Module) -> tuple[int, int, int]:
    """Return a model's context length, vocabulary and end-of-text id."""
    config = getattr(getattr(model, "config", None), "text_config", None)
    if config is not None:
        old = config.eos_token_id == 2  # configurations from before 2023, whose text is read at the largest id
        return config.max_position_embeddings, config.vocab_size, config.vocab_size - 1 if old else config.eos_token_id
    eos = getattr(model, "eos_id", None)
    eos = getattr(getattr(model, "text", model), "eos_id", None) if eos is None else eos
    return model.context_length, model.vocab_size, model.vocab_size - 1 if eos is None else eos


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return the model where every weight is float32 in host memory; a copy where it is not."""
    weights = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in weights) and not model.training:
        return model
    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()


def _compare(part: Path, exported: _Exported, tolerance: float, path: Path) -> ExportReport:
    import onnx
    import onnxruntime

    described = onnx.load(part, load_external_data=False)
    foreign = sorted({node.domain for node in described.graph.node} - {"", "ai.onnx"})
    if foreign or described.functions:
        raise ValueError(f"{path}: got operators of {', '.join(foreign) or 'functions'}, expected ONNX's alone")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(part, options, providers=["CPUExecutionProvider"])
    errors = dict.fromkeys(exported.outputs, 0.0)
    for batch in _BATCHES:
        inputs = exported.example(*batch)
        expected = exported(*inputs)
        actual = session.run(exported.outputs, {n: x.numpy() for n, x in zip(exported.inputs, inputs, strict=True)})
        for name, mine, theirs in zip(exported.outputs, expected, actual, strict=True):
            error = (torch.from_numpy(theirs).reshape(mine.shape).double() - mine.double()).abs().max()
            relative = float(error / mine.double().abs().max())
            if not relative <= tolerance:
                raise ExportMismatch(
                    f"{path}: got a relative error of {relative:.1e} in {name} of the batch {batch}, expected at most "
                    f"{tolerance:.0e}; the file was not kept"
                )
            errors[name] = max(errors[name], relative)
    return ExportReport(
        path=path,
        inputs={i.name: tuple(i.shape) for i in session.get_inputs()},
        outputs={o.name: tuple(o.shape) for o in session.get_outputs()},
        opset=next(entry.version for entry in described.opset_import if entry.domain in ("", "ai.onnx")),
        batches=_BATCHES,
        errors=errors,
        tolerance=tolerance,
    )


def _check_installed() -> None:
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise missing("export needs", error.name or name) from error


@contextmanager
def _quiet() -> Iterator[Any]:
    """Leave out what the exporter says of its own insides."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
