"""Lets torchvision be imported beside a PyTorch for CPUs."""

from __future__ import annotations

import importlib.util

import torch

_libraries = []


def enable() -> None:
    """Define the two schemas that torchvision's Python half asks for: it has no CPU build."""
    if not _libraries and not torch.cuda.is_available() and importlib.util.find_spec("torchvision"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
