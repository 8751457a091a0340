"""Chooses the worker of a request: what the policies of `core.routing` look at, kept from request to request.

Called by `gateway.slots` for every request that gets a slot, and by the data path at the end of each. It
counts nothing: slots are counted there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from pilotlight.core.outliers import SLOW_MS, WorkerHealth, judge
from pilotlight.core.prefix_index import PrefixIndex
from pilotlight.core.routing import pick_by_prefix, pick_by_session, pick_least_loaded
from pilotlight.domain.endpoint import Endpoint, Routing
from pilotlight.gateway.slots import Ask, WorkerSlots
from pilotlight.ports.clock import Clock

_log = structlog.get_logger()

_BY_SESSION = frozenset({Routing.AUTO, Routing.SESSION})
_BY_PREFIX = frozenset({Routing.AUTO, Routing.PREFIX})


def looks_at_prompts(routing: Routing, ask: Ask) -> bool:
    """Whether the worker of a request may depend on its prompt."""
    return routing in _BY_PREFIX and not (ask.session and routing in _BY_SESSION)


@dataclass(slots=True)
class _Fleet:
    """The workers of one endpoint.

    Attributes:
        slots: Of each that was a candidate.
        health: Of each, too.
        doubted: How many are not in full use.
        index: What they were sent.
        again: Tells of the moment at which one of them may be picked, when none might.
    """

    slots: dict[str, WorkerSlots] = field(default_factory=dict)
    health: dict[str, WorkerHealth] = field(default_factory=dict)
    doubted: int = 0
    index: PrefixIndex = field(default_factory=PrefixIndex)
    again: asyncio.TimerHandle | None = None


class FleetRouter:
    """Implements `gateway.slots.Router`.

    Args:
        clock: Time.
        endpoint_of: An endpoint by id, for its setting `routing`; None for one that is gone.
        draw: Random numbers, 0 <= x < 1.
        on_suspend: Called with a worker's id and the seconds for which it must get no requests.
        on_resume: Called with a worker's id when that counts no longer.
        on_ready: Called with an endpoint's id when a worker may be picked after none might be.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        endpoint_of: Callable[[str], Endpoint | None],
        draw: Callable[[], float],
        on_suspend: Callable[[str, float], None] = lambda _worker_id, _seconds: None,
        on_resume: Callable[[str], None] = lambda _worker_id: None,
        on_ready: Callable[[str], None] = lambda _endpoint_id: None,
    ) -> None:
        self._clock = clock
        self._endpoint_of = endpoint_of
        self._draw = draw
        self.on_suspend = on_suspend
        self.on_resume = on_resume
        self.on_ready = on_ready
        self._fleets: dict[str, _Fleet] = {}
        self._endpoints: dict[str, str] = {}

    def pick(self, endpoint_id: str, candidates: Sequence[WorkerSlots], ask: Ask) -> WorkerSlots | None:
        """One of the candidates; None when all of them are on probation with a request under way."""
        fleet = self._fleets.get(endpoint_id)
        if fleet is None:
            fleet = self._fleets[endpoint_id] = _Fleet()
        known = fleet.health
        for slots in candidates:
            if slots.worker_id not in known:
                self._add(endpoint_id, fleet, slots)
        if len(known) == 1:
            return candidates[0]
        if not fleet.doubted:
            return self._choose(fleet, endpoint_id, candidates, ask)
        now_ms = self._now_ms()
        sound = [slots for slots in candidates if known[slots.worker_id].takes_from_ms <= now_ms]
        if not sound:
            if fleet.again is None:
                wait_ms = min(known[slots.worker_id].takes_from_ms for slots in candidates) - now_ms
                loop = asyncio.get_running_loop()
                fleet.again = loop.call_later(wait_ms / 1000, self._pick_again, endpoint_id, fleet)
            return None
        picked = self._choose(fleet, endpoint_id, sound, ask)
        known[picked.worker_id] = known[picked.worker_id].probed(now_ms)
        return picked

    def observed(self, worker_id: str, *, failed: bool, first_byte_ms: int | None) -> None:
        """A request has ended. To be called before its slot is given back.

        Args:
            worker_id: Who served it.
            failed: Whether the worker could not be reached, broke off, or answered with a status from 500 on.
            first_byte_ms: From its sending to the first byte of the answer; None where there was none.
        """
        fleet = self._fleets.get(self._endpoints.get(worker_id, ""))
        if fleet is None or (len(fleet.health) == 1 and not fleet.doubted):
            # The only worker is never suspended.
            return
        before = fleet.health[worker_id]
        slow = first_byte_ms is not None and first_byte_ms > SLOW_MS and not self._busier(fleet, worker_id)
        judgement = judge(
            worker_id,
            fleet.health,
            failed=failed,
            first_byte_ms=first_byte_ms,
            slow=slow,
            now_ms=self._now_ms(),
        )
        fleet.health[worker_id] = judgement.health
        fleet.doubted += (judgement.health.until_ms != 0) - (before.until_ms != 0)
        if judgement.pause_ms:
            _log.warning(
                "worker_suspended", endpoint=self._endpoints[worker_id], worker=worker_id,
                reason=judgement.reason.value, seconds=judgement.pause_ms / 1000,
            )  # fmt: skip
            self.on_suspend(worker_id, judgement.pause_ms / 1000)

    def forget(self, worker_id: str) -> None:
        """A worker ended, or takes no more requests; should it come back it is a new one."""
        endpoint_id = self._endpoints.pop(worker_id, None)
        if endpoint_id is None:
            return
        fleet = self._fleets[endpoint_id]
        del fleet.slots[worker_id]
        fleet.doubted -= fleet.health.pop(worker_id).until_ms != 0
        fleet.index.forget(worker_id)
        if not fleet.health:
            del self._fleets[endpoint_id]
            if fleet.again is not None:
                fleet.again.cancel()
        elif fleet.doubted == len(fleet.health):
            # Those that did better have gone.
            fleet.health = {name: WorkerHealth(trips=one.trips) for name, one in fleet.health.items()}
            fleet.doubted = 0
            for name in list(fleet.health):
                self.on_resume(name)

    def _pick_again(self, endpoint_id: str, fleet: _Fleet) -> None:
        fleet.again = None
        self.on_ready(endpoint_id)

    def _add(self, endpoint_id: str, fleet: _Fleet, slots: WorkerSlots) -> None:
        fleet.slots[slots.worker_id] = slots
        fleet.health[slots.worker_id] = WorkerHealth()
        self._endpoints[slots.worker_id] = endpoint_id

    def _choose(
        self, fleet: _Fleet, endpoint_id: str, candidates: Sequence[WorkerSlots], ask: Ask
    ) -> WorkerSlots:
        endpoint = self._endpoint_of(endpoint_id)
        routing, workers_min = (endpoint.routing, endpoint.workers_min) if endpoint else (Routing.AUTO, 0)
        if ask.session and routing in _BY_SESSION:
            return pick_by_session(candidates, ask.session)
        if ask.prefix is not None and looks_at_prompts(routing, ask):
            blocks = ask.prefix()
            if len(blocks) > 1:
                looks = [fleet.index.look(slots.worker_id, blocks) for slots in candidates]
                gather = len(fleet.health) > workers_min
                picked = pick_by_prefix(candidates, looks, len(blocks), gather=gather)
                fleet.index.note(picked.worker_id, blocks)
                return picked
        return pick_least_loaded(candidates, self._draw())

    @staticmethod
    def _busier(fleet: _Fleet, worker_id: str) -> bool:
        slots = fleet.slots[worker_id]
        occupied = sum(one.occupied for one in fleet.slots.values())
        capacity = sum(one.capacity for one in fleet.slots.values())
        return slots.occupied * capacity > occupied * slots.capacity

    def _now_ms(self) -> int:
        return self._clock.monotonic_ns() // 1_000_000 + 1
