"""An HTTP client for URLs that strangers have named.

The host is looked up anew for every request; every address found must be allowed, and the connection goes
to one of these very addresses, so that a name cannot mean one address when it is checked and another when
it is called. The name stays in the Host header and in TLS. No redirects, no proxies, no cookies, no
connection used twice.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pilotlight.errors import PilotlightError
from pilotlight.net.addresses import literal, refusal

_LOOKUP_THREADS = 64
"""Lookups at once, in threads of their own. A name server that does not answer holds one for half a minute,
longer than whoever asked waits; there must be some left for other names."""

Lookup = Callable[..., list[tuple[Any, ...]]]


class RefusedAddressError(PilotlightError):
    """A URL that we do not call, now or later: its scheme is unknown or its address is not public."""


class UnreachableError(PilotlightError):
    """A request without an answer: no such host, no connection, a broken or late answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the other side said.

    Attributes:
        status: HTTP status.
        headers: By lower-case name.
        body: The first bytes of the body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class GuardedHttp:
    """Sends single requests to addresses that are allowed.

    Args:
        allow_private: Whether addresses that are not public are allowed, too.
        lookup: Finds addresses of a name; `socket.getaddrinfo` or something with its arguments.
        tls: Whom to trust; None for the machine's own authorities.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        lookup: Lookup = socket.getaddrinfo,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allow_private = allow_private
        self._lookup = lookup
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._threads: ThreadPoolExecutor | None = None

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes,
        timeout_s: float,
        read_bytes: int = 64 * 1024,
        encoded: bool = False,
    ) -> Answer:
        """Send a request and return the answer, of its body the first `read_bytes`, less if it breaks off.

        Args:
            method: HTTP method.
            url: Where to.
            headers: All headers but Host and Content-Length.
            body: The body.
            timeout_s: Longest time for everything together.
            read_bytes: How much of the answer is read; the rest is cut off.
            encoded: Whether the URL is to be sent exactly as it is, because it was signed.

        Raises:
            RefusedAddressError: It was not sent, and never will be.
            UnreachableError: No answer.
        """
        target = self._checked(url, encoded=encoded)
        parts: list[bytes] = []
        head: aiohttp.ClientResponse | None = None
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._open().request(
                    method,
                    target,
                    # A file and not bytes: these are written in pieces.
                    data=io.BytesIO(body),
                    headers=headers,
                    allow_redirects=False,
                ) as response,
            ):
                head = response
                await _read(response.content, read_bytes, parts)
        except TimeoutError as error:
            if head is None:
                raise UnreachableError(f"no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if head is None:
                raise UnreachableError(_cause(error)) from error
        # With the status the other side has said what became of the request, whatever becomes of the body.
        assert head is not None
        return Answer(
            status=head.status,
            headers=MappingProxyType({name.lower(): value for name, value in head.headers.items()}),
            body=b"".join(parts),
        )

    async def close(self) -> None:
        """Cut what is under way; idempotent."""
        session, self._session = self._session, None
        threads, self._threads = self._threads, None
        if session is not None:
            await session.close()
        if threads is not None:
            # A lookup cannot be interrupted; nobody waits for it.
            threads.shutdown(wait=False, cancel_futures=True)

    def _checked(self, url: str, *, encoded: bool) -> URL:
        try:
            target = URL(url, encoded=encoded)
        except ValueError as error:
            raise RefusedAddressError(f"not a URL: {error}") from error
        if target.scheme not in {"http", "https"} or not target.raw_host:
            raise RefusedAddressError("the URL must begin with http:// or https:// and name a host")
        address = literal(target.raw_host)
        if address is not None:
            self._check(address)
        return target

    def _check(self, address: str) -> None:
        reason = None if self._allow_private else refusal(address)
        if reason is not None:
            raise RefusedAddressError(f"{reason}, and others are not called")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
            connector = aiohttp.TCPConnector(
                resolver=_CheckedResolver(self._threads, self._lookup, self._check),
                use_dns_cache=False,
                force_close=True,
                limit=0,
                socket_factory=self._socket,
                ssl=self._tls if self._tls is not None else True,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                trust_env=False,
                auto_decompress=False,
            )
        return self._session

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        """The socket for a connection: the last place at which an address passes by."""
        family, kind, protocol, _, sockaddr = info
        try:
            self._check(sockaddr[0])
        except RefusedAddressError as error:
            # The caller knows errors of the operating system only.
            raise PermissionError(str(error)) from error
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made


class _CheckedResolver(AbstractResolver):
    """Finds the addresses of a name in threads of its own; one that is not allowed refuses the name."""

    def __init__(self, threads: ThreadPoolExecutor, lookup: Lookup, check: Callable[[str], None]) -> None:
        self._threads = threads
        self._lookup = lookup
        self._check = check

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """All addresses of a name, each of them allowed."""
        loop = asyncio.get_running_loop()
        infos = await loop.run_in_executor(
            self._threads, lambda: self._lookup(host, port, family=family, type=socket.SOCK_STREAM)
        )
        found: list[ResolveResult] = []
        for found_family, _, protocol, _, sockaddr in infos:
            address = str(sockaddr[0])
            self._check(address)
            found.append(
                ResolveResult(
                    hostname=host,
                    host=address,
                    port=port,
                    family=found_family,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        if not found:
            raise OSError(f"{host} has no address")
        return found

    async def close(self) -> None:
        """Nothing to close; the threads are their maker's."""


async def _read(content: aiohttp.StreamReader, limit: int, parts: list[bytes]) -> None:
    """Add the first bytes of a body to `parts`; the connection is closed behind them."""
    left = limit
    while left > 0 and (part := await content.read(left)):
        parts.append(part)
        left -= len(part)


def _cause(error: Exception) -> str:
    """What went wrong, without the URL: it may carry a secret."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return f"TLS certificate not accepted: {error.certificate_error}"
        case aiohttp.ClientConnectorDNSError():
            return f"the host cannot be looked up: {error.os_error.strerror or error.os_error}"
        case aiohttp.ClientConnectorError():
            return f"cannot connect: {os.strerror(error.errno) if error.errno else error.os_error}"
        case aiohttp.ServerDisconnectedError():
            return "the connection was closed before an answer came"
        case aiohttp.ClientPayloadError():
            return "the answer broke off"
        case aiohttp.ClientResponseError():
            return "the answer is not HTTP"
        case _:
            return f"the request failed: {type(error).__name__}"
