"""Where one request ends and the next begins, as raw bytes show it (serverless-api.md §3, RFC 9112 §6)."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pilotlight.gateway import protocol

ID = "lbendpoint1234"
KEY = "Authorization: Bearer rpa_RUN\r\n"
SMUGGLED = b"GET /admin HTTP/1.1\r\nHost: h\r\n\r\n"


class RawWorker:
    """Keeps every byte it is sent, and answers each connection's first bytes with one answer."""

    def __init__(self, answer=b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"):
        self.answer = answer
        self.received = []
        self.ended = asyncio.Event()

    async def serve(self, reader, writer):
        number = len(self.received)
        self.received.append(b"")
        while data := await reader.read(65536):
            self.received[number] += data
            if b"\r\n\r\n" in self.received[number] and self.answer:
                writer.write(self.answer)
        self.ended.set()


@pytest.fixture
def raw(balanced):
    """Start a raw worker: `await raw()`."""

    async def start(*answer):
        worker = RawWorker(*answer)
        await balanced.raw_worker(worker.serve)
        return worker

    return start


async def opened(balanced):
    return await asyncio.open_connection(*balanced.url.removeprefix("http://").split(":"))


async def told(balanced, request):
    """What comes back for these bytes until the connection is closed by the other side."""
    reader, writer = await opened(balanced)
    writer.write(request if isinstance(request, bytes) else request.encode())
    answer = b""
    try:
        async with asyncio.timeout(20):
            # Closed with bytes of ours unread, it ends in a reset.
            with contextlib.suppress(ConnectionError):
                while piece := await reader.read(65536):
                    answer += piece
    finally:
        writer.close()
    return answer


@pytest.mark.parametrize("named", ["content-length", "Content-Length, host", "x, CONTENT-LENGTH ,y"])
async def test_connection_cannot_take_the_length_away(balanced, raw, named):
    worker = await raw()
    head = (
        f"POST /lb/{ID}/x HTTP/1.1\r\nHost: h\r\n{KEY}Connection: close, {named}\r\n"
        f"Content-Length: {len(SMUGGLED)}\r\n\r\n"
    )
    assert b"200 OK" in await told(balanced, head.encode() + SMUGGLED)
    (received,) = worker.received
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(SMUGGLED) in head
    assert b"host: h" in head
    assert body == SMUGGLED


async def test_connection_cannot_take_the_chunks_away(balanced, raw):
    worker = await raw()
    head = (
        f"POST /lb/{ID}/x HTTP/1.1\r\nHost: h\r\n{KEY}Connection: close, transfer-encoding, content-length\r\n"
        f"Transfer-Encoding: chunked\r\n\r\n"
    )
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    assert b"200 OK" in await told(balanced, head.encode() + body)
    head, _, rest = worker.received[0].partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert b"content-length" not in head
    assert rest == body


async def test_connection_cannot_take_away_who_asked(balanced, raw):
    worker = await raw()
    await told(
        balanced,
        f"GET /lb/{ID}/x HTTP/1.1\r\nHost: h\r\n{KEY}X-Forwarded-For: 10.1.2.3\r\n"
        "Connection: close, x-forwarded-for, x-forwarded-host\r\n\r\n",
    )
    head = worker.received[0]
    assert b"x-forwarded-for: 10.1.2.3, " in head
    assert b"x-forwarded-host: h" in head
    assert b"content-length" not in head


async def test_a_length_of_nought_is_said_and_nothing_follows(balanced, raw):
    worker = await raw()
    await told(
        balanced,
        f"POST /lb/{ID}/x HTTP/1.1\r\nHost: h\r\n{KEY}Connection: close\r\nContent-Length: 0\r\n\r\n",
    )
    assert b"content-length: 0\r\n" in worker.received[0]
    assert worker.received[0].endswith(b"\r\n\r\n")


async def test_a_connection_that_lacks_a_part_of_the_body_serves_nobody_else(balanced, raw):
    """The worker answers before it has the body: the rest would be read as the next request."""
    worker = await raw()
    reader, writer = await opened(balanced)
    writer.write(
        f"POST /lb/{ID}/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: 1000\r\n\r\nonly this".encode()
    )
    async with asyncio.timeout(20):
        await reader.readuntil(b"ok")
        await worker.ended.wait()
    writer.close()


@pytest.mark.parametrize("begin", ["GET /", "GET / HTTP/1.1\r\nHost: h\r\nX-Long: "])
async def test_a_head_without_end_is_431(balanced, begin):
    reader, writer = await opened(balanced)
    writer.write(begin.encode())
    answer = b""
    for _ in range(100):
        writer.write(b"x" * 8192)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                answer = await reader.read()
                break
    assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert answer.endswith(b'{"error":"request head too large"}\n')
    writer.close()


async def test_a_head_in_large_pieces_ends_the_connection(balanced):
    await told(balanced, b"GET / HTTP/1.1\r\nHost: h\r\nX-Long: " + b"x" * 3_000_000)


async def test_a_trailer_without_end_ends_the_connection(balanced):
    """A chunked body may be followed by headers, which the parser keeps just as long."""
    head = f"POST /lb/{ID}/x HTTP/1.1\r\nHost: h\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n"
    await told(balanced, head.encode() + b"1\r\nx\r\n0\r\nX-Long: " + b"x" * 300_000)


async def test_a_large_body_is_no_large_head(balanced, raw):
    worker = await raw(b"")
    reader, writer = await opened(balanced)
    body = b"".join(b"4000\r\n%b\r\n" % (b"y" * 0x4000) for _ in range(20)) + b"0\r\n\r\n"
    writer.write(
        f"POST /lb/{ID}/x HTTP/1.1\r\nHost: h\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n".encode() + body
    )
    async with asyncio.timeout(20):
        while not worker.received or worker.received[0].count(b"y") < 20 * 0x4000:
            await asyncio.sleep(0.01)
    assert not reader.at_eof()
    writer.close()


async def test_a_head_that_never_ends_in_time_ends_the_connection(balanced, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.05)
    assert await told(balanced, b"GET / HTTP/1.1\r\nX-Slow: ") == b""
