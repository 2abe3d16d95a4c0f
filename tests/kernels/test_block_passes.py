"""What a block moves with the kernels: benchmarks/count_block.py, whose figures the docs quote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from clipfast.ops import kernel_ops

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning"),
]
FILE = Path(__file__).parent.parent.parent / "benchmarks" / "count_block.py"


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("count_block", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bytes_of_a_block_under_autocast(counting: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "BATCH", 1)
    # attention's kernels take long in the interpreter; PyTorch's stacks its gradients, which they do not
    refusal = kernel_ops.refusal
    monkeypatch.setattr(
        kernel_ops, "refusal", lambda op, *rest: "it is not counted" if op == "attention" else refusal(op, *rest)
    )
    forward, backward = counting.block_of(counting.ours, "triton", "autocast, images (bfloat16 stream)")
    assert +forward.names == {"add_layer_norm_forward": 2, "bias_gelu_forward": 1}
    stacked = 12 * backward.names["stack"]
    # vectors of weights and statistics are 3% of what 60 rows take
    assert 74 < counting.per_channel(forward) + counting.per_channel(backward) - stacked < 77
    assert backward.names["add_layer_norm_backward"] == 2
    assert backward.names["sum"] == 1
