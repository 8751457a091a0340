"""A stand-in for one engine: answers at once, so that only the proxy in front of it is measured.

`python -m pilotlight.bench.harness.upstream PORT` (port 0: a free one) prints its port once it listens. The
request says what it wants, so one engine serves every load: a POST whose body holds `"stream":true` and the
words of `asking` gets a chunked stream of so many chat-completion chunks and `[DONE]`, the first chunk at
once and the others on a fixed schedule, which a late chunk does not move; any other request gets one fixed
chat completion. Each chunk carries its number and the monotonic nanoseconds at which it was written.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from typing import cast

import httptools
import uvloop

from pilotlight.bench.harness.wire import allow_descriptors

ASKING = re.compile(rb"count to (\d+), one every (\d+) us")
CONNECTIONS = 16_384
"""Connections that it must be able to hold, where the machine allows so many descriptors."""

EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1795284333,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" %06d@%020d"},"logprobs":null,"finish_reason":null}]}\n\n'
)
LENGTH = b"%x\r\n" % len(EVENT % (0, 0))
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
BODY = (
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1795284333,"model":"m",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"'
    + b"x"
    * 300
    + b'"},"finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":6,"total_tokens":26,"completion_tokens":20}}'
)
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY


def asking(events: int, pause_s: float) -> str:
    """What a client says to get so many events, so many seconds apart."""
    return f"count to {events}, one every {round(pause_s * 1e6)} us"


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._body = b""
        self._parser = httptools.HttpRequestParser(self)
        self._streams: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """See `asyncio.Protocol`."""
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._body += body

    def on_message_complete(self) -> None:
        """Called by the parser."""
        body, self._body = self._body, b""
        asked = ASKING.search(body)
        if asked is not None and (b'"stream":true' in body or b'"stream": true' in body):
            task = asyncio.ensure_future(self._stream(int(asked[1]), int(asked[2]) / 1e6))
            self._streams.add(task)
            task.add_done_callback(self._streams.discard)
        elif self._transport is not None:
            self._transport.write(REPLY)

    async def _stream(self, events: int, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        if self._transport is not None:
            self._transport.write(HEAD)
        for number in range(events):
            await asyncio.sleep(max(0.0, due - loop.time()))
            if self._transport is None:
                return
            self._transport.write(LENGTH + EVENT % (number, time.monotonic_ns()) + b"\r\n")
            due += pause_s
        if self._transport is not None:
            self._transport.write(END)


async def main(port: int) -> None:
    """Serve until killed."""
    allow_descriptors(CONNECTIONS)
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=2048)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
