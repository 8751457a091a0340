"""The plumbing of the job road: queries, routes in tables, and whole answers on the wire."""

import asyncio
import contextlib
import socket
from urllib.parse import parse_qsl

import msgspec
import pytest
import uvicorn

from pilotlight.gateway import protocol
from pilotlight.gateway.asgi import Response
from pilotlight.gateway.jobs.http import (
    JobRoad,
    Operation,
    SegmentRoute,
    WholeCall,
    json_answer,
    parse_query,
)
from pilotlight.gateway.jobs.waiting import watched
from pilotlight.gateway.protocol import GatewayProtocol


@pytest.mark.parametrize(
    "text", ["a=1", "a=1&b=&c", "a=1&a=2", "&&a=1&", "a=b=c", "a=%2F+x", "=1", "job_id=x-u1,y-u1&gpu=cpu"]
)
def test_queries_are_read_as_the_standard_library_reads_them(text):
    assert parse_query(text) == dict(parse_qsl(text, keep_blank_values=True))


async def _first(_):
    return json_answer(b'"first"')


async def _second(_):
    return json_answer(b'"second"')


async def _ids(call):
    return json_answer(repr((call.endpoint_id, call.ids, call.method, dict(call.query))).encode())


async def _defect(_):
    raise KeyError("x")


async def _empty(_):
    return Response(status_code=204)


async def _paused(_):
    return json_answer(b"{}", {"X-Endpoint-Paused": "1"})


def road(**handlers):
    operations = {(verb, 0): Operation(frozenset({"GET"}), handler) for verb, handler in handlers.items()}
    return SegmentRoute(operations)


@pytest.fixture
async def asked(serve_app):
    """Asks one connection for several answers; returns what came over the wire, answer by answer."""
    again = SegmentRoute({("run", 0): Operation(frozenset({"GET"}), _second)})
    with_ids = SegmentRoute({("status", 2): Operation(frozenset({"GET"}), _ids)})
    below = SegmentRoute({("", 1): Operation(frozenset({"GET"}), _ids)}, ("p", "v1"), verbless=True)
    app = JobRoad([road(run=_first, defect=_defect, empty=_empty, paused=_paused), again, with_ids, below])
    async with serve_app(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def ask(path, method="GET", headers=""):
            writer.write(f"{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(
                (int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length")),
                0,
            )
            body = await reader.readexactly(0 if method == "HEAD" else length)
            return head, body.decode()

        yield ask
        writer.close()


@pytest.fixture
def serve_app():
    @contextlib.asynccontextmanager
    async def serve(app, **settings):
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=GatewayProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            **settings,
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task
            listener.close()

    return serve


async def test_answers_on_one_connection_one_after_the_other(asked):
    head, body = await asked("/v2/e/run")
    assert head.startswith("http/1.1 200 ok\r\n")
    assert "content-type: application/json\r\n" in head
    assert "date: " in head
    assert body == '"first"'
    head, body = await asked("//v2/e//status/a/b/?x=1")
    assert body == repr(("e", ("a", "b"), "GET", {"x": "1"}))
    assert (await asked("/p/v1/e/w"))[1] == repr(("e", ("w",), "GET", {}))


async def test_refusals_defects_and_empty_answers(asked):
    """serverless-api.md §2.14: of a fault of ours nothing is told but that it was one."""
    assert (await asked("/v2/e/nothing"))[0].startswith("http/1.1 404 ")
    assert (await asked("/v2/serverless/run"))[0].startswith("http/1.1 404 ")
    head, _ = await asked("/v2/e/run", "POST", "content-length: 0\r\n")
    assert head.startswith("http/1.1 405 ")
    assert "allow: get\r\n" in head
    head, body = await asked("/v2/e/defect")
    assert head.startswith("http/1.1 500 ")
    assert msgspec.json.decode(body) == {"error": "internal server error", "detail": "internal server error"}
    head, body = await asked("/v2/e/empty")
    assert head.startswith("http/1.1 204 ")
    assert "content-length" not in head
    assert "x-endpoint-paused: 1\r\n" in (await asked("/v2/e/paused"))[0]


async def test_a_head_request_gets_no_body(asked):
    head, body = await asked("/v2/e/run", "HEAD")
    assert (head[:13], body) == ("http/1.1 405 ", "")
    assert (await asked("/v2/e/run"))[1] == '"first"'


async def test_a_client_that_wants_no_further_answer_is_closed(serve_app):
    async with serve_app(JobRoad([road(run=_first)])) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v2/e/run HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = (await reader.read()).decode().lower()
        assert "connection: close\r\n" in answer
        assert answer.endswith('"first"')
        writer.close()


def test_a_line_break_cannot_be_put_into_a_header():
    scope = {"type": "http", "extensions": {"pilotlight.answer": lambda *_: True}}
    response = Response(b"", headers={"X-A": "1\r\nX-B: 2"})
    with pytest.raises(ValueError, match="line break"):
        asyncio.run(response(scope, None, None))


async def test_a_body_that_does_not_come_ends(serve_app):
    """serverless-api.md §2.13: half a body must not hold a connection for ever."""

    async def read(call):
        await call.body(limit=100)
        raise AssertionError("the body never ended")

    async with serve_app(JobRoad([road(run=read)], body_s=0.05)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v2/e/run HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf")
        async with asyncio.timeout(30):
            assert b" 408 " in await reader.readline()
        writer.close()


@pytest.mark.parametrize("direct", [True, False])
async def test_a_client_that_goes_is_noticed_with_the_help_of_the_server_and_without(serve_app, direct):
    entered, noticed = asyncio.Event(), asyncio.Event()

    async def wait(call):
        scope = call.scope if direct else {}
        async with watched(scope, call.receive) as gone:
            entered.set()
            await asyncio.wait({gone})
            noticed.set()
        return json_answer(b"{}")

    async with serve_app(JobRoad([road(run=wait)])) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v2/e/run HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(30):
            await entered.wait()
            writer.close()
            await noticed.wait()


# How long connections last on which no request comes: `gateway.protocol`.

REQUEST = b"GET /v2/e/run HTTP/1.1\r\nhost: x\r\n\r\n"
ANSWER = b'"first"'


async def test_a_connection_that_was_opened_long_before_its_first_byte_is_served(serve_app, monkeypatch):
    """worker-protocol.md §10.5: a worker connects, runs blocking handlers for a minute, and then posts.

    The wait for a head was counted from the accept, so the connection was closed after 30 s, and the result
    was lost for good.
    """
    monkeypatch.setattr(protocol, "HEAD_S", 0.05)
    async with serve_app(JobRoad([road(run=_first)])) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.5)
        monkeypatch.setattr(protocol, "HEAD_S", 30)
        writer.write(REQUEST)
        async with asyncio.timeout(30):
            assert (await reader.readuntil(ANSWER)).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_connection_on_which_no_byte_comes_ends_some_time(serve_app, monkeypatch):
    """worker-protocol.md §3.4: not before the library gives up, which it does after 600 s."""
    assert protocol.FIRST_BYTE_S > 600
    monkeypatch.setattr(protocol, "FIRST_BYTE_S", 0.05)
    async with serve_app(JobRoad([road(run=_first)])) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("before", [b"", REQUEST, REQUEST * 2], ids=["first", "second", "third"])
@pytest.mark.parametrize("begun", [b"G", REQUEST[:30], b"\r\n"], ids=["a byte", "half", "empty line"])
async def test_a_head_that_was_begun_and_does_not_end_ends_the_connection(
    serve_app, monkeypatch, before, begun
):
    """Whatever came before it, and however slowly its bytes drip in.

    An empty line after an answer used to end the wait for the next request, and began none: such a connection
    stood for ever.
    """
    monkeypatch.setattr(protocol, "HEAD_S", 0.1)
    async with serve_app(JobRoad([road(run=_first)]), timeout_keep_alive=60) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(30):
            for _ in range(before.count(b"GET")):
                writer.write(REQUEST)
                await reader.readuntil(ANSWER)
            writer.write(begun)
            while not reader.at_eof():
                # Bytes that only prolong it: of the head, or one empty line more.
                with contextlib.suppress(ConnectionError):
                    writer.write(b"\n" if begun == b"\r\n" else b"x")
                with contextlib.suppress(TimeoutError, ConnectionError):
                    await asyncio.wait_for(reader.read(), 0.02)
        writer.close()


@pytest.mark.parametrize("between", [b"", b"\r\n"], ids=["nothing", "empty line"])
async def test_the_wait_for_a_head_is_over_when_the_head_is_there(serve_app, monkeypatch, between):
    """An answer that takes longer than a head may is given, to a first request and to a repeated one."""

    async def slow(_):
        await asyncio.sleep(0.3)
        return json_answer(ANSWER)

    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    async with serve_app(JobRoad([road(run=slow)])) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(30):
            for _ in range(3):
                writer.write(between)
                await writer.drain()
                # In a piece of its own, as only a whole request is read without the parser.
                await asyncio.sleep(0.01)
                writer.write(REQUEST)
                await reader.readuntil(ANSWER)
        writer.close()


# Requests that repeat the fields of an earlier one on their connection: `gateway.repeated`.

POST = frozenset({"POST"})


async def _echo(call):
    body = await call.whole_body(limit=100)
    whole = isinstance(call, WholeCall)
    return json_answer(
        msgspec.json.encode([whole, call.method, list(call.ids), dict(call.query), body.decode()])
    )


def post(path, body=b"body"):
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (path, len(body), body)


@contextlib.asynccontextmanager
async def connected(port):
    """(`send`, `receive`, `writer`) of one connection; `receive` gives the decoded body of the next answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def receive():
        async with asyncio.timeout(30):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            return msgspec.json.decode(await reader.readexactly(length))

    try:
        yield writer.write, receive, writer
    finally:
        writer.close()


@pytest.fixture
async def echo(serve_app):
    async with serve_app(JobRoad([SegmentRoute({("echo", 1): Operation(POST, _echo)})])) as port:
        yield port


async def test_the_second_request_with_the_same_fields_needs_no_parser(echo):
    async with connected(echo) as (send, receive, _):
        send(post(b"/v2/e/echo/1"))
        assert await receive() == [False, "POST", ["1"], {}, "body"]
        send(post(b"/v2/e//echo/2/?a=b%20c", b"next"))
        assert await receive() == [True, "POST", ["2"], {"a": "b c"}, "next"]
        send(post(b"/v2/e/echo/3", b"longer"))
        assert await receive() == [False, "POST", ["3"], {}, "longer"]
        send(post(b"/v2/e/echo/%34"))
        assert await receive() == [False, "POST", ["4"], {}, "body"]
        send(post(b"/v2/e/nothing"))
        assert await receive() == {"error": "not found", "detail": "not found"}
        send(post(b"/v2/e/echo/5"))
        assert (await receive())[0] is True


async def test_what_can_be_answered_at_once_is(serve_app):
    def at_once(call):
        if call.ids[0] == "wait":
            return None
        if call.ids[0] == "wrong":
            raise KeyError
        return json_answer(b'"at once"')

    async with (
        serve_app(JobRoad([SegmentRoute({("echo", 1): Operation(POST, _echo, at_once)})])) as port,
        connected(port) as (send, receive, _),
    ):
        send(post(b"/v2/e/echo/0"))
        assert (await receive())[0] is False
        for job_id in (b"a", b"b"):
            send(post(b"/v2/e/echo/" + job_id))
            assert await receive() == "at once"
        for job_id in (b"wait", b"wrong"):
            send(post(b"/v2/e/echo/" + job_id))
            assert (await receive())[0] is True
        get = b"GET /v2/e/echo/a HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
        for _ in range(2):
            send(get)
            assert (await receive())["error"] == "method not allowed"


async def test_a_client_that_asks_and_does_not_read_is_not_answered_without_end(serve_app):
    answered = 0

    def at_once(_):
        nonlocal answered
        answered += 1
        return json_answer(b'"%b"' % (b"x" * 100_000))

    async with (
        serve_app(JobRoad([SegmentRoute({("echo", 1): Operation(POST, _echo, at_once)})])) as port,
        connected(port) as (send, receive, writer),
    ):
        send(post(b"/v2/e/echo/0"))
        await receive()
        for _ in range(1000):
            send(post(b"/v2/e/echo/1"))
            # One by one, or they would arrive as one piece and be parsed.
            await asyncio.sleep(0.0005)
        assert answered < 200
        writer.transport.abort()


async def test_an_answer_that_the_connection_does_not_take_at_once_arrives_whole(serve_app):
    """Far more than the buffers of a socket hold."""
    large = b'"%b"' % (bytes(range(97, 123)) * 200_000)
    table = {("echo", 1): Operation(POST, _echo, lambda _: json_answer(large))}
    async with serve_app(JobRoad([SegmentRoute(table)])) as port, connected(port) as (send, receive, _):
        send(post(b"/v2/e/echo/0"))
        await receive()
        for _ in range(2):
            send(post(b"/v2/e/echo/1"))
            assert await receive() == large[1:-1].decode()


async def test_requests_that_come_in_pieces_or_all_at_once_are_answered_in_order(echo):
    async with connected(echo) as (send, receive, writer):
        send(post(b"/v2/e/echo/0"))
        await receive()
        for number in range(1, 40):
            send(post(b"/v2/e/echo/%d" % number))
        assert [(await receive())[2] for _ in range(1, 40)] == [[str(number)] for number in range(1, 40)]
        data = post(b"/v2/e/echo/halves")
        for cut in (3, 30, len(data) - 2):
            send(data[:cut])
            await writer.drain()
            await asyncio.sleep(0.01)
            send(data[cut:])
            assert (await receive())[2:] == [["halves"], {}, "body"]


async def test_what_comes_while_a_request_is_answered_waits_for_its_turn(serve_app):
    may_end, asked = asyncio.Event(), []

    async def slow(call):
        asked.append((call.ids[0], isinstance(call, WholeCall)))
        if call.ids[0] == "slow":
            await may_end.wait()
        return await _echo(call)

    async with (
        serve_app(JobRoad([SegmentRoute({("echo", 1): Operation(POST, slow)})])) as port,
        connected(port) as (send, receive, _),
    ):
        send(post(b"/v2/e/echo/0"))
        await receive()
        send(post(b"/v2/e/echo/slow"))
        async with asyncio.timeout(30):
            while len(asked) < 2:
                await asyncio.sleep(0.001)
        send(post(b"/v2/e/echo/a") + post(b"/v2/e/echo/b") + post(b"/v2/e/echo/c")[:10])
        await asyncio.sleep(0.05)
        assert asked == [("0", False), ("slow", True)]
        may_end.set()
        assert [(await receive())[2] for _ in range(3)] == [["slow"], ["a"], ["b"]]
        send(post(b"/v2/e/echo/c")[10:])
        assert (await receive())[2] == ["c"]


async def test_a_client_that_goes_is_noticed_while_its_repeated_request_waits(serve_app):
    entered, noticed = asyncio.Event(), asyncio.Event()

    async def wait(call):
        if call.ids[0] == "0":
            return json_answer(b"{}")
        async with call.client_gone() as gone:
            entered.set()
            await asyncio.wait({gone})
            noticed.set()
        return json_answer(b"{}")

    async with (
        serve_app(JobRoad([SegmentRoute({("echo", 1): Operation(POST, wait)})])) as port,
        connected(port) as (send, receive, writer),
    ):
        send(post(b"/v2/e/echo/0"))
        await receive()
        send(post(b"/v2/e/echo/1"))
        async with asyncio.timeout(30):
            await entered.wait()
            writer.close()
            await noticed.wait()


async def test_a_server_that_stops_answers_a_repeated_request_and_closes(serve_app):
    entered = asyncio.Event()

    async def slow(call):
        if call.ids[0] != "0":
            entered.set()
            await asyncio.sleep(0.1)
        return json_answer(b"[1]")

    async with contextlib.AsyncExitStack() as stack:
        server = contextlib.AsyncExitStack()
        port = await server.enter_async_context(
            serve_app(JobRoad([SegmentRoute({("echo", 1): Operation(POST, slow)})]))
        )
        send, receive, _ = await stack.enter_async_context(connected(port))
        send(post(b"/v2/e/echo/0"))
        await receive()
        send(post(b"/v2/e/echo/1"))
        async with asyncio.timeout(30):
            await entered.wait()
            stopping = asyncio.create_task(server.aclose())
            assert await receive() == [1]
            with pytest.raises(asyncio.IncompleteReadError):
                await receive()
            await stopping


async def test_idle_connections_are_closed_and_used_ones_are_not(serve_app):
    """The timer of an answer that came before must not close a connection in use."""
    may_end = asyncio.Event()

    async def slow(call):
        if call.ids[0] == "slow":
            await may_end.wait()
        return json_answer(b"[1]")

    road = JobRoad([SegmentRoute({("echo", 1): Operation(POST, slow)})])
    async with serve_app(road, timeout_keep_alive=0.2) as port, connected(port) as (send, receive, _):
        send(post(b"/v2/e/echo/0"))
        await receive()
        send(post(b"/v2/e/echo/slow"))
        await asyncio.sleep(0.5)
        may_end.set()
        assert await receive() == [1]
        with pytest.raises(asyncio.IncompleteReadError):
            await receive()
