"""The TCP ports of direct HTTP mode: taken at once, long before there is an HTTP server behind them."""

from __future__ import annotations

import contextlib
import socket

from pilotlight.worker.config import DirectSettings

BACKLOG = 128
"""Connections that may wait until they are accepted, which during the first moments nobody does."""


def bind_ports(settings: DirectSettings) -> tuple[socket.socket, ...]:
    """Sockets that listen on the port for requests and on that for health checks; one where both are one.

    Raises:
        OSError: One of them cannot be had; neither is held then.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with contextlib.ExitStack() as bound:
        sockets = tuple(
            bound.enter_context(socket.create_server((settings.host, port), family=family, backlog=BACKLOG))
            for port in dict.fromkeys((settings.port, settings.health_port))
        )
        bound.pop_all()
    return sockets
