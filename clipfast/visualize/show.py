"""What ``clipfast show`` does: pictures of what a model sees in pictures, and how they fit texts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from clipfast.console import counted, visible
from clipfast.data.input_transform import square_transform_of
from clipfast.data.model_inputs import image_size_of, model_and_tokenizer, tokenizer_of
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.data.transform import load_image, to_pixels
from clipfast.evaluate.probabilities import sigmoid_of
from clipfast.models.clip import CLIP
from clipfast.modules.vit import ViT
from clipfast.outputs import check_output_folder
from clipfast.visualize.attention_maps import attention_rollout, class_attention, plot_attention_maps, plot_heads
from clipfast.visualize.feature_space import METHODS, plot_feature_space, project_features, require_method
from clipfast.visualize.figures import save_png
from clipfast.visualize.model_facts import facts_of, logit_scale_of, source_of
from clipfast.visualize.report import Report
from clipfast.visualize.similarity_matrix import plot_similarity_matrix, similarity_matrix, similarity_words
from clipfast.visualize.training_curves import plot_training_curves, read_log

_LEAST_SIDE = 224  # pixels that overlays are drawn with, however small the model's input
_CURVES = {"step", "loss", "logit_scale", "samples_per_second"}


@dataclass(frozen=True)
class Sight:
    """Pictures as a model sees them.

    Attributes:
        pictures: Each uint8 ``[H, W, 3]``, whole.
        crops: uint8 ``[N, S, S, 3]``, the part that the model is given, finer where its input is small.
        names: N names.
        inputs: float ``[N, 3, h, w]``, the model's input.
        features: ``[N, E]``.
    """

    pictures: list[np.ndarray]
    crops: np.ndarray
    names: list[str]
    inputs: Tensor
    features: Tensor


def show(
    model: CLIP | str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    texts: Sequence[str] = (),
    log: str | os.PathLike[str] | None = None,
    method: str = "tsne",
    block: int = -1,
    dark: bool = False,
    tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None,
    model_source: Mapping[str, str] | None = None,
) -> list[Path]:
    """Draw attention maps, similarities, the shared space and training curves, as PNGs and in ``report.html``.

    The page and every PNG say which model and weights they are of.

    Args:
        model: In ``eval()``; or what :func:`~clipfast.models.open_model.open_model` opens: a run's folder, for one.
        images: Pictures' files.
        output: The folder; files of the same names are replaced.
        texts: What to compare the pictures with. As many as there are pictures, three or more, are taken to be their
            captions, and both are laid out in a plane.
        log: The ``log.jsonl`` of a training run.
        method: Of the plane: ``"tsne"``, or ``"umap"``.
        block: Whose heads are drawn.
        dark: Whether PNGs are for dark pages. The report follows its reader.
        tokenizer: Of the model, for texts: one, or what :meth:`clipfast.Tokenizer.from_file` reads; CLIP's by default.
        model_source: What to call the model, ``spec``, and its ``weights``, if they are another file's.

    Returns:
        The files, the report last.

    Raises:
        ImageError, OSError: A picture cannot be read.
        ImportError: A package is missing.
        TypeError: One picture or text that is not in a list.
        ValueError: No pictures, an empty text, or an argument that does not fit.
    """
    for name, values in (("images", images), ("texts", texts)):
        # a text is a sequence too, of its letters
        if isinstance(values, (str, os.PathLike)):
            raise TypeError(f"{name}: got {values!r} alone, expected a list")
    if not images:
        raise ValueError("images: got none, expected at least one picture")
    if any(not text.strip() for text in texts):
        raise ValueError("texts: got an empty one, expected words")
    require_method(method)
    output = Path(output)
    check_output_folder(output)
    source = source_of(model, model_source)
    model, tokenizer = model_and_tokenizer(model, tokenizer)
    read_text = tokenizer_of(model, tokenizer) if texts else None
    sight = _look(model, [Path(image) for image in images])
    shown = [_drawable(text) for text in texts]
    facts = facts_of(model, source)
    about = _drawable(facts.line)
    output.mkdir(parents=True, exist_ok=True)
    pictures, words = counted(len(images), "picture"), counted(len(texts), "text")
    report = Report("What the model sees", f"{pictures} and {words}." if texts else f"{pictures}.")
    report.add_table((), [(name, _drawable(words)) for name, words in facts.rows()])
    files = []

    def add(name: str, heading: str, words: str, figure: Figure, note: str = "") -> None:
        report.add_section(heading, words)
        report.add_figure(figure, heading)  # before the colours of a page are fixed
        save_png(figure, output / name, dark=dark, about=about + note)
        files.append(output / name)

    if read_text is not None:
        text_features = _encode_texts(model, read_text, texts)
        cosines = similarity_matrix(sight.features, text_features)
        sigmoid = sigmoid_of(model)
        probabilities = None if sigmoid is None else sigmoid(cosines)
        scale = logit_scale_of(model)
        figure = plot_similarity_matrix(cosines, shown, sight.pictures, probabilities, logit_scale=scale)
        words = similarity_words(len(texts), None if sigmoid is not None else scale)
        shares = sigmoid is None and len(texts) > 1
        note = " · below each cosine: the text's share among these texts" if shares else ""
        add("similarity.png", "Texts and pictures", words, figure, note)
        if len(texts) == len(images) >= 3:
            points = project_features(sight.features, text_features, method=method)
            words = f"Pictures and their captions (orange), laid out by {METHODS[method]}; pairs are joined."
            add("space.png", "The shared space", words, plot_feature_space(*points, sight.crops, shown))
    _add_attention(model, sight, block, add, report)
    if log is not None:
        records = [record for record in read_log(Path(log)) if record.keys() >= _CURVES]
        if records:
            add("training.png", "Training", "", plot_training_curves(records))
    report.write(output / "report.html")
    return [*files, output / "report.html"]


def _look(model: CLIP, paths: list[Path]) -> Sight:
    height, width = image_size_of(model)
    finer = max(1, -(-_LEAST_SIDE // min(height, width)))
    sizes = (height, width), (height * finer, width * finer)
    transform, fine = (square_transform_of(model.config.vision_cfg, size) for size in sizes)
    loaded = [load_image(path) for path in paths]
    like = model.logit_scale
    inputs = torch.stack([transform(image) for image in loaded]).to(like.device, like.dtype)
    crops = to_pixels(torch.stack([fine(image) for image in loaded]), fine.mean, fine.std).numpy()
    with torch.no_grad():
        features = model.encode_image(inputs).float().cpu()
    if not features.isfinite().all():
        raise ValueError("model: got features with NaN or infinity, expected finite ones")
    pictures = [np.asarray(_thumbnail(image)) for image in loaded]
    return Sight(pictures, crops, [_drawable(path.name) for path in paths], inputs, features)


def _drawable(text: str) -> str:
    """Return a text that fonts can be asked for: lone surrogates of names that are not UTF-8 are written out."""
    return visible(text.encode("utf-8", "backslashreplace").decode())


def _thumbnail(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((512, 512), Image.Resampling.LANCZOS)
    return image


def _encode_texts(model: CLIP, tokenizer: AnyTokenizer, texts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return model.encode_text(tokenizer(list(texts)).to(model.logit_scale.device)).float().cpu()


def _add_attention(model: CLIP, sight: Sight, block: int, add: object, report: Report) -> None:
    if not isinstance(model.visual, ViT):
        report.add_section("Attention", "This image tower is a ResNet: it has no attention between patches to draw.")
        return
    grid, prefix = model.visual.grid_size, model.visual.prefix_tokens
    reader = "the class token" if model.visual.pool_type == "tok" else "the pooling"
    rollouts, heads = [], []
    for one in sight.inputs.split(1):  # the maps of every block and head are large
        with torch.no_grad():
            attention = model.visual.get_attention_maps(one)
            read = model.visual.get_pool_weights(one).mean(dim=1)
        rollouts.append(attention_rollout(attention, read, prefix)[0].cpu())
        heads.append(class_attention(attention, block, read, prefix)[0].cpu())
    words = f"Attention from {reader}, followed through all blocks (rollout)."
    figure = plot_attention_maps(sight.crops, torch.stack(rollouts), grid, sight.names)
    add("attention.png", "Where it looks", words, figure)
    number = block % model.config.vision_cfg.layers + 1
    for index, name in enumerate(sight.names):
        stem = re.sub(r"[^\w.-]", "_", Path(name).stem)[:60]
        figure = plot_heads(sight.crops[index], heads[index], rollouts[index], grid)
        words = f"Where {reader} looks in block {number}, head by head, each with its own scale."
        add(f"heads-{index:02d}-{stem}.png", name, words, figure)
