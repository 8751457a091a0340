"""Ports of this machine for workers that serve HTTP: one each, since they share the machine.

`bootstrap` makes one `PortBook`. A port is looked for outside the range from which the kernel serves outgoing
connections, so that none of those takes it between our look and the worker's start.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from pilotlight.errors import ClusterError

_HOST = "127.0.0.1"
_LOWEST = 10_000
_HIGHEST = 65_535
_TRIES_MAX = 200
_EPHEMERAL_DEFAULT = (32_768, 60_999)


class PortBook:
    """Gives each worker a free port of the loopback interface and remembers it.

    Args:
        living: Whether a worker exists; the port of one that never came to life is given away again.
    """

    def __init__(self, living: Callable[[str], bool]) -> None:
        self._living = living
        self._ports: dict[str, int] = {}
        ranges = _outside(_ephemeral_range())
        self._candidates = [port for low, high in ranges for port in range(low, high + 1)]

    def take(self, worker_id: str) -> int:
        """A port that nobody listens on.

        Raises:
            ClusterError: None was found.
        """
        self._ports = {known: port for known, port in self._ports.items() if self._living(known)}
        taken = set(self._ports.values())
        for _ in range(_TRIES_MAX):
            port = secrets.choice(self._candidates)
            if port not in taken and _is_free(port):
                self._ports[worker_id] = port
                return port
        raise ClusterError(f"no free port on {_HOST} was found in {_TRIES_MAX} tries")

    def url(self, worker_id: str) -> str:
        """The base URL at which the worker listens."""
        return f"http://{_HOST}:{self._ports[worker_id]}"

    def release(self, worker_id: str) -> None:
        """Give back the port of a worker that has ended; harmless without one."""
        self._ports.pop(worker_id, None)


def _ephemeral_range() -> tuple[int, int]:
    with contextlib.suppress(OSError, ValueError):
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        return int(low), int(high)
    return _EPHEMERAL_DEFAULT


def _outside(ephemeral: tuple[int, int]) -> list[tuple[int, int]]:
    """The ranges below and above; everything where little is left of them."""
    low, high = ephemeral
    ranges = [
        (first, last)
        for first, last in ((_LOWEST, min(low - 1, _HIGHEST)), (max(high + 1, _LOWEST), _HIGHEST))
        if last - first >= _TRIES_MAX
    ]
    return ranges or [(_LOWEST, _HIGHEST)]


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do; a connection that is only waiting for its end is no obstacle to them.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True
