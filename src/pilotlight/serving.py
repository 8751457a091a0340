"""The listening socket and the server behind it, made by `bootstrap`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn

from pilotlight.errors import SettingsError
from pilotlight.gateway.asgi import App
from pilotlight.gateway.load_balancer.tunnel import WebSocketTunnel
from pilotlight.gateway.protocol import GatewayProtocol
from pilotlight.settings import Settings


def bind(settings: Settings) -> socket.socket:
    """The listening socket.

    Raises:
        SettingsError: The port is in use or the address is not ours.
    """
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} on {host} is in use; choose another with `pilotlight up --port`, "
                "or stop what uses it"
            ) from error
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.set_inheritable(False)
    return listener


class Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: `up` decides what a signal means."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, and say so."""
        await super().startup(sockets)
        self.answering.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to whoever has them."""
        yield


def server_config(app: App) -> uvicorn.Config:
    """How the gateway is served."""
    return uvicorn.Config(
        app,
        http=GatewayProtocol,
        ws=WebSocketTunnel,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # A worker that blocks its event loop posts its result on a connection that has been idle for up to
        # 15 s, and loses it if we have closed that (worker-protocol.md §10.5).
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
