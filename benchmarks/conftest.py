"""The options of ``pytest benchmarks/``, the limits of the machine, and the results' file at the end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

if not torch.cuda.is_available() and importlib.util.find_spec("torchvision"):
    # torchvision's Python half asks for these two schemas when it is imported
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from harness import DEVICE, ROUNDS, SESSION

from clipfast.benchmark.machine import keep_pages, machine_name


class WithoutPlugin:
    """Stands in for pytest-benchmark where it is absent: rounds are timed and recorded all the same."""

    @pytest.fixture
    def benchmark(self):
        return None


def pytest_addoption(parser):
    group = parser.getgroup("clipfast")
    group.addoption(
        "--scale", choices=list(ROUNDS), default="short", help="short: minutes; full: an hour; smoke: a try"
    )
    group.addoption("--threads", type=int, help="of PyTorch on the CPU; by default as many as PyTorch takes")
    group.addoption(
        "--allocator",
        choices=["kept", "default"],
        default="kept",
        help="kept: every side keeps the pages that it freed; default: the C library may give them back",
    )
    group.addoption("--results", type=Path, help="the results' folder, or file if it ends with .json")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: only in the full set")
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(WithoutPlugin())
        config.addinivalue_line("markers", "benchmark: read by pytest-benchmark, which is not installed")
    SESSION.scale, SESSION.results = config.getoption("--scale"), config.getoption("--results")
    if DEVICE == "cpu" and config.getoption("--allocator") == "kept" and keep_pages():
        SESSION.allocator = "keeps its pages"
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_report_header(config):
    threads = f", {torch.get_num_threads()} threads" if DEVICE == "cpu" else ""
    no_gpu = "no NVIDIA GPU: measuring the CPU, " if DEVICE == "cpu" else ""
    return f"clipfast benchmarks: {no_gpu}{machine_name(DEVICE)}{threads}, scale {SESSION.scale}"


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=SESSION.read_clock, group=Path(item.fspath).stem[5:], warmup=False))
    if SESSION.scale != "full":
        kept = [item for item in items if item.get_closest_marker("full") is None]
        if len(kept) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item not in kept])
            items[:] = kept


def pytest_sessionstart(session):
    plugins = session.config.pluginmanager
    terminal, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")

    def write(line):
        with capture.global_and_fixture_disabled():
            terminal.write_line(line)

    if terminal is not None and capture is not None:
        SESSION.write = write


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    chosen = config.getoption("keyword", "") or config.getoption("markexpr", "") or config.getoption("deselect", None)
    files = {Path(a.split("::")[0]).resolve() for a in config.args}
    whole = not chosen and Path(__file__).parent.resolve() in files
    path = SESSION.finish(complete=bool(whole) and exitstatus == 0)
    if path is not None:
        SESSION.write(f"\nwrote {path}")


@pytest.fixture(autouse=True)
def same_start():
    """Every row starts from the same seed, and leaves nothing of what it was compiled for."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset() if "torch._dynamo" in sys.modules else None
