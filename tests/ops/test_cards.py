"""Cards that the op library has code for, PTX for, or nothing, without a card: what the losses then run on, and say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import clipfast
from clipfast import ops
from clipfast.ops import announcements, contrastive_kernels, dispatch, library, plan

WHEEL = "13.0:80,90a,100,100+PTX"
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Pretend that there are cards, and a library with CUDA."""

    def pretend(*capabilities: tuple[int, int], cuda: str = WHEEL, driver: tuple[int, int] | None = (13, 0)) -> None:
        monkeypatch.setattr(library, "build_info", lambda: {"cuda": cuda})
        monkeypatch.setattr(library, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capabilities[index or 0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"card {index or 0}")
        library._card_refusal.cache_clear()
        plan.reset()

    monkeypatch.setattr(contrastive_kernels, "native", contrastive_kernels.chunked)
    monkeypatch.setattr(contrastive_kernels, "native_devices", frozenset({"cpu", "cuda"}))
    # what a PyTorch for CPUs lacks in any case
    monkeypatch.setattr(library, "missing_cuda_entry_points", lambda: None, raising=False)
    monkeypatch.setattr(announcements, "_announced", set())
    yield pretend
    library._card_refusal.cache_clear()
    plan.reset()


def on_card(index: int, use: Callable[[Tensor], object]) -> object:
    """Call ``use`` with features that have a device and no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return use(torch.empty(8, 16, device=f"cuda:{index}"))


def backend_on(index: int) -> str:
    return on_card(index, lambda x: dispatch.chosen("contrastive_loss", x, x, 20.0))


def explanation_on(index: int) -> str:
    return on_card(index, lambda x: clipfast.explain("contrastive_loss", x, x, 20.0))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)])
def test_code_serves(machine: Machine, capability: tuple[int, int]) -> None:
    machine(capability)
    assert backend_on(0) == "native"


@pytest.mark.parametrize("capability", [(11, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("driver", [(13, 0), (13, 2), None])
def test_ptx_serves_what_there_is_no_code_for(machine: Machine, capability: tuple, driver: tuple | None) -> None:
    machine(capability, driver=driver)
    assert backend_on(0) == "native"
    served, how = library.card_support(WHEEL, capability, driver)
    assert served
    assert "PTX" in how


@pytest.mark.parametrize(
    ("capability", "more", "reason"),
    [
        ((7, 5), {}, "compute capability 7.5, the op library needs 8.0 or later"),
        ((9, 0), {"driver": (12, 8)}, "the driver serves CUDA 12.8, the op library needs 13.0 or later"),
        ((12, 0), {"cuda": "13.0:80,90a,100"}, "no code for compute capability 12.0"),
        # PTX of a newer toolkit than the driver knows
        ((12, 0), {"cuda": "13.1:90a,100,100+PTX"}, "no code for compute capability 12.0"),
        # what no version of clipfast knows yet, with a library of one architecture alone
        ((17, 3), {"cuda": "13.0:90a"}, "no code for compute capability 17.3"),
        ((9, 0), {"cuda": "none"}, "built without CUDA"),
    ],
)
def test_a_card_that_it_cannot_serve(machine: Machine, capability: tuple, more: dict, reason: str) -> None:
    machine(capability, **more)
    assert backend_on(0) == "torch"
    assert reason in explanation_on(0)


def test_each_card_is_judged_on_its_own(machine: Machine) -> None:
    machine((9, 0), (7, 5), (12, 0))
    assert [backend_on(index) for index in range(3)] == ["native", "torch", "native"]


def test_one_line_says_why_pytorch_computes(machine: Machine) -> None:
    machine((9, 0), (7, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (0, 1, 0, 1):
            value = on_card(index, lambda x: ops.siglip_loss(x, x, 20.0))
            assert value.shape == ()
            assert value.device == torch.device("cuda", index)
    fallbacks = [w for w in caught if issubclass(w.category, ops.FallbackWarning)]
    assert len(fallbacks) == 1
    assert "compute capability 7.5" in str(fallbacks[0].message)
