"""The client's side, the same for every queue: a window of tasks under way, results read oldest first."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

WARM_UP = 50
"""Tasks whose results are read before the measurement begins: then workers and connections are there."""


def drive(submit: Callable[[], Any], read: Callable[[Any], None], *, seconds: float, window: int) -> None:
    """Print how many results per second were read; a failed task raises.

    Args:
        submit: Submits a task.
        read: Waits for its result and reads it.
        seconds: Length of the measurement.
        window: Tasks under way at most.
    """
    for task in [submit() for _ in range(WARM_UP)]:
        read(task)
    pending: deque[Any] = deque()
    jobs = 0
    started = time.perf_counter()
    until = started + seconds
    while (now := time.perf_counter()) < until:
        if len(pending) < window:
            pending.append(submit())
        else:
            read(pending.popleft())
            jobs += 1
    for task in pending:
        read(task)
    report(jobs, now - started)


def report(jobs: int, took_s: float) -> None:
    """Print what was measured, as the other load generators do."""
    result = {"jobs": jobs, "seconds": took_s, "jobs_per_s": jobs / took_s, "cpu_s": time.process_time()}
    sys.stdout.write(json.dumps(result) + "\n")
