"""A living worker as its owner, the fleet, knows it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.usage import START_STAGES, StartRecord
from pilotlight.domain.worker import Failure, Registration, Rung, Worker, WorkerState
from pilotlight.ports.fleet import StageReport

_OUR_STAGES = frozenset({"decision", "placement", "spawned", "ready", "failed", "stopped", "first_token"})
"""Stages whose moment is the gateway's own, whatever a worker says."""

_BEFORE_WORKER = frozenset({"decision", "placement", "spawned"})

_PLACES = {stage: place for place, stage in enumerate(START_STAGES)}
_UNKNOWN_PLACE = _PLACES["ready"] - 0.5
_STAGE_NAME = re.compile(r"[a-z][a-z_]{0,31}")
_TIMELINE_MAX = 32
_NOTE_CHARS = 500
_COUNT_MAX = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What is kept of a worker that is stopped in place.

    Attributes:
        memory_bytes: Host memory that it holds.
        gpu_memory_bytes: The most that it still holds on one of its GPUs.
        slept: Whether its engine went to sleep first, and gave the memory of its GPUs back.
        whole: Whether all of it is stopped, its polls and heartbeats as well; else its engine only.
    """

    memory_bytes: int
    gpu_memory_bytes: int = 0
    slept: bool = False
    whole: bool = False


@dataclass(slots=True)
class Living:
    """A living worker and what only its owner knows of it.

    Attributes:
        worker: What is recorded of it.
        endpoint: Whose it is, with the revision it was started from.
        registration: What it told of itself; None before that.
        asked: Slots it has by its own word; 0 before it is ready.
        capacity: Slots it is given; 0 before it is ready.
        stages: Steps of its last start so far, in order, each once, with its moment in ms.
        rung: From where that start came, as far as it is known.
        start_outcome: How that start ended; "" before.
        start_memory_bytes: What the worker held at its end; None where it did not say.
        start_note: Why it came from no better rung.
        metered_ms: Up to when its usage is accounted for.
        usage_sequence: Number of its last usage interval.
        deadline: What happens to it when the time for its present step is over.
        grace_s: From SIGTERM to SIGKILL at least.
        wanted_end: Why it was told to end; None where it ends by itself.
        killed: It was told to end at once.
        failure: Why it fails, once that is known.
        changing: Held while it is frozen or thawed, which takes answers of others.
        recording: Held while a freeze, a thaw or its end is written down.
        frozen: What is kept of it; None before it is frozen and after it is thawed.
        thawing: Whether it is on the way from frozen to ready, so that it must be given what it needs.
        unfreezable: Whether freezing it was tried and does not work.
    """

    worker: Worker
    endpoint: Endpoint
    registration: Registration | None = None
    asked: int = 0
    capacity: int = 0
    stages: list[tuple[str, int]] = field(default_factory=list)
    rung: str = ""
    start_outcome: str = ""
    start_memory_bytes: int | None = None
    start_note: str = ""
    metered_ms: int = 0
    usage_sequence: int = 0
    deadline: asyncio.TimerHandle | None = None
    grace_s: float = 0
    wanted_end: str | None = None
    killed: bool = False
    failure: Failure | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    recording: asyncio.Lock = field(default_factory=asyncio.Lock)
    frozen: Frozen | None = None
    thawing: bool = False
    unfreezable: bool = False

    @property
    def asleep(self) -> bool:
        """Whether it has been frozen and nobody is waking it."""
        return self.worker.state is WorkerState.FROZEN and self.frozen is not None and not self.thawing

    def set_deadline(self, delay_s: float, action: Callable[[Living], None] | None) -> None:
        """Replace its deadline; None for no deadline."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = (
            None if action is None else asyncio.get_running_loop().call_later(delay_s, action, self)
        )

    def begin_start(self, now_ms: int, rung: Rung) -> None:
        """Begin one more start of a worker that lives already, such as a thaw."""
        self.stages = [("decision", now_ms)]
        self.rung, self.start_outcome, self.start_note = rung, "", ""
        self.start_memory_bytes = None

    def note(self, stage: str, now_ms: int) -> None:
        """Remember when a step of its start began; a repetition, or a step after its end, changes nothing."""
        if not self.start_outcome and all(name != stage for name, _ in self.stages):
            self.stages.append((stage, now_ms))

    def take(self, report: StageReport, now_ms: int) -> None:
        """Remember what a report tells of a start: its step, and what the worker program wrote down of it.

        Of its `detail` count `rung`, `timeline` (pairs of a stage and its moment in ms), `now_ms` (the
        worker's clock as it reported, where that may differ from ours), `memory_bytes` and `note`; what is
        malformed is left out.
        """
        if self.start_outcome:
            return
        self.note(report.stage.value, now_ms)
        detail = report.detail
        if isinstance(rung := detail.get("rung"), str) and rung in set(Rung):
            self.rung = rung
        if isinstance(note := detail.get("note"), str) and note:
            self.start_note = note[:_NOTE_CHARS]
        if (memory_bytes := _count(detail.get("memory_bytes"))) is not None:
            self.start_memory_bytes = memory_bytes
        if timeline := _timeline(detail, now_ms):
            self.stages = merge_timeline(self.stages, timeline, now_ms)

    def finish_start(self, outcome: str, now_ms: int) -> StartRecord:
        """Its start, which ends now: `ready`, `failed` or `stopped`."""
        self.note(outcome, now_ms)
        self.start_outcome = outcome
        if outcome == "ready":
            # A program that says nothing of it prepared nothing.
            self.rung = self.rung or Rung.PLAIN
        return self._start_record()

    def first_token(self, arrival_ms: int, at_ms: int) -> StartRecord | None:
        """Note the answer to a request that had waited for the start; that start, if this changes it.

        Requests that came later waited for nothing. They all are told of when they end, which need not be
        the order in which their answers began.

        Args:
            arrival_ms: When the request arrived.
            at_ms: When its answer began.
        """
        if self.start_outcome != "ready":
            return None
        decided_ms, (stage, last_ms) = self.stages[0][1], self.stages[-1]
        if stage == "ready" and arrival_ms <= last_ms and decided_ms <= at_ms:
            self.stages.append(("first_token", max(at_ms, last_ms)))
        elif stage == "first_token" and decided_ms <= at_ms < last_ms and self.stages[-2][1] < last_ms:
            self.stages[-1] = ("first_token", max(at_ms, self.stages[-2][1]))
        else:
            return None
        return self._start_record()

    def _start_record(self) -> StartRecord:
        return StartRecord(
            worker_id=self.worker.id,
            endpoint_id=self.worker.endpoint_id,
            version=self.worker.version,
            rung=self.rung,
            stages=tuple(self.stages),
            outcome=self.start_outcome,
            memory_bytes=self.start_memory_bytes,
            note=self.start_note,
            failure=self.failure if self.start_outcome == "failed" else None,
        )


def merge_timeline(
    stages: Sequence[tuple[str, int]], timeline: Sequence[tuple[str, int]], now_ms: int
) -> list[tuple[str, int]]:
    """The steps of a start as the gateway saw them, with those that the worker wrote down itself.

    The worker's count from where they begin: the gateway learns of a step only when a report arrives. They
    come from another process, so they are put into the span since its spawn, and never go back in time.

    Args:
        stages: What the gateway noted, in order.
        timeline: What the worker wrote down.
        now_ms: When it told so.
    """
    spawned_ms = max((at_ms for stage, at_ms in stages if stage in _BEFORE_WORKER), default=now_ms)
    told: dict[str, int] = {}
    last_ms = spawned_ms
    for stage, at_ms in timeline:
        if stage not in _OUR_STAGES and stage not in told:
            told[stage] = last_ms = max(last_ms, min(at_ms, now_ms))
    begun_ms = min(told.values(), default=now_ms)
    kept = [
        (stage, at_ms)
        for stage, at_ms in stages
        if stage in _OUR_STAGES or (stage not in told and at_ms < begun_ms)
    ]
    return sorted([*kept, *told.items()], key=_order)


def _order(step: tuple[str, int]) -> tuple[int, float]:
    stage, at_ms = step
    return at_ms, _PLACES.get(stage, _UNKNOWN_PLACE)


def _timeline(detail: Mapping[str, object], now_ms: int) -> list[tuple[str, int]]:
    """The steps that a report names, by our clock, without what is no step."""
    steps, theirs_ms = detail.get("timeline"), _count(detail.get("now_ms"))
    if not isinstance(steps, list | tuple):
        return []
    behind_ms = 0 if theirs_ms is None else now_ms - theirs_ms
    found = []
    for step in steps[:_TIMELINE_MAX]:
        match step:
            case [str(stage), moment] if _STAGE_NAME.fullmatch(stage):
                if (at_ms := _count(moment)) is not None:
                    found.append((stage, at_ms + behind_ms))
    return found


def _count(value: object) -> int | None:
    """A number from a worker program as one that a store can keep; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < _COUNT_MAX else None
