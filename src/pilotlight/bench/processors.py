"""One processor set aside for an engine's computing.

An engine on a GPU computes where nobody else does. On CPUs it computes on the processors that its own API
server, the gateway and the clients need: each of its steps then waits for whoever has the processor, and what
is measured is the scheduler. Set aside, one processor is to the engine what a GPU would be.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import psutil


@contextlib.contextmanager
def one_set_aside() -> Iterator[frozenset[int]]:
    """Keep this thread, and whatever it starts in the block, off one processor.

    Yields:
        The processor set aside, for `move_children`; with no other, the only one, which all then share.
    """
    ours = os.sched_getaffinity(0)
    aside = {max(ours)}
    os.sched_setaffinity(0, ours - aside or ours)
    try:
        yield frozenset(aside)
    finally:
        os.sched_setaffinity(0, ours)


def move_children(pid: int, processors: frozenset[int]) -> None:
    """Move what a process has started, and what that has started, to these processors; not itself.

    vLLM's API server starts its engine core, and that a worker which computes. Threads that they start later
    stay there too.
    """
    for child in psutil.Process(pid).children(recursive=True):
        for thread in child.threads():
            # A thread may have ended since it was listed.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, processors)
