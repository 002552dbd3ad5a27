"""The order of the rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inlay.train.order import LengthGroupedOrder


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 5))
def test_every_row_once_and_known_from_seed_and_epoch(lengths: list[int], size: int, seed: int) -> None:
    order = LengthGroupedOrder(lengths, size, seed)
    first = list(order)
    assert sorted(first) == list(range(len(lengths)))
    order.set_epoch(3)
    later = list(order)
    again = LengthGroupedOrder(lengths, size, seed)
    again.set_epoch(3)
    assert list(again) == later


def test_epochs_and_seeds_differ() -> None:
    lengths = [i % 7 + 1 for i in range(100)]
    order = LengthGroupedOrder(lengths, 4, 0)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first != list(LengthGroupedOrder(lengths, 4, 1))


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [(i * 37) % 101 for i in range(640)]
    rows = list(LengthGroupedOrder(lengths, 8, 0))
    spread = [max(batch) - min(batch) for i in range(0, 640, 8) if (batch := [lengths[r] for r in rows[i : i + 8]])]
    assert sum(spread) / len(spread) < 25  # at random it is about 78
