"""A living worker as its owner, the fleet, knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.usage import StartRecord
from pilotlight.domain.worker import Failure, Registration, Worker


@dataclass(slots=True)
class Living:
    """A living worker and what only its owner knows of it.

    Attributes:
        worker: What is recorded of it.
        endpoint: Whose it is, with the revision it was started from.
        registration: What it told of itself; None before that.
        asked: Slots it has by its own word; 0 before it is ready.
        capacity: Slots it is given; 0 before it is ready.
        stages: Steps of its start so far, each once, with its moment in ms.
        metered_ms: Up to when its usage is accounted for.
        usage_sequence: Number of its last usage interval.
        deadline: What happens to it when the time for its present step is over.
        grace_s: From SIGTERM to SIGKILL at least.
        wanted_end: Why it was told to end; None where it ends by itself.
        killed: It was told to end at once.
        failure: Why it fails, once that is known.
    """

    worker: Worker
    endpoint: Endpoint
    registration: Registration | None = None
    asked: int = 0
    capacity: int = 0
    stages: list[tuple[str, int]] = field(default_factory=list)
    metered_ms: int = 0
    usage_sequence: int = 0
    deadline: asyncio.TimerHandle | None = None
    grace_s: float = 0
    wanted_end: str | None = None
    killed: bool = False
    failure: Failure | None = None

    def note(self, stage: str, now_ms: int) -> None:
        """Remember when a step of its start began; a repetition changes nothing."""
        if all(name != stage for name, _ in self.stages):
            self.stages.append((stage, now_ms))

    def start_record(self, outcome: str) -> StartRecord:
        """Its start, for the list of starts."""
        return StartRecord(
            worker_id=self.worker.id,
            endpoint_id=self.worker.endpoint_id,
            version=self.worker.version,
            rung="cold",
            stages=tuple(self.stages),
            outcome=outcome,
        )
