"""The listening sockets and the server behind them, made by `bootstrap`.

With TLS there are two sockets: the one that is set speaks TLS and nothing else; another one, on the loopback
interface at a free port, is plain. Workers of this machine and the command line use that: they need no
certificate authority, whose name for this machine might not even be one that resolves here, and programs
that are not ours, with TLS of their own, keep working.

With several processes the public port belongs to fronts (`front`): each has a socket of its own there, and
the system spreads connections among them. What fronts do not serve comes to the gateway's server by
`Server.adopt`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import structlog
import uvicorn
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pilotlight.errors import SettingsError
from pilotlight.gateway.asgi import App
from pilotlight.gateway.fronts.front_gateway import FrontGateway
from pilotlight.gateway.handover import Handed, HandedProtocol
from pilotlight.gateway.protocol import GatewayProtocol
from pilotlight.gateway.tunnel import WebSocketTunnel
from pilotlight.settings import ServerSettings, Settings

_log = structlog.get_logger()

_BACKLOG = 2048

_LOOPBACK = "127.0.0.1"

_HANDSHAKE_S = 10.0
"""Longest TLS handshake."""

_FAREWELL_S = 60.0
"""How long a TLS connection that is being closed may take to send what was written to it and to hear that the
client closes it, too; a client that reads slowly has this long for its answer."""

_LEAVE_S = 0.2
"""The same when the gateway stops, for those that were sent everything: a client whose connection is idle
hears of its end only when it uses it next."""

_RENEWAL_TICKS = 600
"""Ticks of Uvicorn's (0.1 s) between two looks at the certificate's files."""

_Stamp = tuple[tuple[int, int, int], ...]


class Certificate:
    """The gateway's certificate and its key, read again when their files have changed.

    Args:
        certificate: PEM file: the certificate, then those that it is vouched for by, if any.
        key: PEM file with the private key.

    Raises:
        SettingsError: A file is missing, cannot be read or used, or the two do not belong together.

    Attributes:
        context: What a listening socket needs. TLS 1.2 is the oldest version that is spoken.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate = certificate
        self._key = key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        self.context.set_alpn_protocols(["http/1.1"])
        self._stamp: _Stamp = ()
        self._load()

    def renew(self) -> None:
        """Read the files if they have changed; connections that begin from now on meet the new certificate.

        What cannot be used is logged, and the old certificate stays.
        """
        try:
            if self._stamp == self._look():
                return
            self._load()
        except (SettingsError, OSError) as error:
            _log.warning("certificate_not_renewed", problem=str(error))
        else:
            _log.info("certificate_renewed", file=str(self._certificate))

    def _look(self) -> _Stamp:
        found = [path.stat() for path in (self._certificate, self._key)]
        return tuple((seen.st_ino, seen.st_mtime_ns, seen.st_size) for seen in found)

    def _load(self) -> None:
        _check_pair(self._certificate, self._key)
        stamp = self._look()
        try:
            self.context.load_cert_chain(self._certificate, self._key)
        except (ssl.SSLError, OSError) as error:
            raise SettingsError(f"server.tls_cert {self._certificate} cannot be used: {error}") from error
        self._stamp = stamp


def _check_pair(certificate: Path, key: Path) -> None:
    """Say what is wrong with two files better than OpenSSL does. SettingsError if something is."""
    try:
        chain = x509.load_pem_x509_certificates(_read("server.tls_cert", certificate))
    except ValueError as error:
        raise SettingsError(f"server.tls_cert {certificate} holds no certificate in PEM form") from error
    try:
        private = load_pem_private_key(_read("server.tls_key", key), password=None)
    except TypeError as error:
        raise SettingsError(
            f"server.tls_key {key} is encrypted; a key without a passphrase is needed"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"server.tls_key {key} holds no private key in PEM form") from error
    if chain[0].public_key() != private.public_key():
        raise SettingsError(
            f"server.tls_key {key} is not the key of the first certificate in server.tls_cert {certificate}"
        )


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name} {path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the gateway listens.

    Attributes:
        plain: The socket without TLS.
        secured: The one with TLS and its certificate; None where TLS is off, or done by fronts.
        local_url: Where workers of this machine and the command line reach us, always without TLS.
        url: Where clients reach us, as far as we know.
        fronts: Sockets at the public port, one for each front; none where this process serves it itself.
            Kept open here, so that what waits on one for a front that has ended is served by the next.
    """

    plain: socket.socket
    secured: tuple[socket.socket, Certificate] | None
    local_url: str
    url: str
    fronts: tuple[socket.socket, ...] = ()

    def close(self) -> None:
        """Close the sockets; may be called twice."""
        self.plain.close()
        if self.secured is not None:
            self.secured[0].close()
        for listener in self.fronts:
            listener.close()


def listen(settings: Settings) -> Listening:
    """Open the listening sockets.

    Raises:
        SettingsError: The port is in use, the address is not ours, or the certificate cannot be used.
    """
    server = settings.server
    certificate = certificate_of(server)
    if server.processes > 1:
        return _listen_with_fronts(server)
    listener = _bind(server.host, server.port)
    if certificate is None:
        url = f"http://{_reached_at(listener)}"
        return Listening(listener, None, url, url)
    try:
        plain = _bind(_LOOPBACK, 0)
    except SettingsError:
        listener.close()
        raise
    local_url, url = f"http://{_reached_at(plain)}", f"https://{_reached_at(listener)}"
    return Listening(plain, (listener, certificate), local_url, url)


def _listen_with_fronts(server: ServerSettings) -> Listening:
    opened = [_bind(_LOOPBACK, 0)]
    try:
        if server.port:
            # A port that is shared could be shared with another gateway by mistake.
            _bind(server.host, server.port).close()
        port = server.port
        for _ in range(server.processes):
            opened.append(_bind(server.host, port, shared=True))
            port = opened[-1].getsockname()[1]
    except SettingsError:
        for listener in opened:
            listener.close()
        raise
    plain, *fronts = opened
    scheme = "http" if server.tls_cert is None else "https"
    local_url, url = f"http://{_reached_at(plain)}", f"{scheme}://{_reached_at(fronts[0])}"
    return Listening(plain, None, local_url, url, tuple(fronts))


def certificate_of(server: ServerSettings) -> Certificate | None:
    """The certificate that is set; None where TLS is off.

    Raises:
        SettingsError: It cannot be used.
    """
    if server.tls_cert is None or server.tls_key is None:
        return None
    return Certificate(server.tls_cert, server.tls_key)


def _bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
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


def _reached_at(listener: socket.socket) -> str:
    """Host and port at which this machine reaches a socket."""
    host, port = listener.getsockname()[:2]
    everywhere = {"0.0.0.0": _LOOPBACK, "::": "[::1]"}  # noqa: S104 - compared, not bound
    return f"{everywhere.get(host, f'[{host}]' if ':' in host else host)}:{port}"


class Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: `up` decides what a signal means.

    Args:
        config: How it serves.
        secured: A socket on which it speaks TLS, beside those that `serve` is given.
    """

    def __init__(
        self, config: uvicorn.Config, secured: tuple[socket.socket, Certificate] | None = None
    ) -> None:
        super().__init__(config)
        self._secured = secured
        self.answering = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, and say so."""
        await super().startup(sockets)
        if self._secured is not None:
            listener, certificate = self._secured
            self.servers.append(
                await asyncio.get_running_loop().create_server(
                    self._protocol,
                    sock=listener,
                    ssl=certificate.context,
                    backlog=_BACKLOG,
                    ssl_handshake_timeout=_HANDSHAKE_S,
                    ssl_shutdown_timeout=_FAREWELL_S,
                )
            )
        self.answering.set()

    async def on_tick(self, counter: int) -> bool:
        """Do what is due ten times a second (Uvicorn)."""
        if self._secured is not None and counter % _RENEWAL_TICKS == 0:
            self._secured[1].renew()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, and end (Uvicorn)."""
        if self._secured is not None:
            asyncio.get_running_loop().call_later(_LEAVE_S, self._leave)
        await super().shutdown(sockets)

    def _leave(self) -> None:
        for connection in [*self.server_state.connections]:
            transport = connection.transport
            secured = transport.get_extra_info("sslcontext") is not None
            if secured and transport.is_closing() and not transport.get_write_buffer_size():
                transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to whoever has them."""
        yield

    def _protocol(self) -> asyncio.Protocol:
        return GatewayProtocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def adopt(self, sock: socket.socket, handed: Handed) -> None:
        """Serve a connection that a front hands over, like those that come by themselves."""
        if self.should_exit:
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._adopt(sock, handed), name="adopt a connection")
        self.server_state.tasks.add(task)
        task.add_done_callback(self.server_state.tasks.discard)

    async def _adopt(self, sock: socket.socket, handed: Handed) -> None:
        def protocol() -> asyncio.Protocol:
            return HandedProtocol(
                handed, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        await asyncio.get_running_loop().connect_accepted_socket(protocol, sock)


def server_config(app: App | FrontGateway, *, grace_s: int = 1) -> uvicorn.Config:
    """How the gateway is served.

    Args:
        app: What answers.
        grace_s: How long connections may take to end when the server is told to stop.
    """
    return uvicorn.Config(
        cast("Any", app),
        http=GatewayProtocol,
        ws=WebSocketTunnel,
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # A worker that blocks its event loop posts its result on a connection that has been idle for up to
        # 15 s, and loses it if we have closed that (worker-protocol.md §10.5).
        timeout_keep_alive=75,
        timeout_graceful_shutdown=grace_s,
    )
