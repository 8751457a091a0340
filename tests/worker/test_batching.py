"""The schedule of vllm-worker.md §2.1: its table, row by row."""

from __future__ import annotations

import pytest

from pilotlight.worker.batching import BatchSchedule, BatchSizes, item_sizes


@pytest.mark.parametrize(
    ("sizes", "pieces", "expected"),
    [
        ((50, 1, 3), 200, [1, 3, 9, 27, 50, 50, 50, 10]),
        ((50, 1, 3), 10, [1, 3, 6]),
        ((50, 1, 3), 40, [1, 3, 9, 27]),
        ((50, 1, 3), 1, [1]),
        ((10, 2, 1.5), 30, [2, 3, 5, 7, 10, 3]),
        ((3, 1, 2), 9, [1, 2, 3, 3]),
        ((10, 10, 3), 30, [10, 10, 10]),
        ((10, 20, 3), 30, [10, 10, 10]),
        ((10, 1, 1), 30, [10, 10, 10]),
        ((10, 1, 0.5), 30, [10, 10, 10]),
        ((50, 1, 3), 0, []),
    ],
)
def test_item_sizes(sizes: tuple[int, int, float], pieces: int, expected: list[int]) -> None:
    assert list(item_sizes(pieces, BatchSizes(*sizes))) == expected


def test_pending_counts_what_is_not_yet_an_item() -> None:
    schedule = BatchSchedule(BatchSizes(10, 10, 1))
    assert [schedule.add_piece() for _ in range(3)] == [False] * 3
    assert schedule.pending == 3
