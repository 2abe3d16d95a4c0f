"""What every test needs before it imports the rivals."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Generator, Iterable
from pathlib import Path

import compile_once
import interpreter
import pytest
import torch
import torchvision_on_cpu

import clipfast  # noqa: F401  # from wherever it is, before the path changes

# `python -m pytest` puts the clone's root on the path, where transformers' `import kernels` would find our folder
_root = Path(__file__).parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _root]

# workers side by side share the cores: one thread each
if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)

# what the machine's owner tuned would choose other implementations than those that a test is about
os.environ["CLIPFAST_TUNED"] = "off"

# models come from code here, never from a hub
os.environ["HF_HUB_OFFLINE"] = "1"

# before the rivals, which import torchvision
torchvision_on_cpu.enable()

# before the rivals, which import Triton
interpreter.enable()


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a build without CUDA takes objects from the run's other builds; empty if it cannot."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    command = compile_once.command(folder / "objects")
    return {} if command is None else {"CXX": command}


def pytest_configure(config: pytest.Config) -> None:
    """Let a kernel that fails fail its test: in use PyTorch would compute instead, and nobody would notice here."""
    config.addinivalue_line("filterwarnings", "error::clipfast.ops.fallback.KernelFallbackWarning")


# Files whose tests take a quarter of a minute or more, the longest first (CONTRIBUTING.md says how long). They begin
# a run: one that came last would leave the other workers idle. xdist's own order is by the number of tests.
LONGEST = (
    "models/test_parity_open_clip.py",
    "kernels/test_attention_kernels.py",
    "test_wheel.py",
    "test_readme.py",
    "train/test_run.py",
    "train/test_stopping.py",
    "test_doctor.py",
    "models/test_parity_transformers.py",
    "kernels/test_trust.py",
    "kernels/test_layer_norm_kernels.py",
    "ops/test_tensor_core_step.py",
    "models/test_export.py",
    "test_host_path.py",
    "ops/test_contrastive_loss_kernels.py",
    "test_install.py",
    "train/test_demo.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes the longest, and skip what needs a GPU where there is none."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


# files whose tests take gigabytes each
LARGE = {"test_parity_open_clip.py"}

# Set where nothing can be installed, such as by `make gpu`: tests skip what they miss. Elsewhere that is an error.
SKIP_MISSING = os.environ.get("CLIPFAST_SKIP_MISSING") == "1"


class _Module(pytest.Module):
    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                pytest.skip(str(error.__cause__), allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip a file that imports what is not installed, where that was asked for."""
    return _Module.from_parent(parent, path=module_path) if SKIP_MISSING else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Give memory back to the system after each file: glibc keeps gigabytes of what large models leave in pieces."""
    if sys.platform == "linux" and (nextitem is None or nextitem.path != item.path or item.path.name in LARGE):
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skip a test that needs what is not installed, where that was asked for."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if SKIP_MISSING:
            pytest.skip(str(error))
        raise
