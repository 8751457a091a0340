"""Requests that are too large or too slow, and clients and engines that do not read: refused, ended, held back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import tracemalloc

import pytest

from pilotlight.gateway import connection, protocol

from .conftest import BODY_MAX, SLOTS
from .engine import STREAM_HEAD, chunk, event
from .wire import WAIT_S, ClosedError, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUTES = ("chat", "stream", "run", "keys", "lb")
every_route = pytest.mark.parametrize("name", ROUTES)

MEGABYTE = 2**20


def head(site, route, fields):
    return b"POST %b HTTP/1.1\r\nHost: h\r\n%b%b\r\n" % (route.path.encode(), site.auth, fields)


def too_large(name):
    """What says so; /run is in the words of its contract."""
    return {413, 400} if name == "run" else {413}


async def pour(wire, piece, pieces):
    """Send as much as the server takes, until it says something or the connection breaks."""
    loop = asyncio.get_running_loop()
    answering = asyncio.create_task(wire.receive())
    try:
        for _ in range(pieces):
            sending = asyncio.create_task(loop.sock_sendall(wire.sock, piece))
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED, timeout=WAIT_S)
            if not sending.done() or sending.exception() is not None or answering.done():
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                return
    finally:
        await answering


@contextlib.contextmanager
def keeps_at_most(limit):
    """No more memory is taken at a time, in this whole process, than this many bytes."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MEGABYTE:.1f} MB are kept"


# Sizes.


@every_route
@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        pytest.param(b"POST /", b"x" * 8192, id="target"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: h\r\nX-A: ", b"x" * 8192, id="field"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: h\r\nX-", b"x" * 8192, id="name"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: h\r\n", b"X-A: 1\r\n" * 1000, id="fields"),
        pytest.param(b"", b"\r\n" * 4096, id="empty-lines"),
        pytest.param(b"", b"P" * 8192, id="method"),
    ],
)
async def test_a_head_without_end_is_refused(site, name, begin, piece):
    """RFC 6585 §5, RFC 9110 §15.5.15; however it is cut into pieces, and on a warm connection, too."""
    wire = await site.warm(site.routes[name])
    await wire.send(begin)
    await pour(wire, piece, 200)
    with contextlib.suppress(ClosedError):
        answer = await wire.answer()
        assert answer.status in {400, 414, 431, 501}, answer
        assert answer.closes
    assert not await wire.rest()
    assert len(site.engine.seen) in {0, 2}, "only what made the connection warm"


@pytest.mark.parametrize("name", ["chat", "stream", "run", "lb"])
async def test_the_largest_body_is_served_and_one_byte_more_is_not(site, name):
    route = site.routes[name]
    room = BODY_MAX - len(route.body(""))
    for length, more in ((room, 0), (room + 1, 1)):
        for chunked in (False, True):
            wire = await site.warm(route)
            text = "x" * length
            body = route.body(text)
            assert len(body) == BODY_MAX + more
            if chunked:
                request = head(site, route, b"Transfer-Encoding: chunked\r\n")
                pieces = [body[begin : begin + 7000] for begin in range(0, len(body), 7000)]
                request += b"".join(chunk(piece) for piece in pieces) + b"0\r\n\r\n"
            else:
                request = site.request(route, text)
            site.engine.reset()
            await wire.send(request)
            answer = await wire.answer()
            if more:
                assert answer.status in too_large(name), answer
                assert not site.engine.seen
            else:
                site.answers(route, text, answer)
            if answer.closes:
                assert not await wire.rest()
            else:
                await site.serves(wire, route)


@every_route
async def test_a_body_that_says_it_is_too_large_is_refused_at_once(site, name):
    """And then the connection is of no use, as nobody reads to the end of that."""
    route = site.routes[name]
    for length in (b"50000000", b"10000000000"):
        for wire in (await site.open(), await site.warm(route)):
            await wire.send(head(site, route, b"Content-Length: " + length + b"\r\n"))
            answer = await wire.answer()
            assert answer.status in too_large(name), answer
            assert answer.closes, answer
            assert not await wire.rest()


@every_route
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_client_that_goes_on_sending_can_read_why_it_is_refused(site, name, framing):
    """RFC 9112 §9.6: a reset in the middle of its body could cost it the answer. Nothing of this is kept."""
    route = site.routes[name]
    wire = await site.warm(route)
    piece = b"x" * MEGABYTE
    if framing == "length":
        await wire.send(head(site, route, b"Content-Length: %d\r\n" % (64 * MEGABYTE)))
    else:
        await wire.send(head(site, route, b"Transfer-Encoding: chunked\r\n"))
        piece = chunk(piece)
    with keeps_at_most(8 * MEGABYTE):
        await pour(wire, piece, 64)
    answer = await wire.answer()
    assert answer.status in too_large(name), answer
    assert answer.closes, answer
    assert not await wire.rest()


@every_route
async def test_chunks_of_one_byte_count_like_others(site, name):
    """And all that is said around them is bounded, too."""
    route = site.routes[name]
    wire = await site.open()
    await wire.send(head(site, route, b"Transfer-Encoding: chunked\r\n"))
    await pour(wire, b"1;" + b"e" * 1000 + b"\r\n \r\n", 20_000)
    with contextlib.suppress(ClosedError):
        answer = await wire.answer()
        assert answer.status in {400, 408, *too_large(name)}, answer
        assert answer.closes
    assert not await wire.rest()


# Slowness. The server is set to wait three seconds for a body.


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"POST /", b"x", id="target"),
        pytest.param(b"POST / HTTP/1.1\r\n", b"X", id="name"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: h\r\nX-A: ", b"x", id="field"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: h\r\n", b"X-A: 1\r\n", id="fields"),
        pytest.param(b"\r\n", b"\r\n", id="empty-line"),
    ],
)
async def test_a_head_that_comes_too_slowly_ends_the_connection(site, begun, more, monkeypatch):
    """A letter now and then is no progress."""
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)
    # A worker may keep a connection for minutes before it says anything; so may everybody.
    monkeypatch.setattr(protocol, "FIRST_BYTE_S", 0.1)
    wire = await site.open()
    await wire.send(begun)
    ending = asyncio.create_task(wire.rest())
    while not ending.done():
        await wire.send(more)
        await asyncio.sleep(0.02)
    assert (await ending)[:12] in {b"", b"HTTP/1.1 408"}
    monkeypatch.undo()
    await site.is_clean()


async def test_a_second_head_that_comes_too_slowly_ends_the_connection(site, monkeypatch):
    wires = [await site.warm(site.routes[name]) for name in ROUTES]
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)
    for wire in wires:
        await wire.send(b"POST / HT")
    for wire in wires:
        assert (await wire.rest())[:12] in {b"", b"HTTP/1.1 408"}
    monkeypatch.undo()
    await site.is_clean()


async def test_a_body_that_comes_too_slowly_is_refused(site):
    """408 and an end; a byte now and then is no progress. What passes through has a bound of its own."""
    wires, loop = {}, asyncio.get_running_loop()
    for name in ("chat", "stream", "run", "keys"):
        for framing in (b"Content-Length: 90000\r\n", b"Transfer-Encoding: chunked\r\n"):
            wires[name, framing] = wire = await site.open()
            await wire.send(head(site, site.routes[name], framing))
    endings = {key: asyncio.create_task(wire.rest()) for key, wire in wires.items()}
    try:
        async with asyncio.timeout(WAIT_S):
            while not all(ending.done() for ending in endings.values()):
                for key, wire in wires.items():
                    if not endings[key].done():
                        piece = b"x" if key[1].startswith(b"C") else b"1\r\nx\r\n"
                        with contextlib.suppress(ConnectionError):
                            await loop.sock_sendall(wire.sock, piece)
                await asyncio.sleep(0.1)
    except TimeoutError:
        hanging = [key for key, ending in endings.items() if not ending.done()]
        raise AssertionError(f"still waiting: {hanging}") from None
    finally:
        for ending in endings.values():
            ending.cancel()
    answers = {key: wire.pending[:12] for key, wire in wires.items()}
    assert set(answers.values()) <= {b"", b"HTTP/1.1 408"}, answers
    await site.is_clean()


# Who does not read is held back, and so is who writes to him.


class Flood:
    """An engine's answer without end, until told."""

    def __init__(self):
        self.written = 0
        self.enough = asyncio.Event()
        self.ended = asyncio.Event()
        self.gone = asyncio.Event()
        self.piece = event("x" * 16_000)

    async def script(self, seen, writer):
        writer.write(STREAM_HEAD)
        try:
            while not self.enough.is_set():
                writer.write(chunk(self.piece))
                await writer.drain()
                self.written += len(self.piece)
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            await writer.drain()
        except ConnectionError:
            self.gone.set()
            raise
        finally:
            self.ended.set()

    async def stalls(self):
        """Return when nothing more could be written for a while."""
        async with asyncio.timeout(WAIT_S):
            before = -1
            while before != self.written or not before:
                before = self.written
                await asyncio.sleep(0.3)


@pytest.mark.parametrize("name", ["stream", "lb"])
async def test_an_engine_waits_for_a_client_that_reads_slowly(site, name):
    """What is on its way is bounded, and everything arrives, in order, once the client reads."""
    flood = Flood()
    site.engine.script = flood.script
    route = site.routes[name]
    wire = await site.open(receive_bytes=4096)
    with keeps_at_most(8 * MEGABYTE):
        await wire.send(site.request(route, site.text()))
        await flood.stalls()
    assert flood.written < 24 * MEGABYTE, "kernel buffers on two or three connections, and no more"
    flood.enough.set()
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MEGABYTE)
    answer = await wire.answer()
    assert answer.body == flood.piece * (flood.written // len(flood.piece)) + b"data: [DONE]\n\n"
    site.engine.reset()
    await site.serves(wire, route)


@pytest.mark.parametrize("name", ["stream", "lb"])
async def test_a_client_that_never_reads_and_leaves_frees_everything(site, name):
    flood = Flood()
    site.engine.script = flood.script
    wire = await site.open(receive_bytes=4096)
    await wire.send(site.request(site.routes[name], site.text()))
    await flood.stalls()
    wire.reset()
    async with asyncio.timeout(WAIT_S):
        await flood.ended.wait()
    assert flood.gone.is_set()
    site.engine.reset()
    await site.is_clean()


@pytest.mark.parametrize("name", ["stream", "lb"])
async def test_a_client_that_never_reads_is_left_in_the_end(site, name, monkeypatch):
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    flood = Flood()
    site.engine.script = flood.script
    wire = await site.open(receive_bytes=4096)
    await wire.send(site.request(site.routes[name], site.text()))
    async with asyncio.timeout(WAIT_S):
        await flood.ended.wait()
    assert flood.gone.is_set()
    site.engine.reset()
    await site.is_clean()


async def test_a_large_answer_waits_for_its_reader(site):
    """An answer that is no stream, of the data path, in one piece."""
    body = b'{"choices":[{"message":{"content":"' + b"x" * 3 * MEGABYTE + b'"}}]}'

    async def large(_seen, writer):
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        await writer.drain()

    site.engine.script = large
    wire = await site.open(receive_bytes=4096)
    await wire.send(site.request(site.routes["chat"], site.text()))
    assert (await wire.answer()).body == body
    site.engine.reset()
    await site.serves(wire, site.routes["chat"])


@every_route
async def test_a_request_leaves_nothing_for_the_garbage_collector(site, name):
    """A busy gateway would pause for it, and keep megabytes of it in between."""
    wire = await site.warm(site.routes[name], requests=20)
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            await site.serves(wire, site.routes[name])
        assert gc.collect() < 50
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["health", "run", "chat"])
async def test_a_client_that_only_asks_is_not_read_from(site, name):
    """Requests without end, of which no answer is read: the server stops taking them in."""
    piece = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n" if name == "health" else None
    piece = piece or site.request(site.routes[name], site.text())
    piece *= 1 + 65_536 // len(piece)
    wire = await site.open(receive_bytes=4096)
    loop, sent = asyncio.get_running_loop(), 0
    with keeps_at_most(8 * MEGABYTE), contextlib.suppress(TimeoutError):
        while sent < 64 * MEGABYTE:
            async with asyncio.timeout(0.5):
                await loop.sock_sendall(wire.sock, piece)
            sent += len(piece)
    assert sent < 16 * MEGABYTE, "the server reads on"
    wire.reset()
    await site.is_clean()


async def test_a_gateway_full_of_waiting_requests_answers_others(site):
    """Held requests are bounded: more are told to come again, at once, and their connections go on."""
    release = asyncio.Event()
    held = []

    async def hold(seen, writer):
        held.append(seen)
        await release.wait()
        await seen_script(seen, writer)

    seen_script = site.engine.script
    site.engine.script = hold
    route = site.routes["chat"]
    first = [await site.open() for _ in range(SLOTS + 4)]
    for wire in first:
        await wire.send(site.request(route, "t"))
    await until(lambda: len(held) == SLOTS, "all slots in use")
    for _ in range(3):
        wire = await site.open()
        await wire.send(site.request(route, "t"))
        answer = await wire.answer()
        assert answer.status == 429, answer
        await wire.send(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await wire.answer("GET")).status == 200
    release.set()
    for wire in first:
        site.answers(route, "t", await wire.answer())
