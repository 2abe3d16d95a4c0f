"""What importing clipfast does and does not do, each in a fresh process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import clipfast

RIVALS = ("open_clip", "timm", "transformers", "torchvision")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_little() -> None:
    code = (
        "import sys, clipfast; print(sorted(m for m in sys.modules if m.startswith(('clipfast', 'torch', 'triton'))))"
    )
    assert run_python(code).strip() == "['clipfast']"


def test_everything_public_works_without_triton_the_library_and_the_rivals() -> None:
    # None in sys.modules makes an import fail as if the package were not installed
    code = f"""
import sys
for name in ("triton", *{RIVALS!r}, "matplotlib", "sklearn", "emoji", "resvg_py"):
    sys.modules[name] = None
import clipfast
from clipfast.ops import library
from pathlib import Path
library._PACKAGE = Path("/nowhere")
for name in clipfast.__all__:
    getattr(clipfast, name)
import torch
model = clipfast.create_model({{"embed_dim": 16,
    "vision_cfg": {{"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}},
    "text_cfg": {{"width": 16, "heads": 2, "layers": 1}}}})
loss = clipfast.ContrastiveLoss()(*model(torch.randn(2, 3, 16, 16), clipfast.tokenize(["a cat", "a dog"])))
loss.backward()
assert loss.isfinite() and not torch.cuda.is_initialized()
"""
    run_python(code)


def test_our_kernels_do_not_shadow_another_package() -> None:
    # transformers imports a package of that name
    root = Path(clipfast.__file__).parent.parent
    assert str(root) not in sys.path or not (root / "kernels").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or "site-packages" in str(spec.origin)
    assert importlib.util.find_spec("clipfast.kernels") is not None


def test_public_names() -> None:
    for name in clipfast.__all__:
        assert getattr(clipfast, name) is not None
    assert set(clipfast.__all__) <= set(dir(clipfast))
    with pytest.raises(AttributeError, match="no attribute 'Vit'"):
        clipfast.Vit  # noqa: B018
