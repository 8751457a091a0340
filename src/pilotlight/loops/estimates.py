"""How long the next start of an endpoint's workers will take, learned from the last ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from pilotlight.core.estimates import STARTS_KEPT, estimate_start_ms
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.usage import StartRecord
from pilotlight.domain.worker import Rung, Worker, WorkerState
from pilotlight.ports.store import StartLog

_STARTS_READ = 10_000
"""All that the store keeps: thaws are many, and the last launch may be far behind them."""


@dataclass(frozen=True, slots=True)
class _Start:
    worker_id: str
    decided_ms: int
    version: int
    took_ms: int


class Estimates:
    """Remembers how long starts took, by endpoint and rung, and from which rung the next one will come.

    Args:
        endpoint: Looks up a living endpoint by id.
        store: Past starts.
        workers: The living workers of an endpoint.
        launchable: Whether a launcher is ready for an endpoint.
    """

    def __init__(
        self,
        *,
        endpoint: Callable[[str], Endpoint | None],
        store: StartLog,
        workers: Callable[[str], Iterable[Worker]],
        launchable: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._endpoint = endpoint
        self._store = store
        self._workers = workers
        self._launchable = launchable
        # By endpoint, then by rung, latest last.
        self._starts: dict[str, dict[Rung, list[_Start]]] = {}

    async def load(self) -> None:
        """Learn from the starts in the store, instead of what was known before. StoreError when it cannot."""
        records = await self._store.starts(limit=_STARTS_READ)
        self._starts.clear()
        for record in reversed(records):
            self.note(record)

    def note(self, record: StartRecord) -> None:
        """Learn from a start; one that failed, is known, or is of a deleted endpoint changes nothing."""
        took_ms = start_took_ms(record)
        if took_ms is None or record.rung not in set(Rung) or self._endpoint(record.endpoint_id) is None:
            return
        start = _Start(record.worker_id, record.decided_ms, record.version, took_ms)
        known = self._starts.setdefault(record.endpoint_id, {}).setdefault(Rung(record.rung), [])
        if start not in known:
            known.append(start)
            del known[:-STARTS_KEPT]

    def forget(self, endpoint_id: str) -> None:
        """An endpoint was deleted."""
        self._starts.pop(endpoint_id, None)

    def next_ms(self, endpoint_id: str) -> int | None:
        """From the decision to a ready worker, in ms, for the next start; None where nobody can know."""
        endpoint, rung = self._endpoint(endpoint_id), self.next_rung(endpoint_id)
        return None if endpoint is None or rung is None else self._estimate_ms(endpoint, rung)

    def next_rung(self, endpoint_id: str) -> Rung | None:
        """From where the endpoint's next worker will come; None for one that has a fixed engine."""
        endpoint = self._endpoint(endpoint_id)
        if endpoint is None or endpoint.revision.engine_url is not None:
            return None
        if any(
            worker.state is WorkerState.FROZEN and worker.version == endpoint.revision.version
            for worker in self._workers(endpoint_id)
        ):
            return Rung.FROZEN
        if self._launchable(endpoint_id):
            return Rung.LAUNCHABLE
        # Which of the other two it is, the worker program finds out; it will probably find the same again.
        starts = self._starts.get(endpoint_id, {})
        unprepared = [rung for rung in (Rung.COLD, Rung.PLAIN) if starts.get(rung)]
        if unprepared:
            return max(unprepared, key=lambda rung: starts[rung][-1].decided_ms)
        return Rung.COLD if endpoint.kind is EndpointKind.VLLM else Rung.PLAIN

    def all_ms(self, endpoint_id: str) -> Mapping[Rung, int | None]:
        """How long a start from each rung will take, in ms; None where nobody can know."""
        endpoint = self._endpoint(endpoint_id)
        return {rung: None if endpoint is None else self._estimate_ms(endpoint, rung) for rung in Rung}

    def _estimate_ms(self, endpoint: Endpoint, rung: Rung) -> int | None:
        """How long a start from a rung will take.

        Starts of the current revision count, and before there is one those of earlier ones. An endpoint that
        never started anything borrows from those that serve the same model.
        """
        if (own := self._starts.get(endpoint.id)) is not None:
            starts = own.get(rung, [])
            current = [start.took_ms for start in starts if start.version == endpoint.revision.version]
            return estimate_start_ms(current or [start.took_ms for start in starts])
        borrowed = [
            start
            for other_id, rungs in self._starts.items()
            if _alike(endpoint, self._endpoint(other_id))
            for start in rungs.get(rung, ())
        ]
        borrowed.sort(key=lambda start: start.decided_ms)
        return estimate_start_ms([start.took_ms for start in borrowed])


def _alike(endpoint: Endpoint, other: Endpoint | None) -> bool:
    """Whether workers of the two may be expected to start alike."""
    if other is None or other.kind is not endpoint.kind:
        return False
    return other.revision.model == endpoint.revision.model != ""


def start_took_ms(record: StartRecord) -> int | None:
    """From the decision to a ready worker, without what was fetched, which the next start will find.

    None for a start that did not get there.
    """
    ready_ms = record.after_ms("ready")
    if record.outcome != "ready" or ready_ms is None:
        return None
    fetched_ms = sum(
        end_ms - begin_ms
        for (stage, begin_ms), (_, end_ms) in pairwise(record.stages)
        if stage == "downloading"
    )
    return max(0, ready_ms - fetched_ms)
