"""Two hundred launches and two hundred freezes in a row: nothing leaks, every answer is right (`make soak`)."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.conftest import LiveInstallation, live_installation

from pilotlight.bench.processes import rss_mb

from .waking import ANSWER, Sleeper, launcher_of, processes_of, state_of, until

pytestmark = [pytest.mark.soak, pytest.mark.engine]

ROUNDS = max(10, 200 * int(os.environ.get("PILOTLIGHT_SOAK_PERCENT", "100")) // 100)
SETTLED = 5
"""Rounds before the first look: caches fill, and allocators find their size."""

GROWTH_MB = 20
"""What may be added in all rounds together: logs in memory, rows in caches."""


@dataclass(frozen=True)
class Footprint:
    """What processes hold."""

    memory_mb: float
    descriptors: int
    zombies: int
    ports: int

    @classmethod
    def of(cls, pids: list[int]) -> Footprint:
        children = [int(child) for pid in pids for child in _children(pid)]
        return cls(
            # Not the proportional size: it moves with strangers that map the same libraries.
            memory_mb=sum(map(rss_mb, pids)),
            descriptors=sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
            zombies=sum(state_of(child) == "Z" for child in children),
            ports=sum(len(_listening(pid)) for pid in pids),
        )

    def check(self, before: Footprint) -> None:
        assert self.memory_mb < before.memory_mb + GROWTH_MB
        assert self.descriptors <= before.descriptors + 4
        assert self.zombies == 0
        assert self.ports == before.ports


def _listening(pid: int) -> set[str]:
    """TCP sockets on which a process listens, by their inodes."""
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    listening = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(str(entry.readlink()))
    return listening & held


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.fixture
def place() -> Iterator[LiveInstallation]:
    with live_installation() as installation:
        yield installation


def _report(name: str, before: Footprint, after: Footprint) -> None:
    print(json.dumps({"soak": name, "rounds": ROUNDS, "before": vars(before), "after": vars(after)}))


def test_launches_leave_nothing_behind(place):
    endpoint = Sleeper(place, "launches", flashboot=False)
    launcher = launcher_of(place)["pid"]
    before = None
    for number in range(ROUNDS):
        assert endpoint.ask() == ANSWER
        worker_id = endpoint.worker_id()
        assert until(endpoint.starts)[0]["rung"] == "launchable"
        endpoint.await_none()
        assert processes_of(worker_id) == []
        if number == SETTLED:
            before = Footprint.of([place.process.pid, launcher])
    assert before is not None
    after = Footprint.of([place.process.pid, launcher])
    _report("launches", before, after)
    after.check(before)
    assert launcher_of(place)["pid"] == launcher, "the same launcher all along"


def test_freezes_and_thaws_leave_nothing_behind(place):
    endpoint = Sleeper(place, "freezes")
    launcher_of(place)
    assert endpoint.ask() == ANSWER
    worker_id = endpoint.await_frozen()
    before = None
    start = endpoint.starts()[0]
    for number in range(ROUNDS):
        assert endpoint.ask() == ANSWER
        start = endpoint.start_after(start)
        assert start["rung"] == "frozen", start
        assert endpoint.await_frozen() == worker_id
        if number == SETTLED:
            before = Footprint.of([place.process.pid, *processes_of(worker_id)])
    assert before is not None
    after = Footprint.of([place.process.pid, *processes_of(worker_id)])
    _report("freezes", before, after)
    after.check(before)


def test_a_worker_frozen_for_a_hundred_seconds_answers(place):
    endpoint = Sleeper(place, "long")
    assert endpoint.ask() == ANSWER
    worker_id = endpoint.await_frozen()
    start = endpoint.starts()[0]
    time.sleep(100)
    assert endpoint.ask() == ANSWER
    assert (endpoint.worker_id(), endpoint.start_after(start)["rung"]) == (worker_id, "frozen")
