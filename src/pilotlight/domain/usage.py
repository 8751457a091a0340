"""Measured facts: usage intervals of workers, and one row per request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from pilotlight.domain.worker import Failure, WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageInterval:
    """A closed span of a worker's life in one state; appended once, never changed.

    `(worker_id, sequence)` is the idempotency key. The intervals of a worker touch each other and
    cover its life from spawn to the end of its last process.
    """

    worker_id: str
    sequence: int
    endpoint_id: str
    version: int
    state: WorkerState
    devices: int
    start_ms: int
    end_ms: int

    @property
    def duration_ms(self) -> int:
        """Length in milliseconds; never negative."""
        return self.end_ms - self.start_ms


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    REJECTED = "rejected"
    SHED = "shed"
    EXPIRED = "expired"
    FAILED = "failed"
    DISCONNECTED = "disconnected"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"

    # That of `Enum` is written in Python, and every count by outcome would call it.
    __hash__ = str.__hash__


class Road(StrEnum):
    """Which of the two roads a request took."""

    DATA = "data"
    JOB = "job"


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of the request log; holds no prompt, completion, header or key.

    Attributes:
        id: Request id (data path) or job id (job path).
        road: Which road it took.
        endpoint_id: Endpoint it named.
        key_id: Public id of the API key.
        worker_id: Worker that served it; "" when none did.
        route: Path below the endpoint, such as `/v1/chat/completions` or `/run`.
        status: HTTP status sent to the client, 0 where none was sent.
        outcome: How it ended.
        arrival_ms: When it arrived.
        wait_ms: Wait for a worker.
        first_token_ms: From arrival to the first byte of the answer's body; None when there was none.
        duration_ms: From arrival to the end.
        tokens_in: Prompt tokens; None when unknown.
        tokens_out: Completion tokens; None when unknown.
        estimated: Whether the token counts are estimates (a stream that was cut).
        client_id: The id that the client gave its request; "" for none.
        streamed: Whether the answer was a stream of events, one for every few tokens; never for a job.
        continued: How often its stream was continued by another worker.
        trace: Its span, as `traceparent` of W3C; "" for a request without one.
        parent_span: Id of the span that the client named as its parent; "" for none.

    The last five are for metrics, access log and traces; no store keeps them.
    """

    id: str
    road: Road
    endpoint_id: str
    key_id: str
    worker_id: str = ""
    route: str
    status: int
    outcome: Outcome
    arrival_ms: int
    wait_ms: int = 0
    first_token_ms: int | None = None
    duration_ms: int = 0
    tokens_in: int | None = None
    tokens_out: int | None = None
    estimated: bool = False
    client_id: str = ""
    streamed: bool = False
    continued: int = 0
    trace: str = ""
    parent_span: str = ""


START_STAGES = (
    "decision",
    "placement",
    "spawned",
    "starting",
    "downloading",
    "launched",
    "importing",
    "config",
    "loading_weights",
    "kv_cache",
    "compiling",
    "warming_up",
    "initializing",
    "registering",
    "ready",
    "first_token",
)
"""Stages of a start in the order in which they usually come. Few starts have all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRecord:
    """One start of a worker, stage by stage. A worker that is thawed or resumed has several.

    `(worker_id, decided_ms)` is the key under which it is stored and replaced.

    Attributes:
        rung: From where on the warm ladder it came up, a `domain.worker.Rung`; "" while nobody knows.
        stages: (stage name, moment in ms since the epoch), in order; the first is the decision. A stage
            lasts until the next begins. The names, in their order: `START_STAGES`.
        outcome: `ready`, `failed` or `stopped`; "" while starting.
        memory_bytes: What the worker's processes hold once it is ready (proportional set size); None where
            nobody has measured it.
        note: Why it did not start from a better rung, in words; "" for no reason to tell.
        failure: Why it failed, where that is known.
    """

    worker_id: str
    endpoint_id: str
    version: int
    rung: str
    stages: tuple[tuple[str, int], ...]
    outcome: str = ""
    memory_bytes: int | None = None
    note: str = ""
    failure: Failure | None = None

    @property
    def decided_ms(self) -> int:
        """Moment of the first stage; 0 where there is none."""
        return self.stages[0][1] if self.stages else 0

    def after_ms(self, stage: str) -> int | None:
        """From the decision to the beginning of a stage; None where it was not reached."""
        return next((at_ms - self.decided_ms for name, at_ms in self.stages if name == stage), None)
