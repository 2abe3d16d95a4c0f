"""Fingerprints of weights: what a turn finds, what all turns find, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from clipfast.ops import fingerprint, library
from clipfast.ops.fingerprint import Fingerprint, can_be_read

SHAPES = [(768, 768), (2304, 768), (768, 3072), (512, 512), (640, 1500), (70, 1000), (300, 100), (64, 192), (3000, 50)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(params=["native", "sampled"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take the op library's fingerprints, or those of PyTorch."""
    if request.param == "sampled":
        monkeypatch.setattr(fingerprint.library, "unavailable", lambda: "it is not wanted")
    elif library.unavailable() is not None:
        pytest.skip(library.unavailable())
    return request.param


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def at_turn(made: Fingerprint, turn: int) -> bool:
    return made._state.changed(turn)


def found(made: Fingerprint, weight: Tensor, part: tuple, turn: int) -> bool:
    """Return whether a write to a part of a weight shows at a turn; it is undone."""
    kept = weight[part].clone()
    weight[part] += 1
    try:
        return at_turn(made, turn)
    finally:
        weight[part] = kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_part_in_64_is_found_at_once(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    made = Fingerprint([weight_of((3, 8)), weight])
    rows, columns = shape
    high, wide = math.ceil(rows / 64), math.ceil(columns / 64)
    random = torch.Generator().manual_seed(1)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=random))

    for _ in range(60):
        top, left = draw(rows - high + 1), draw(columns - wide + 1)
        assert found(made, weight, (slice(top, top + high),), draw(1000)), f"rows from {top}"
        assert found(made, weight, (slice(None), slice(left, left + wide)), draw(1000)), f"columns from {left}"
        tall = high + draw(rows - high + 1)
        broad = math.ceil(rows * columns / 64 / tall)
        top, left = draw(rows - tall + 1), draw(columns - broad + 1)
        assert found(made, weight, (slice(top, top + tall), slice(left, left + broad)), draw(1000)), (top, left, tall)
    for turn in range(10):
        assert not at_turn(made, turn)


@pytest.mark.parametrize("shape", [(768, 768), (2304, 768), (768, 3072), (3072, 768)], ids=str)
def test_no_block_is_missed(shape: tuple[int, int]) -> None:
    """What a turn reads, line by line, leaves no block of 1/64 of the matrix out."""
    if library.unavailable() is not None:
        pytest.skip(library.unavailable())
    rows, columns, a_line = *shape, 32
    weight = weight_of(shape, torch.bfloat16)
    made, bits = Fingerprint([weight]), weight.view(torch.int16).numpy()
    read = torch.zeros(rows + 1, columns // a_line + 1, dtype=torch.long)
    turn = 11
    for row in range(rows):
        for line in range(columns // a_line):
            bits[row, line * a_line] ^= 1
            read[row + 1, line + 1] = at_turn(made, turn)
            bits[row, line * a_line] ^= 1
    assert read.sum() == rows // (4 if rows >= 2048 else 2)
    area = read.cumsum(0).cumsum(1)
    for tall in range(math.ceil(rows / 64), rows + 1):
        # a block meets at least so many lines of each of its rows
        broad = math.ceil(math.ceil(rows * columns / 64 / tall) / a_line)
        inside = area[tall:, broad:] - area[:-tall, broad:] - area[tall:, :-broad] + area[:-tall, :-broad]
        assert inside.min() > 0, f"a block of {tall} rows and {broad} lines"


@pytest.mark.parametrize("shape", [(768, 768), (2304, 768), (3072, 768)], ids=str)
def test_scattered_rows_are_found(shape: tuple[int, int]) -> None:
    """But for a probability below 3e-4 at once, and always after four turns."""
    if library.unavailable() is not None:
        pytest.skip(library.unavailable())
    weight = weight_of(shape, torch.bfloat16)
    made, random = Fingerprint([weight]), torch.Generator().manual_seed(0)
    drawn = [torch.randperm(shape[0], generator=random)[: shape[0] // 64] for _ in range(300)]
    drawn += [torch.arange(first, shape[0], 64) for first in range(64)]
    missed = 0
    for i, some in enumerate(drawn):
        missed += not found(made, weight, (some,), i)
        # a group's turns start where the number of its rows divides the turn
        assert any(found(made, weight, (some[:1],), 4 * i + j) for j in range(4))
    assert missed <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (77,), (5, 7), (7, 1), (40, 200), (800, 100), (2050, 70), (8, 3, 4, 4), (20, 9000)], ids=str
)
def test_every_write_is_found_in_the_end(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    made = Fingerprint([weight])
    flat = weight.view(-1)
    for i in torch.randint(flat.numel(), (10,), generator=torch.Generator().manual_seed(3)).tolist():
        before = flat[i].clone()
        flat[i] = -flat[i]
        assert any(made.changed() for _ in range(made.turns)), i
        flat[i] = before
        assert not any(made.changed() for _ in range(made.turns)), i


def sign(weight: Tensor) -> None:
    weight.neg_()


def swap(weight: Tensor) -> None:
    weight.copy_(weight.flip(0))


def turn(weight: Tensor) -> None:
    weight.copy_(weight.T.clone())


@pytest.mark.parametrize("change", [sign, swap, turn])
def test_no_sum_hides_a_change(kind: str, change: Callable[[Tensor], None]) -> None:
    weight = weight_of((256, 256), torch.bfloat16)
    made = Fingerprint([weight])
    change(weight)
    assert made.changed()


def test_a_vector_is_read_whole(kind: str) -> None:
    weights = [weight_of((n,), torch.bfloat16) for n in (1, 31, 32, 33, 768, 3072)]
    made = Fingerprint(weights)
    for weight in weights:
        for i in {0, weight.shape[0] // 2, weight.shape[0] - 1}:
            assert found(made, weight, (i,), 0)


@pytest.mark.parametrize(
    "weight", [weight_of((8, 8))[:, ::2], weight_of((8, 8))[:, :4], torch.ones(4).expand(4, 4), torch.empty(0, 3)]
)
def test_gaps_are_refused(kind: str, weight: Tensor) -> None:
    assert not can_be_read(weight)
    with pytest.raises(ValueError, match=r"Fingerprint\(weights\): got .* expected one without gaps"):
        Fingerprint([weight])


@pytest.mark.parametrize(
    "turned", [lambda w: w.T, lambda w: w.view(8, 10, 100).permute(2, 0, 1), lambda w: w.view(80, 1, 100)]
)
def test_turned_weights_are_read(kind: str, turned: Callable[[Tensor], Tensor]) -> None:
    weight = weight_of((80, 100))
    made = Fingerprint([turned(weight)])
    assert not made.changed()
    weight[40:42] += 1
    assert made.changed()


def test_threads_share_the_turns() -> None:
    weight = weight_of((2304, 768))
    made = Fingerprint([weight])
    weight[1000, 500] += 1
    with ThreadPoolExecutor(4) as threads:
        assert any(threads.map(lambda _: made.changed(), range(made.turns)))


def test_the_random_state_is_left_alone(kind: str) -> None:
    before = torch.get_rng_state()
    assert not Fingerprint([weight_of((64, 64))]).changed()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_op_checks_its_arguments() -> None:
    if library.unavailable() is not None:
        pytest.skip(library.unavailable())
    weight = weight_of((8, 8))
    hashes = torch.ops.clipfast.fingerprint([weight])
    for weights, expected, turn in (([weight, weight], hashes, 0), ([weight], hashes.int(), 0), ([weight], hashes, -1)):
        with pytest.raises(RuntimeError, match="changed_weight"):
            torch.ops.clipfast.changed_weight(weights, expected, turn)
    for weights in ([], [weight.T], [weight[0]], [weight[:0]]):
        with pytest.raises(RuntimeError, match="fingerprint"):
            torch.ops.clipfast.fingerprint(weights)
