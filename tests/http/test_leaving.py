"""Clients that leave and engines that break off: nobody else notices, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib

import h11
import pytest

from .conftest import SLOTS
from .engine import STREAM_HEAD, chunk, event, say_back, whole
from .wire import WAIT_S, ClosedError, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEAVE = {
    "close": lambda wire: wire.close(),
    "half": lambda wire: wire.half_close(),
    "reset": lambda wire: wire.reset(),
}
every_leave = pytest.mark.parametrize("how", LEAVE)


class Held:
    """An engine that keeps its requests until the gateway hangs up."""

    def __init__(self, *, first=b""):
        self.seen = []
        self.first = first

    async def script(self, seen, writer):
        self.seen.append(seen)
        writer.write(self.first)
        await seen.gone.wait()

    async def all_aborted(self):
        async with asyncio.timeout(WAIT_S):
            for seen in self.seen:
                await seen.gone.wait()


@pytest.mark.parametrize("name", ["chat", "stream", "run", "keys", "lb"])
@every_leave
async def test_in_the_middle_of_a_request(site, name, how):
    route = site.routes[name]
    request = site.request(route, site.text())
    body = request.index(b"\r\n\r\n") + 4
    for cut in (0, 1, body - 3, body, len(request) - 1):
        for wire in (await site.open(), await site.warm(route)):
            await wire.pieces(request[:cut])
            LEAVE[how](wire)
    site.engine.reset()
    await site.is_clean()
    assert all(seen.body != route.body("") for seen in site.engine.seen)


@pytest.mark.parametrize("name", ["chat", "stream", "lb"])
@every_leave
async def test_while_the_engine_thinks(site, name, how):
    """It is told by the end of its connection, and the slot is free for others."""
    held = Held()
    site.engine.script = held.script
    wires = [await site.open() for _ in range(SLOTS)]
    for wire in wires:
        await wire.send(site.request(site.routes[name], site.text()))
    await until(lambda: len(held.seen) == SLOTS, "all in the engine's hands")
    for wire in wires:
        LEAVE[how](wire)
    await held.all_aborted()
    site.engine.reset()
    await site.is_clean()


@pytest.mark.parametrize("name", ["stream", "lb"])
@every_leave
async def test_in_the_middle_of_a_stream(site, name, how):
    held = Held(first=STREAM_HEAD + chunk(event("one")))
    site.engine.script = held.script
    wires = [await site.open() for _ in range(SLOTS)]
    for wire in wires:
        await wire.send(site.request(site.routes[name], site.text()))
    for wire in wires:
        await wire.has(b'"one"')
        LEAVE[how](wire)
    await held.all_aborted()
    site.engine.reset()
    await site.is_clean()


@every_leave
async def test_while_waiting_for_a_slot(site, how):
    """Those who wait leave before those who are served; the engine never hears of them."""
    held = Held()
    site.engine.script = held.script
    route = site.routes["chat"]
    served = [await site.open() for _ in range(SLOTS)]
    for wire in served:
        await wire.send(site.request(route, "served"))
    await until(lambda: len(held.seen) == SLOTS, "all slots in use")
    for _ in range(3):
        waiting = [await site.open() for _ in range(4)]
        for wire in waiting:
            await wire.pieces(site.request(route, "waiting"))
        for wire in waiting:
            LEAVE[how](wire)
        # The places of those who have left are free again, or the next would be told to come again.
        if how == "half":
            for wire in waiting:
                assert not await wire.rest()
        else:
            await site.serves(await site.open(), site.routes["run"])
    for wire in served:
        wire.close()
    await held.all_aborted()
    site.engine.reset()
    await site.is_clean()
    assert all(seen.said != "waiting" for seen in held.seen)


@every_leave
async def test_with_requests_in_the_pipeline(site, how):
    held = Held(first=STREAM_HEAD + chunk(event("one")))
    site.engine.script = held.script
    wires = [await site.open() for _ in range(4)]
    for wire in wires:
        requests = [site.request(site.routes[name], site.text()) for name in ("stream", "chat", "run", "lb")]
        await wire.send(b"".join(requests))
        await wire.has(b'"one"')
        LEAVE[how](wire)
    await held.all_aborted()
    assert len(held.seen) == 4, "a request of somebody who has left"
    site.engine.reset()
    await site.is_clean()


@every_leave
async def test_after_an_answer(site, how):
    for route in site.routes.values():
        wire = await site.warm(route)
        LEAVE[how](wire)
        if how == "half":
            assert not await wire.rest()
    await site.is_clean()


async def test_at_any_moment(site):
    """After so many turns of the event loop, from the first to long after the answer."""
    for route in site.routes.values():
        for turns in range(40):
            wire = await site.open()
            await wire.send(site.request(route, site.text()))
            for _ in range(turns):
                await asyncio.sleep(0)
            (wire.reset if turns % 2 else wire.close)()
    await site.is_clean()


# Engines. Each of these is an answer that an engine of ours would never give.

BROKEN = {
    "nothing": b"",
    "letters": b"xyz",
    "zeros": bytes(100),
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "other version": b"HTTP/9.9 200 OK\r\ncontent-length: 0\r\n\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc",
    "length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\nabc",
    "too short": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\nabc",
    "bad chunk": STREAM_HEAD + chunk(event("one")) + b"xyz\r\n",
    "cut chunk": STREAM_HEAD + b"100\r\ndata: ",
    "no last chunk": STREAM_HEAD + chunk(event("one")),
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"x-a: 1\r\n" * 50_000,
    "no colon": b"HTTP/1.1 200 OK\r\nx-a\r\ncontent-length: 0\r\n\r\n",
    "line break in a value": b"HTTP/1.1 200 OK\r\nx-a: 1\nx-b: 2\0\r\ncontent-length: 0\r\n\r\n",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello",
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_an_engine_that_breaks_off(site, broken):
    """An error, or an answer that is visibly incomplete; never one that looks whole; then all goes on."""

    async def breaking(_seen, writer):
        writer.write(BROKEN[broken])
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    for name in ("chat", "stream", "lb"):
        site.engine.script = breaking
        wire = await site.warm(site.routes["run"])
        await wire.send(site.request(site.routes[name], site.text()))
        try:
            answer = await wire.answer()
        except (ClosedError, AssertionError, h11.RemoteProtocolError):
            assert wire.ended, (name, wire.pending)
        else:
            assert answer.status >= 500 or b'"error"' in answer.body, (name, answer)
            if not answer.closes:
                await site.serves(wire, site.routes["run"])
    site.engine.reset()
    await site.is_clean()


@pytest.mark.parametrize("name", ["chat", "stream", "lb"])
@pytest.mark.parametrize("when", ["with", "after"])
async def test_what_an_engine_says_without_being_asked_is_nobodys_answer(site, name, when):
    """A second answer on a connection that is used again would be given to somebody else: it is used no more."""
    writers = []
    stolen = whole(b'{"choices":[{"message":{"content":"stolen"}}],"body":"stolen"}')

    async def says_more(_seen, writer):
        writers.append(writer)
        answer = whole(b'{"choices":[{"message":{"content":"%b"}}],"body":"%b"}' % ((b"mine",) * 2))
        if name == "stream":
            answer = STREAM_HEAD + chunk(event("mine")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        if when == "with":
            writer.write(answer + stolen)
        else:
            writer.write(answer)
            await writer.drain()
            await asyncio.sleep(0)
            writer.write(stolen)

    site.engine.script = says_more
    route = site.routes[name]
    wires = [await site.open() for _ in range(3)]
    for wire in wires:
        await wire.send(site.request(route, site.text()))
    for wire in wires:
        answer = await wire.answer()
        assert b"mine" in answer.body
        assert b"stolen" not in answer.body
    site.engine.script = say_back
    await until(lambda: all(writer.is_closing() for writer in writers), "the gateway has hung up")
    for wire in wires:
        for _ in range(3):
            await site.serves(wire, route)
    await site.is_clean()


@pytest.mark.parametrize("name", ["chat", "stream", "lb"])
async def test_an_engine_may_say_something_in_between(site, name):
    """RFC 9110 §15.2: any number of 1xx before the answer."""

    async def hinting(seen, writer):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
        await writer.drain()
        await say_back(seen, writer)

    site.engine.script = hinting
    wire = await site.open()
    for _ in range(3):
        await site.serves(wire, site.routes[name])


CHUNKS = {
    "zeros": (b"0000", b"\r\n", True),
    "capitals": (b"", b"\r\n", True),
    "extension": (b"", b";a=b\r\n", True),
    "plus": (b"+", b"\r\n", False),
    "prefix": (b"0x", b"\r\n", False),
    "blank": (b" ", b"\r\n", False),
    "underscore": (b"0_", b"\r\n", False),
    "too many digits": (b"1" + b"0" * 16, b"\r\n", False),
}
"""Before the digits of a chunk's size, after them, and whether that is correct."""


@pytest.mark.parametrize("name", ["stream", "lb"])
@pytest.mark.parametrize("framing", CHUNKS)
async def test_chunks_of_an_engine_are_read_as_they_are(site, name, framing):
    """Also in the middle of a stream, whose chunks may be passed on unread, and however they are cut."""
    before, after, correct = CHUNKS[framing]
    events = [event(f"{'x' * 150}{number}") for number in range(6)]
    size = b"%X" % len(events[3]) if framing == "capitals" else b"%x" % len(events[3])
    odd = before + size + after + events[3] + b"\r\n"

    async def speaking(_seen, writer):
        for piece in (
            STREAM_HEAD, chunk(events[0]), chunk(events[1]), chunk(events[2]), odd[:2], odd[2:-1], odd[-1:],
            chunk(events[4])[:9], chunk(events[4])[9:] + chunk(events[5]),
            chunk(b"data: [DONE]\n\n")[:-2], b"\r\n0\r\n", b"\r\n",
        ):  # fmt: skip
            if writer.is_closing():
                return
            writer.write(piece)
            for _ in range(3):
                await asyncio.sleep(0)

    site.engine.script = speaking
    wire = await site.open()
    await wire.send(site.request(site.routes[name], site.text()))
    whole_body = b"".join(events) + b"data: [DONE]\n\n"
    if correct:
        assert (await wire.answer()).body == whole_body
    else:
        await wire.has(events[2])
        try:
            answer = await wire.answer()
        except (AssertionError, h11.RemoteProtocolError):
            assert wire.ended
        else:
            assert answer.body.startswith(b"".join(events[:3]))
            assert b'"error"' in answer.body
            assert events[4] not in answer.body
    site.engine.reset()
    await site.is_clean()


@pytest.mark.parametrize("name", ["chat", "lb"])
async def test_an_answer_without_a_body_ends_with_its_head(site, name):
    """RFC 9112 §6.3: 204 and 304, whatever they say of a length."""
    route = site.routes[name]
    wire = await site.open()
    for head in (
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n",
    ):

        async def saying(_seen, writer, *, head=head):
            writer.write(head)

        site.engine.script = saying
        await wire.send(site.request(route, site.text()))
        answer = await wire.answer()
        assert answer.status == int(head[9:12]), answer
        assert not answer.all("transfer-encoding"), answer
        assert answer.status != 204 or not answer.all("content-length"), answer
        site.engine.script = say_back
        await site.serves(wire, route)


@pytest.mark.parametrize("name", ["chat", "lb"])
async def test_answers_with_the_head_of_an_earlier_one_are_read_like_it(site, name):
    """And those that differ in a byte are not."""
    route = site.routes[name]

    async def said(head, body):
        async def saying(_seen, writer):
            writer.write(head + body)

        site.engine.script = saying
        wire = await site.open()
        await wire.send(site.request(route, site.text()))
        try:
            answer = await wire.answer()
        except (ClosedError, AssertionError, h11.RemoteProtocolError):
            assert wire.ended
            return None
        return answer.status, answer.body

    def head(length, line=b"HTTP/1.1 200 OK", more=b""):
        return line + b"\r\ncontent-type: application/json\r\n%bcontent-length: %b\r\n\r\n" % (more, length)

    body = b'{"choices":[],"n":%d}'
    for number in (1, 10, 100, 7):
        text = body % number
        assert await said(head(b"%d" % len(text)), text) == (200, text)
    text = body % 1
    assert await said(head(b"%d" % len(text), b"HTTP/1.1 201 OK"), text) == (201, text)
    assert await said(head(b"%d" % len(text), more=b"x-a: 1\r\n"), text) == (200, text)
    assert await said(head(b"%d" % (len(text) - 1)), text) in {(200, text[:-1]), None}
    for wrong in (b"+%d", b"-%d", b"0x%x", b"%d, 3", b"%d 3", b"1_%d"):
        told = await said(head(wrong % len(text)), text)
        assert told is None or told[0] >= 500, (wrong, told)
        text = body % 2
        assert await said(head(b"%d" % len(text)), text) == (200, text)
    site.engine.reset()
    await site.is_clean()


@pytest.mark.parametrize("name", ["chat", "lb"])
async def test_an_answer_may_end_with_its_connection(site, name):
    """RFC 9112 §6.3: an engine that speaks HTTP/1.0."""

    async def old(seen, writer):
        answer = b'{"choices":[{"message":{"content":"%b"}}],"body":"%b"}' % (
            (seen.body[-20:-4] and b"old",) * 2
        )
        writer.write(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + answer)
        writer.close()

    site.engine.script = old
    route = site.routes[name]
    wire = await site.open()
    for _ in range(2):
        await wire.send(site.request(route, site.text()))
        assert route.says(await wire.answer(), "old")


@pytest.mark.parametrize("name", ["chat", "stream", "lb"])
async def test_an_engine_that_closes_idle_connections_costs_nobody_a_request(site, name):
    route = site.routes[name]
    wire = await site.open()
    for _ in range(10):
        await site.serves(wire, route)
        site.engine.hang_up()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", ["chat", "stream", "lb"])
async def test_what_an_engine_says_of_its_connection_is_not_passed_on(site, name):
    """RFC 9110 §7.6.1: fields of the engine's connection stay there."""

    async def saying(_seen, writer):
        body = b"data: [DONE]\n\n" if name == "stream" else b'{"choices":[]}'
        kind = b"text/event-stream" if name == "stream" else b"application/json"
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nconnection: x-mine, keep-alive\r\nx-mine: 1\r\n"
            b"keep-alive: timeout=5\r\nproxy-connection: x\r\ncontent-length: %d\r\n\r\n%b"
            % (kind, len(body), body)
        )

    site.engine.script = saying
    wire = await site.open()
    await wire.send(site.request(site.routes[name], site.text()))
    answer = await wire.answer()
    for gone in ("x-mine", "keep-alive", "proxy-connection"):
        assert not answer.all(gone), answer
    assert len(answer.all("content-length")) + len(answer.all("transfer-encoding")) == 1, answer
