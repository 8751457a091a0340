"""Heads of requests and answers as they cross the load balancer: unchanged but for what belongs to a hop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pilotlight.core.affinity import HEADER
from pilotlight.domain.endpoint import Endpoint
from pilotlight.gateway.asgi import Headers, Scope
from pilotlight.gateway.hop import without_hop

FORWARD_KEY_VARIABLE = "FORWARD_AUTHORIZATION"
"""Set to `false` in an endpoint's environment, its workers do not see the keys of its callers."""

_KEYS = frozenset({b"authorization", b"x-api-key"})

_Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Call:
    """A client's request, and what of its path is the worker's.

    Attributes:
        scope: As it came (ASGI).
        headers: The same, by name.
        path: Path and query for the worker, percent-encoded.
        prefix: What was taken away from the path, for servers that make links.
    """

    scope: Scope
    headers: Headers
    path: str
    prefix: str


@dataclass(frozen=True, slots=True)
class Framing:
    """How the body of a request is told from what comes after it; the one decision that head and body follow.

    Attributes:
        length: Announced size in bytes; None when it was not announced.
        chunked: Whether it comes in chunks; with neither there is no body.
    """

    length: int | None = None
    chunked: bool = False

    @classmethod
    def of(cls, headers: Iterable[_Header]) -> Framing:
        """The framing of a request whose head the HTTP parser has accepted (RFC 9112 §6.3)."""
        given = dict(headers)
        if b"transfer-encoding" in given:
            return cls(chunked=True)
        length = given.get(b"content-length", b"").strip()
        return cls(length=int(length)) if length.isdigit() else cls()

    @property
    def has_body(self) -> bool:
        """Whether bytes follow the head."""
        return self.chunked or bool(self.length)

    @property
    def headers(self) -> list[_Header]:
        """The same for the worker."""
        if self.chunked:
            return [(b"transfer-encoding", b"chunked")]
        return [] if self.length is None else [(b"content-length", b"%d" % self.length)]


def request_head(call: Call, endpoint: Endpoint, framing: Framing) -> bytes:
    """Request line and headers as the worker gets them.

    Args:
        call: The client's request.
        endpoint: Whose worker.
        framing: Of the body that follows.
    """
    return _encode(call.scope["method"], call.path, _forwarded(call, endpoint) + framing.headers, endpoint.id)


def upgrade_head(call: Call, endpoint: Endpoint) -> bytes:
    """The same for a request that asks for a WebSocket, which has no body."""
    upgrade = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    return _encode("GET", call.path, _forwarded(call, endpoint) + upgrade, endpoint.id)


def response_headers(headers: Iterable[_Header], worker_id: str) -> list[_Header]:
    """Headers of a worker's answer as the client gets them.

    Args:
        headers: The worker's, with names in lower case.
        worker_id: Who answered.
    """
    # The date is set by our own server; two of them would be one too many.
    own = {b"date", HEADER.encode()}
    passed = [header for header in without_hop(list(headers)) if header[0] not in own]
    return [*passed, (HEADER.encode(), worker_id.encode())]


def _forwarded(call: Call, endpoint: Endpoint) -> list[_Header]:
    scope = call.scope
    headers = without_hop(list(scope["headers"]))
    if not _forwards_key(endpoint):
        headers = [header for header in headers if header[0] not in _KEYS]
    given = dict(headers)
    peer = (scope.get("client") or ("",))[0].encode()
    chain = b", ".join(filter(None, (given.get(b"x-forwarded-for", b""), peer)))
    proto = scope["scheme"].replace("ws", "http").encode()
    ours = {
        b"x-forwarded-for": chain,
        b"x-forwarded-proto": given.get(b"x-forwarded-proto", proto),
        b"x-forwarded-host": given.get(b"x-forwarded-host", given.get(b"host", b"")),
        b"x-forwarded-prefix": given.get(b"x-forwarded-prefix", b"") + call.prefix.encode(),
    }
    kept = [header for header in headers if header[0] not in ours and header[0] != b"content-length"]
    return kept + [(name, value) for name, value in ours.items() if value]


def _forwards_key(endpoint: Endpoint) -> bool:
    return endpoint.revision.env.get(FORWARD_KEY_VARIABLE, "true").strip().lower() not in {"false", "0", "no"}


def _encode(method: str, path: str, headers: list[_Header], endpoint_id: str) -> bytes:
    if not any(name == b"host" for name, _ in headers):
        headers = [(b"host", endpoint_id.encode()), *headers]
    lines = [
        f"{method} {path} HTTP/1.1".encode("latin-1"),
        *(name + b": " + value for name, value in headers),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"
