from __future__ import annotations

import threading
import time

import pytest

from clipfast.data.read_ahead import read_ahead
from clipfast.data.sources import PairError
from clipfast.data.transform import ImageError


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_rows_come_in_order_and_broken_ones_as_their_errors(workers):
    errors = {3: PairError("three"), 5: ImageError("five"), 8: FileNotFoundError("eight")}

    def read(row: int) -> int:
        time.sleep(0.002 * (row % 3))  # so that threads overtake each other
        if row in errors:
            raise errors[row]
        return row * row

    got = list(read_ahead(read, range(20), workers=workers, ahead=6))
    assert got == [(row, errors.get(row, row * row)) for row in range(20)]


def test_no_more_is_read_than_asked_for():
    begun = []
    rows = read_ahead(begun.append, iter(range(1000)), workers=4, ahead=5)
    assert begun == []  # not before the first is asked for
    for taken in range(1, 50):
        next(rows)
        deadline = time.monotonic() + 5
        while len(begun) < taken + 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.002)  # the chance to read more
        assert len(begun) == taken + 4
    rows.close()
    assert len(begun) <= 54


def test_other_exceptions_are_raised_and_threads_end():
    def read(row: int) -> int:
        return 1 // (3 - row)

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(read, range(100), workers=3, ahead=8))
    assert threading.active_count() == before


def test_errors():
    with pytest.raises(ValueError, match="workers: got -1, expected 0 to"):
        read_ahead(int, range(3), workers=-1, ahead=4)
    with pytest.raises(ValueError, match="ahead: got 0, expected at least 1"):
        read_ahead(int, range(3), workers=1, ahead=0)
