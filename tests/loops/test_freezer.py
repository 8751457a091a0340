"""The loop that ends frozen workers which may not be kept."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.core.freezing import EvictionReason, FrozenView, HostMemory
from pilotlight.loops.freezer import Freezer
from pilotlight.settings import WorkerSettings

from .conftest import GIB, HandClock

CALM = HostMemory(total_bytes=64 * GIB, available_bytes=60 * GIB, pressure_percent=0.0)


class PaperFleet:
    def __init__(self):
        self.kept = {}
        self.evicted = []
        self.changed = asyncio.Event()
        self.looks = 0

    def add(self, worker_id, since_ms, gib=1):
        self.kept[worker_id] = FrozenView(id=worker_id, since_ms=since_ms, memory_bytes=gib * GIB)

    def frozen(self):
        self.looks += 1
        self.changed.set()
        return list(self.kept.values())

    async def evict(self, worker_id, *, reason):
        del self.kept[worker_id]
        self.evicted.append((worker_id, reason.rpartition(" ")[2]))
        self.changed.set()


class Bench:
    def __init__(self, **settings):
        self.fleet, self.clock, self.memory = PaperFleet(), HandClock(), CALM
        self.freezer = Freezer(self.fleet, self.read, self.clock, WorkerSettings(**settings))

    def read(self):
        if isinstance(self.memory, Exception):
            raise self.memory
        return self.memory

    async def until(self, look):
        async with asyncio.timeout(10):
            while not look():
                self.fleet.changed.clear()
                await self.fleet.changed.wait()


@pytest.mark.parametrize(
    ("settings", "memory", "reason"),
    [
        ({"frozen_age_s": 1}, CALM, EvictionReason.AGE),
        ({"frozen_memory_bytes": GIB}, CALM, EvictionReason.BUDGET),
        ({}, HostMemory(total_bytes=64 * GIB, available_bytes=GIB // 2), EvictionReason.AVAILABLE),
        (
            {"frozen_pressure": 5.0},
            HostMemory(total_bytes=64 * GIB, available_bytes=60 * GIB, pressure_percent=7.5),
            EvictionReason.PRESSURE,
        ),
    ],
)
async def test_what_is_ended_and_why(settings, memory, reason):
    bench = Bench(**settings)
    bench.fleet.add("old", bench.clock.now - 1000)
    bench.fleet.add("new", bench.clock.now)
    bench.memory = memory
    await bench.freezer.look()
    assert bench.fleet.evicted == [("old", reason)]
    assert list(bench.fleet.kept) == ["new"]


async def test_it_sleeps_until_something_is_frozen_and_ends_at_once_what_is_too_much():
    bench = Bench(frozen_memory_bytes=GIB)
    bench.freezer.start()
    await bench.until(lambda: bench.fleet.looks == 1)
    bench.fleet.add("a", bench.clock.now)
    bench.fleet.add("b", bench.clock.now + 1)
    bench.freezer.wake()
    await bench.until(lambda: bench.fleet.evicted)
    assert bench.fleet.evicted == [("a", EvictionReason.BUDGET)]
    await bench.freezer.stop()
    await bench.freezer.stop()


async def test_memory_that_cannot_be_read_once_ends_nothing(monkeypatch):
    monkeypatch.setattr("pilotlight.loops.freezer._RETRY_S", 0.01)
    bench = Bench(frozen_age_s=1)
    bench.fleet.add("a", bench.clock.now - 5000)
    bench.memory = OSError("no /proc")
    bench.freezer.start()
    await bench.until(lambda: bench.fleet.looks == 2)
    bench.memory = CALM
    await bench.until(lambda: bench.fleet.evicted)
    await bench.freezer.stop()
