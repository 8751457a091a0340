"""The head of a message, and how one that repeats is known without parsing it.

A client sends the same request line and header fields with every request on a connection, and an engine the
same head with every answer; what changes is the length of the body. Parsing a head and deciding what it means
costs more than passing a message on, so each connection remembers the last head that the parser has accepted
(`Lane`). Data that begins with it, byte for
byte but for the digits of Content-Length, means what the head meant then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

_LENGTH = b"\r\ncontent-length:"
_DIGITS_MAX = 15
_LANE_BYTES_MAX = 8192

_SPECIAL = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"trailer", b"te"})
"""Fields that change how a message is read; requests with one are always parsed."""


class Head:
    """Request line and header fields.

    Args:
        method: HTTP method, in capitals.
        path: Percent-encoded, single slashes, without the query.
        query: Percent-encoded, without the question mark.
        fields: Header fields, names in lower case, in order.
        http_11: Whether the client speaks HTTP/1.1, and so understands chunks.
        keep_alive: Whether the connection may be used again.
        expects: Whether the client waits for `100 Continue` before it sends the body.

    Attributes:
        headers: The fields by name; of repeated ones the last counts. Content-Length is that of the first
            request with this head.
        memo: What whoever serves it has found out about it.
    """

    __slots__ = ("expects", "fields", "headers", "http_11", "keep_alive", "memo", "method", "path", "query")

    def __init__(
        self,
        *,
        method: str,
        path: bytes,
        query: bytes,
        fields: Sequence[tuple[bytes, bytes]],
        http_11: bool,
        keep_alive: bool,
        expects: bool,
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.fields = fields
        self.headers = dict(fields)
        self.http_11 = http_11
        self.keep_alive = keep_alive
        self.expects = expects
        self.memo: object = None


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lane(Generic[T]):
    """A head as it was sent, split at the digits of Content-Length.

    Attributes:
        head: What the parser made of it.
        before: Everything before the digits.
        after: Everything after them, with the empty line.
    """

    head: T
    before: bytes
    after: bytes

    def read(self, data: bytes) -> tuple[int, int] | None:
        """Where the body begins in data that begins with this head, and its length; None for another head."""
        if not data.startswith(self.before):
            return None
        at = len(self.before)
        end = data.find(b"\r", at, at + _DIGITS_MAX + 1)
        digits = data[at:end]
        if end < 0 or not digits.isdigit() or not data.startswith(self.after, end):
            return None
        return end + len(self.after), int(digits)


def lane_of(data: bytes, fields: Sequence[tuple[bytes, bytes]], head: T) -> Lane[T] | None:
    """The lane of a head that the parser has accepted; None where only a parser can read such a head.

    Args:
        data: An HTTP/1.1 message from its first byte on, its head complete, its connection kept open.
        fields: What the parser made of its header fields, names in lower case.
        head: What the lane shall give.
    """
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0 or head_end > _LANE_BYTES_MAX:
        return None
    # Only what splits at its line breaks and colons into what the parser found: then there is no second way
    # to read it.
    lines = [line.partition(b":") for line in data[data.find(b"\r\n") + 2 : head_end].split(b"\r\n")]
    if [(name.lower(), value.strip(b" \t")) for name, _, value in lines] != list(fields):
        return None
    names = [name for name, _ in fields]
    if _SPECIAL.intersection(names) or names.count(b"content-length") != 1:
        return None
    if any(name == b"connection" and value.lower() != b"keep-alive" for name, value in fields):
        return None
    at = data[: head_end + 2].lower().find(_LENGTH) + len(_LENGTH)
    while data[at : at + 1] == b" ":
        at += 1
    end = data.find(b"\r", at)
    if not data[at:end].isdigit():
        return None
    return Lane(head, data[:at], data[end : head_end + 4])
