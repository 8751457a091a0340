"""How much memory processes hold, and how much the machine has left, as the kernel counts it.

Standard library only: the worker program stays small. Everything here blocks, a few milliseconds per process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def proportional_bytes(pids: Iterable[int]) -> int:
    """What these processes hold in bytes: a page that is shared by n processes counts as one nth (PSS).

    Of a process of another user only the resident size can be read, which counts shared pages in full. What
    has ended holds nothing.
    """
    return sum(map(_bytes_of, pids))


def resident_bytes(pid: int) -> int:
    """What a process has in memory, in bytes, shared pages in full; 0 for one that has ended."""
    try:
        return _field_bytes(Path(f"/proc/{pid}/status"), b"VmRSS:")
    except OSError:
        return 0


def available_bytes() -> int:
    """What the machine can give without swapping, in bytes; 0 where it does not say."""
    try:
        return _field_bytes(Path("/proc/meminfo"), b"MemAvailable:")
    except OSError:
        return 0


def _bytes_of(pid: int) -> int:
    try:
        return _field_bytes(Path(f"/proc/{pid}/smaps_rollup"), b"Pss:")
    except PermissionError:
        return resident_bytes(pid)
    except OSError:
        return 0


def _field_bytes(path: Path, name: bytes) -> int:
    """One line of a table of the kernel, `name  n kB`; 0 where it is missing."""
    lines = path.read_bytes().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
