"""Heads of requests and answers as they cross the load balancer: unchanged but for what belongs to a hop."""

from __future__ import annotations

from collections.abc import Iterable

from pilotlight.core.affinity import HEADER
from pilotlight.gateway.asgi import Scope

_HOP = frozenset(
    {
        b"connection",
        b"expect",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers between two neighbours (RFC 9110 §7.6.1), and what a proxy answers by itself."""

_KEYS = frozenset({b"authorization", b"x-api-key"})

_Header = tuple[bytes, bytes]


def request_head(scope: Scope, path: str, *, prefix: str, endpoint_id: str, forward_key: bool) -> bytes:
    """Request line and headers as the worker gets them.

    Args:
        scope: The client's request (ASGI).
        path: Path and query for the worker.
        prefix: What was taken away from the path, for servers that make links.
        endpoint_id: For `X-Forwarded-*` only.
        forward_key: Whether the worker sees the caller's key.
    """
    headers = _forwarded(scope, prefix=prefix, forward_key=forward_key)
    given = dict(scope["headers"])
    if b"transfer-encoding" in given and b"content-length" not in given:
        headers.append((b"transfer-encoding", b"chunked"))
    return _encode(scope["method"], path, headers, endpoint_id)


def upgrade_head(scope: Scope, path: str, *, prefix: str, endpoint_id: str, forward_key: bool) -> bytes:
    """The same for a request that asks for a WebSocket."""
    headers = _forwarded(scope, prefix=prefix, forward_key=forward_key)
    headers += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    return _encode("GET", path, headers, endpoint_id)


def response_headers(headers: Iterable[_Header], worker_id: str) -> list[_Header]:
    """Headers of a worker's answer as the client gets them.

    Args:
        headers: The worker's, with names in lower case.
        worker_id: Who answered.
    """
    # The date is set by our own server; two of them would be one too many.
    own = {b"date", HEADER.encode()}
    passed = [header for header in _without_hop(list(headers)) if header[0] not in own]
    return [*passed, (HEADER.encode(), worker_id.encode())]


def _forwarded(scope: Scope, *, prefix: str, forward_key: bool) -> list[_Header]:
    headers = _without_hop(list(scope["headers"]))
    if not forward_key:
        headers = [header for header in headers if header[0] not in _KEYS]
    given = dict(headers)
    peer = (scope.get("client") or ("",))[0].encode()
    chain = b", ".join(filter(None, (given.get(b"x-forwarded-for", b""), peer)))
    proto = scope["scheme"].replace("ws", "http").encode()
    ours = {
        b"x-forwarded-for": chain,
        b"x-forwarded-proto": given.get(b"x-forwarded-proto", proto),
        b"x-forwarded-host": given.get(b"x-forwarded-host", given.get(b"host", b"")),
        b"x-forwarded-prefix": given.get(b"x-forwarded-prefix", b"") + prefix.encode(),
    }
    kept = [header for header in headers if header[0] not in ours]
    return kept + [(name, value) for name, value in ours.items() if value]


def _without_hop(headers: list[_Header]) -> list[_Header]:
    named = {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }
    return [header for header in headers if header[0] not in _HOP and header[0] not in named]


def _encode(method: str, path: str, headers: list[_Header], endpoint_id: str) -> bytes:
    if not any(name == b"host" for name, _ in headers):
        headers = [(b"host", endpoint_id.encode()), *headers]
    lines = [
        f"{method} {path} HTTP/1.1".encode("latin-1"),
        *(name + b": " + value for name, value in headers),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"
