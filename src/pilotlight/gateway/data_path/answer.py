"""How the head of an engine's answer becomes the head of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus

from pilotlight.gateway.hop import without_hop
from pilotlight.gateway.upstream import AnswerHead

_OURS = frozenset({b"content-length", b"server", b"date", b"x-request-id"})
"""Answer headers that we set."""

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


def begin_head(status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Status line and headers, each with its line break; those of the hop and our own are left out."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return line + lines(header for header in without_hop(headers) if header[0] not in _OURS)


def lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers, each with its line break."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def passed_head(head: AnswerHead) -> bytes:
    """The same for an engine's answer; made once for a head that repeats."""
    if head.memo is None:
        head.memo = begin_head(head.status, head.fields)
    return head.memo


def end_head(request_id: str, length: int | None = None) -> bytes:
    """The headers that are ours: the request's id, and the length of the body unless that stays open."""
    if length is None:
        return b"x-request-id: %b\r\n" % request_id.encode()
    return b"content-length: %d\r\nx-request-id: %b\r\n" % (length, request_id.encode())
