"""The WebSocket of the OpenAI routes: OpenAI's own client in front, a WebSocket server as the engine behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from openai import AsyncOpenAI

from pilotlight.domain.endpoint import Endpoint, EndpointKind, Revision
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.data_path import StartFailedError
from pilotlight.gateway.realtime import RealtimeRoad
from pilotlight.serving import Server, server_config

from .conftest import ADMIN, OTHER, RUN

ROUTE = "/v2/ep/openai/v1/realtime"


async def converse(request, _body):
    """Greets as vLLM does, and then says back what it was told; audio backwards."""
    talk = web.WebSocketResponse(max_msg_size=0, compress=True)
    await talk.prepare(request)
    await talk.send_json({"type": "session.created", "id": "s1"})
    async for message in talk:
        if message.type is WSMsgType.BINARY:
            await talk.send_bytes(message.data[::-1])
        elif json.loads(message.data)["type"] == "leave":
            await talk.close(code=4002, message=b"enough")
        else:
            await talk.send_json({"type": "error", "said": json.loads(message.data)})
    return talk


class Site:
    """The rig of the data path, on a port, with the road under test."""

    def __init__(self, rig, url, client):
        self.rig = rig
        self.url = url
        self.client = client
        self.direct = True

    def connect(self, path=ROUTE, *, key=RUN, **more):
        headers = {"authorization": f"Bearer {key}", **more.pop("headers", {})} if key else {}
        return self.client.ws_connect(f"{self.url}{path}", headers=headers, **more)

    async def refusal(self, path=ROUTE, **more):
        """Status and error object of a handshake that is refused."""
        reader, writer = await asyncio.open_connection(*self.url.removeprefix("http://").split(":"))
        headers = {
            "Host": "h", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Authorization": f"Bearer {RUN}", **more,
        }  # fmt: skip
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value)]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        async with asyncio.timeout(20):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), json.loads(body)["error"], head.decode().lower()

    async def idle(self, worker_id="w1"):
        async with asyncio.timeout(20):
            while self.rig.slots.worker(worker_id).occupied:
                await asyncio.sleep(0.005)


@pytest.fixture
async def site(rig):
    rig.engine.script["/v1/realtime"] = converse
    listener = socket.create_server(("127.0.0.1", 0))
    made = Site(rig, f"http://127.0.0.1:{listener.getsockname()[1]}", None)
    rig.app._realtime = RealtimeRoad(rig.data_path, lambda _: made.direct)
    server = Server(server_config(rig.app))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await server.answering.wait()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as made.client:
        yield made
    server.should_exit = True
    await task


async def test_openais_realtime_client_talks_to_an_engine_through_a_slot(site):
    site.rig.open_worker()
    async with (
        AsyncOpenAI(base_url=f"{site.url}/v2/ep/openai/v1", api_key=RUN, max_retries=0) as client,
        client.realtime.connect(model="org/model") as connection,
    ):
        assert (await connection.recv()).type == "session.created"
        assert site.rig.slots.worker("w1").occupied == 1
        await connection.send({"type": "response.create"})
        assert (await connection.recv()).said == {"type": "response.create"}
    row = await site.rig.row()
    assert (row.status, row.outcome, row.route) == (101, Outcome.OK, "/v1/realtime")
    assert (row.endpoint_id, row.key_id, row.worker_id, row.tokens_out) == ("ep", "run", "w1", None)
    assert site.rig.slots.worker("w1").occupied == 0


async def test_the_engine_gets_its_own_key_and_nothing_of_the_clients(site):
    site.rig.open_worker()
    headers = {"cookie": "c=1", "x-secret": "s", "x-request-id": "mine", "openai-beta": "realtime=v1"}
    async with site.connect(ROUTE + "?model=org/model", headers=headers) as talk:
        assert talk._response.headers["x-request-id"] == "mine"
    method, path, seen, _ = site.rig.engine.requests[0]
    lower = {name.lower(): value for name, value in seen.items()}
    assert (method, path) == ("GET", "/v1/realtime?model=org/model")
    assert lower["authorization"] == "Bearer engine-key"
    assert lower["openai-beta"] == "realtime=v1"
    assert lower["x-request-id"].startswith("mine-")
    assert RUN not in json.dumps(seen)
    assert not {"cookie", "x-secret"} & set(lower)
    assert (await site.rig.row()).client_id == "mine"


async def test_a_browsers_key_comes_as_a_subprotocol_and_goes_no_further(site):
    """As OpenAI's JavaScript package has it: `realtime` and the key; a browser leaves if neither is chosen."""
    site.rig.open_worker()
    offered = ["realtime", f"openai-insecure-api-key.{RUN}", "openai-beta.realtime-v1"]
    async with site.connect(key="", protocols=offered) as talk:
        assert talk.protocol == "realtime"
        assert (await talk.receive_json())["type"] == "session.created"
    seen = site.rig.engine.requests[0][2]
    assert RUN not in json.dumps(dict(seen))
    assert seen["Sec-WebSocket-Protocol"] == "realtime, openai-beta.realtime-v1"
    assert seen["Authorization"] == "Bearer engine-key"


async def test_a_subprotocol_that_the_engine_chooses_stays(site):
    async def choose(request, _body):
        talk = web.WebSocketResponse(protocols=("other",))
        await talk.prepare(request)
        await talk.close()
        return talk

    site.rig.engine.script["/v1/realtime"] = choose
    site.rig.open_worker()
    async with site.connect(protocols=["realtime", "other"]) as talk:
        assert talk._response.headers.getall("sec-websocket-protocol") == ["other"]


async def test_large_and_compressed_frames_pass_both_ways(site):
    site.rig.open_worker()
    audio = bytes(range(256)) * 16_000
    async with site.connect(max_msg_size=0, compress=15) as talk:
        await talk.receive()
        for _ in range(2):
            sending = asyncio.create_task(talk.send_bytes(audio))
            assert await talk.receive_bytes() == audio[::-1]
            await sending


async def test_the_engines_close_reaches_the_client_with_its_code(site):
    site.rig.open_worker()
    async with site.connect() as talk:
        await talk.receive()
        await talk.send_json({"type": "leave"})
        assert (await talk.receive()).type is WSMsgType.CLOSE
        assert talk.close_code == 4002
    await site.idle()


async def test_a_client_that_vanishes_gives_its_slot_back(site):
    site.rig.open_worker()
    talk = await site.connect()
    talk._response.connection.transport.abort()
    await site.rig.row()
    assert site.rig.slots.worker("w1").occupied == 0
    await talk.close()


async def test_it_waits_for_a_worker_and_may_leave_meanwhile(site):
    waiting = asyncio.Event()
    site.rig.slots.on_demand = lambda _: waiting.set()
    leaving = asyncio.create_task(site.connect())
    await waiting.wait()
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving
    row = await site.rig.row()
    assert (row.outcome, row.status, row.worker_id) == (Outcome.DISCONNECTED, 0, "")
    waiting.clear()
    connecting = asyncio.create_task(site.connect())
    await waiting.wait()
    site.rig.open_worker()
    talk = await connecting
    assert (await talk.receive_json())["type"] == "session.created"
    await talk.close()


async def test_no_worker_in_the_clients_time_is_504(site):
    status, error, _ = await site.refusal(**{"X-Request-Timeout": "0.1"})
    assert (status, error["code"]) == (504, "deadline_exceeded")
    assert (await site.rig.row()).outcome is Outcome.EXPIRED


async def test_an_endpoint_that_gives_up_says_so(site):
    waiting = asyncio.Event()
    site.rig.slots.on_demand = lambda _: waiting.set()
    asking = asyncio.create_task(site.refusal())
    await waiting.wait()
    site.rig.slots.fail_held("ep", StartFailedError("no worker could be started: boom", retry_after_s=7))
    status, error, head = await asking
    assert (status, error["code"]) == (503, "start_failed")
    assert "boom" in error["message"]
    assert "retry-after: 7" in head


async def test_a_session_ends_after_its_time(site):
    site.rig.open_worker()
    async with site.connect(headers={"X-Request-Timeout": "0.5"}) as talk:
        await talk.receive()
        assert (await talk.receive()).type in {WSMsgType.CLOSED, WSMsgType.CLOSE, WSMsgType.ERROR}
    row = await site.rig.row()
    assert (row.status, row.outcome) == (101, Outcome.TIMED_OUT)


REFUSED = [
    (ROUTE, {"Authorization": ""}, 401),
    (ROUTE, {"Authorization": "", "Sec-WebSocket-Protocol": "openai-insecure-api-key.rpa_NO"}, 401),
    (ROUTE, {"Authorization": OTHER}, 403),
    ("/v2/nope/openai/v1/realtime", {"Authorization": ADMIN}, 404),
    ("/v2/ep/openai/v1/unknown", {}, 404),
    ("/v2/ep/openai/v1/chat/completions", {}, 400),
    ("/v2/ep/openai/v1/../sleep", {}, 400),
    ("/v2/ep/openai/sleep", {}, 403),
    (ROUTE, {"X-Request-Timeout": "soon"}, 400),
]


async def test_what_is_refused_never_reaches_the_engine(site):
    site.rig.open_worker()
    for path, headers, status in REFUSED:
        answered, error, head = await site.refusal(path, **headers)
        assert (path, headers, answered, bool(error["message"])) == (path, headers, status, True)
        assert "x-request-id: " in head
        assert (await site.rig.row()).status == status
    assert site.rig.engine.requests == []


async def test_endpoints_without_an_engine_that_is_reached_refuse_with_the_reason(site):
    """The last one is a gateway that follows: the workers are another's."""
    site.direct = False
    for kind, status, says in (
        (EndpointKind.QUEUE, 400, "only take jobs"),
        (EndpointKind.LOAD_BALANCER, 400, "/lb/load-balancer"),
        (EndpointKind.VLLM, 503, "another gateway"),
    ):
        revision = Revision(endpoint_id=kind, version=1, model="m", command=("x",), env={})
        await site.rig.store.add_endpoint(Endpoint(id=kind, name=kind, kind=kind, revision=revision))
        await site.rig.directory.refresh()
        path = f"/v2/{kind}/openai/v1/realtime"
        answered, error, _ = await site.refusal(path, Authorization=f"Bearer {ADMIN}")
        assert answered == status
        assert says in error["message"]


async def test_an_engine_without_the_route_is_told_apart_from_a_refused_key(site):
    """vLLM, whose server is Starlette, answers the handshake of an unknown route 403."""

    async def unknown(_request, _body):
        return web.Response(status=403)

    site.rig.engine.script["/v1/realtime"] = unknown
    site.rig.open_worker()
    status, error, _ = await site.refusal()
    assert (status, error["code"]) == (404, "route_not_served")
    row = await site.rig.row()
    assert (row.status, row.outcome, row.worker_id) == (404, Outcome.REJECTED, "w1")


async def test_another_answer_of_the_engine_is_passed_on(site):
    async def busy(_request, _body):
        return web.json_response({"error": {"message": "busy"}}, status=503)

    site.rig.engine.script["/v1/realtime"] = busy
    site.rig.open_worker()
    status, error, head = await site.refusal()
    assert (status, error["message"]) == (503, "busy")
    assert "connection: close" in head
    assert (await site.rig.row()).outcome is Outcome.FAILED
    assert site.rig.slots.worker("w1").occupied == 0


def open_dead(rig, worker_id):
    """A worker that is not there any more."""
    registration = Registration(engine=Address(url=f"unix:/nowhere/{worker_id}"))
    rig.slots.open_worker("ep", worker_id, capacity=2, registration=registration)


async def test_a_worker_that_is_not_reached_is_passed_over_for_another(site):
    observed = []
    site.rig.desk.observed = lambda worker_id, *, failed, **_: observed.append((worker_id, failed))
    open_dead(site.rig, "dead")
    site.rig.open_worker()
    async with site.connect() as talk:
        assert (await talk.receive_json())["type"] == "session.created"
    assert (await site.rig.row()).worker_id == "w1"
    assert observed == [("dead", True), ("w1", False)]
    assert not site.rig.slots.worker("dead").takes_requests


async def test_with_none_that_is_reached_it_is_502(site):
    for number in range(3):
        open_dead(site.rig, f"dead{number}")
    status, error, _ = await site.refusal()
    assert (status, error["type"]) == (502, "server_error")
    assert (await site.rig.row()).outcome is Outcome.FAILED


async def test_the_limits_of_a_key_count_its_sessions(site):
    site.rig.open_worker()
    key = site.rig.directory.key(RUN)
    site.rig.store._keys[key.id] = replace(key, concurrent_max=1)
    await site.rig.directory.refresh()
    async with site.connect() as talk:
        await talk.receive()
        status, error, head = await site.refusal()
        assert (status, error["code"]) == (429, "rate_limit_exceeded")
        assert "retry-after" in head
    await site.idle()
    async with site.connect() as talk:
        await talk.receive()


HANDSHAKE = (
    f"GET {ROUTE} HTTP/1.1\r\nHost: h\r\nAuthorization: {RUN}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
).encode()


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_handshake_behind_a_request_that_is_being_answered_waits_for_its_turn(site, leaves):
    """Until then the connection is the request's, which learns at once when its client goes."""
    go_on = asyncio.Event()

    async def wait(_request):
        await go_on.wait()

    async def stream(request, body):
        return await site.rig.engine.stream(request, json.loads(body), then=wait)

    site.rig.engine.script["/v1/chat/completions"] = stream
    site.rig.open_worker()
    body = json.dumps({"model": "m", "messages": [], "stream": True})
    reader, writer = await asyncio.open_connection(*site.url.removeprefix("http://").split(":"))
    writer.write(
        f"POST /v2/ep/openai/v1/chat/completions HTTP/1.1\r\nHost: h\r\nAuthorization: {RUN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    async with asyncio.timeout(20):
        await reader.readuntil(b'"content":"2"')
        writer.write(HANDSHAKE)
        if leaves:
            writer.close()
            assert (await site.rig.row()).outcome is Outcome.DISCONNECTED
            await site.rig.engine.aborted.wait()
            assert site.rig.slots.worker("w1").occupied == 0
            return
        await writer.drain()
        go_on.set()
        assert b"101" not in await reader.readuntil(b"0\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert b"session.created" in await reader.readuntil(b"session.created")
    writer.close()


async def test_a_gateway_that_stops_takes_no_more(site):
    site.rig.open_worker()
    site.rig.app.closing = True
    status, error, head = await site.refusal()
    assert (status, error["code"]) == (503, "stopping")
    assert "retry-after" in head


async def test_without_a_handshake_it_is_400(site):
    async with site.client.get(f"{site.url}{ROUTE}", headers={"authorization": RUN}) as answer:
        assert answer.status == 400
        assert "handshakes only" in (await answer.json())["error"]["message"]
