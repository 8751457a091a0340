"""Asks engines that have something to do for their load, and gives their workers the capacity that fits it.

Once a second, of every engine that works or is held to less than its configured concurrency: at most one
small request each, for the few figures needed, and none to an engine that stands still. What follows from
them is decided by `core.engine_capacity`. An engine that has no such figures, because it is no vLLM or was
started with `--disable-log-stats`, keeps its configured concurrency and is asked again now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlencode

import structlog

from pilotlight.core.engine_capacity import (
    CapacityReason,
    CapacityState,
    EngineReading,
    decide_capacity,
)
from pilotlight.domain.worker import Address
from pilotlight.loops.tasks import Endless
from pilotlight.ports.clock import Clock

_log = structlog.get_logger()

_PERIOD_S = 1.0

_WITHOUT_MS = 60_000
"""How long an engine is left alone that answered without such figures."""

_SILENT_MS = 10_000
"""How long one is left alone that did not answer and has never given any."""

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_WAITING_BY_REASON = "vllm:num_requests_waiting_by_reason"
_CACHE_USE = "vllm:kv_cache_usage_perc"
_PREEMPTIONS = "vllm:num_preemptions_total"
_FIGURES = (_RUNNING, _WAITING, _WAITING_BY_REASON, _CACHE_USE, _PREEMPTIONS)

FEW: Final = "/metrics/?" + urlencode([("name[]", name) for name in _FIGURES])
"""Only these figures: a page of 1 KB instead of 50, and 2 ms instead of 7 for the engine's server (measured
with vLLM 0.32). The slash matters: without it the names are ignored."""

ALL: Final = "/metrics"
"""The whole page, which is all that an engine with several API servers has."""

_SAMPLE = re.compile(rf"^({'|'.join(_FIGURES)})(\{{.*\}})? (\S+)".encode(), re.MULTILINE)
_FOR_ROOM = b'reason="capacity"'


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSlots:
    """A worker whose engine can be asked.

    Attributes:
        worker_id: Whose engine it is.
        engine: Where it listens.
        occupied: Slots in use.
        configured: Slots it has when it is not limited.
    """

    worker_id: str
    engine: Address
    occupied: int
    configured: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoadView:
    """What was last known and decided of an engine, for metrics.

    Attributes:
        reading: What it said; None where it said nothing of use.
        capacity: Slots it has.
        reason: Why so many.
    """

    reading: EngineReading | None
    capacity: int
    reason: CapacityReason


Ask = Callable[[Address, str], Awaitable[bytes | None]]
"""Gets a page of an engine: (address, path) → its body, empty where there is no such page, None if the
engine did not answer. Bounded in time and size."""


@dataclass(slots=True)
class _Known:
    path: str = FEW
    rests_until_ms: int = 0
    state: CapacityState = field(default_factory=CapacityState)
    view: EngineLoadView | None = None


class EngineLoad:
    """A task that keeps the capacity of workers to what their engines can do.

    Args:
        engines: The engines to ask now, of busy and of limited workers.
        lives: Whether there is still a worker of this id.
        limit: Holds a worker to so many slots, None to as many as are configured (`SlotTable.limit_worker`).
        ask: Gets a page of an engine.
        clock: Time.
    """

    def __init__(
        self,
        *,
        engines: Callable[[], Iterable[EngineSlots]],
        lives: Callable[[str], bool],
        limit: Callable[[str, int | None], None],
        ask: Ask,
        clock: Clock,
    ) -> None:
        self._engines = engines
        self._lives = lives
        self._limit = limit
        self._ask = ask
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._loop = Endless(self._run, "engine-load")

    def start(self) -> None:
        """Begin; idempotent."""
        self._loop.start()

    async def stop(self) -> None:
        """End; idempotent. Limits stay as they are."""
        await self._loop.stop()

    def views(self) -> Mapping[str, EngineLoadView]:
        """What was last known and decided, by worker id, of all workers whose engines are asked now."""
        return {worker_id: known.view for worker_id, known in self._known.items() if known.view is not None}

    async def look(self) -> None:
        """Ask every engine that is to be asked once, and apply what follows."""
        engines = {engine.worker_id: engine for engine in self._engines()}
        for worker_id, known in [*self._known.items()]:
            if not self._lives(worker_id):
                del self._known[worker_id]
            elif worker_id not in engines:
                # It stands still: what it said while it worked is true no longer.
                known.view = None
        now_ms = self._now_ms()
        asked: list[tuple[EngineSlots, _Known]] = []
        for engine in engines.values():
            known = self._known.setdefault(engine.worker_id, _Known())
            if known.rests_until_ms <= now_ms:
                asked.append((engine, known))
        readings = await asyncio.gather(*(self._read(engine, known) for engine, known in asked))
        # As they are now: slots are taken and given back meanwhile, and workers end or stand still.
        current = {engine.worker_id: engine for engine in self._engines()}
        for (engine, known), reading in zip(asked, readings, strict=True):
            if engine.worker_id in current:
                self._apply(current[engine.worker_id], known, reading)

    async def _read(self, engine: EngineSlots, known: _Known) -> EngineReading | None:
        new = known.state.read_ms is None
        page: bytes | None = None
        for path in (FEW, ALL) if new else (known.path,):
            page = await self._ask(engine.engine, path)
            if page is None:
                break
            reading = parse_reading(page)
            if reading is not None:
                known.path = path
                return reading
        if new:
            pause_ms = _SILENT_MS if page is None else _WITHOUT_MS
            known.rests_until_ms = self._now_ms() + pause_ms
        return None

    def _apply(self, engine: EngineSlots, known: _Known, reading: EngineReading | None) -> None:
        before = known.state.limit
        decision = decide_capacity(
            known.state,
            reading,
            self._now_ms(),
            occupied=engine.occupied,
            configured=engine.configured,
        )
        known.state = decision.state
        known.view = EngineLoadView(reading=reading, capacity=decision.capacity, reason=decision.reason)
        self._limit(engine.worker_id, decision.limit)
        if (before is None) != (decision.limit is None):
            _log.info(
                "engine_capacity",
                worker=engine.worker_id,
                capacity=decision.capacity,
                configured=engine.configured,
                reason=decision.reason,
                running=None if reading is None else reading.running,
                waiting=None if reading is None else reading.waiting,
                cache_use=None if reading is None else round(reading.cache_use, 3),
            )

    def _now_ms(self) -> int:
        return self._clock.monotonic_ns() // 1_000_000

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await self.look()
            except Exception:  # noqa: BLE001 - limits that nobody lifts any more would stay
                _log.exception("engine_load_failed")
            await asyncio.sleep(max(0.0, began + _PERIOD_S - loop.time()))


def parse_reading(page: bytes) -> EngineReading | None:
    """What a page of vLLM's metrics says of its load; None where it says nothing of it.

    Several engines behind one server add up; of their caches it is the mean, as new requests go where there
    is room. Requests that wait for something else than room, such as an adapter, do not count where vLLM
    tells them apart: fewer of the others would not help them.
    """
    figures: dict[str, list[float]] = defaultdict(list)
    for name, labels, text in _SAMPLE.findall(page):
        with contextlib.suppress(ValueError):
            value = float(text)
            counts = name != _WAITING_BY_REASON.encode() or _FOR_ROOM in labels
            if counts and math.isfinite(value) and value >= 0:
                figures[name.decode()].append(value)
    waiting = figures.get(_WAITING_BY_REASON) or figures.get(_WAITING)
    running, cache_use = figures.get(_RUNNING), figures.get(_CACHE_USE)
    if not running or not waiting:
        return None
    return EngineReading(
        running=int(sum(running)),
        waiting=int(sum(waiting)),
        cache_use=sum(cache_use) / len(cache_use) if cache_use else 0.0,
        preemptions=int(sum(figures[_PREEMPTIONS])),
    )
