"""Tuning a small model with clocks that say what a test wants."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import interpreter
import pytest
import torch
from torch import Tensor

import clipfast
from clipfast.benchmark.timing import Clock
from clipfast.ops import dispatch, native_rows, plan, registry, tuned
from clipfast.tuning import cases, measure
from clipfast.tuning import run as tuning
from clipfast.tuning.run import Report, tune

CPU = torch.device("cpu")
# what a side of one op is forced to is the last that was asked for; a whole tower's has choices
Seconds = Callable[[str], float]


class MadeUpClock(Clock):
    """Runs a call once, and says of its time what ``seconds`` gives for the backend that it was forced to."""

    seconds: Seconds = staticmethod(lambda backend: 1.0)
    asked: list[str] = []  # noqa: RUF012

    def round(self, call: Callable[..., object], inputs: object, calls: int) -> tuple[float, float]:
        self.asked.clear()
        call(*inputs[0])
        seconds = self.seconds(self.asked[-1])
        return seconds, seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Seconds], type[Clock]]]:
    forced, tried = dispatch.backend, tuned.instead

    def noting(name: str) -> object:
        MadeUpClock.asked.append(name)
        return forced(name)

    def noting_choices(choices: dict, why: str) -> object:
        MadeUpClock.asked.append("tower after" if choices else "tower before")
        return tried(choices, why)

    monkeypatch.setattr(dispatch, "backend", noting)
    monkeypatch.setattr(tuned, "instead", noting_choices)

    def with_seconds(seconds: Seconds) -> type[Clock]:
        monkeypatch.setattr(MadeUpClock, "seconds", staticmethod(seconds))
        return MadeUpClock

    yield with_seconds
    monkeypatch.undo()
    plan.reset()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("CLIPFAST_TUNED", raising=False)
    # kernels in the interpreter take seconds
    interpreter.leave_out(monkeypatch)
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(cases._ELEMENTS, "cpu", 5 * 64 * 3)
    monkeypatch.setitem(cases._PAIRS, "cpu", 12)
    monkeypatch.setattr(cases, "_LAYERS", 2)
    plan.reset()
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "small.json"
    text = {"context_length": 20, "width": 64, "heads": 2, "layers": 6}
    vision = {"image_size": 16, "layers": 6, "width": 64, "head_width": 32, "patch_size": 8}
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def tune_fp32(model: str, clock: type[Clock], **more: object) -> Report:
    return tune([model], device="cpu", precisions=["fp32"], new_clock=clock, **more)


# what the op library computes too, where there is one
_OF_ROWS = set() if native_rows.refusal(torch.zeros(2, 8)) else {"layer_norm", "add_layer_norm", "bias_gelu"}


def attention_of_images() -> str:
    return clipfast.explain("attention", torch.zeros(2, 5, 192), 2)


def test_the_public_name() -> None:
    assert clipfast.tune is tune


def test_a_lead_of_3_percent_changes_nothing_and_one_of_20_does(model: str, clock, cache: Path) -> None:
    report = tune_fp32(model, clock(lambda backend: 1.0 if backend == "reference" else 1.03))
    assert report.lines
    assert not report.changes
    assert report.wrong == []
    assert report.path == tuned.path_of(CPU)
    assert attention_of_images().startswith("attention: torch")
    report = tune_fp32(model, clock(lambda backend: 1.0 if backend == "reference" else 1.2))
    changed = {line.op for line in report.changes}
    assert "attention" in changed
    for line in report.changes:
        assert line.verdict.backend == "reference"
        assert line.verdict.lead == pytest.approx(1.2)
        assert line.verdict.rounds >= 17
    # logits of a whole batch are held for no lead
    assert not changed & {"contrastive_loss", "siglip_loss"}
    # packed captions have any length, and attention's weights its square
    assert not any("packed" in line.key for line in report.changes if line.op == "attention")
    # this process and others go by it at once
    said = attention_of_images()
    assert said.startswith("attention: reference")
    assert str(report.path) in said
    assert tuned.find(CPU)[0].models == ("small fp32",)
    # what is measured again is decided again
    tune_fp32(model, clock(lambda backend: 1.0))
    assert attention_of_images().startswith("attention: torch")


def test_noise_changes_nothing(model: str, clock) -> None:
    drawn = random.Random(5)
    report = tune_fp32(model, clock(lambda backend: 1 + 0.1 * drawn.gauss(0, 1)))
    assert report.lines
    assert not report.changes


def test_a_wrong_candidate_never_wins_however_fast(model: str, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.entries["attention"]
    # the rule's own is right, and the reference is the measure: a third stands in for a kernel
    # of two by one name, the first is for cards
    right, reference = ([i for i in op.implementations if i.backend == n][-1] for n in ("torch", "reference"))
    fast = dispatch.Implementation("native", "fast and wrong", _a_little_off(right.run))
    monkeypatch.setitem(registry.entries, "attention", op.with_implementations(*op.implementations, fast))
    report = tune_fp32(model, clock(lambda backend: 0.01 if backend == "native" else 1.0))
    assert not [line for line in report.changes if line.op == "attention"]
    assert any(text.startswith("attention (native) computes wrong results") for text in report.wrong)
    off = dispatch.Implementation("torch", "fast and wrong", _a_little_off(right.run))
    # and where the rule's is wrong, the reference serves although it is slower
    monkeypatch.setitem(registry.entries, "attention", op.with_implementations(off, reference))
    report = tune_fp32(model, clock(lambda backend: 0.01 if backend == "torch" else 1.0))
    assert {line.verdict.backend for line in report.lines if line.op == "attention"} == {"reference"}


def _a_little_off(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: run(*arguments) * 1.0001


def test_a_candidate_that_fails_is_out_of_the_question(model: str, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    op = registry.entries["attention"]
    fails = dispatch.Implementation("native", "fails", fail)
    monkeypatch.setitem(registry.entries, "attention", op.with_implementations(*op.implementations, fails))
    report = tune_fp32(model, clock(lambda backend: 1.0))
    assert any("no kernel image" in text for text in report.wrong)
    assert not [line for line in report.changes if line.op == "attention"]


def test_what_makes_a_whole_tower_slower_is_taken_back(model: str, clock) -> None:
    times = {"reference": 1.0, "tower before": 1.0, "tower after": 1.1}
    report = tune_fp32(model, clock(lambda backend: times.get(backend, 2.0)))
    assert report.lines
    assert not report.changes
    assert any("slower with it" in line.verdict.why for line in report.lines)
    times["tower after"] = 0.99
    assert tune_fp32(model, clock(lambda backend: times.get(backend, 2.0))).changes


def test_ctrl_c_keeps_what_is_done(model: str, clock) -> None:
    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("encoder"):
            raise KeyboardInterrupt

    report = tune_fp32(model, clock(lambda backend: 1.0), progress=progress)
    assert report.interrupted
    assert tuned.find(CPU)[0].confirmed.keys() == _OF_ROWS | {
        "attention",
        "single_query_attention",
        "contrastive_loss",
        "siglip_loss",
    }
    report.path.unlink()
    # what wins by itself, while no tower has been run with it
    fast = clock(lambda backend: 1.0 if backend == "reference" else 2.0)
    report = tune_fp32(model, fast, progress=progress)
    assert report.interrupted
    # losses are no part of a tower, and of small LayerNorms with gradients it is what the rule says
    norms = _OF_ROWS - {"bias_gelu"}
    assert tuned.find(CPU)[0].choices.keys() == norms | {"contrastive_loss", "siglip_loss"}
    assert not tuned.find(CPU)[0].fastest

    def late(done: int, total: int, what: str) -> None:
        if what.startswith("siglip_loss of"):
            raise KeyboardInterrupt

    report = tune_fp32(model, fast, progress=late)
    assert report.interrupted
    assert "attention" in tuned.find(CPU)[0].fastest


def test_a_home_that_cannot_be_written_to_costs_the_file_alone(
    model: str, clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "file" / "cache"))
    fast = clock(lambda backend: 1.0 if backend == "reference" else 2.0)
    report = tune_fp32(model, fast)
    assert report.path is None
    assert "file" in report.not_written
    assert report.changes
    elsewhere = tmp_path / "mine.json"
    assert tune_fp32(model, fast, output=elsewhere).path == elsewhere
    assert attention_of_images().startswith("attention: torch")
    monkeypatch.setenv("CLIPFAST_TUNED", str(elsewhere))
    plan.reset()
    assert attention_of_images().startswith("attention: reference")


def test_what_there_is_no_time_for_stays(model: str, clock) -> None:
    report = tune_fp32(model, clock(lambda backend: 1.0 if backend == "reference" else 2.0), seconds=1e-6)
    assert report.left_out > 3
    assert not report.lines


def test_what_no_tower_had_time_for_stays(model: str, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_FOR_CALLS", 1e12)
    report = tune_fp32(model, clock(lambda backend: 1.0 if backend == "reference" else 2.0), seconds=1e-9)
    assert report.lines
    assert not report.changes
    assert report.left_out >= 1
    assert any("not tried in a tower" in line.verdict.why for line in report.lines)


def test_a_model_that_fails_costs_those_before_it_nothing(
    model: str, clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second.json"
    second.write_text(Path(model).read_text())
    passes = cases.passes

    def failing(name: str, *more: object) -> object:
        if name == str(second):
            raise MemoryError("none left")
        return passes(name, *more)

    monkeypatch.setattr(cases, "passes", failing)
    with pytest.raises(MemoryError):
        tune([model, str(second)], device="cpu", precisions=["fp32"], new_clock=clock(lambda backend: 1.0))
    assert tuned.find(CPU)[0].confirmed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["ViT-B-23"]}, "ViT-B-32"),
        ({"precisions": ["fp8"]}, "got 'fp8'"),
        ({"device": "meta"}, "got 'meta'"),
        ({"device": "cuda"}, "no card"),
        ({"seconds": 0}, "got 0"),
        ({"seconds": float("nan")}, "got nan"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments: dict, message: str) -> None:
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(ValueError, match=message):
        tune(**{"models": ["ViT-B-32"], "device": "cpu", **arguments})


def test_what_a_model_asks_is_what_was_measured(model: str, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of its blocks, in training and in use, it asks for no class of calls that tuning has not seen."""
    precisions = ["fp32", "bf16"]
    tune([model], device="cpu", precisions=precisions, new_clock=clock(lambda backend: 1.0))
    measured = tuned.find(CPU)[0].confirmed
    asked: set[tuple[str, str]] = set()
    original = dispatch.call

    def noting(op: str, *args: object) -> object:
        if len(set(dispatch.able(op, *args)) & set(dispatch.plannable(op))) > 1:
            asked.add((op, dispatch.shape_class(op, *args)))
        return original(op, *args)

    whole = clipfast.create_model(model)
    images, tokens = torch.randn(3, 3, 16, 16), torch.zeros(3, 20, dtype=torch.long)
    tokens[:, 4], tokens[:, 9] = 7, whole.eos_id
    monkeypatch.setattr(dispatch, "call", noting)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = whole(images, tokens)
            for training in (True, False):
                with torch.set_grad_enabled(training):
                    whole(images, tokens)
                    for tower in (whole.visual, whole):
                        handle = tower.transformer.resblocks[0].attn.out_proj.register_forward_hook(lambda *a: None)
                        whole(images, tokens)
                        handle.remove()
        clipfast.ContrastiveLoss()(*(f.float() for f in features[:2]), features[2])
    assert {op for op, _ in asked} == _OF_ROWS | {"attention", "single_query_attention", "encoder", "contrastive_loss"}
    # that of packed captions has no second implementation here whose memory does not grow with their square
    packed = {(op, key) for op, key in asked if op == "attention" and "packed" in key}
    missing = {(op, key) for op, key in asked - packed if key not in measured.get(op, {})}
    assert not missing


def test_a_call_is_checked_in_its_own_surroundings() -> None:
    """The errors of bfloat16 under autocast are measured by those of plain PyTorch in bfloat16."""
    qkv = torch.randn(2, 5, 192).bfloat16()
    call = cases.Call("attention", "", (qkv, 2, False, None, None), {}, (0,), True, torch.bfloat16, "a test")
    assert measure.complaints(call, ["torch", "reference"]) == {}


def test_memory_that_runs_out_in_a_check_is_nobodys_fault(model: str, clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    op = registry.entries["attention"]
    large = dispatch.Implementation("native", "large", full)
    monkeypatch.setitem(registry.entries, "attention", op.with_implementations(*op.implementations, large))
    report = tune_fp32(model, clock(lambda backend: 1.0))
    assert report.wrong == []
    assert any("no memory" in line.verdict.why for line in report.lines)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy * 1.01


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    op = registry.entries["attention"]
    torchs = [i for i in op.implementations if i.backend == "torch"][-1]  # the first is for cards
    wrong = dispatch.Implementation("native", "", lambda *a: _WrongGradient.apply(torchs.run(*a)))
    monkeypatch.setitem(registry.entries, "attention", op.with_implementations(*op.implementations, wrong))
    qkv = torch.randn(2, 5, 192)
    call = cases.Call("attention", "", (qkv, 2, False, None, None), {}, (0,), True, None, "a test")
    assert measure.complaints(call, ["torch"]) == {}
    assert "wrong results" in measure.complaints(call, ["native"])["native"]
