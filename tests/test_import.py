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


# what a process is heard doing, but for reading: audit hooks come before the deed, and cannot be left out
LISTEN = """
import sys, threading
import torch
heard = []
def hear(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.mkdir",
                 "os.rename", "os.remove", "socket.connect", "socket.getaddrinfo"):
        heard.append((event, *map(str, arguments)))
    # an integer of flags or the mode of open()
    if event == "open" and (set("wax+") & set(arguments[1] or "") or arguments[1] is None and arguments[2] & 3):
        heard.append((event, str(arguments[0])))
def tasks():
    import os
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
before, loaded = tasks(), set(sys.modules)
start = threading.Thread.start
threading.Thread.start = lambda thread: (heard.append(("thread", thread.name)), start(thread))
sys.addaudithook(hear)
import clipfast
for name in clipfast.__all__:
    getattr(clipfast, name)
from clipfast.ops import library
library.unavailable()
"""


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_importing_starts_nothing_and_writes_nothing(home: str | None) -> None:
    code = f"""{LISTEN}
assert not heard, heard
assert tasks() == before, (tasks(), before)
new = set(sys.modules) - loaded
heavy = ("triton", "torch._dynamo", "torch._inductor", "torch.testing", *{RIVALS!r}, "matplotlib", "sklearn", "typer")
assert not [m for m in new if m.startswith(heavy)]
assert not torch.cuda.is_initialized()
import pathlib
maps = pathlib.Path("/proc/self/maps")
assert not maps.exists() or "libcuda.so" not in maps.read_text()
"""
    elsewhere = {} if home is None else {"HOME": home, "XDG_CACHE_HOME": home, "TRITON_HOME": home}
    run_python(code, PYTHONDONTWRITEBYTECODE="1", **elsewhere)


def test_what_must_not_be_done_would_be_heard() -> None:
    code = f"""{LISTEN}
import os, pathlib, subprocess
subprocess.run(["true"])
pathlib.Path(os.devnull).write_text("")
threading.Thread(target=len, args=("",)).start()
os.fork() or os._exit(0)
print({{event for event, *_ in heard}} >= {{"subprocess.Popen", "open", "thread", "os.fork"}}, heard)
"""
    assert run_python(code).startswith("True ")


def test_a_fork_after_the_import_computes() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    code = f"""{LISTEN}
import os, signal
torch.set_num_threads(2)
child = os.fork()
if child == 0:
    signal.alarm(120)  # a deadlock ends
    model = clipfast.create_model({{"embed_dim": 16,
        "vision_cfg": {{"image_size": 16, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8}},
        "text_cfg": {{"width": 32, "heads": 2, "layers": 1}}}})
    tokens = clipfast.tokenize(["a cat", "a dog"])
    with torch.inference_mode():
        assert model.encode_text(tokens).isfinite().all()
    x = torch.nn.functional.normalize(torch.randn(512, 64), dim=-1).requires_grad_()
    clipfast.ops.contrastive_loss(x, x, 10.0).backward()
    loss = clipfast.ContrastiveLoss()(*model(torch.randn(2, 3, 16, 16), tokens))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    os._exit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
"""
    run_python(code)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("1.13.1", "clipfast needs PyTorch 2.10 or later, this is 1.13.1"), ("2.10.0", "No module named 'torch.nn'")],
)
def test_a_pytorch_that_is_too_old_is_told(version: str, expected: str) -> None:
    code = f"""
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch"].__version__ = {version!r}
import clipfast
try:
    clipfast.ViT
except ImportError as error:
    print(error)
"""
    assert run_python(code).startswith(expected)


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
