"""Upstream connections against a real server on a Unix socket that misbehaves on request."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.domain.worker import Address
from pilotlight.gateway.upstream import UpstreamError, UpstreamPool, request_bytes


class Server:
    """Answers each request with the next script: bytes to write, "close", or a future to wait for."""

    def __init__(self) -> None:
        self.scripts = []
        self.requests = []
        self.connections = 0
        self.closed = asyncio.Event()
        self.serving = {}

    async def serve(self, reader, writer):
        self.connections += 1
        self.serving[asyncio.current_task()] = writer
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length")
                    ),
                    0,
                )
                self.requests.append(head + await reader.readexactly(length))
                for step in self.scripts.pop(0):
                    if step == "close":
                        return
                    if isinstance(step, bytes):
                        writer.write(step)
                        await writer.drain()
                    else:
                        await step
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            writer.close()


@pytest.fixture
async def server(tmp_path):
    made = Server()
    listener = await asyncio.start_unix_server(made.serve, tmp_path / "s")
    made.address = Address(url=f"unix:{tmp_path / 's'}", key="secret")
    yield made
    listener.close()
    for task, writer in made.serving.items():
        writer.transport.abort()
        task.cancel()
    await asyncio.gather(*made.serving, return_exceptions=True)


@pytest.fixture
def pool():
    made = UpstreamPool(idle_s=60)
    yield made
    made.close()


def ok(body=b"hello", more=b""):
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
        + more
        + b"content-length: %d\r\n\r\n" % len(body)
        + body
    )


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


async def ask(pool, server, *, timeout_s=10):
    return await pool.request(server.address, "POST", "/x?y=1", [(b"a", b"b")], b"body", timeout_s=timeout_s)


async def whole(response):
    data = b""
    while (piece := await response.read(10)) is not None:
        data += piece
    response.release()
    return data


async def test_a_request_carries_key_length_and_headers_and_the_connection_is_used_again(server, pool):
    server.scripts = [[ok()], [ok(b"again")]]
    first = await ask(pool, server)
    assert (first.status, dict(first.headers)[b"content-type"]) == (200, b"text/plain")
    assert await whole(first) == b"hello"
    assert await whole(await ask(pool, server)) == b"again"
    assert server.connections == 1
    assert server.requests[0] == (
        b"POST /x?y=1 HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer secret\r\na: b\r\ncontent-length: 4\r\n\r\nbody"
    )


async def test_a_reused_connection_found_dead_is_replaced_once(server, pool):
    server.scripts = [[ok()], ["close"], [ok(b"new")]]
    await whole(await ask(pool, server))
    assert await whole(await ask(pool, server)) == b"new"
    assert (server.connections, len(server.requests)) == (2, 3)


async def test_a_request_is_sent_twice_at_most_however_many_idle_connections_there_are(server, pool):
    first, second = asyncio.Event(), asyncio.Event()
    server.scripts = [[first.wait(), ok()], [second.wait(), ok()], ["close"], ["close"], ["close"]]
    asking = [asyncio.create_task(ask(pool, server)) for _ in range(2)]
    async with asyncio.timeout(20):
        while len(server.requests) < 2:
            await asyncio.sleep(0.001)
    first.set()
    second.set()
    for response in await asyncio.gather(*asking):
        await whole(response)
    with pytest.raises(UpstreamError):
        await ask(pool, server)
    assert len(server.requests) == 2 + 2


@pytest.mark.parametrize(
    "begin", [b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: "]
)
async def test_a_head_or_trailer_without_end_is_an_error(server, pool, begin):
    """The parser would keep all of it, and copy it with every piece."""
    server.scripts = [[begin, *[b"x" * 10_000] * 40]]
    with pytest.raises(UpstreamError, match="too large"):
        await whole(await ask(pool, server))
    async with asyncio.timeout(20):
        await server.closed.wait()
    pool.close()


async def test_a_new_connection_that_breaks_is_an_error(server, pool):
    server.scripts = [["close"]]
    with pytest.raises(UpstreamError) as error:
        await ask(pool, server)
    assert not error.value.answered


async def test_an_answer_that_breaks_off_is_an_error_and_not_a_short_answer(server, pool):
    server.scripts = [[b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "close"]]
    response = await ask(pool, server)
    assert await response.read(10) == b"abc"
    with pytest.raises(UpstreamError) as error:
        await response.read(10)
    assert error.value.answered
    response.release()


async def test_releasing_an_unread_answer_closes_the_connection(server, pool):
    gate = asyncio.get_running_loop().create_future()
    server.scripts = [
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", gate, b"3\r\nabc\r\n" * 9999]
    ]
    response = await ask(pool, server)
    response.release()
    gate.set_result(None)
    async with asyncio.timeout(10):
        await server.closed.wait()


async def test_silence_ends_in_an_error(server, pool):
    server.scripts = [[asyncio.get_running_loop().create_future()]]
    with pytest.raises(UpstreamError, match="sent nothing in time"):
        await ask(pool, server, timeout_s=0.05)


@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000 + b"\r\n\r\n"]
)
async def test_what_is_not_http_is_an_error(server, pool, garbage):
    server.scripts = [[garbage]]
    with pytest.raises(UpstreamError):
        await ask(pool, server)


async def test_a_slow_reader_pauses_the_engine(server, pool):
    done = asyncio.get_running_loop().create_future()
    size = 16 * 1024 * 1024

    async def note():
        done.set_result(None)

    server.scripts = [[b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size, b"x" * size, note()]]
    response = await ask(pool, server)
    while not response._paused:
        await asyncio.sleep(0)
    assert response._buffered < 2 * 1024 * 1024
    assert not done.done()
    total = 0
    while (piece := await response.read(10)) is not None:
        total += len(piece)
    assert total == size
    response.release()


async def begun(pool, server, arrived, *, silence_s=10):
    """A connection on which a request was written whose answer is told by callback."""
    connection = await pool.connect(server.address)
    data = request_bytes(server.address, "POST", "/x", [], b"body")
    connection.begin(data, lambda: arrived(connection), silence_s=silence_s)
    return connection


async def test_callbacks_get_all_of_it_once_and_may_ask_for_pauses(server, pool):
    size = 8 * 1024 * 1024
    server.scripts = [[b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size, b"x" * size], [ok(b"next")]]
    got, done, paused = [], asyncio.Event(), asyncio.Event()

    def arrived(connection):
        got.append(len(connection.take()))
        if connection.complete:
            done.set()
        elif len(got) % 3 == 0:
            connection.pause()
            paused.set()

    connection = await begun(pool, server, arrived)
    pauses = 0
    async with asyncio.timeout(20):
        while not done.is_set():
            waits = [asyncio.ensure_future(event.wait()) for event in (done, paused)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if paused.is_set():
                paused.clear()
                pauses += 1
                before = len(got)
                await asyncio.sleep(0)
                assert len(got) == before
                connection.resume()
    assert (sum(got), connection.error) == (size, None)
    assert pauses == len([number for number in range(1, len(got)) if number % 3 == 0])
    connection.release()
    assert await whole(await ask(pool, server)) == b"next"
    assert server.connections == 1


@pytest.mark.parametrize("cut", range(1, 40))
async def test_chunks_that_are_taken_as_they_came_are_not_parsed_again(server, pool, cut):
    """However the bytes are cut, the same data arrives, and what is offered begins where a chunk does."""
    body = b"3\r\nabc\r\n" + b"11\r\n" + b"d" * 17 + b"\r\n" + b"a;x=y\r\n0123456789\r\n"
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    first = b"2\r\n__\r\n"
    server.scripts = [[head + first, body[:cut], body[cut:], b"4\r\nlast\r\n", b"0\r\n\r\n"]]
    got, done = [], asyncio.Event()

    class Passage:
        def pass_on(self, piece):
            length, _, data = piece.partition(b"\r\n")
            assert length in (b"3"[: len(length)], b"11"[: len(length)], b"4", b"0", b"a;x=y"[: len(length)])
            if not length.isdigit() or len(data) != int(length, 16) + 2 or length == b"0":
                return None
            got.append(data[:-2])
            return True

    def arrived(connection):
        connection.pass_chunks(Passage())
        got.append(connection.take())
        if connection.complete or connection.error:
            done.set()

    connection = await begun(pool, server, arrived)
    async with asyncio.timeout(20):
        await done.wait()
    assert connection.error is None
    assert b"".join(got) == b"__abc" + b"d" * 17 + b"0123456789last"
    connection.release()


async def test_silence_is_told_and_counted_from_the_last_piece(server, pool):
    never = asyncio.get_running_loop().create_future()
    server.scripts = [[b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", never]]
    got, failed = [], asyncio.Event()

    def arrived(connection):
        got.append(connection.take())
        if connection.error is not None:
            failed.set()

    connection = await begun(pool, server, arrived, silence_s=0.05)
    async with asyncio.timeout(20):
        await failed.wait()
    assert "in time" in str(connection.error)
    assert b"".join(got) == b"abc"
    connection.release()


async def test_silence_on_a_reused_connection_is_not_asked_again(server, pool):
    server.scripts = [[ok()], [asyncio.get_running_loop().create_future()]]
    await whole(await ask(pool, server))
    with pytest.raises(UpstreamError, match="sent nothing in time"):
        await ask(pool, server, timeout_s=0.05)
    assert len(server.requests) == 2


async def test_an_answer_that_ends_with_its_connection_is_whole(server, pool):
    server.scripts = [[b"HTTP/1.1 200 OK\r\n\r\nall of it", "close"]]
    assert await whole(await ask(pool, server)) == b"all of it"


async def test_bytes_nobody_asked_for_close_an_idle_connection(server, pool):
    server.scripts = [[ok(), b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"], [ok(b"good")]]
    await whole(await ask(pool, server))
    await asyncio.sleep(0.05)
    assert await whole(await ask(pool, server)) == b"good"


async def test_nothing_is_kept_of_a_server_that_closes_its_idle_connections(server, pool):
    server.scripts = [[ok(), "close"]]
    await whole(await ask(pool, server))
    while pool._idle:
        await asyncio.sleep(0)


async def test_nothing_is_kept_of_an_address_that_nobody_asks_any_more(server, tmp_path):
    """Its connections are closed, too: a worker that is gone is not asked again, and its server may not close them."""
    pool = UpstreamPool(idle_s=0)
    other = tmp_path / "other"
    other.symlink_to(tmp_path / "s")
    server.scripts = [[ok()], [ok()]]
    await whole(await ask(pool, server))
    assert server.address.url in pool._idle
    address = Address(url=f"unix:{other}")
    await whole(await pool.request(address, "GET", "/", [], b"", timeout_s=10))
    assert [*pool._idle] == [address.url]
    await server.closed.wait()
    pool.close()


@pytest.mark.parametrize("answer", [ok(), CHUNKED], ids=["length", "chunks"])
@pytest.mark.parametrize("more", [ok(b"stolen", b"x-stolen: 1\r\n"), b"xyz"], ids=["answer", "letters"])
async def test_bytes_behind_an_answer_are_not_part_of_it_and_end_the_connection(server, pool, answer, more):
    server.scripts = [[answer + more], [ok(b"mine")]]
    first = await ask(pool, server)
    assert (await whole(first), dict(first.headers).get(b"x-stolen")) == (b"hello", None)
    assert await whole(await ask(pool, server)) == b"mine"
    assert server.connections == 2


async def test_another_protocol_is_an_error(server, pool):
    """101 to a request that asked for no other (RFC 9110 §15.2.2)."""
    server.scripts = [[b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello"]]
    with pytest.raises(UpstreamError, match="another protocol"):
        await ask(pool, server)


async def test_no_server_is_an_error(tmp_path, pool):
    with pytest.raises(UpstreamError, match="cannot be reached"):
        await pool.request(Address(url=f"unix:{tmp_path}/none"), "GET", "/", [], b"", timeout_s=1)
