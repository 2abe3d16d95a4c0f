"""Lets the benchmark files import the harness beside them, and open_clip where torchvision has no CPU build."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))

if not torch.cuda.is_available() and importlib.util.find_spec("torchvision"):
    # torchvision's Python half asks for these two schemas when it is imported
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
