"""Cuts a byte stream of server-sent events into whole events, wherever the network cut it.

Pure. Events are found in bytes (line ends are ASCII) and decoded whole, so a character split over two reads
never becomes U+FFFD. Framing: `vllm-worker.md` §6.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""Longest event kept in memory. Arbitrary: far above any event vLLM sends, far below what hurts."""

DONE: Final = "[DONE]"
"""Data of the event that ends a chat or completion stream."""


class EventTooLongError(Exception):
    """An upstream event longer than `MAX_EVENT_BYTES`; the stream cannot be continued."""


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event.

    Attributes:
        name: Value of its `event:` field; "" for plain data events.
        data: Its `data:` lines joined by newlines; "" for comments.
        text: The event as received, line ends normalised, closed by one blank line.
    """

    name: str
    data: str
    text: str

    @property
    def is_comment(self) -> bool:
        """Whether it carries nothing, such as a keep-alive."""
        return not self.data and not self.name


class SseSplitter:
    """Incremental: bytes in, whole events out."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[SseEvent]:
        """The events completed by these bytes, in order.

        Raises:
            EventTooLongError: The unfinished event exceeds `MAX_EVENT_BYTES`.
        """
        buffer = self._buffer + data
        # A carriage return at the very end may be half of a line end: wait for the next byte.
        tail = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):
                buffer, tail = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = buffer.split(b"\n\n")
        self._buffer = rest + tail
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise EventTooLongError(f"event of more than {MAX_EVENT_BYTES} bytes")
        return [_parse(block) for block in blocks if block.strip(b"\n")]

    def close(self) -> list[SseEvent]:
        """The last event, if the stream ended without its blank line."""
        block, self._buffer = self._buffer.strip(b"\r\n"), b""
        return [_parse(block)] if block else []


def _parse(block: bytes) -> SseEvent:
    text = block.decode("utf-8", "replace").strip("\n")
    name = ""
    data: list[str] = []
    for line in text.split("\n"):
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif field == "event":
            name = value.removeprefix(" ")
    return SseEvent(name, "\n".join(data), text + "\n\n")
