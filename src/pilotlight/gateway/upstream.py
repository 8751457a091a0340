"""Pooled HTTP/1.1 connections to engines and listeners, on Unix sockets or TCP.

The data path and the load balancer call it; `gateway.upstream_connection` is one connection. Idle connections
are closed well before the engine closes them, and a request whose reused connection turns out to be dead is
sent once more on a new one, provided that no byte of an answer had come.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from pilotlight.domain.worker import Address
from pilotlight.gateway.upstream_connection import AnswerHead, UpstreamError, UpstreamResponse

__all__ = [
    "AnswerHead",
    "UpstreamError",
    "UpstreamPool",
    "UpstreamResponse",
    "dial",
    "request_bytes",
    "request_head",
]

_CONNECT_TIMEOUT_S = 5.0
_IDLE_MAX_PER_ADDRESS = 512

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)


class UpstreamPool:
    """Connections by address, the most recently used first.

    Args:
        idle_s: Idle connections are closed after this many seconds.

    Attributes:
        on_drop: Called with the addresses that are dropped; others may have connections to them, too.
    """

    def __init__(self, *, idle_s: float) -> None:
        self.on_drop: Callable[[Sequence[str]], None] = lambda _: None
        self._idle_s = idle_s
        self._idle: dict[str, deque[tuple[float, UpstreamResponse]]] = {}
        self._swept_s = time.monotonic()

    async def request(
        self,
        address: Address,
        method: str,
        path: str,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes,
        *,
        timeout_s: float,
    ) -> UpstreamResponse:
        """Send one request and wait for the head of its answer; the caller must `release()` it.

        Args:
            address: Where to.
            method: HTTP method.
            path: Path and query, already encoded.
            headers: Names in lower case; host, length and key are added here.
            body: The whole body.
            timeout_s: Longest wait for the head.

        Raises:
            UpstreamError: Not reachable, or broken before the head.
        """
        return await self.exchange(
            address, request_bytes(address, method, path, headers, body), timeout_s=timeout_s
        )

    async def exchange(self, address: Address, data: bytes, *, timeout_s: float) -> UpstreamResponse:
        """Send the bytes of one request and wait for the head of its answer; the caller must `release()` it.

        The bytes are sent a second time, on a new connection, when the first was an old one and ended without
        a byte of an answer; never a third time, and never after a new connection.

        Raises:
            UpstreamError: Not reachable, or broken before the head.
        """
        response = self.take_idle(address)
        if response is not None:
            response.send(data)
            try:
                await response.wait_head(timeout_s)
            except UpstreamError as error:
                if error.answered or error.timed_out:
                    raise
                # The engine closed an idle connection in the moment in which we used it. Its others may be as
                # old: the second and last time goes over a new one.
            except BaseException:
                response.close()
                raise
            else:
                return response
        response = await self.connect(address)
        try:
            response.send(data)
            await response.wait_head(timeout_s)
        except BaseException:
            response.close()
            raise
        return response

    def give_back(self, address: Address, response: UpstreamResponse) -> None:
        """Keep a connection for the next request."""
        idle = self._idle.setdefault(address.url, deque())
        if len(idle) >= _IDLE_MAX_PER_ADDRESS:
            response.close()
            return
        now = time.monotonic()
        idle.append((now, response))
        self._close_old(idle, now)
        if now - self._swept_s > self._idle_s:
            self._sweep(now)

    def forget(self, address: Address, response: UpstreamResponse) -> None:
        """Drop a connection that was closed while idle."""
        if idle := self._idle.get(address.url):
            left = deque(item for item in idle if item[1] is not response)
            if left:
                self._idle[address.url] = left
            else:
                del self._idle[address.url]

    def drop(self, urls: Sequence[str]) -> None:
        """Close the idle connections to these addresses; their worker has ended or is stopped in place."""
        for url in urls:
            for _, response in self._idle.pop(url, ()):
                response.close()
        self.on_drop(urls)

    def close(self) -> None:
        """Close all idle connections."""
        self.drop(list(self._idle))

    def take_idle(self, address: Address) -> UpstreamResponse | None:
        """A connection that is kept, to be released like a new one; None when there is none."""
        idle = self._idle.get(address.url)
        now = time.monotonic()
        while idle:
            since, response = idle.pop()
            if response.alive and now - since <= self._idle_s:
                return response
            response.close()
        return None

    def _sweep(self, now_s: float) -> None:
        """Forget addresses that nobody asks any more: a worker may be gone before its last answer is."""
        self._swept_s = now_s
        for url, idle in [*self._idle.items()]:
            self._close_old(idle, now_s)
            if not idle:
                del self._idle[url]

    def _close_old(self, idle: deque[tuple[float, UpstreamResponse]], now_s: float) -> None:
        while idle and now_s - idle[0][0] > self._idle_s:
            idle.popleft()[1].close()

    async def connect(self, address: Address, *, head_only: bool = False) -> UpstreamResponse:
        """A new connection, whose owner writes a request on it and must `release()` it.

        Args:
            address: Where to.
            head_only: Whether the answer has no body whatever its head says, as to HEAD.

        Raises:
            UpstreamError: Not reachable.
        """
        return await dial(address, lambda: UpstreamResponse(self, address, head_only=head_only))


async def dial(address: Address, make: Callable[[], _ProtocolT]) -> _ProtocolT:
    """A new connection.

    Args:
        address: Where to.
        make: Makes its protocol.

    Raises:
        UpstreamError: Not reachable.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            if address.url.startswith("unix:"):
                _, protocol = await loop.create_unix_connection(make, address.url.removeprefix("unix:"))
            else:
                host, port = _host_port(address.url)
                _, protocol = await loop.create_connection(make, host, port)
    except TimeoutError as error:
        raise UpstreamError(
            f"the engine did not accept a connection within {_CONNECT_TIMEOUT_S:g} s", sent=False
        ) from error
    except OSError as error:
        raise UpstreamError(f"the engine cannot be reached: {error.strerror}", sent=False) from error
    return protocol


def _host_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


def _base_path(url: str) -> str:
    return "" if url.startswith("unix:") else urlsplit(url).path.strip("/")


@functools.lru_cache(maxsize=1024)
def request_head(address: Address, method: str, target: str) -> bytes:
    """Request line and the headers that are ours to set; the same few are asked for all the time."""
    base = _base_path(address.url)
    host = "localhost" if address.url.startswith("unix:") else urlsplit(address.url).netloc
    key = f"\r\nauthorization: Bearer {address.key}" if address.key else ""
    line = f"{method} {'/' + base if base else ''}{target} HTTP/1.1\r\nhost: {host}{key}\r\n"
    return line.encode("latin-1")


def request_bytes(
    address: Address, method: str, target: str, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> bytes:
    """A whole request, as it is sent.

    Args:
        address: Where to; its key is added.
        method: HTTP method.
        target: Path and query, already encoded.
        headers: Names in lower case, beside host, length and key.
        body: The whole body.
    """
    parts = [request_head(address, method, target)]
    parts += [b"%b: %b\r\n" % header for header in headers]
    if body or method == "POST":
        parts.append(b"content-length: %d\r\n" % len(body))
    parts += (b"\r\n", body)
    return b"".join(parts)
