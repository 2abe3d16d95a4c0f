"""A small CLIP with CLIP's vocabulary, as a training run leaves it, and pictures for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import clipfast
from clipfast.models.model_folder import write_model_folder

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}
WORDS = ("red", "green", "blue", "grey", "white", "black", "pink", "brown")


def model(seed: int = 0, **changes: object) -> clipfast.CLIP:
    """Return the model, the same for a seed; ``changes`` are of its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return clipfast.create_model(CONFIG | changes).eval().requires_grad_(False)


def run(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write the model as a training run leaves it, and return the folder."""
    clip = model(seed, **changes)
    write_model_folder(folder, clip.config, clip.state_dict())
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Return a picture of smooth noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Write pictures ``00.png`` and so on, each with a ``.txt`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:02d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        picture(index).save(path)
        path.with_suffix(".txt").write_text(f"a {WORDS[index % 8]} thing, number {index}", encoding="utf-8")
    return paths
