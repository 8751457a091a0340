"""What Prometheus is told: totals of ended requests, and what goes on while it asks.

Requests cost nothing here but their row: `gateway.recorder` brings rows in batches, which are added to plain
integers (`core.request_totals`). Everything else is read when `/metrics` is called, and becomes text in a
thread (`gateway.exposition`), so that nobody waits for it.

Label sets are bounded. Endpoints and workers that nobody knows any more leave after a while, in which the
last scrapes see their last numbers; what a worker counted stays in its endpoint's totals. What strangers
write never becomes a label: requests for endpoints that do not exist count for the endpoint `none`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pilotlight.core.request_totals import Totals
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.job import JobCounts
from pilotlight.domain.key import Scope
from pilotlight.domain.usage import RequestRecord
from pilotlight.domain.worker import Worker, WorkerState
from pilotlight.errors import StoreError
from pilotlight.gateway.asgi import Headers, Response
from pilotlight.gateway.directory import Directory, secret_hash_of
from pilotlight.gateway.errors import native_error
from pilotlight.gateway.metrics_view import EndpointView, View, WorkerView
from pilotlight.gateway.slots import WorkerSlots
from pilotlight.loops.engine_load import EngineLoadView
from pilotlight.ports.clock import Clock
from pilotlight.ports.traffic import TrafficReader
from pilotlight.threads import call_in_thread

NO_ENDPOINT = "none"
"""Label of requests for endpoints that do not exist; no endpoint has an id as short as that."""

_LINGER_MS = 300_000
"""How long endpoints and workers that are gone are still told of: for some scrapes of everybody."""

_PRUNE_MS = 60_000
_STATES = tuple(state for state in WorkerState if not state.ended)


class FleetReader(Protocol):
    """Living workers."""

    def worker(self, worker_id: str) -> Worker | None:
        """One; None when unknown or ended."""
        ...

    def workers(self, endpoint_id: str) -> Sequence[Worker]:
        """Those of an endpoint."""
        ...


class SlotReader(TrafficReader, Protocol):
    """Slots of workers, and the requests that wait for one."""

    def worker(self, worker_id: str) -> WorkerSlots | None:
        """Those of one worker; None when it is not ready or has ended."""
        ...


class JobReader(Protocol):
    """The queue."""

    async def counts(self, endpoint_id: str) -> JobCounts:
        """Of an endpoint."""
        ...


class EngineReader(Protocol):
    """What engines said of themselves."""

    def views(self) -> Mapping[str, EngineLoadView]:
        """The last of it, by worker id."""
        ...


class Rows(Protocol):
    """Where rows come from."""

    rows_dropped: int

    @property
    def rows_pending(self) -> int:
        """Rows of the request log that are not written yet."""
        ...

    async def tell(self) -> None:
        """Note everything that has ended so far."""
        ...


@dataclass(slots=True)
class _OfWorker:
    totals: Totals = field(default_factory=Totals)
    absent_ms: int | None = None


@dataclass(slots=True)
class _OfEndpoint:
    """`others` are the requests that no worker had, or one that has been forgotten."""

    others: Totals = field(default_factory=Totals)
    workers: dict[str, _OfWorker] = field(default_factory=dict)
    absent_ms: int | None = None


class Metrics:
    """Counts ended requests and answers `/metrics`. Lives on the event loop.

    Args:
        directory: Endpoints and keys.
        slots: Slots and held requests.
        fleet: Workers.
        jobs: Queues; asked only where this gateway leads.
        clock: Time.
        rows: Where rows come from.
        engines: What engines said of themselves.
        leads: Whether this gateway tells of queues, which gateways on one store share.
        public: Whether everybody is answered.
        lines_dropped: Lines of the access log that were given up.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        slots: SlotReader,
        fleet: FleetReader,
        jobs: JobReader,
        clock: Clock,
        rows: Rows,
        engines: EngineReader,
        leads: Callable[[], bool] = lambda: True,
        public: bool = False,
        lines_dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self._directory = directory
        self._slots = slots
        self._fleet = fleet
        self._jobs = jobs
        self._clock = clock
        self._rows = rows
        self._engines = engines
        self._leads = leads
        self._public = public
        self._lines_dropped = lines_dropped
        self._counted: dict[str, _OfEndpoint] = {NO_ENDPOINT: _OfEndpoint()}
        self._pruned_ms = clock.now_ms()
        self._rendering = asyncio.Lock()
        self._begun = 0
        self._rendered: tuple[str, bytes, str] = ("", b"", "")

    def note(self, rows: Sequence[RequestRecord]) -> None:
        """Count requests that have ended."""
        for row in rows:
            counted = self._counted.get(row.endpoint_id) or self._counted_of(row.endpoint_id)
            if not row.worker_id:
                counted.others.note(row)
                continue
            worker = counted.workers.get(row.worker_id)
            if worker is None:
                worker = counted.workers[row.worker_id] = _OfWorker()
            worker.totals.note(row)
        if self._clock.now_ms() - self._pruned_ms >= _PRUNE_MS:
            self._prune()

    async def close(self) -> None:
        """Nothing is left to do."""

    async def answer(self, headers: Headers) -> Response:
        """The answer to a scrape: the metrics, 401 without a key, or 403 with one that is no admin's."""
        if not self._public:
            key = self._directory.key_of_hash(secret_hash_of(headers))
            if key is None:
                return native_error(401, "unauthorized")
            if key.scope is not Scope.ADMIN:
                return native_error(403, "access denied: metrics are for admin keys")
        accept = headers.get(b"accept").decode("latin-1")
        arrived = self._begun
        async with self._rendering:
            # A text that was begun after the request arrived will do for it: a crowd costs two of them.
            if self._begun == arrived or self._rendered[0] != accept:
                self._begun += 1
                await self._rows.tell()
                view = await self._view()
                self._rendered = (
                    accept,
                    *await call_in_thread(lambda: _render(view, accept), name="metrics"),
                )
            _, body, media_type = self._rendered
        return Response(body, media_type=media_type)

    async def _view(self) -> View:
        self._prune()
        existing = self._directory.endpoints()
        for endpoint in existing:
            self._counted_of(endpoint.id)
        now = [await self._now(endpoint) for endpoint in existing]
        known = {view.id for view in now}
        gone = [_past(name, counted) for name, counted in self._counted.items() if name not in known]
        return View(
            endpoints=[*now, *gone],
            rows_pending=self._rows.rows_pending,
            rows_dropped=self._rows.rows_dropped,
            lines_dropped=self._lines_dropped(),
        )

    async def _now(self, endpoint: Endpoint) -> EndpointView:
        """An endpoint that exists, as it is now."""
        jobs: JobCounts | None = None
        if self._leads():
            try:
                jobs = await self._jobs.counts(endpoint.id)
            except StoreError:
                # What is told without it is worth telling, then above all.
                jobs = None
        traffic = await self._slots.traffic(endpoint.id, overdue_before_ms=0)
        counted, engines = self._counted_of(endpoint.id), self._engines.views()
        workers = []
        for worker_id in {**dict.fromkeys(traffic.occupied), **dict.fromkeys(counted.workers)}:
            slots = self._slots.worker(worker_id)
            served = counted.workers.get(worker_id)
            workers.append(
                WorkerView(
                    id=worker_id,
                    totals=None if served is None else _sum([served.totals]),
                    slots=None if slots is None else slots.capacity,
                    occupied=0 if slots is None else slots.occupied,
                    engine=engines[worker_id].reading if worker_id in engines else None,
                )
            )
        states = dict.fromkeys((state.value for state in _STATES), 0)
        for worker in self._fleet.workers(endpoint.id):
            states[worker.state.value] = states.get(worker.state.value, 0) + 1
        return EndpointView(
            id=endpoint.id,
            totals=_all(counted),
            workers=workers,
            name=endpoint.name,
            kind=endpoint.kind.value,
            model=endpoint.revision.model,
            states=states,
            held=traffic.held,
            in_flight=traffic.requests_in_flight,
            jobs=jobs,
        )

    def _counted_of(self, endpoint_id: str) -> _OfEndpoint:
        """What is counted of an endpoint; those that do not exist share one."""
        counted = self._counted.get(endpoint_id)
        if counted is None:
            if self._directory.endpoint(endpoint_id) is None:
                return self._counted[NO_ENDPOINT]
            counted = self._counted[endpoint_id] = _OfEndpoint()
        return counted

    def _prune(self) -> None:
        """Forget who has been gone for a while; what a worker has counted stays its endpoint's."""
        self._pruned_ms = now_ms = self._clock.now_ms()
        for endpoint_id, counted in [*self._counted.items()]:
            exists = endpoint_id == NO_ENDPOINT or self._directory.endpoint(endpoint_id) is not None
            counted.absent_ms = None if exists else counted.absent_ms or now_ms
            if counted.absent_ms is not None and now_ms - counted.absent_ms >= _LINGER_MS:
                del self._counted[endpoint_id]
                continue
            for worker_id, worker in [*counted.workers.items()]:
                lives = self._fleet.worker(worker_id) is not None or self._slots.worker(worker_id) is not None
                worker.absent_ms = None if lives else worker.absent_ms or now_ms
                if worker.absent_ms is not None and now_ms - worker.absent_ms >= _LINGER_MS:
                    counted.others.add(worker.totals)
                    del counted.workers[worker_id]


def _all(counted: _OfEndpoint) -> Totals:
    return _sum([counted.others, *(worker.totals for worker in counted.workers.values())])


def _sum(parts: Sequence[Totals]) -> Totals:
    """A copy that nobody goes on counting in, for another thread."""
    total = Totals()
    for part in parts:
        total.add(part)
    return total


def _past(endpoint_id: str, counted: _OfEndpoint) -> EndpointView:
    """An endpoint that does not exist any more, or never did."""
    workers = [
        WorkerView(id=worker_id, totals=_sum([worker.totals]))
        for worker_id, worker in counted.workers.items()
    ]
    return EndpointView(id=endpoint_id, totals=_all(counted), workers=workers)


def _render(view: View, accept: str) -> tuple[bytes, str]:
    # Most installations are never scraped, and need not load the library.
    from pilotlight.gateway.exposition import render  # noqa: PLC0415 - see above

    return render(view, accept)
