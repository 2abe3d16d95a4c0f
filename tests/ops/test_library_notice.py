"""What the first model says where the op library is missing: who says it, when, and the remedy of each reason."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast import installation, ops
from clipfast.ops import announcements, contrastive_kernels, library, library_notice

COST = "inference on the CPU and the losses run in PyTorch, which is right but slower"
AGAIN = "run `pip install again`"


@pytest.fixture(autouse=True)
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package without an op library, about which nothing was said yet."""
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    monkeypatch.setattr(library_notice, "_told", False)
    monkeypatch.setattr(installation, "command", lambda: "`pip install again`")
    monkeypatch.setattr(installation, "clone", lambda: None)
    monkeypatch.setattr(installation, "other_built", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    library.unavailable.cache_clear()
    yield tmp_path
    library.unavailable.cache_clear()


def model() -> torch.nn.Module:
    return clipfast.ViT(image_size=16, patch_size=8, width=16, layers=1, heads=1, output_dim=8)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_first_model_says_it_and_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_kernels, "native", None)
    monkeypatch.setattr(contrastive_kernels, "native_unavailable", library.unavailable())
    with pytest.warns(ops.FallbackWarning, match="clipfast: the op library was not built") as said:
        first = model()
    (warning,) = said
    # it is put down to who made the model
    assert warning.filename == __file__
    with silence():
        first(torch.zeros(2, 3, 16, 16))
        model()
        clipfast.ContrastiveLoss()(torch.eye(4, 8), torch.eye(4, 8), torch.tensor(2.0))


def test_a_loss_without_a_model_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_kernels, "native", None)
    monkeypatch.setattr(contrastive_kernels, "native_unavailable", library.unavailable())
    with pytest.warns(ops.FallbackWarning, match="clipfast: the op library was not built") as said:
        clipfast.ContrastiveLoss()(torch.eye(4, 8), torch.eye(4, 8), torch.tensor(2.0))
    assert len(said) == 1
    with silence():
        model()


def test_compiled_losses_are_silent_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_kernels, "native", None)
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    reasons = (library.unavailable(), "another reason")
    for why, loss in itertools.product(reasons, (ops.contrastive_loss, ops.siglip_loss)):
        monkeypatch.setattr(contrastive_kernels, "native_unavailable", why)
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", ops.FallbackWarning)
            found = torch.compile(loss, fullgraph=True, backend="eager")(features, features, torch.tensor(2.0))
        with warnings.catch_warnings(action="ignore"):
            assert torch.equal(found, loss(features, features, torch.tensor(2.0)))


def test_the_words_of_a_loss_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(announcements, "_announced", set())
    monkeypatch.setattr(library_notice, "words_of_cuda", lambda reason: made.append(reason) or f"{reason}, in words")
    monkeypatch.setattr(contrastive_kernels, "native", None)
    monkeypatch.setattr(contrastive_kernels, "native_unavailable", library.WITHOUT_CUDA)
    with pytest.warns(ops.FallbackWarning, match=f"{library.WITHOUT_CUDA}, in words"):
        ops.contrastive_loss(torch.eye(4, 8), torch.eye(4, 8), torch.tensor(2.0))
    ops.contrastive_loss(torch.eye(4, 8), torch.eye(4, 8), torch.tensor(2.0))
    # it reads files and looks for what is installed: nothing for every step
    assert made == [library.WITHOUT_CUDA]


def test_an_accelerated_model_says_it() -> None:
    from torchvision.models import VisionTransformer

    foreign = VisionTransformer(16, 8, num_layers=1, num_heads=1, hidden_dim=16, mlp_dim=32)
    with pytest.warns(ops.FallbackWarning, match="clipfast: the op library was not built") as said:
        clipfast.accelerate(foreign)
    (warning,) = said
    assert warning.filename == __file__


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_backend_that_was_asked_for_keeps_it_for_later(name: str) -> None:
    with silence(), clipfast.backend(name):
        model()
    with pytest.warns(ops.FallbackWarning, match="was not built"):
        model()


def test_nobody_speaks_while_operators_are_watched() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            return function(*arguments, **(named or {}))

    with silence(), Watch():
        model()
    with pytest.warns(ops.FallbackWarning, match="was not built"):
        model()


def rank_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")


def rank_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)


def worker_of_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker")


def process_that_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)


def switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_NO_LIBRARY", "1")


def without_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


SILENT = (
    rank_of_the_machine,
    rank_of_a_group,
    worker_of_a_loader,
    process_that_begins,
    switched_off,
    without_a_remedy,
)


@pytest.mark.parametrize("become", SILENT, ids=[f.__name__ for f in SILENT])
def test_one_process_speaks_and_only_where_something_can_be_done(become, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch)
    with silence():
        model()


def test_the_first_rank_of_a_machine_speaks_though_it_is_not_the_first_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_of_a_group(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.warns(ops.FallbackWarning, match="was not built"):
        model()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"reason": "no C++ compiler was found (c++)", "remedy": "install g++"},
            f"the op library was not built: no C++ compiler was found (c++): {COST}. To build it, install g++, "
            f"then {AGAIN}",
        ),
        ({"reason": "why"}, f"the op library was not built: why: {COST}. To build it, {AGAIN}"),
        (None, f"the op library was not built: clipfast was not installed with it: {COST}. To build it, {AGAIN}"),
    ],
)
def test_what_is_said_of_a_build(record: dict | None, words: str, unbuilt: Path) -> None:
    if record is not None:
        (unbuilt / "_build.json").write_text(json.dumps(record))
    assert library_notice.words() == words


def test_what_is_said_in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "clone", lambda: Path("/a/clone"))
    words = f"the op library was not built: clipfast runs from its sources in /a/clone: {COST}. To build it, {AGAIN}"
    assert library_notice.words() == words
    monkeypatch.setattr(installation, "other_built", lambda: Path("/site/clipfast"))
    hint = "; or start Python in another folder, where it finds the clipfast in /site/clipfast"
    assert library_notice.words() == words + hint


def test_what_is_said_of_a_library_that_does_not_load(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unbuilt / "libclipfast.so").write_bytes(b"\x7fELF and nothing else")
    words = library_notice.words()
    assert "install clipfast again" in words
    assert words.endswith(f"{COST}. To mend it, {AGAIN}")
    # another remedy than an install
    library.unavailable.cache_clear()
    monkeypatch.setattr(library, "_damage", lambda *_: None)
    monkeypatch.setattr(library.torch, "__version__", "2.9.1")
    assert library_notice.words().endswith(f"upgrade PyTorch, to the same kind of build: {COST}")


@pytest.mark.parametrize(("remedy", "first"), [("install the toolkit", "install the toolkit, then "), (None, "")])
def test_what_is_said_of_a_card(remedy: str | None, first: str, unbuilt: Path) -> None:
    _, refusal = library.card_support("none", (9, 0), None)
    assert library_notice.words_of_cuda(refusal) == refusal
    (unbuilt / "_build.json").write_text(json.dumps({"cuda_reason": "no nvcc was found", "cuda_remedy": remedy}))
    words = f"the op library was built without CUDA: no nvcc was found. To build it with CUDA, {first}{AGAIN}"
    assert library_notice.words_of_cuda(refusal) == words
    _, refusal = library.card_support("13.0:90a", (8, 0), None)
    assert library_notice.words_of_cuda(refusal) == refusal
