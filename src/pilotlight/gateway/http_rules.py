"""What the parser takes and a server must not: rules of RFC 9110 and 9112 that llhttp leaves to us.

Pure. A head that can be read in two ways lets one request hide in another, so it is refused as soon as
somebody before or behind us could read it otherwise. Checked once for each head that is parsed; one that
repeats byte for byte (`gateway.head`, `gateway.repeated`) was checked when it was learnt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

_BLANKS = b" \t"
"""Around a value; the parser leaves those behind it."""

_VERSIONS = frozenset({"1.0", "1.1"})

_HOST = re.compile(rb"(?:\[[A-Za-z0-9:.%_~-]+\]|[A-Za-z0-9._~%!$&'()*+;=-]*)(?::[0-9]*)?")
"""RFC 9112 §3.2, but for the comma, by which lines are joined."""

CHUNK_OVERHEAD = 16
"""Bytes around a piece of a chunked body that cost nothing: size and line ends, as Go's net/http has it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a message is not read any further; the connection ends with it.

    Attributes:
        status: HTTP status.
        reason: What is wrong, for people; ASCII without quotes.
    """

    status: int
    reason: str

    def answer(self, end_of_head: bytes) -> bytes:
        """The whole answer.

        Args:
            end_of_head: Header fields of every last answer of a connection, and the empty line.
        """
        body = b'{"error":"%b"}\n' % self.reason.encode()
        phrase = HTTPStatus(self.status).phrase.encode()
        return b"".join(
            (
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\n" % (self.status, phrase),
                b"content-length: %d\r\n" % len(body),
                end_of_head,
                body,
            )
        )


BROKEN = Fault(400, "the request is no HTTP")
HEAD_TOO_LARGE = Fault(431, "request head too large")
OVERHEAD_TOO_LARGE = Fault(400, "there is too much around the chunks of the request body")
TARGET = Fault(400, "the target of the request is not a URL")
_VERSION = Fault(505, "HTTP/1.1 and HTTP/1.0 are spoken here")
_LINE = Fault(400, "the request line must be method, target and version with one blank between")
_TUNNEL = Fault(501, "CONNECT is not supported")
_HOSTS = Fault(400, "a request needs one Host header")
_BAD_HOST = Fault(400, "the Host header must be a name or an address, with a port or without")
_CODING = Fault(501, "chunked is the only transfer coding that is understood")
_BAD_CODING = Fault(400, "chunked must be the last transfer coding, and be there once")


def fault_of(
    head: bytes, method: bytes, target: bytes, version: str, fields: Iterable[tuple[bytes, bytes]]
) -> Fault | None:
    """What is wrong with a head that llhttp has accepted; None for nothing.

    Args:
        head: As it came, from its first byte on or with empty lines before.
        method: What the parser made of it, like the rest.
        target: The request target.
        version: Such as "1.1".
        fields: Header fields, names in lower case.
    """
    if version not in _VERSIONS:
        return _VERSION
    line = b"%b %b HTTP/%b\r\n" % (method, target, version.encode())
    if not head.startswith(line) and not head.lstrip(b"\r\n").startswith(line):
        return _LINE
    if method == b"CONNECT":
        return _TUNNEL
    hosts = 0
    codings: list[bytes] = []
    for name, value in fields:
        if name == b"host":
            hosts += 1
            if _HOST.fullmatch(value.strip(_BLANKS)) is None:
                return _BAD_HOST
        elif name == b"transfer-encoding":
            codings.append(value)
    if hosts != 1 and (hosts or version == "1.1"):
        return _HOSTS
    return _coding_fault(b",".join(codings)) if codings else None


def _coding_fault(value: bytes) -> Fault | None:
    codings = [coding for item in value.lower().split(b",") if (coding := item.strip(_BLANKS))]
    if codings == [b"chunked"]:
        return None
    faulty = codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1
    return _BAD_CODING if faulty else _CODING


def content_length(fields: Iterable[tuple[bytes, bytes]]) -> int:
    """The length of the body that follows a head; 0 for none, and for one in chunks."""
    length = 0
    for name, value in fields:
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            return 0
    return length
