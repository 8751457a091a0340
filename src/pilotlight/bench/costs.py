"""What running processes have cost so far: CPU seconds, and memory, shared pages divided among sharers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pilotlight.bench.errors import BenchError
from pilotlight.bench.processes import TICK_S, stat_fields
from pilotlight.clusters.processes import find_processes
from pilotlight.memory import proportional_bytes


@dataclass(frozen=True, slots=True)
class Cost:
    """What some processes hold and have used.

    Attributes:
        memory_mb: Proportional set size in megabytes (10⁶ bytes): private pages, and of every shared page the
            share that falls to them.
        cpu_s: CPU seconds, user and system, of all their threads and of children that they have reaped.
    """

    memory_mb: float
    cpu_s: float


def cost_of(pids: Iterable[int]) -> Cost:
    """What these processes cost; those that have ended meanwhile count for nothing."""
    memory = cpu = 0.0
    for pid in pids:
        try:
            cpu += _cpu_s(pid)
            memory += proportional_bytes([pid]) / 1e6
        except BenchError:
            continue
    return Cost(memory, cpu)


def session_of(leader: int) -> list[int]:
    """Processes of the session that this process leads, itself included."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def worker_processes(worker_ids: Sequence[str]) -> list[int]:
    """Processes of these workers, worker programs and engines."""
    found = find_processes(dict.fromkeys(worker_ids))
    return [identity.pid for identities in found.values() for identity in identities]


def _cpu_s(pid: int) -> float:
    # Fields 14 to 17: user and system time, its own and that of children that it has reaped.
    return sum(map(int, stat_fields(pid)[11:15])) * TICK_S
