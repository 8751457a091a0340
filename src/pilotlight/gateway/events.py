"""Server-sent events on the data path: keep their boundaries, count tokens, take out what was not asked for.

Events are looked for by their blank line and parsed only when they hold `"usage"`. A streaming body
that did not ask for usage gets the request added on its way in (`gateway.body`), and the one event
that carries nothing but usage is taken out on its way back.
"""

from __future__ import annotations

import functools

import msgspec

from pilotlight.core.openai_routes import STREAM_USAGE_ROUTES, speaks_anthropic

_EVENT_MAX = 4 * 1024 * 1024
"""An event longer than this is passed on unparsed; vLLM's are a few hundred bytes."""


_PLAIN = b'data: {"id":'
"""How events of OpenAI's routes begin that are neither an error nor the end."""

_IMPOSSIBLE = b"\n"
"""How no chunk begins."""

_TOKENS_MAX = 2**53
"""Counts beyond it are an engine's mistake and not stored."""


class _Usage(msgspec.Struct):
    # Chat and completions; Responses and Messages call the same things input and output.
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Nested(msgspec.Struct):
    usage: _Usage | None = None


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: _Usage | None = None
    response: _Nested | None = None  # Responses: {"type": "response.completed", "response": {"usage": …}}
    message: _Nested | None = None  # Messages: {"type": "message_start", "message": {"usage": …}}


_decoder = msgspec.json.Decoder(_Event)


def data_event(body: bytes) -> bytes:
    """A body of any form as one event."""
    return b"".join(b"data: %b\n" % line for line in body.splitlines()) + b"\n"


def error_event(route: str, body: bytes) -> bytes:
    """The event that tells of a failure once the head of a stream has been sent.

    Args:
        route: Path of the engine's route.
        body: The error object, encoded.
    """
    return (b"event: error\n" if speaks_anthropic(route) else b"") + data_event(body)


def stream_end(route: str) -> bytes:
    """What ends a stream of this route, after an error, too; b"" where nothing says so."""
    return b"data: [DONE]\n\n" if route in STREAM_USAGE_ROUTES else b""


class TokenCount:
    """Tokens of one answer, as far as they are known."""

    __slots__ = ("tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.tokens_in: int | None = None
        self.tokens_out: int | None = None

    def note(self, data: bytes) -> bool:
        """Count the usage in a JSON object; returns whether it holds usage and no choices."""
        try:
            event = _decoder.decode(data)
        except (msgspec.DecodeError, RecursionError):
            return False
        if event.response is not None and event.response.usage is not None:
            self._add(event.response.usage)
        if event.message is not None and event.message.usage is not None:
            # A Messages stream begins with this: the tokens out are not known yet.
            self._add(_Usage(input_tokens=event.message.usage.input_tokens))
        if event.usage is None:
            return False
        self._add(event.usage)
        return event.choices is not None and not event.choices

    def _add(self, usage: _Usage) -> None:
        tokens_in = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
        tokens_out = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
        if tokens_in is not None and 0 <= tokens_in <= _TOKENS_MAX:
            self.tokens_in = tokens_in
        if tokens_out is not None and 0 <= tokens_out <= _TOKENS_MAX:
            self.tokens_out = tokens_out


class EventStream:
    """Passes a stream of events on, in whole events.

    Args:
        count: Where tokens are noted.
        hide_usage: Take out the event that carries only usage; the client did not ask for it.
    """

    __slots__ = ("_blank", "_count", "_hide_usage", "_rest", "complete", "events", "failed")

    def __init__(self, count: TokenCount, *, hide_usage: bool) -> None:
        self._count = count
        self._hide_usage = hide_usage
        self._rest = b""
        self._blank = b""
        self.events = 0
        self.complete = False
        self.failed = False

    @property
    def at_boundary(self) -> bool:
        """Whether something has come, and what comes next begins an event."""
        return self.events > 0 and not self._rest

    def feed(self, data: bytes) -> bytes:
        """What of the stream can be passed on now; b"" when no event is whole yet."""
        whole = self.whole(data)
        return self.shown(whole) if whole else b""

    def whole(self, data: bytes) -> bytes:
        """The whole events that there are with this data, as the engine sent them; b"" for none."""
        if self._rest:
            data = self._rest + data
        if not self._blank and b"\n" in data:
            # vLLM ends lines with LF, some servers with CR LF; one stream keeps to one of them.
            self._blank = b"\r\n\r\n" if b"\r\n" in data else b"\n\n"
        end = data.rfind(self._blank) if self._blank else -1
        if end < 0 and len(data) <= _EVENT_MAX:
            self._rest = data
            return b""
        cut = end + len(self._blank) if end >= 0 else len(data)
        self._rest = data[cut:]
        return data if cut == len(data) else data[:cut]

    def shown(self, whole: bytes) -> bytes:
        """What the client is to see of whole events, which are counted."""
        self._count_events(whole)
        return whole if b'"usage"' not in whole or not self._blank else self._without_usage(whole)

    def _count_events(self, whole: bytes) -> None:
        self.events += whole.count(self._blank) if self._blank else 0
        if b"data: [DONE]" in whole and _has_line(whole, b"data: [DONE]"):
            self.complete = True
            self.events -= 1
        if b'data: {"error"' in whole or (b"event: error" in whole and _has_line(whole, b"event: error")):
            self.failed = True

    def rest(self) -> bytes:
        """What was left over when the stream ended inside an event."""
        rest, self._rest = self._rest, b""
        return rest

    def _without_usage(self, whole: bytes) -> bytes:
        kept = []
        # Nothing follows the last blank line, except where an event was too long to wait for its end.
        *events, beginning = whole.split(self._blank)
        for event in events:
            if b'"usage"' in event:
                at = event.find(b"data:")
                only_usage = at >= 0 and self._count.note(event[at + 5 :])
                if only_usage:
                    self.events -= 1
                    if self._hide_usage:
                        continue
            kept.append(event + self._blank)
        return b"".join((*kept, beginning))


def is_plain_chunk(piece: bytes) -> bool:
    """Whether a piece of a chunked body is one chunk, and that one event which can be passed on as it is.

    No chunk with extensions is one, nor one whose length is written in another way than usual.

    Args:
        piece: Begins where a chunk and an event do.
    """
    size = len(piece)
    return (
        piece.startswith(_plain_chunk(size))
        and piece.find(b"\n\n") == size - 4
        and piece.endswith(b"\r\n")
        and b'"usage"' not in piece
    )


@functools.lru_cache(maxsize=4096)
def _plain_chunk(size: int) -> bytes:
    """How a chunk begins that has so many bytes with its framing, and whose data is a plain event."""
    for digits in range(1, 9):
        length = size - digits - 4
        if length > 0 and len(line := b"%x\r\n" % length) == digits + 2:
            return line + _PLAIN
    return _IMPOSSIBLE


def _has_line(whole: bytes, begin: bytes) -> bool:
    """Whether a line begins like this; the text of an answer, in which line breaks are escaped, may, too."""
    return whole.startswith(begin) or b"\n" + begin in whole
