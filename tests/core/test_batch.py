"""The states of a batch (serverless-api.md §2.16), from its counters."""

from __future__ import annotations

import pytest

from pilotlight.domain.batch import Batch, BatchStatus

DRAFT, FINALIZED, CANCELLED = BatchStatus.DRAFT, BatchStatus.FINALIZED, BatchStatus.CANCELLED


def batch(**changes: object) -> Batch:
    return Batch(id="batch_1", endpoint_id="e", **changes)


@pytest.mark.parametrize(
    ("fields", "status", "active"),
    [
        ({}, DRAFT, True),
        ({"total": 3}, DRAFT, True),
        ({"finalized_ms": 1, "total": 3, "queued": 3}, FINALIZED, True),
        ({"finalized_ms": 1, "total": 3, "queued": 1, "completed": 2}, FINALIZED, True),
        ({"finalized_ms": 1, "total": 3, "in_progress": 1, "failed": 2}, FINALIZED, True),
        # Done: there is no state for it, and it no longer counts against the bound.
        ({"finalized_ms": 1, "total": 3, "completed": 2, "failed": 1}, FINALIZED, False),
        ({"finalized_ms": 1, "total": 1, "cancelled": 1}, FINALIZED, False),
        ({"finalized_ms": 1}, FINALIZED, False),
        # Cancelled only after what ran has drained.
        ({"finalized_ms": 1, "cancel_ms": 2, "total": 3, "in_progress": 1}, FINALIZED, True),
        ({"finalized_ms": 1, "cancel_ms": 2, "total": 3, "completed": 1, "cancelled": 2}, CANCELLED, False),
        ({"cancel_ms": 2, "total": 3}, CANCELLED, False),
    ],
)
def test_status_and_whether_it_counts(fields: dict[str, int], status: BatchStatus, active: bool) -> None:
    made = batch(**fields)
    assert (made.status, made.active) == (status, active)


def test_only_states_of_the_contract_exist() -> None:
    assert [str(each) for each in BatchStatus] == ["DRAFT", "FINALIZED", "FAILED", "CANCELLED"]
