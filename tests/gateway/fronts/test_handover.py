"""Connections that change the server: what a front does not serve, between two real servers, plain and by TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import socket

import httptools
import pytest
import pytest_asyncio

from pilotlight.gateway import connection, handover
from pilotlight.gateway.asgi import Response
from pilotlight.gateway.handover import Door, Handed, Reception
from pilotlight.gateway.tunnel import TUNNEL
from pilotlight.serving import Certificate, Server, listen, server_config
from pilotlight.settings import ServerSettings, Settings

from ...certificates import Pair  # noqa: TID252

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT_S = 20


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"))


class Served:
    """A call that is answered with what was posted."""

    def __init__(self, road, call):
        self.road, self.call, self.body = road, call, b""
        call.body_s = 5
        call.proceed()

    def body_received(self, data):
        self.body += data

    def body_whole(self, body):
        self.body = body
        self.body_complete()

    def body_complete(self):
        answer = self.road.name + b":" + self.body + b"x" * self.road.padding
        self.call.answer(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(answer), answer)

    def body_late(self):
        self.call.break_off()

    client_ready = client_gone = body_late


class Site:
    """Two applications that say their name; the front serves /call by callbacks and nothing else."""

    def __init__(self, name):
        self.name = name
        self.padding = 0
        self.scopes = []
        self.left = asyncio.Event()

    def call_road(self, target, headers):
        httptools.parse_url(target)
        path, _, query = target.partition(b"?")
        return (self, path, query) if path == b"/call" else None

    def serve(self, call):
        return Served(self, call)

    def is_current(self, head):
        return True


class Owner(Site):
    """Serves the rest as an ASGI application."""

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        if scope["type"] == "websocket":
            scope["extensions"][TUNNEL].refuse(403, b"no", [])
            return
        if scope["path"] == "/never":
            await scope["extensions"]["pilotlight.gone"]()
            self.left.set()
            return
        if scope["path"] == "/refused":
            await Response(b"too large", 413)(scope, receive, send)
            return
        body = b""
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        await Response(self.name + b":" + body + b"x" * self.padding)(scope, receive, send)


class Front(Site):
    def __init__(self, name, door):
        super().__init__(name)
        self.hand_over = door.hand_over


class Rig:
    def __init__(self, port, trust):
        self.port, self.trust = port, trust
        self.writers = []

    def reset(self):
        for site in (self.owner, self.front):
            site.padding = 0
            site.scopes.clear()
            site.left.clear()

    @property
    def connections(self):
        return self.server.server_state.connections | self.owner_server.server_state.connections

    async def is_clean(self):
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()
        async with asyncio.timeout(WAIT_S):
            while self.connections:
                await asyncio.sleep(0.001)

    async def open(self):
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.trust)
        self.writers.append(writer)
        return reader, writer


@contextlib.asynccontextmanager
async def running(tmp_path, pair, *, tls):
    files = {"tls_cert": pair.certificate, "tls_key": pair.key} if tls else {}
    listening = listen(Settings(home=tmp_path, server=ServerSettings(port=0, processes=2, **files)))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made = Rig(int(listening.url.rpartition(":")[2]), pair.trust() if tls else None)
    made.owner = Owner(b"owner")
    made.owner_server = Server(server_config(made.owner))
    made.reception = Reception(ours, made.owner_server.adopt)
    made.front = Front(b"front", Door(theirs))
    # One of the sockets of the port would do, were it not for the system, which takes any.
    secured = (listening.fronts[0], Certificate(pair.certificate, pair.key)) if tls else None
    made.server = Server(server_config(made.front), secured)
    listening.fronts[1].close()
    tasks = [
        asyncio.create_task(made.owner_server.serve(sockets=[listening.plain])),
        asyncio.create_task(made.server.serve(sockets=[] if tls else [listening.fronts[0]])),
    ]
    await made.owner_server.answering.wait()
    await made.server.answering.wait()
    yield made
    made.owner_server.should_exit = made.server.should_exit = True
    await asyncio.gather(*tasks)
    made.reception.close()
    theirs.close()
    listening.close()


@pytest_asyncio.fixture(params=["plain", "tls"], scope="module", loop_scope="module")
async def shared(request, tmp_path_factory, pair):
    async with running(tmp_path_factory.mktemp("h"), pair, tls=request.param == "tls") as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def rig(shared, monkeypatch):
    """One that others have used; nothing is left of them."""
    for module in (connection, handover):
        monkeypatch.setattr(module, "LINGER_S", 0.1)
    shared.reset()
    yield shared
    await shared.is_clean()


def post(path, body, *, fields=b""):
    return b"POST %b HTTP/1.1\r\nhost: h\r\n%bcontent-length: %d\r\n\r\n%b" % (path, fields, len(body), body)


def get(path):
    return b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n" % path


async def answer(reader):
    """Status and body of the next answer."""
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        return int(head.split()[1]), await reader.readexactly(length)


async def test_a_connection_stays_until_something_else_is_asked_and_never_comes_back(rig):
    reader, writer = await rig.open()
    for path, says in (
        (b"/call", b"front"),
        (b"/call", b"front"),
        (b"/other", b"owner"),
        (b"/call", b"owner"),
    ):
        for body in (b"a", b"bc"):
            writer.write(post(path, body))
            assert await answer(reader) == (200, says + b":" + body)
    host, port = writer.get_extra_info("sockname")[:2]
    for scope in rig.owner.scopes:
        assert scope["client"] == (host, port)
        assert scope["server"] == ("127.0.0.1", rig.port)
        assert scope["scheme"] == ("http" if rig.trust is None else "https")


@pytest.mark.parametrize("size", [1, 50, 100_000])
async def test_requests_that_come_at_once_are_answered_in_order_however_they_are_cut(rig, size):
    asked = [
        (b"/call", b"1", b"front"), (b"/call", b"2", b"front"), (b"/other", b"3" * 90_000, b"owner"),
        (b"/call", b"4", b"owner"), (b"/other", b"5", b"owner"),
    ]  # fmt: skip
    data = b"".join(post(path, body if size > 1 else body[:2]) for path, body, _ in asked)
    reader, writer = await rig.open()
    for at in range(0, len(data), size):
        writer.write(data[at : at + size])
        await asyncio.sleep(0)
    for _, body, says in asked:
        assert await answer(reader) == (200, says + b":" + (body if size > 1 else body[:2]))


async def test_chunks_old_clients_and_clients_that_wait_are_the_owners(rig):
    reader, writer = await rig.open()
    writer.write(b"POST /other HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
    async with asyncio.timeout(WAIT_S):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"ab")
    assert await answer(reader) == (200, b"owner:ab")
    reader, writer = await rig.open()
    writer.write(
        b"POST /other HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
        + get(b"/x")
    )
    assert await answer(reader) == (200, b"owner:ab")
    assert await answer(reader) == (200, b"owner:")
    reader, writer = await rig.open()
    writer.write(b"GET /other HTTP/1.0\r\n\r\n")
    assert await answer(reader) == (200, b"owner:")
    async with asyncio.timeout(WAIT_S):
        assert not await reader.read()


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
async def test_an_upgrade_is_for_the_owner_to_take_or_to_leave(rig, upgrade):
    reader, writer = await rig.open()
    fields = b"connection: upgrade\r\nupgrade: %b\r\nsec-websocket-key: x\r\n" % upgrade
    writer.write(b"GET /other HTTP/1.1\r\nhost: h\r\n%b\r\n" % fields)
    if upgrade == b"h2c":
        assert await answer(reader) == (200, b"owner:")
        return
    assert await answer(reader) == (403, b"no")
    (scope,) = rig.owner.scopes
    assert scope["client"][1] == writer.get_extra_info("sockname")[1]
    assert scope["scheme"] == ("ws" if rig.trust is None else "wss")
    async with asyncio.timeout(WAIT_S):
        assert not await reader.read()


@pytest.mark.parametrize(
    "broken", [b"GET / HTTP/1.1\r\n\r\n", b"\0\r\n\r\n", b"GET / HTTP/1.1\r\nhost: h\r\nbad field: 1\r\n\r\n"]
)
async def test_what_is_no_http_is_refused_where_it_is_read(rig, broken):
    for first in (b"", post(b"/call", b"a"), post(b"/other", b"a")):
        reader, writer = await rig.open()
        writer.write(first + broken)
        if first:
            assert (await answer(reader))[0] == 200
        assert (await answer(reader))[0] == 400
        async with asyncio.timeout(WAIT_S):
            assert not await reader.read()
    assert [scope["path"] for scope in rig.owner.scopes] == ["/other"]


async def test_large_bodies_and_answers_pass_whole_through_a_reader_that_takes_its_time(rig):
    rig.owner.padding = 8 * 2**20
    body = os.urandom(3 * 2**20)
    reader, writer = await rig.open()
    writer.write(post(b"/other", body))
    async with asyncio.timeout(WAIT_S):
        await reader.readuntil(b"\r\n\r\n")
        got = bytearray()
        while len(got) < 6 + len(body) + rig.owner.padding:
            got += await reader.read(100_000)
            await asyncio.sleep(0)
    assert got == b"owner:" + body + b"x" * rig.owner.padding


@pytest.mark.parametrize("how", ["close", "abort", "half"])
async def test_the_owner_learns_that_a_client_has_left(rig, how):
    reader, writer = await rig.open()
    writer.write(get(b"/never"))
    async with asyncio.timeout(WAIT_S):
        while not rig.owner.scopes:
            await asyncio.sleep(0.001)
    if how == "abort":
        writer.transport.abort()
    elif how == "half" and rig.trust is None:
        writer.write_eof()
    else:
        writer.close()
    async with asyncio.timeout(WAIT_S):
        await rig.owner.left.wait()
        if how == "half":
            assert not await reader.read()
        while rig.connections:
            await asyncio.sleep(0.001)


async def test_a_client_that_goes_on_sending_can_read_why_it_is_refused(rig):
    reader, writer = await rig.open()
    writer.write(post(b"/refused", b"x" * 1000).replace(b"length: 1000", b"length: 50000000"))

    async def pour():
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"x" * 100_000)
                await writer.drain()

    pouring = asyncio.create_task(pour())
    assert await answer(reader) == (413, b"too large")
    async with asyncio.timeout(WAIT_S):
        assert not await reader.read()
        pouring.cancel()
        while rig.connections:
            await asyncio.sleep(0.001)


async def test_an_answer_that_is_still_to_be_read_comes_before_what_another_process_answers(rig):
    """Such a connection cannot change hands; both go on with it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", rig.port))
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=rig.trust, server_hostname=None if rig.trust is None else "127.0.0.1", limit=1024
        )
        served = rig.server.server_state
        writer.write(post(b"/call", b"a"))
        assert await answer(reader) == (200, b"front:a")
        (connection,) = served.connections
        transport = connection.transport
        # Until some is kept by the server, and less than what pauses it.
        rig.front.padding = 1000
        asked = 0
        while not transport.get_write_buffer_size() and asked < 100_000:
            writer.write(post(b"/call", b"b") * 10)
            asked += 10
            await asyncio.sleep(0)
        writer.write(post(b"/other", b"c"))
        while transport.get_protocol() is connection:
            await asyncio.sleep(0)
        assert transport.get_write_buffer_size()
        for _ in range(asked):
            assert await answer(reader) == (200, b"front:b" + b"x" * 1000)
        assert await answer(reader) == (200, b"owner:c")


async def test_a_client_that_only_asks_is_not_read_from(rig):
    """From the first moment on: what was handed over may be enough already."""
    rig.owner.padding = 100_000
    _, writer = await rig.open()
    writer.transport.pause_reading()
    piece, sent = get(b"/other") * 2000, 0
    with contextlib.suppress(TimeoutError):
        while sent < 64 * 2**20:
            writer.write(piece)
            async with asyncio.timeout(0.3):
                await writer.drain()
            sent += len(piece)
    assert sent < 16 * 2**20
    assert all(len(getattr(each, "_later", b"")) < 2**20 for each in rig.connections)


async def test_many_connections_at_once_through_one_door(rig):
    async def ask(number):
        reader, writer = await rig.open()
        body = b"%d" % number * 20_000
        writer.write(post(b"/other", body))
        assert await answer(reader) == (200, b"owner:" + body)

    await asyncio.gather(*map(ask, range(40)))


@pytest.mark.parametrize("tls", [False, True])
async def test_connections_end_when_the_owner_stops_and_when_it_is_gone(tmp_path, pair, tls):
    async with running(tmp_path, pair, tls=tls) as rig:
        reader, writer = await rig.open()
        writer.write(get(b"/other"))
        assert (await answer(reader))[0] == 200
        late, later = await rig.open()
        rig.owner_server.should_exit = True
        async with asyncio.timeout(WAIT_S):
            assert not await reader.read()
            later.write(get(b"/other"))
            with contextlib.suppress(ConnectionError):
                assert not await late.read()
            rig.reception.close()
            gone, writer = await rig.open()
            writer.write(get(b"/other"))
            with contextlib.suppress(ConnectionError):
                assert not await gone.read()
        await rig.is_clean()


async def test_a_message_that_brings_no_descriptor_costs_that_connection_alone():
    """As the system does it where the receiver has too many files open."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    adopted = asyncio.Queue()
    reception = Reception(ours, lambda sock, handed: adopted.put_nowait((sock, handed)))
    door = Door(theirs)
    ends = socket.socketpair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client, kept = socket.socketpair()
    door._post(Handed(b"lost" * 20_000), client.detach())
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    kept.setblocking(False)
    try:
        async with asyncio.timeout(WAIT_S):
            assert await asyncio.get_running_loop().sock_recv(kept, 1) == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    door._post(Handed(b"taken"), ends[0].detach())
    async with asyncio.timeout(WAIT_S):
        sock, handed = await adopted.get()
    assert handed == Handed(b"taken")
    ends[1].send(b"x")
    assert sock.recv(1) == b"x"
    for each in (sock, ends[1], kept, theirs):
        each.close()
    reception.close()
