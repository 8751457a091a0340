"""The plumbing of the job road: queries, routes in tables, and whole answers on the wire."""

import asyncio
import contextlib
import socket
from urllib.parse import parse_qsl

import pytest
import uvicorn

from pilotlight.gateway.asgi import Response
from pilotlight.gateway.jobs.http import JobRoad, Operation, SegmentRoute, json_answer, parse_query
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
    async def serve(app):
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=GatewayProtocol, ws="none", lifespan="off", log_config=None)
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
    assert (await asked("/v2/e/nothing"))[0].startswith("http/1.1 404 ")
    assert (await asked("/v2/serverless/run"))[0].startswith("http/1.1 404 ")
    head, _ = await asked("/v2/e/run", "POST", "content-length: 0\r\n")
    assert head.startswith("http/1.1 405 ")
    assert "allow: get\r\n" in head
    head, body = await asked("/v2/e/defect")
    assert head.startswith("http/1.1 500 ")
    assert "KeyError" not in body
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
    """§2.13: half a body must not hold a connection for ever."""

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
