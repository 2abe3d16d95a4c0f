"""What every test needs before it imports the rivals."""

from __future__ import annotations

import importlib.util
import os

import torch

# models come from code here, never from a hub
os.environ["HF_HUB_OFFLINE"] = "1"

if not torch.cuda.is_available() and importlib.util.find_spec("torchvision"):
    # torchvision has no CPU build: its Python half asks for these two schemas when it is imported
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
