"""Events on their shortest way, on real sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pilotlight.gateway.body import BodyPlan
from pilotlight.gateway.cycle import Flow
from pilotlight.gateway.data_path.streams import EventPass
from pilotlight.gateway.events import TokenCount
from pilotlight.gateway.passage import Passage
from pilotlight.system import SystemClock

CHUNK = b'10\r\ndata: {"id":1}\n\n\r\n'


class Client(asyncio.Protocol):
    """Our end of a connection whose other end is `theirs`."""

    async def connect(self):
        ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        self.flow = Flow(self.transport)
        return self

    def passage(self, *, plain=True):
        descriptor = self.transport.get_extra_info("socket").fileno() if plain else None
        return Passage(self.transport, descriptor, self.flow)

    def pause_writing(self):
        self.flow.pause_writing()

    def resume_writing(self):
        self.flow.resume_writing()

    async def read(self, size):
        """So much of what has come."""
        got = b""
        async with asyncio.timeout(20):
            while len(got) < size:
                got += await asyncio.get_running_loop().sock_recv(self.theirs, size - len(got))
        return got


@pytest.fixture
async def client():
    client = await Client().connect()
    yield client
    client.transport.abort()
    client.theirs.close()


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "tls"])
async def test_a_plain_event_is_passed_on_as_it_came_and_counted(client, plain):
    passage = client.passage(plain=plain)
    assert passage.pass_on(CHUNK) is True
    assert passage.pass_on(CHUNK) is True
    assert await client.read(2 * len(CHUNK)) == CHUNK * 2
    assert passage.events == 2


async def test_what_is_no_plain_event_is_left_alone(client):
    passage = client.passage()
    assert passage.pass_on(b"e\r\ndata: [DONE]\n\n\r\n") is None
    assert passage.events == 0
    with pytest.raises(BlockingIOError):
        client.theirs.recv(1)


async def test_a_client_that_reads_slowly_gets_all_in_order_and_is_waited_for(client):
    passage, sent = client.passage(), 0
    text = b'data: {"id":' + b"x" * 4000 + b"}\n\n"
    chunk = b"%x\r\n%b\r\n" % (len(text), text)
    while passage.pass_on(chunk):
        sent += 1
    assert client.flow.write_paused
    assert await client.read((sent + 1) * len(chunk)) == chunk * (sent + 1)
    async with asyncio.timeout(20):
        while client.flow.write_paused:
            await asyncio.sleep(0)
    assert passage.pass_on(chunk) is True


async def test_nothing_is_written_to_a_connection_that_is_being_closed(client, monkeypatch):
    """Its descriptor may be somebody else's by then."""
    written = []
    monkeypatch.setattr("pilotlight.gateway.writing.write_now", lambda *call: written.append(call))
    passage = client.passage()
    client.transport.abort()
    assert passage.pass_on(CHUNK) is True
    assert written == []


async def test_a_stream_has_a_passage_between_its_events_and_counts_both_ways_together(client):
    class Call:
        write = staticmethod(lambda _data: True)
        passage = client.passage

    stream = EventPass(Call(), BodyPlan(b"", stream=True), TokenCount(), kept_bytes=0, clock=SystemClock())
    assert stream.passage() is None
    assert stream.feed(b'data: {"id":0}\n\ndata: {"id"')
    assert stream.passage() is None
    assert stream.feed(b":1}\n\n")
    passage = stream.passage()
    assert passage.pass_on(CHUNK)
    assert stream.passage() is passage
    assert stream.count == 3
