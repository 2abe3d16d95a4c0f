"""The process' plan: who is asked in which order, one plan for all ranks, and what a compiler makes of a change."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import clipfast
from clipfast import ops
from clipfast.ops import dispatch, fallback, library, measured, plan, rules, trust, tuned

CPU = torch.device("cpu")
X, WEIGHT = torch.randn(3, 64), torch.ones(64)
NORM = "float32, width ≤ 256, small, training"
Known = Callable[..., None]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[Known]:
    """Set what is known of this machine; nothing by default."""

    def know(
        of_file: dict[str, dict[str, str]] | None = None,
        of_card: dict[str, dict[str, str]] | None = None,
        reason: str = "no tuned file",
        path: str = "tuned.json",
    ) -> None:
        found = None if of_file is None else tuned.Tuned(path=Path(path), fastest=of_file)
        monkeypatch.setattr(tuned, "find", lambda device: (found, "" if found else reason))
        cards = {} if of_card is None else {"cpu": measured.Measurements("2.13", "3.7", "abc", of_card)}
        monkeypatch.setattr(measured, "CARDS", cards)
        plan.reset()

    know()
    yield know
    monkeypatch.undo()
    plan.reset()


def explained() -> str:
    return clipfast.explain("layer_norm", X, WEIGHT, WEIGHT)


@pytest.mark.parametrize(
    ("of_cpu", "why_not", "native"), [(True, None, True), (True, "no", False), (False, "no", False)]
)
def test_whose_amx_a_cpu_has(of_cpu: bool, why_not: str | None, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: of_cpu)
    monkeypatch.setattr(library, "why_no_amx", lambda: why_not)
    machine = plan.machine_of(CPU)
    assert (machine.amx, machine.native_amx) == (of_cpu, native)


def test_the_order_of_authority(known: Known) -> None:
    lines = explained().splitlines()
    assert lines[0] == "layer_norm: reference (F.layer_norm)"
    assert lines[1].startswith("  because the rule takes reference: ")
    assert lines[-1] == "  `clipfast tune` would measure it here"
    known(of_card={"layer_norm": {NORM: "triton"}})
    lines = explained().splitlines()
    assert lines[0] == "layer_norm: triton (one pass over the rows)"
    assert lines[1] == (
        "  because the measurement of this card takes triton: triton was the fastest on cpu, as shipped with clipfast "
        f"({NORM})"
    )
    assert "tune" not in explained()
    known(of_file={"layer_norm": {NORM: "reference"}}, of_card={"layer_norm": {NORM: "triton"}})
    lines = explained().splitlines()
    assert lines[0] == "layer_norm: reference (F.layer_norm)"
    assert "the tuned file takes reference: reference was the fastest in the tuned file tuned.json" in lines[1]
    assert lines[2].endswith("(one pass over the rows): the tuned file takes reference")
    with clipfast.backend("triton"):
        lines = explained().splitlines()
        assert lines[0].startswith("layer_norm: triton")
        assert lines[1] == "  because the triton backend was asked for"


def test_what_the_plan_decides_serves(known: Known) -> None:
    expected = ops.layer_norm(X, WEIGHT, WEIGHT).grad_fn
    assert expected is None
    leaf = X.clone().requires_grad_()
    assert "NativeLayerNorm" in type(ops.layer_norm(leaf, WEIGHT, WEIGHT).grad_fn).__name__
    known(of_file={"layer_norm": {NORM: "triton"}})
    assert "_LayerNorm" in type(ops.layer_norm(leaf, WEIGHT, WEIGHT).grad_fn).__name__
    # of another class nothing is known
    with torch.autocast("cpu", torch.bfloat16):
        assert "_LayerNorm" not in type(ops.layer_norm(leaf, WEIGHT, WEIGHT).grad_fn).__name__
    plan.adopt(json.dumps(json.loads(plan.export()) | {"devices": {}}))
    known()
    assert "NativeLayerNorm" in type(ops.layer_norm(leaf, WEIGHT, WEIGHT).grad_fn).__name__


def test_explain_says_why_a_tuned_file_is_not_used_and_nothing_warns(known: Known) -> None:
    known(reason="it was written with torch 2.12, this is 2.13")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = explained()
        ops.layer_norm(X, WEIGHT, WEIGHT)
    assert "the tuned file is not used: it was written with torch 2.12, this is 2.13; `clipfast tune` writes" in said
    known(of_file={"attention": {}, "layer_norm": {"float16, width ≤ 256, training": "triton"}})
    assert f"tuned.json has no entry for {NORM}" in explained()


def test_a_file_names_only_what_an_op_has(known: Known) -> None:
    known(of_file={"layer_norm": {NORM: "cudnn"}, "contrastive_loss": {NORM: "reference"}, "conv": {NORM: "triton"}})
    assert "because the rule takes" in explained()
    # all logits at once are never fast enough for their memory
    assert not clipfast.explain("contrastive_loss", X, X, 1.0).startswith("contrastive_loss: reference")
    # and what a file names may not serve a call
    known(of_file={"attention": {"float32, head_dim 8, ≤ 64 tokens, training": "triton"}})
    said = clipfast.explain("attention", torch.zeros(1, 4, 48), 2)
    assert said.startswith("attention: torch")
    assert "the tuned file takes triton, and torch where that cannot serve" in said
    assert "head_dim 8 is not served" in said


def test_a_device_is_asked_about_once_and_its_plan_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fastest = {"layer_norm": {NORM: "triton"}}

    def find(device: torch.device) -> tuple[tuned.Tuned, str]:
        asked.append(device)
        return tuned.Tuned(path=Path("tuned.json"), fastest=dict(fastest)), ""

    monkeypatch.setattr(tuned, "find", find)
    plan.reset()
    for _ in range(3):
        assert dispatch.chosen("layer_norm", X, WEIGHT, WEIGHT) == "triton"
    # a file that is written now is for the next process
    fastest["layer_norm"] = {NORM: "reference"}
    assert dispatch.chosen("layer_norm", X, WEIGHT, WEIGHT) == "triton"
    assert asked == [CPU]
    plan.reset()
    assert dispatch.chosen("layer_norm", X, WEIGHT, WEIGHT) == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_here_gets_the_conservative_choice() -> None:
    key = rules.Key("layer_norm", ("bfloat16",) * 2, training=True, large=True, width=1024)
    assert plan.decision("layer_norm", key, torch.device("cuda", 0)).backend == "reference"
    assert plan.name_of(torch.device("cuda", 0)) == "cuda"
    assert json.loads(plan.export(torch.device("cuda", 0)))["devices"]["cuda"]["machine"]["capability"] is None


# ----------------------------------------------------------------------------------------------------------------------
# ranks


def test_a_rank_adopts_the_plan_of_another(known: Known) -> None:
    known(of_file={"layer_norm": {NORM: "triton"}}, path="/home/rank0/tuned.json")
    theirs, digest = plan.export(), plan.digest()
    known()
    own = plan.digest()
    assert own != digest
    plan.adopt(theirs)
    assert plan.digest() == digest
    assert dispatch.chosen("layer_norm", X, WEIGHT, WEIGHT) == "triton"
    assert "/home/rank0/tuned.json" in explained()
    # a card of another capability than rank 0's follows rank 0's
    content = json.loads(theirs)
    content["devices"]["cuda"] = content["devices"]["cpu"] | {"machine": rules.Machine("cuda", (9, 0))._asdict()}
    plan.adopt(json.dumps(content))
    key = rules.Key("attention", ("bfloat16",), training=True, large=True, width=64, tokens=64)
    assert plan.decision("attention", key, torch.device("cuda", 3)).backend == "triton"
    plan.reset()
    assert plan.digest() == own


def test_the_digest_is_of_all_that_decides(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [plan.digest()]
    assert plan.digest() == seen[0]
    known(of_file={"layer_norm": {NORM: "triton"}})
    seen.append(plan.digest())
    known(of_file={"layer_norm": {NORM: "triton"}}, path="/elsewhere/tuned.json")
    assert plan.digest() == seen[-1]
    known(of_card={"layer_norm": {NORM: "triton"}})
    seen.append(plan.digest())
    with monkeypatch.context() as patch:
        patch.setattr(rules, "VERSION", rules.VERSION + 1)
        seen.append(plan.digest())
    with monkeypatch.context() as patch:
        patch.setitem(trust._verdicts, (CPU, "layer_norm forward, width 64", 1), "wrong")
        seen.append(plan.digest())
    with monkeypatch.context() as patch:
        patch.setitem(fallback._failed, ("layer_norm", CPU), "no C compiler")
        seen.append(plan.digest())
    assert len(set(seen)) == len(seen)
    assert all(len(digest) == 12 for digest in seen)


def test_what_one_rank_refuses_no_rank_uses(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan.export()
    with monkeypatch.context() as patch:
        patch.setitem(trust._verdicts, (CPU, "a kernel", 1), "a race")
        patch.setitem(fallback._failed, ("bias_gelu", CPU), "no C compiler")
        second = plan.export()
    merged = plan.merge([first, second])
    assert plan.merge([second, first]) == merged
    trial = trust.Trial("a kernel", 1, lambda programs: pytest.fail("it passed here"))
    monkeypatch.setitem(trust._verdicts, (CPU, "a kernel", 1), None)
    assert trust.refusal("layer_norm", CPU, [trial]) is None
    plan.adopt(merged)
    assert trust.refusal("layer_norm", CPU, [trial]) == "a race"
    assert fallback.failure("bias_gelu", CPU) == "no C compiler"
    assert fallback.failure("layer_norm", CPU) is None
    with torch.no_grad():
        assert "triton" not in dispatch.able("bias_gelu", X, WEIGHT, "none")
    plan.reset()
    assert trust.refusal("layer_norm", CPU, [trial]) is None
    assert fallback.failure("bias_gelu", CPU) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        "[1]",
        f'{{"schema": 1, "rules": {rules.VERSION}}}',
        f'{{"schema": 1, "rules": {rules.VERSION}, "devices": {{"cpu": {{}}}}}}',
    ],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    generation = plan.generation
    with pytest.raises(ValueError, match=r"plan.adopt\(text\): got .*, expected what plan.export gives"):
        plan.adopt(text)
    assert plan.generation == generation
    with pytest.raises(ValueError, match="got none"):
        plan.merge([])


def test_ranks_with_other_rules_are_refused() -> None:
    content = json.loads(plan.export())
    for change in ({"rules": rules.VERSION + 1}, {"schema": plan.SCHEMA + 1}):
        with pytest.raises(ValueError, match="every rank needs the same clipfast"):
            plan.adopt(json.dumps(content | change))


# ----------------------------------------------------------------------------------------------------------------------
# compilers


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, WEIGHT, WEIGHT)


def test_a_change_of_the_plan_compiles_anew(known: Known) -> None:
    counter = CompileCounter()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return counter(graph, inputs)

    torch._dynamo.reset()
    model = torch.compile(Block(), backend=keep, fullgraph=True)
    expected = Block()(X)

    def run(compilations: int, kernel: bool) -> None:
        for _ in range(2):
            assert (model(X) - expected).abs().max() < 1e-5
        assert counter.frame_count == compilations
        assert ("layer_norm_forward" in _operators(graphs[-1])) == kernel

    run(1, kernel=False)
    with_kernel = {"layer_norm": {f"{NORM.replace('small', 'large')}, compiled": "triton"}}
    known(of_file=with_kernel)
    run(2, kernel=True)
    theirs = plan.export()
    known()
    run(3, kernel=False)
    plan.adopt(theirs)
    run(4, kernel=True)
    with clipfast.backend("reference"):
        run(5, kernel=False)
    # what has been compiled before serves again
    count = counter.frame_count
    model(X)
    assert counter.frame_count == count
    # asking for the plan, or reading a device's part of it, is no change
    plan.digest()
    explained()
    model(X)
    assert counter.frame_count == count


def _operators(graph: torch.fx.GraphModule) -> str:
    """Return the code of a graph and of what it calls."""
    parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    return "\n".join(part.code for part in parts)
