"""Ending everything in an engine's session, when nobody is left who would do it in order."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_TRACKER = b"multiprocessing.resource_tracker"


def kill_session(session: int, *, trackers: bool) -> bool:
    """Sends SIGKILL to the members of a session; returns whether there was none any more.

    Args:
        session: Led by a child of ours that was not waited for, so that nobody else can have the number.
        trackers: Whether to kill resource trackers of Python, too. Left alone, they remove the shared memory
            of the others, and end.
    """
    left = members(session)
    for pid in left:
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)
            try:
                # Between the look and this line the number may have passed to somebody else.
                if _session(pid) == session and (trackers or not _tracks(pid)):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)
    return not left


def members(session: int) -> list[int]:
    """The living processes of a session, its leader included; zombies are none."""
    numbers = (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())
    return [pid for pid in numbers if _session(pid) == session]


def _session(pid: int) -> int | None:
    try:
        # After the command name, which may hold blanks: state, ppid, pgrp, session.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {b"Z", b"X"} else int(fields[3])


def _tracks(pid: int) -> bool:
    return _TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
