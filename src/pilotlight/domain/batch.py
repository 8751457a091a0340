"""Batches: requests submitted together, run when nothing more urgent waits (serverless-api.md §2.16)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class BatchStatus(StrEnum):
    """The states of a batch; there is none for running or done (serverless-api.md §2.16)."""

    DRAFT = "DRAFT"
    FINALIZED = "FINALIZED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch with its counters, which are kept in the transactions that change its jobs.

    Attributes:
        id: `batch_…`.
        endpoint_id: Where its requests run.
        key_id: The API key that made it.
        name: For people; "" when none was given.
        finalized_ms: When its requests were queued; None while it is a draft.
        cancel_ms: When it was cancelled; requests running then still finish.
        total: Requests in it.
        input_bytes: Inputs of those together.
        queued: Of those, waiting; 0 in a draft.
        in_progress: Of those, handed out.
        completed: Of those, COMPLETED.
        failed: Of those, FAILED or TIMED_OUT.
        cancelled: Of those, CANCELLED.
        created_ms: When it was made.
    """

    id: str
    endpoint_id: str
    key_id: str = ""
    name: str = ""
    finalized_ms: int | None = None
    cancel_ms: int | None = None
    total: int = 0
    input_bytes: int = 0
    queued: int = 0
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    created_ms: int = 0

    @property
    def status(self) -> BatchStatus:
        """Where it stands; CANCELLED only after what ran at the cancellation has drained."""
        if self.cancel_ms is not None and not self.in_progress:
            return BatchStatus.CANCELLED
        return BatchStatus.DRAFT if self.finalized_ms is None else BatchStatus.FINALIZED

    @property
    def active(self) -> bool:
        """Whether it still counts against the bound on batches: something of it is to be done."""
        if self.cancel_ms is not None:
            return self.in_progress > 0
        return self.finalized_ms is None or self.queued + self.in_progress > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDraft:
    """A request of a batch that is not finalized: no job yet."""

    id: str
    input: bytes
