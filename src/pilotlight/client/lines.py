"""Lines and server-sent events out of a byte stream.

httpx splits lines at every Unicode line break, and JSON may hold U+2028 unescaped, so an event would be torn
in two. The formats read here know only LF and CRLF.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pilotlight.client.errors import GatewayError

LINE_BYTES_MAX = 32 * 1024 * 1024
"""Longest line accepted; above the gateway's largest answer, so only a broken peer reaches it."""


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event; a comment between events is one with no data and no id."""

    data: str = ""
    id: str = ""


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines without their ends; what follows the last line end comes last, if it is not empty.

    Raises:
        GatewayError: A line is longer than `LINE_BYTES_MAX`.
    """
    rest = bytearray()
    for chunk in chunks:
        *lines, tail = chunk.split(b"\n")
        for line in lines:
            yield bytes(rest + line).removesuffix(b"\r")
            rest.clear()
        rest += tail
        if len(rest) > LINE_BYTES_MAX:
            raise GatewayError(f"the answer holds a line of more than {LINE_BYTES_MAX} bytes")
    if rest:
        yield bytes(rest).removesuffix(b"\r")


def parse_events(chunks: Iterable[bytes]) -> Iterator[ServerEvent]:
    """Server-sent events in order; comments come as empty events, so that a reader sees that the peer lives.

    An event that is cut off by the end of the stream is dropped, as the format asks.
    """
    data: list[str] = []
    event_id = ""
    for raw in split_lines(chunks):
        line = raw.decode("utf-8", errors="replace")
        if not line:
            if data:
                yield ServerEvent("\n".join(data), event_id)
                data = []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "id":
            event_id = value
        elif not field:
            yield ServerEvent()
