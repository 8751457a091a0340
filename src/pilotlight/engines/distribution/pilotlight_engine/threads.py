"""The threads that compute in a forked worker, set up by calls.

vLLM puts their number and their processors into a worker's environment, which libgomp reads when it is
loaded. In a forked worker that has happened long ago, in its launcher.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence

_HANG_SECONDS = 20


def set_up_threads(env: Mapping[str, str], set_count: Callable[[int], None]) -> None:
    """Does what libgomp or libiomp would have done with these variables at load.

    Args:
        env: Of a worker as vLLM prepares it.
        set_count: `torch.set_num_threads`, which reaches all libraries that compute.
    """
    if not env.get("OMP_NUM_THREADS", "").isdecimal():
        return
    threads = int(env["OMP_NUM_THREADS"])
    places = read_places(env, threads)
    set_count(threads)
    if not places:
        return
    # Threads that are there, and those that they start, run where the first one does.
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), places[0])
    if threads > 1:
        _pin_team(threads, places)


def read_places(env: Mapping[str, str], threads: int) -> tuple[frozenset[int], ...]:
    """The processors of each thread in turn; empty where threads are not bound.

    vLLM writes one of three forms: `GOMP_CPU_AFFINITY=0 1`, `KMP_AFFINITY=…,proclist=[0,1]` and
    `OMP_PLACES={0,1}`. The first two bind each thread to one, the last all to all.
    """
    for name, pattern in (("GOMP_CPU_AFFINITY", r"^([\d ]+)$"), ("KMP_AFFINITY", r"proclist=\[([\d,]+)\]")):
        if found := re.search(pattern, env.get(name, "")):
            processors = [int(each) for each in re.findall(r"\d+", found[1])]
            return tuple(frozenset({processors[i % len(processors)]}) for i in range(threads))
    if found := re.fullmatch(r"\{([\d,]+)\}", env.get("OMP_PLACES", "")):
        return (frozenset(int(each) for each in found[1].split(",")),) * threads
    return ()


def _pin_team(threads: int, places: Sequence[frozenset[int]]) -> None:
    """Opens the first parallel region, in which every thread of the team binds itself; the team stays.

    A team that was left half dead by a fork would hang here, so the process gives up after a while.
    """
    library = ctypes.CDLL(None)
    pinned: set[int] = set()

    def pin(_: int | None) -> None:
        number = library.omp_get_thread_num()
        os.sched_setaffinity(0, places[number])
        pinned.add(number)

    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_HANG_SECONDS)
    routine = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(pin)
    library.GOMP_parallel(routine, None, ctypes.c_uint(threads), ctypes.c_uint(0))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    if len(pinned) != threads:
        raise RuntimeError(f"of {threads} threads that should compute, only {len(pinned)} came")
