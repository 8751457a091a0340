"""What the gateway holds: memory, descriptors, tasks, objects, children; looked at from outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .site import Site

_PAGE = os.sysconf("SC_PAGE_SIZE")

HELD = re.compile(
    r"^(pilotlight|uvicorn|uvloop|asyncio)\..*"
    r"(Exchange|Call|Connection|Waiting|Response|Cycle|Protocol|EventPass|Splice|Taken|Ask|TimerHandle"
    r"|WorkerSlots|_Line|\.Endpoint)$"
)
"""Objects of requests, connections, workers and endpoints: none is left when these are gone."""


@dataclass(frozen=True)
class Footprint:
    """At one moment.

    Attributes:
        at_s: By `time.monotonic`.
        memory_mb: Resident.
        descriptors: What they are of, without numbers → how many.
        zombies: Children that ended and that nobody asked about.
    """

    at_s: float
    memory_mb: float
    descriptors: Counter[str]
    zombies: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Now."""
        memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1e6
        descriptors: Counter[str] = Counter()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                descriptors[re.sub(r"\d+", "", str(entry.readlink()))] += 1
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return cls(time.monotonic(), memory, descriptors, sum(map(_is_zombie, children)))


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def workers_of(pid: int) -> list[str]:
    """Children of the gateway that are worker programs."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"pilotlight.worker" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                found.append(child)
    return found


async def census(site: Site, file: Path) -> dict[str, Any]:
    """Tasks, objects and threads of the gateway, as it tells them itself (`watch/sitecustomize.py`)."""
    file.unlink(missing_ok=True)
    os.kill(site.pid, signal.SIGUSR2)
    for _ in range(1000):
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text())
            return found
        await asyncio.sleep(0.01)
    raise AssertionError("the gateway does not tell what it holds")


async def watch(site: Site, found: list[Footprint]) -> None:
    """Look once a second until the soak is over."""
    while await site.pause(1):
        found.append(Footprint.of(site.pid))


def thirds(found: list[Footprint], seconds: float) -> list[float]:
    """Median resident memory of the three thirds of a soak, in MB.

    Args:
        found: What was seen.
        seconds: How long it lasted.
    """
    began_s = found[0].at_s
    parts: list[list[float]] = [[], [], []]
    for each in found:
        parts[min(2, int(3 * (each.at_s - began_s) / seconds))].append(each.memory_mb)
    return [round(statistics.median(part), 2) if part else 0.0 for part in parts]


def left_over(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Tasks that are more than before, and objects of requests and connections."""
    found = []
    for name, count in after["tasks"].items():
        if count > before["tasks"].get(name, 0) and not re.fullmatch(r"Task-\d+", name):
            found.append(f"{count} tasks {name}, before {before['tasks'].get(name, 0)}")
    if sum(after["tasks"].values()) > sum(before["tasks"].values()) + 2:
        found.append(f"tasks {after['tasks']}, before {before['tasks']}")
    for name, count in after["objects"].items():
        # Periodic work has timers, more or fewer of them at a moment.
        more = 12 if name.endswith("TimerHandle") else 4
        if HELD.search(name) and count > before["objects"].get(name, 0) + more:
            found.append(f"{count} objects {name}, before {before['objects'].get(name, 0)}")
    return found
