"""Processes of a worker: telling them apart, finding all of them, ending all of them.

Called by `clusters.local`, from a thread wherever a function reads the whole of /proc. A number alone
never identifies a process: every decision to signal compares start time and boot as well, and the signal
goes through a pidfd, so that a process which got a dead one's number is not hit.

What belongs to a worker:
1. its recorded main process, if that still is the same process;
2. every process whose initial environment holds the worker's cookie (`WORKER_COOKIE=<worker id>`), which
   all children inherit, also those that left the session or whose parents are gone;
3. every member of a session led by one of these, and every descendant of one of these, so that a child
   which was started with an empty environment is found too, as long as it either is in such a session or
   its parents live. One that gives up all three (environment, session, parents) is not found.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from pilotlight.domain.worker import WORKER_COOKIE, ProcessIdentity
from pilotlight.errors import ClusterError
from pilotlight.processes import (
    STOP_TIMEOUT_S,
    Process,
    boot_id,
    describe,
    identify,
    identity_of,
    is_alive,
    let_go_on,
    open_pidfd,
    read_process,
    send_signal,
    stop_found,
    wait_while,
)

__all__ = [
    "boot_id",
    "find_processes",
    "identify",
    "is_alive",
    "kill_all",
    "let_go_on",
    "open_pidfd",
    "send_signal",
    "stop_all",
]

KILL_TIMEOUT_S = 10.0
"""How long SIGKILL may take before the survivors are reported; a large process needs a second to unmap."""

_LOOKS_MAX = 5


def find_processes(workers: Mapping[str, ProcessIdentity | None]) -> dict[str, list[ProcessIdentity]]:
    """All living processes of these workers; reads the whole of /proc, so call it from a thread.

    Args:
        workers: Worker ids with the main process recorded for each, if any.

    Returns:
        Worker id → its processes, sorted by number; ids without a living process are absent. The calling
        process is never in it.
    """
    here = {
        each: identity for each, identity in workers.items() if identity and identity.boot_id == boot_id()
    }
    # No process of a worker is older than its main process; without one on record, all are looked at.
    oldest_ticks = 0
    if len(here) == len(workers):
        oldest_ticks = min((identity.started_ticks for identity in here.values()), default=0)
    table, owners = _look(workers.keys(), oldest_ticks)
    for worker_id, identity in here.items():
        main = table.get(identity.pid)
        # A zombie counts here: as long as it is not reaped, its number is that of its session.
        if main is not None and main.started_ticks == identity.started_ticks:
            owners[main.pid] = worker_id
    _add_relatives(table, owners)
    found: dict[str, list[ProcessIdentity]] = {}
    for pid in sorted(owners):
        if not table[pid].dead:
            found.setdefault(owners[pid], []).append(identity_of(table[pid]))
    return found


def kill_all(
    workers: Mapping[str, ProcessIdentity | None], *, timeout_s: float = KILL_TIMEOUT_S
) -> dict[str, list[ProcessIdentity]]:
    """End every process of these workers; returns when a look at all processes finds none.

    Blocks, so call it from a thread. Processes that were forked between a look and the signal are found by
    the next look. Stopped processes need no SIGCONT: SIGKILL ends them as they are.

    Args:
        workers: Worker ids with the main process recorded for each, if any.
        timeout_s: Bound on the whole.

    Returns:
        Worker id → the processes that were found running; ids of which nothing ran are absent.

    Raises:
        ClusterError: Some survived until the bound; the message names them.
    """
    deadline = time.monotonic() + timeout_s
    ended: dict[str, list[ProcessIdentity]] = {}
    while found := find_processes(workers):
        targets = [identity for identities in found.values() for identity in identities]
        if time.monotonic() >= deadline:
            who = f"worker {', '.join(sorted(found))}"
            raise ClusterError(describe(who, targets, f"still exists {timeout_s:g} s after SIGKILL"))
        for worker_id, identities in found.items():
            known = ended.setdefault(worker_id, [])
            known.extend(identity for identity in identities if identity not in known)
        for identity in targets:
            send_signal(identity, signal.SIGKILL)
        wait_while(is_alive, targets, deadline)
    return ended


def stop_all(
    workers: Mapping[str, ProcessIdentity | None], *, timeout_s: float = STOP_TIMEOUT_S
) -> list[ProcessIdentity]:
    """Stop every process of these workers in place; returns them when a look finds none that runs.

    Blocks, so call it from a thread. Processes that were forked between a look and the signal are found by
    the next look. SIGKILL ends them as they are; `let_go_on` is the way back.

    Args:
        workers: Worker ids with the main process recorded for each, if any.
        timeout_s: Bound on the whole.

    Raises:
        ClusterError: Some still ran at the bound; all go on again then.
    """

    def find() -> list[ProcessIdentity]:
        return [each for identities in find_processes(workers).values() for each in identities]

    return stop_found(find, f"worker {', '.join(sorted(workers))}", timeout_s=timeout_s)


def _look(worker_ids: Collection[str], oldest_ticks: int) -> tuple[dict[int, Process], dict[int, str]]:
    """All processes that started at or after `oldest_ticks`, and which of them carry one of the cookies."""
    table: dict[int, Process] = {}
    owners: dict[int, str] = {}
    unsure: list[int] = []
    seen = {os.getpid()}
    for _ in range(_LOOKS_MAX):
        # A process that forks and ends at once runs ahead of a long list of numbers, so what appeared
        # meanwhile is looked at again; those lists are short.
        fresh = {int(name) for name in os.listdir("/proc") if name.isdigit()} - seen  # noqa: PTH208 - fast
        if not fresh:
            break
        seen |= fresh
        for pid in sorted(fresh):
            process = read_process(pid)
            if process is None or process.started_ticks < oldest_ticks:
                continue
            table[pid] = process
            if process.dead or process.kernel:
                continue
            cookie = _read_cookie(pid)
            if cookie is None:
                unsure.append(pid)
            elif cookie in worker_ids:
                owners[pid] = cookie
    # In the middle of an exec the environment reads as empty for some microseconds.
    for pid in unsure:
        cookie = _read_cookie(pid)
        if cookie and cookie in worker_ids:
            owners[pid] = cookie
    return table, owners


def _add_relatives(table: Mapping[int, Process], owners: dict[int, str]) -> None:
    """Extend `owners` by sessions and descendants until nothing is added any more."""
    grew = True
    while grew:
        grew = False
        for process in table.values():
            if process.pid in owners:
                continue
            # Only sessions that a process of the worker *leads*: somebody who types the cookie into a
            # shell's command line must not lose the shell.
            owner = owners.get(process.session) or owners.get(process.parent)
            if owner is not None:
                owners[process.pid] = owner
                grew = True


def _read_cookie(pid: int) -> str | None:
    """The cookie in a process's environment: "" without one or not readable, None if it read as empty."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    if not environment:
        return None
    marker = f"\0{WORKER_COOKIE}=".encode()
    _, _, rest = (b"\0" + environment).partition(marker)
    return rest.partition(b"\0")[0].decode("utf-8", "replace")
