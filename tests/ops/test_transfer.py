"""From host memory to a device: what the host copies; without a GPU, on the CPU and on ``meta``.

That nothing waits for a card is shown on a pretend one, in ``tests/test_host_path.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipfast.ops import attention_packed, transfer

CPU, META = torch.device("cpu"), torch.device("meta")


def test_nothing_is_copied_where_it_lies_already() -> None:
    x, y = torch.arange(3), torch.ones(2, dtype=torch.int32)
    assert transfer.to_device(x, CPU) is x
    there = transfer.together([x, y], CPU)
    assert there[0] is x
    assert there[1] is y


def test_several_tensors_are_views_of_one_buffer() -> None:
    parts = [torch.arange(3, dtype=torch.int32), torch.arange(6).view(2, 3), torch.ones(0), torch.ones(5).double()]
    there = transfer.together(parts, META)
    assert [(t.shape, t.dtype, t.device) for t in there] == [(p.shape, p.dtype, META) for p in parts]
    assert len({t.untyped_storage()._cdata for t in there}) == 1
    assert all(t.storage_offset() * t.element_size() % 16 == 0 for t in there)


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Tensor:
        raise RuntimeError("no accelerator")

    monkeypatch.setattr(Tensor, "pin_memory", refuse)
    # as a device that is none of the CPU's would be treated
    assert transfer._send(torch.arange(3), META).device == META


OFFSETS = torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("operator", "result"),
    [(torch.ops.clipfast.to_device, OFFSETS), (torch.ops.clipfast.offsets_on_device, OFFSETS.int())],
    ids=["to_device", "offsets_on_device"],
)
def test_operators(operator: object, result: Tensor) -> None:
    torch.library.opcheck(operator.default, (OFFSETS, CPU))
    actual = operator(OFFSETS, CPU)
    assert actual.data_ptr() != OFFSETS.data_ptr()
    assert torch.equal(actual, result)
    assert actual.dtype == result.dtype


def test_what_is_known_of_offsets() -> None:
    offsets = OFFSETS.clone()
    attention_packed.remember(offsets, offsets.diff(), 5)
    x = torch.zeros(5, 4)
    assert attention_packed.groups_of(offsets, x) == attention_packed.groups_of(OFFSETS, x)
    assert torch.equal(attention_packed.on_device(offsets, CPU), OFFSETS.int())
    for check in (offsets, OFFSETS):
        with pytest.raises(ValueError, match=r"attention\(cu_seqlens\): got 0 … 5, expected .* the 6 packed tokens"):
            attention_packed.groups_of(check, torch.zeros(6, 4))
