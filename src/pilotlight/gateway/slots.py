"""The slots of every ready worker, and the requests that wait for one.

One count per worker covers both roads: requests on the data path and leased jobs. This object is the
only one that counts, and whoever takes a slot gives it back here. Requests that wait get slots in fair order
(`core.fair_queue`); which worker's slot it is, a router decides. It lives in the gateway's event loop and is
not shared between threads; loops read it through the `TrafficReader` port.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from pilotlight.core.admission import (
    HOLD_REASONS,
    Admission,
    AdmissionLimits,
    AdmissionSnapshot,
    decide_admission,
)
from pilotlight.domain.worker import Registration
from pilotlight.gateway.waiting import (
    DisplacedError,
    EndpointSlots,
    Ends,
    HoldExpiredError,
    Waiting,
    WorkerGoneError,
)
from pilotlight.gateway.worker_slots import Ask, LeastShare, Router, WorkerSlots
from pilotlight.ports.clock import Clock
from pilotlight.ports.traffic import Traffic

__all__ = [
    "Ask",
    "DisplacedError",
    "HoldExpiredError",
    "LeastShare",
    "Router",
    "SlotTable",
    "Waiting",
    "WorkerGoneError",
    "WorkerSlots",
]


class SlotTable:
    """Counts slots, admits requests, holds those that must wait.

    Args:
        clock: Time.
        limits: Bounds of the hold, per endpoint.
        router: Chooses workers for requests; the smallest share of slots in use if there is none.
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
        router: Router | None = None,
        on_demand: Callable[[str], None] = lambda _: None,
        on_idle: Callable[[str], None] = lambda _: None,
        on_free: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._router: Router = router or LeastShare()
        self.on_demand = on_demand
        self.on_idle = on_idle
        self.on_free = on_free
        self._endpoints: dict[str, EndpointSlots] = {}
        self._workers: dict[str, WorkerSlots] = {}
        # By worker, which may not have slots yet.
        self._pinned: dict[str, list[Waiting]] = {}
        self._ends = Ends()

    def open_worker(
        self, endpoint_id: str, worker_id: str, *, capacity: int, registration: Registration | None
    ) -> None:
        """Add a ready worker, or change its capacity and addresses; held requests flow to it at once."""
        endpoint = self._endpoint(endpoint_id)
        slots = self._workers.get(worker_id)
        if slots is None:
            slots = WorkerSlots(
                worker_id=worker_id,
                endpoint_id=endpoint_id,
                configured=capacity,
                capacity=capacity,
                registration=registration,
                idle_since_ms=self._clock.now_ms(),
            )
            self._workers[worker_id] = slots
            endpoint.add(slots)
        else:
            slots.resize(capacity, slots.limit)
            slots.registration = registration or slots.registration
            if not slots.open:
                # What was known of it counts no longer.
                slots.resume()
            slots.open = True
        endpoint.candidates = None
        endpoint.retry_ms = None
        self._serve(endpoint_id, endpoint)

    def limit_worker(self, worker_id: str, capacity: int | None) -> None:
        """Give fewer slots of a worker than it was opened with; those in use stay in use.

        Args:
            worker_id: Which; one that has no slots is passed over.
            capacity: How many; more than it was opened with changes nothing, and None lifts the limit.
        """
        slots = self._workers.get(worker_id)
        if slots is None or slots.limit == capacity:
            return
        free = slots.free
        slots.resize(slots.configured, capacity)
        endpoint = self._endpoints[slots.endpoint_id]
        endpoint.candidates = None
        if slots.free > free:
            self._freed(slots.endpoint_id, endpoint)

    def serve_held(self, endpoint_id: str) -> None:
        """Hand out free slots: the router may pick a worker now that it did not pick before."""
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is not None:
            self._serve(endpoint_id, endpoint)

    def close_worker(self, worker_id: str, *, for_good: bool = True) -> None:
        """Give no more slots of this worker; those in use stay in use.

        Args:
            worker_id: Which.
            for_good: Whether it is going to end, so that nobody needs to wait for it.
        """
        slots = self._workers.get(worker_id)
        if slots is not None:
            slots.open = False
            self._endpoints[slots.endpoint_id].candidates = None
            self._router.forget(worker_id)
        if for_good:
            self._fail_pinned(worker_id)

    def suspend_worker(self, worker_id: str, seconds: float) -> None:
        """Send it no requests for a while: it cannot be reached, or fails; the longest time said counts."""
        slots = self._workers.get(worker_id)
        if slots is not None:
            slots.suspend(seconds, self._resume)
            self._endpoints[slots.endpoint_id].candidates = None

    def resume_worker(self, worker_id: str) -> None:
        """End its suspension, and hand out its slots: the router may pick it now."""
        slots = self._workers.get(worker_id)
        if slots is not None:
            self._resume(slots)

    def drop_worker(self, worker_id: str) -> None:
        """Forget a worker that has ended; releases of its slots become harmless."""
        self._fail_pinned(worker_id)
        self._ends.tell(worker_id)
        slots = self._workers.pop(worker_id, None)
        if slots is not None:
            slots.open = False
            slots.resume()
            endpoint = self._endpoints[slots.endpoint_id]
            endpoint.candidates = None
            endpoint.workers.pop(worker_id, None)
            self._router.forget(worker_id)
            self._forget_unused(slots.endpoint_id, endpoint)

    def worker(self, worker_id: str) -> WorkerSlots | None:
        """The slots of one worker; None when it is not ready or has ended."""
        return self._workers.get(worker_id)

    def workers(self) -> list[WorkerSlots]:
        """The slots of all workers there are, of all endpoints."""
        return list(self._workers.values())

    def admit(self, endpoint_id: str, ask: Ask, *, take: bool = True) -> tuple[Admission, WorkerSlots | None]:
        """Decide on a request; with ADMIT the slot is taken already and must be released.

        A full hold does not shed it if another key has more than its part in there: the last requests of that
        key are shed instead, and fail with a DisplacedError.

        Args:
            endpoint_id: Whom it calls.
            ask: The request.
            take: Whether to take a slot; no for a request that not every worker will do for.

        Returns:
            The decision, and the slot. There may be none although a worker has one free: the router had its
            reasons, and the decision is then to queue.
        """
        endpoint = self._known(endpoint_id)
        candidates = endpoint.look(ask.tried)
        ahead, free = len(endpoint.queue) - endpoint.constrained, len(candidates)
        slots = None
        if candidates and not ahead and take:
            slots = self._pick(endpoint, endpoint_id, candidates, ask)
        admission = decide_admission(
            AdmissionSnapshot(
                endpoint.ready,
                free if slots is not None or not take else 0,
                ahead,
                len(endpoint.queue) + endpoint.aside,
                endpoint.held_bytes,
                ask.body_bytes,
                endpoint.retry_ms,
            ),
            self._clock.now_ms(),
            self._limits,
        )
        if slots is not None:
            ask.charged = endpoint.queue.serve(ask.key_id, ask.share, ask.cost)
        elif admission.reason in HOLD_REASONS and self._make_room(endpoint, ask, admission):
            return self.admit(endpoint_id, ask, take=take)
        return admission, slots

    def take_of(self, endpoint_id: str, worker_id: str, ask: Ask) -> WorkerSlots | None:
        """A slot of one certain worker, taken and to be released; None when it has none free."""
        endpoint = self._known(endpoint_id)
        slots = self._take_only(endpoint, endpoint_id, worker_id)
        if slots is not None:
            ask.charged = endpoint.queue.serve(ask.key_id, ask.share, ask.cost)
        return slots

    def wait(
        self,
        endpoint_id: str,
        ask: Ask,
        granted: Callable[[WorkerSlots], None],
        failed: Callable[[Exception], None],
        *,
        worker_id: str | None = None,
    ) -> Waiting:
        """Let a request wait for a slot, for as long as its maker likes.

        Neither function is called before this returns, at most one of them is, and at most once. They are
        called from whatever freed the slot, and must not raise.

        Args:
            endpoint_id: Whom it calls.
            ask: The request. While it has tried all ready workers, it waits for another.
            granted: Takes the slot, which must be released.
            failed: Takes what was given to `fail_held`; a WorkerGoneError: the only worker that would do is
                going to end; or a DisplacedError: others need its place.
            worker_id: The only worker that will do; None for any.
        """
        endpoint = self._endpoint(endpoint_id)
        waiting = Waiting(self._cancel, endpoint_id, ask, granted, failed, worker_id, self._clock.now_ms())
        # A slot may have become free between the decision to hold and now.
        slots = self._at_once(endpoint, waiting)
        if slots is not None:
            waiting.slots = slots
            waiting.handle = asyncio.get_running_loop().call_soon(waiting.deliver)
            return waiting
        waiting.place = endpoint.queue.join(ask.key_id, ask.share, waiting, priority=ask.priority)
        endpoint.held_bytes += ask.body_bytes
        endpoint.constrained += waiting.constrained
        if worker_id is not None:
            self._pinned.setdefault(worker_id, []).append(waiting)
        self.on_demand(endpoint_id)
        return waiting

    async def hold(
        self, endpoint_id: str, ask: Ask, *, timeout_s: float, worker_id: str | None = None
    ) -> WorkerSlots:
        """Wait for a slot; it is taken when this returns and must be released.

        Args:
            endpoint_id: Whom it calls.
            ask: The request.
            timeout_s: Longest wait; a slot that is free at once is taken even with none.
            worker_id: The only worker that will do; None for any.

        Raises:
            HoldExpiredError: No slot came in time; the message of a start failure is raised as given
                to `fail_held`.
            WorkerGoneError: The only worker that would do is going to end.
            DisplacedError: Requests of other keys need its place.
        """
        future: asyncio.Future[WorkerSlots] = asyncio.get_running_loop().create_future()

        def granted(slots: WorkerSlots) -> None:
            if future.cancelled():
                self.release_request(slots, ask, tokens=0)
            else:
                future.set_result(slots)

        def failed(error: Exception) -> None:
            if not future.cancelled():
                future.set_exception(error)

        waiting = self.wait(endpoint_id, ask, granted, failed, worker_id=worker_id)
        if waiting.handle is not None:
            waiting.handle.cancel()
            waiting.deliver()
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            self._leave(waiting, future)
            raise HoldExpiredError(f"no worker became free within {timeout_s:g} s") from error
        except asyncio.CancelledError:
            self._leave(waiting, future)
            raise

    async def wait_end(self, endpoint_id: str, worker_id: str) -> None:
        """Wait until a worker that is going to end has ended, for a request that wants it started again."""
        with self.aside(endpoint_id):
            await self._ends.wait(worker_id)

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
            self._forget_unused(endpoint_id, endpoint)

    def fail_held(self, endpoint_id: str, error: Exception, *, retry_ms: int | None = None) -> None:
        """Give all held requests of an endpoint an error; shed new ones until `retry_ms` if given."""
        endpoint = self._endpoint(endpoint_id)
        endpoint.retry_ms = retry_ms
        for waiting in list(endpoint.queue):
            # What one of them does about it may end the wait of another.
            if waiting.place is not None:
                self._withdraw(waiting)
                waiting.failed(error)
        self._forget_unused(endpoint_id, endpoint)

    def ahead(self, endpoint_id: str, ask: Ask) -> tuple[int, int]:
        """Requests that will probably be served before one more like this, and slots for requests in all."""
        endpoint = self._known(endpoint_id)
        slots = sum(slots.capacity for slots in endpoint.workers.values() if slots.takes_requests)
        return endpoint.queue.ahead(ask.key_id, ask.share), slots

    def forgive(self, endpoint_id: str) -> None:
        """Hold new requests again instead of shedding them: the endpoint may start workers again."""
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is not None:
            endpoint.retry_ms = None

    def release_request(self, slots: WorkerSlots, ask: Ask, *, tokens: int | None = None) -> None:
        """Give back a slot taken by `admit`, `take_of`, `wait` or `hold`.

        Args:
            slots: Whose.
            ask: The request that it was taken for.
            tokens: What the request has cost (`core.fair_queue.cost_of`); None if nobody knows.
        """
        occupied = slots.requests + slots.jobs
        slots.requests -= 1
        assert slots.requests >= 0, f"worker {slots.worker_id}: more requests released than taken"
        self._endpoints[slots.endpoint_id].queue.settle(ask.key_id, ask.charged, ask.cost, tokens)
        self._released(slots, occupied)

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
        endpoint = self._endpoints[slots.endpoint_id]
        if leaving and endpoint.queue:
            leaving = 0
        occupied = slots.requests + slots.jobs
        granted = max(0, min(count, slots.capacity - occupied + leaving))
        slots.jobs += granted
        endpoint.used(slots, occupied)
        return granted

    def release_jobs(self, worker_id: str, count: int = 1) -> None:
        """Give back job slots; harmless for a worker that has ended."""
        slots = self._workers.get(worker_id)
        if slots is None or count == 0:
            return
        occupied = slots.requests + slots.jobs
        slots.jobs -= count
        assert slots.jobs >= 0, f"worker {worker_id}: more jobs released than taken"
        self._released(slots, occupied)

    async def traffic(self, endpoint_id: str, *, overdue_before_ms: int) -> Traffic:
        """The endpoint's load now (port `TrafficReader`)."""
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None:
            return Traffic()
        since = [waiting.since_ms for waiting in endpoint.queue]
        return Traffic(
            held=len(since),
            oldest_held_ms=min(since, default=None),
            overdue_held=sum(since_ms < overdue_before_ms for since_ms in since),
            occupied={slots.worker_id: slots.occupied for slots in endpoint.workers.values()},
            idle_since_ms={
                slots.worker_id: slots.idle_since_ms
                for slots in endpoint.workers.values()
                if not slots.occupied
            },
            capacity={
                slots.worker_id: 0 if slots.suspended else slots.capacity
                for slots in endpoint.workers.values()
            },
            requests_in_flight=sum(slots.requests for slots in endpoint.workers.values()),
        )

    def _forget_unused(self, endpoint_id: str, endpoint: EndpointSlots) -> None:
        if endpoint.unused and self._endpoints.get(endpoint_id) is endpoint:
            del self._endpoints[endpoint_id]

    def _known(self, endpoint_id: str) -> EndpointSlots:
        """An endpoint to look at; nothing is kept for one that has nothing here, which may be deleted."""
        return self._endpoints.get(endpoint_id) or EndpointSlots()

    def _endpoint(self, endpoint_id: str) -> EndpointSlots:
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None:
            endpoint = self._endpoints[endpoint_id] = EndpointSlots()
        return endpoint

    def _pick(
        self, endpoint: EndpointSlots, endpoint_id: str, candidates: list[WorkerSlots], ask: Ask
    ) -> WorkerSlots | None:
        slots = self._router.pick(endpoint_id, candidates, ask)
        if slots is not None:
            self._occupy(endpoint, slots)
        return slots

    def _occupy(self, endpoint: EndpointSlots, slots: WorkerSlots) -> None:
        slots.requests += 1
        if slots.requests + slots.jobs >= slots.capacity:
            endpoint.used(slots, slots.requests + slots.jobs - 1)

    def _take(self, endpoint: EndpointSlots, waiting: Waiting) -> WorkerSlots | None:
        """A slot that will do for a request, if there is one; its key is not charged yet."""
        if waiting.worker_id is not None:
            return self._take_only(endpoint, waiting.endpoint_id, waiting.worker_id)
        candidates = endpoint.look(waiting.ask.tried)
        return self._pick(endpoint, waiting.endpoint_id, candidates, waiting.ask) if candidates else None

    def _take_only(self, endpoint: EndpointSlots, endpoint_id: str, worker_id: str) -> WorkerSlots | None:
        slots = self._workers.get(worker_id)
        if slots is None or slots.endpoint_id != endpoint_id or not slots.takes_requests or not slots.free:
            return None
        self._occupy(endpoint, slots)
        return slots

    def _at_once(self, endpoint: EndpointSlots, waiting: Waiting) -> WorkerSlots | None:
        if len(endpoint.queue) > endpoint.constrained and waiting.worker_id is None:
            return None
        slots, ask = self._take(endpoint, waiting), waiting.ask
        if slots is not None:
            ask.charged = endpoint.queue.serve(ask.key_id, ask.share, ask.cost)
        return slots

    def _make_room(self, endpoint: EndpointSlots, ask: Ask, shed: Admission) -> bool:
        """Whether a request has its place in the hold now, at the cost of a key that has more of them."""
        count = len(endpoint.queue) + endpoint.aside + 1 - self._limits.requests
        size = endpoint.held_bytes + ask.body_bytes - self._limits.bytes
        leaving: list[Waiting] = []
        for place in endpoint.queue.surplus(ask.key_id, ask.share):
            if count <= 0 and size <= 0:
                break
            leaving.append(place.item)
            count -= 1
            size -= place.item.ask.body_bytes
        if count > 0 or size > 0:
            return False
        for waiting in leaving:
            self._withdraw(waiting)
        for waiting in leaving:
            waiting.failed(DisplacedError(shed))
        return True

    def _serve(self, endpoint_id: str, endpoint: EndpointSlots) -> None:
        """Hand out free slots to those that wait, in fair order."""
        if endpoint.serving or not endpoint.queue:
            return
        endpoint.serving = True
        try:
            while self._serve_one(endpoint):
                pass
        finally:
            endpoint.serving = False
        if endpoint.freed:
            endpoint.freed = False
            self.on_free(endpoint_id)
            if not all(slots.occupied for slots in endpoint.workers.values()):
                self.on_idle(endpoint_id)
            if not endpoint.workers:
                self._forget_unused(endpoint_id, endpoint)

    def _serve_one(self, endpoint: EndpointSlots) -> bool:
        place = endpoint.queue.first()
        if place is None or not endpoint.look():
            return False
        slots = self._take(endpoint, place.item)
        if slots is None:
            if not endpoint.constrained:
                return False
            # The others do not wait for the worker that this one waits for.
            for other in endpoint.queue.in_order():
                slots, place = self._take(endpoint, other.item), other
                if slots is not None:
                    break
            else:
                return False
        waiting = place.item
        waiting.ask.charged = endpoint.queue.take(place, waiting.ask.cost)
        self._left(endpoint, waiting)
        waiting.granted(slots)
        return True

    def _cancel(self, waiting: Waiting) -> None:
        if waiting.place is not None:
            self._withdraw(waiting)
        elif waiting.handle is not None and waiting.slots is not None:
            waiting.handle.cancel()
            slots, waiting.handle, waiting.slots = waiting.slots, None, None
            self.release_request(slots, waiting.ask, tokens=0)

    def _withdraw(self, waiting: Waiting) -> None:
        assert waiting.place is not None
        endpoint = self._endpoints[waiting.endpoint_id]
        endpoint.queue.leave(waiting.place)
        self._left(endpoint, waiting)
        self._forget_unused(waiting.endpoint_id, endpoint)

    def _left(self, endpoint: EndpointSlots, waiting: Waiting) -> None:
        waiting.place = None
        endpoint.held_bytes -= waiting.ask.body_bytes
        endpoint.constrained -= waiting.constrained
        if waiting.worker_id is not None:
            pinned = self._pinned[waiting.worker_id]
            pinned.remove(waiting)
            if not pinned:
                del self._pinned[waiting.worker_id]

    def _leave(self, waiting: Waiting, future: asyncio.Future[WorkerSlots]) -> None:
        waiting.cancel()
        # The slot may have been handed over in the same moment in which the wait ended.
        if future.done() and not future.cancelled() and future.exception() is None:
            self.release_request(future.result(), waiting.ask, tokens=0)

    def _fail_pinned(self, worker_id: str) -> None:
        for waiting in list(self._pinned.get(worker_id, ())):
            if waiting.place is not None:
                self._withdraw(waiting)
                waiting.failed(WorkerGoneError(f"worker {worker_id} is gone"))

    def _resume(self, slots: WorkerSlots) -> None:
        slots.resume()
        endpoint = self._endpoints[slots.endpoint_id]
        endpoint.candidates = None
        if slots.free:
            self._freed(slots.endpoint_id, endpoint)

    def _released(self, slots: WorkerSlots, occupied: int) -> None:
        """Slots were given back; `occupied` were in use before."""
        endpoint_id, idle = slots.endpoint_id, not slots.requests and not slots.jobs
        endpoint = self._endpoints[endpoint_id]
        if idle:
            slots.idle_since_ms = self._clock.now_ms()
        if occupied >= slots.capacity:
            endpoint.used(slots, occupied)
        if endpoint.serving:
            endpoint.freed = True
            return
        if len(endpoint.queue):
            self._serve(endpoint_id, endpoint)
            idle = not slots.requests and not slots.jobs
        if slots.requests + slots.jobs < slots.capacity and slots.open and slots.resumption is None:
            self.on_free(endpoint_id)
        if idle:
            self.on_idle(endpoint_id)
        if not endpoint.workers:
            self._forget_unused(endpoint_id, endpoint)

    def _freed(self, endpoint_id: str, endpoint: EndpointSlots) -> None:
        if endpoint.serving:
            endpoint.freed = True
            return
        self._serve(endpoint_id, endpoint)
        self.on_free(endpoint_id)
