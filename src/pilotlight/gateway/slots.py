"""The slots of every ready worker, and the requests that wait for one.

One count per worker covers both roads: requests on the data path and leased jobs. This object is the
only one that counts, and whoever takes a slot gives it back here. It lives in the gateway's event loop
and is not shared between threads; loops read it through the `TrafficReader` port.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pilotlight.core.admission import (
    Admission,
    AdmissionLimits,
    AdmissionSnapshot,
    Verdict,
    decide_admission,
)
from pilotlight.core.routing import Candidate, pick_worker
from pilotlight.domain.worker import Registration
from pilotlight.ports.clock import Clock
from pilotlight.ports.traffic import Traffic


class HoldExpiredError(Exception):
    """A held request waited as long as it may, or its endpoint gave up starting workers."""


class WorkerGoneError(Exception):
    """The one worker that a held request waited for takes no more requests."""


@dataclass(slots=True)
class WorkerSlots:
    """The slots of one worker. `registration` is None for a worker that only takes jobs."""

    worker_id: str
    endpoint_id: str
    capacity: int
    registration: Registration | None
    open: bool = True
    suspended: bool = False
    requests: int = 0
    jobs: int = 0
    idle_since_ms: int = 0

    @property
    def occupied(self) -> int:
        """Slots in use on both roads."""
        return self.requests + self.jobs

    @property
    def free(self) -> int:
        """Slots that may be taken."""
        return max(0, self.capacity - self.occupied) if self.open and not self.suspended else 0

    @property
    def takes_requests(self) -> bool:
        """Whether requests may be sent to it."""
        return self.open and not self.suspended and self.registration is not None


@dataclass(slots=True)
class _Held:
    future: asyncio.Future[WorkerSlots]
    since_ms: int
    body_bytes: int
    worker_id: str | None = None


@dataclass(slots=True)
class _EndpointSlots:
    workers: OrderedDict[str, WorkerSlots] = field(default_factory=OrderedDict)
    held: OrderedDict[int, _Held] = field(default_factory=OrderedDict)
    held_bytes: int = 0
    aside: int = 0
    retry_ms: int | None = None


class SlotTable:
    """Counts slots, admits requests, holds those that must wait.

    Args:
        clock: Time.
        limits: Bounds of the hold, per endpoint.
        on_demand: Called with an endpoint id when a request begins to wait; wakes the autoscaler.
        on_idle: Called with an endpoint id when a worker has no slot in use any more.
        on_free: Called with an endpoint id when a slot became free and no held request wants it, so that
            parked takes can be served.
    """

    def __init__(
        self,
        clock: Clock,
        limits: AdmissionLimits,
        *,
        on_demand: Callable[[str], None] = lambda _: None,
        on_idle: Callable[[str], None] = lambda _: None,
        on_free: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._limits = limits
        self.on_demand = on_demand
        self.on_idle = on_idle
        self.on_free = on_free
        self._endpoints: dict[str, _EndpointSlots] = {}
        self._workers: dict[str, WorkerSlots] = {}
        # By worker, which may not have slots yet.
        self._pinned: dict[str, dict[int, _Held]] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._ticket = 0

    def open_worker(
        self, endpoint_id: str, worker_id: str, *, capacity: int, registration: Registration | None
    ) -> None:
        """Add a ready worker, or change its capacity and addresses; held requests flow to it at once."""
        slots = self._workers.get(worker_id)
        if slots is None:
            slots = WorkerSlots(
                worker_id=worker_id,
                endpoint_id=endpoint_id,
                capacity=capacity,
                registration=registration,
                idle_since_ms=self._clock.now_ms(),
            )
            self._workers[worker_id] = slots
            self._endpoint(endpoint_id).workers[worker_id] = slots
        else:
            slots.capacity = capacity
            slots.registration = registration or slots.registration
            slots.open = True
        self._endpoint(endpoint_id).retry_ms = None
        self._serve_held(endpoint_id)

    def close_worker(self, worker_id: str, *, for_good: bool = True) -> None:
        """Give no more slots of this worker; those in use stay in use.

        Args:
            worker_id: Which.
            for_good: Whether it is going to end, so that nobody needs to wait for it.
        """
        slots = self._workers.get(worker_id)
        if slots is not None:
            slots.open = False
        if for_good:
            self._fail_pinned(worker_id)

    def suspend_worker(self, worker_id: str, seconds: float) -> None:
        """Send it no requests for a while: it could not be reached, and whether it ended is not known yet."""
        slots = self._workers.get(worker_id)
        if slots is None or slots.suspended:
            return
        slots.suspended = True
        asyncio.get_running_loop().call_later(seconds, self._resume, slots)

    def drop_worker(self, worker_id: str) -> None:
        """Forget a worker that has ended; releases of its slots become harmless."""
        self._fail_pinned(worker_id)
        end = self._ends.pop(worker_id, None)
        if end is not None:
            end.set()
        slots = self._workers.pop(worker_id, None)
        if slots is not None:
            slots.open = False
            endpoint = self._endpoint(slots.endpoint_id)
            endpoint.workers.pop(worker_id, None)
            unused = not endpoint.workers and not endpoint.held and not endpoint.aside
            if unused and endpoint.retry_ms is None:
                del self._endpoints[slots.endpoint_id]

    def worker(self, worker_id: str) -> WorkerSlots | None:
        """The slots of one worker; None when it is not ready or has ended."""
        return self._workers.get(worker_id)

    def admit(
        self, endpoint_id: str, body_bytes: int, *, take: bool = True
    ) -> tuple[Admission, WorkerSlots | None]:
        """Decide on a request; with ADMIT the slot is taken already and must be released.

        Args:
            endpoint_id: Whom it calls.
            body_bytes: Size of its body, which is held while it waits.
            take: Whether to take a slot; no for a request that not every worker will do for.
        """
        endpoint = self._endpoint(endpoint_id)
        candidates = [slots for slots in endpoint.workers.values() if slots.takes_requests]
        admission = decide_admission(
            AdmissionSnapshot(
                ready_workers=len(candidates),
                free_slots=sum(slots.free for slots in candidates),
                held=endpoint.aside + sum(not held.future.done() for held in endpoint.held.values()),
                held_bytes=endpoint.held_bytes,
                body_bytes=body_bytes,
                retry_ms=endpoint.retry_ms,
            ),
            self._clock.now_ms(),
            self._limits,
        )
        if admission.verdict is not Verdict.ADMIT or not take:
            return admission, None
        return admission, self._take_request_slot(endpoint)

    def take_of(self, endpoint_id: str, worker_id: str) -> WorkerSlots | None:
        """A slot of one certain worker, taken and to be released; None when it has none free."""
        slots = self._workers.get(worker_id)
        if slots is None or slots.endpoint_id != endpoint_id or not slots.takes_requests or not slots.free:
            return None
        slots.requests += 1
        return slots

    async def hold(
        self, endpoint_id: str, body_bytes: int, *, timeout_s: float, worker_id: str | None = None
    ) -> WorkerSlots:
        """Wait for a slot; it is taken when this returns and must be released.

        Args:
            endpoint_id: Whom it calls.
            body_bytes: Size of the body held meanwhile.
            timeout_s: Longest wait.
            worker_id: The only worker that will do; None for any.

        Raises:
            HoldExpiredError: No slot came in time; the message of a start failure is raised as given
                to `fail_held`.
            WorkerGoneError: The only worker that would do is going to end.
        """
        endpoint = self._endpoint(endpoint_id)
        self._ticket += 1
        ticket = self._ticket
        held = _Held(asyncio.get_running_loop().create_future(), self._clock.now_ms(), body_bytes, worker_id)
        endpoint.held[ticket] = held
        if worker_id is not None:
            self._pinned.setdefault(worker_id, {})[ticket] = held
        endpoint.held_bytes += body_bytes
        # A slot may have become free between the decision to hold and now.
        self._serve_held(endpoint_id)
        if not held.future.done():
            self.on_demand(endpoint_id)
        try:
            async with asyncio.timeout(timeout_s):
                return await held.future
        except TimeoutError as error:
            self._give_back(held)
            raise HoldExpiredError(f"no worker became free within {timeout_s:g} s") from error
        except asyncio.CancelledError:
            self._give_back(held)
            raise
        finally:
            if endpoint.held.pop(ticket, None) is not None:
                endpoint.held_bytes -= body_bytes
            if worker_id is not None:
                self._unpin(worker_id, ticket)

    async def wait_end(self, endpoint_id: str, worker_id: str) -> None:
        """Wait until a worker that is going to end has ended, for a request that wants it started again."""
        end = self._ends.setdefault(worker_id, asyncio.Event())
        with self.aside(endpoint_id):
            await end.wait()

    @contextlib.contextmanager
    def aside(self, endpoint_id: str) -> Iterator[None]:
        """Give a request its place in the hold while it waits for something else than a slot.

        It is no demand: no other worker would do.
        """
        endpoint = self._endpoint(endpoint_id)
        endpoint.aside += 1
        try:
            yield
        finally:
            endpoint.aside -= 1

    def fail_held(self, endpoint_id: str, error: Exception, *, retry_ms: int | None = None) -> None:
        """Give all held requests of an endpoint an error; shed new ones until `retry_ms` if given."""
        endpoint = self._endpoint(endpoint_id)
        endpoint.retry_ms = retry_ms
        for held in endpoint.held.values():
            if not held.future.done():
                held.future.set_exception(error)

    def forgive(self, endpoint_id: str) -> None:
        """Hold new requests again instead of shedding them: the endpoint may start workers again."""
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is not None:
            endpoint.retry_ms = None

    def release_request(self, slots: WorkerSlots) -> None:
        """Give back a slot taken by `admit` or `hold`."""
        slots.requests -= 1
        assert slots.requests >= 0, f"worker {slots.worker_id}: more requests released than taken"
        self._released(slots)

    def reserve_jobs(self, worker_id: str, count: int, *, leaving: int = 0) -> int:
        """Take up to `count` slots for jobs; returns how many were free. Held requests come first.

        Args:
            worker_id: Whose.
            count: How many at most.
            leaving: Jobs whose slots are about to be given back; these are free already for who asks.
        """
        slots = self._workers.get(worker_id)
        if slots is None or not slots.open or slots.suspended:
            return 0
        if leaving and self._endpoints[slots.endpoint_id].held:
            leaving = 0
        granted = max(0, min(count, slots.capacity - slots.requests - slots.jobs + leaving))
        slots.jobs += granted
        return granted

    def release_jobs(self, worker_id: str, count: int = 1) -> None:
        """Give back job slots; harmless for a worker that has ended."""
        slots = self._workers.get(worker_id)
        if slots is None or count == 0:
            return
        slots.jobs -= count
        assert slots.jobs >= 0, f"worker {worker_id}: more jobs released than taken"
        self._released(slots)

    async def traffic(self, endpoint_id: str, *, overdue_before_ms: int) -> Traffic:
        """The endpoint's load now (port `TrafficReader`)."""
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None:
            return Traffic()
        waiting = [held.since_ms for held in endpoint.held.values() if not held.future.done()]
        return Traffic(
            held=len(waiting),
            oldest_held_ms=min(waiting, default=None),
            overdue_held=sum(since < overdue_before_ms for since in waiting),
            occupied={slots.worker_id: slots.occupied for slots in endpoint.workers.values()},
            idle_since_ms={
                slots.worker_id: slots.idle_since_ms
                for slots in endpoint.workers.values()
                if not slots.occupied
            },
            requests_in_flight=sum(slots.requests for slots in endpoint.workers.values()),
        )

    def _endpoint(self, endpoint_id: str) -> _EndpointSlots:
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None:
            endpoint = self._endpoints[endpoint_id] = _EndpointSlots()
        return endpoint

    def _take_request_slot(self, endpoint: _EndpointSlots) -> WorkerSlots | None:
        picked = pick_worker(
            Candidate(slots.worker_id, slots.occupied, slots.capacity)
            for slots in endpoint.workers.values()
            if slots.takes_requests
        )
        if picked is None:
            return None
        slots = endpoint.workers[picked]
        slots.requests += 1
        return slots

    def _serve_held(self, endpoint_id: str) -> None:
        endpoint = self._endpoint(endpoint_id)
        for held in list(endpoint.held.values()):
            if held.future.done():
                continue
            if held.worker_id is not None:
                pinned = self.take_of(endpoint_id, held.worker_id)
                if pinned is not None:
                    held.future.set_result(pinned)
                continue
            slots = self._take_request_slot(endpoint)
            if slots is None:
                return
            held.future.set_result(slots)

    def _fail_pinned(self, worker_id: str) -> None:
        for held in self._pinned.get(worker_id, {}).values():
            if not held.future.done():
                held.future.set_exception(WorkerGoneError(f"worker {worker_id} is gone"))

    def _unpin(self, worker_id: str, ticket: int) -> None:
        tickets = self._pinned[worker_id]
        del tickets[ticket]
        if not tickets:
            del self._pinned[worker_id]

    def _give_back(self, held: _Held) -> None:
        # The slot may have been handed over in the same moment in which the wait ended.
        if held.future.done() and not held.future.cancelled() and held.future.exception() is None:
            self.release_request(held.future.result())

    def _resume(self, slots: WorkerSlots) -> None:
        slots.suspended = False
        if slots.free:
            self._serve_held(slots.endpoint_id)
            self.on_free(slots.endpoint_id)

    def _released(self, slots: WorkerSlots) -> None:
        if not slots.occupied:
            slots.idle_since_ms = self._clock.now_ms()
        if self._endpoint(slots.endpoint_id).held:
            self._serve_held(slots.endpoint_id)
        if slots.free:
            self.on_free(slots.endpoint_id)
        if not slots.occupied:
            self.on_idle(slots.endpoint_id)
