"""The scripted engine behind the gateway: reads strictly, remembers everything, says its input back.

Requests are read by h11, which shares no code with the gateway. What h11 does not take is a fault of the
gateway, kept in `faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import h11


@dataclass
class Seen:
    """One request as it reached the engine."""

    method: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def all(self, name: str) -> list[bytes]:
        return [value for known, value in self.headers if known == name.encode()]

    @property
    def is_a_clients(self) -> bool:
        """Whether some client is behind it."""
        return self.target.startswith(CLIENTS)

    @property
    def said(self) -> str:
        """The content of the first message."""
        return json.loads(self.body)["messages"][0]["content"]


Script = Callable[["Seen", asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes, *, status: str = "200 OK", kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    delta = {"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + json.dumps(delta).encode() + b"\n\n"


CLIENTS = ("/v1/", "/echo")
"""Where clients' requests go. The gateway asks for health and load on its own account: that is left alone."""

USAGE = {"prompt_tokens": 5, "completion_tokens": 3}


async def say_back(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Answer with what was asked, so that an answer to another request is known for what it is."""
    if seen.target == "/v1/models":
        writer.write(whole(b'{"object":"list","data":[{"id":"m","object":"model"}]}'))
    elif seen.target.startswith("/v1/chat/completions"):
        try:
            asked = json.loads(seen.body)
            said = seen.said
        except (ValueError, LookupError, TypeError):
            writer.write(whole(b'{"error":{"message":"not a chat"}}', status="400 Bad Request"))
            return
        if asked.get("stream"):
            writer.write(STREAM_HEAD)
            for number in range(3):
                writer.write(chunk(event(f"{said}-{number}")))
            if (asked.get("stream_options") or {}).get("include_usage"):
                last = json.dumps({"id": "x", "choices": [], "usage": USAGE}).encode()
                writer.write(chunk(b"data: " + last + b"\n\n"))
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        else:
            answer = {"id": "x", "choices": [{"message": {"content": said}}], "usage": USAGE}
            writer.write(whole(json.dumps(answer).encode()))
    else:
        body = {"method": seen.method, "target": seen.target, "body": seen.body.decode("latin-1")}
        answer = whole(json.dumps(body).encode())
        writer.write(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if seen.method == "HEAD" else answer)


async def nothing_to_say(_seen: Seen, writer: asyncio.StreamWriter) -> None:
    """All is well."""
    writer.write(whole(b"", kind="text/plain"))


class Engine:
    """Serves on a loopback port.

    Attributes:
        seen: Every request, in the order in which they were complete; of clients only.
        begun: Every head, also of requests whose body never came.
        faults: What the gateway sent that is not HTTP.
        script: Replaces `say_back`.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.begun: list[Seen] = []
        self.faults: list[str] = []
        self.script: Script = say_back
        self.port = 0
        self._writers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=65536)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.hang_up()
        await asyncio.gather(*self._writers, return_exceptions=True)

    def hang_up(self) -> None:
        """End every connection."""
        for task, writer in self._writers.items():
            writer.transport.abort()
            task.cancel()

    def reset(self) -> None:
        self.seen.clear()
        self.begun.clear()
        self.faults.clear()
        self.script = say_back

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._writers[task] = writer
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await self._serve_all(reader, writer)
        except h11.RemoteProtocolError as error:
            # A peer that goes in the middle of a message is no fault.
            if not reader.at_eof():
                self.faults.append(str(error))
        finally:
            del self._writers[task]
            writer.transport.abort()

    async def _serve_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            parser = h11.Connection(h11.SERVER)
            seen = await self._read(parser, reader)
            if seen is None:
                return
            if parser.trailing_data[0]:
                self.faults.append(f"more than was asked for: {parser.trailing_data[0][:200]!r}")
            watching = asyncio.create_task(self._watch(reader, seen))
            script = self.script if seen.is_a_clients else nothing_to_say
            try:
                await script(seen, writer)
                await writer.drain()
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            if seen.gone.is_set() or writer.is_closing():
                return

    async def _read(self, parser: h11.Connection, reader: asyncio.StreamReader) -> Seen | None:
        seen: Seen | None = None
        while True:
            part = parser.next_event()
            if part is h11.NEED_DATA:
                data = await reader.read(65536)
                parser.receive_data(data)
                if not data and seen is None:
                    return None
            elif isinstance(part, h11.Request):
                seen = Seen(part.method.decode(), part.target.decode("latin-1"), list(part.headers))
                if seen.is_a_clients:
                    self.begun.append(seen)
            elif isinstance(part, h11.Data):
                assert seen is not None
                seen.body += bytes(part.data)
            elif isinstance(part, h11.EndOfMessage):
                assert seen is not None
                if seen.is_a_clients:
                    self.seen.append(seen)
                return seen
            else:
                return None

    async def _watch(self, reader: asyncio.StreamReader, seen: Seen) -> None:
        try:
            data = await reader.read(65536)
        except ConnectionError:
            data = b""
        if data:
            self.faults.append(f"bytes before the answer: {data[:200]!r}")
        else:
            seen.gone.set()
