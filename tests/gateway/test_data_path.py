"""The data path, over real connections: what reaches the engine, what comes back, what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest
from aiohttp import web

from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address, Failure, Registration
from pilotlight.gateway.data_path import StartFailedError
from pilotlight.gateway.upstream import UpstreamResponse
from pilotlight.gateway.worker_protocol import WORKER_OPERATIONS
from pilotlight.ports.fleet import Health

from .conftest import ADMIN, OTHER, RUN

CHAT = "/v2/ep/openai/v1/chat/completions"
BODY = {"model": "org/model", "messages": [{"role": "user", "content": "hi"}]}


async def waiting(rig, count=1):
    """Return once that many requests are held."""
    async with asyncio.timeout(20):
        while (await rig.slots.traffic("ep", overdue_before_ms=0)).held < count:
            await asyncio.sleep(0.001)


async def test_an_answer_passes_unchanged_and_leaves_one_row(rig):
    rig.open_worker()
    answer = await rig.client.post(CHAT, json=BODY)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "hi"
    row = await rig.row()
    assert (row.endpoint_id, row.key_id, row.worker_id, row.route) == (
        "ep",
        "run",
        "w1",
        "/v1/chat/completions",
    )
    assert (row.status, row.outcome, row.tokens_in, row.tokens_out, row.estimated) == (
        200,
        Outcome.OK,
        5,
        2,
        False,
    )
    assert row.first_token_ms is not None
    assert rig.slots.worker("w1").occupied == 0


async def test_the_engine_sees_its_own_key_and_never_the_clients(rig):
    rig.open_worker()
    await rig.client.post(CHAT, json=BODY, headers={"x-secret": "1", "cookie": "c"})
    _, path, headers, body = rig.engine.requests[0]
    lower = {name.lower(): value for name, value in headers.items()}
    assert path == "/v1/chat/completions"
    assert lower["authorization"] == "Bearer engine-key"
    assert "x-secret" not in lower
    assert "cookie" not in lower
    assert json.loads(body) == BODY
    assert RUN not in json.dumps(headers)


async def test_a_stream_passes_in_whole_events_and_its_usage_is_counted_but_not_shown(rig):
    rig.open_worker()
    async with rig.client.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join([piece async for piece in answer.aiter_text()])
    assert text.count("data: ") == 4
    assert "usage" not in text
    assert text.endswith("data: [DONE]\n\n")
    row = await rig.row()
    assert (row.tokens_in, row.tokens_out, row.estimated, row.outcome) == (5, 3, False, Outcome.OK)


async def test_usage_the_client_asked_for_is_shown(rig):
    rig.open_worker()
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    answer = await rig.client.post(CHAT, json=body)
    assert '"usage"' in answer.text


@pytest.mark.parametrize(
    "headers", [{"authorization": RUN}, {"authorization": f"bearer  {RUN}"}, {"x-api-key": ADMIN}]
)
async def test_a_key_may_come_in_any_of_its_forms(rig, headers):
    """serverless-api.md §10, and x-api-key as Anthropic's clients send it."""
    rig.open_worker()
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(rig.socket))) as client:
        assert (await client.post(f"http://gateway{CHAT}", json=BODY, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("path", "method", "key", "status"),
    [
        (CHAT, "POST", "", 401),
        (CHAT, "POST", "rpa_WRONG", 401),
        (CHAT, "POST", OTHER, 403),
        ("/v2/nope/openai/v1/chat/completions", "POST", ADMIN, 404),
        ("/v2/ep/openai/v1/unknown", "POST", RUN, 404),
        (CHAT, "GET", RUN, 405),
        ("/v2/ep/openai/sleep", "POST", RUN, 403),
        ("/v2/ep/openai/collective_rpc", "POST", ADMIN, 403),
        ("/v2/ep/openai/v1/../sleep", "POST", RUN, 400),
        ("/v2/ep/openai/v1/%2e%2e/sleep", "POST", RUN, 400),
        ("/v2/ep/openai/v1/realtime", "GET", RUN, 400),
    ],
)
async def test_what_is_refused_never_reaches_the_engine(rig, path, method, key, status):
    """vllm-worker.md §1.10 and §6.1; errors in OpenAI's shape."""
    rig.open_worker()
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    body = json.dumps(BODY)
    writer.write(
        f"{method} {path} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}".encode()
    )
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert int(head.split()[1]) == status
    assert json.loads(rest)["error"]["message"]
    assert rig.engine.requests == []


@pytest.mark.parametrize("body", [b"{not json", b"[1]", b""])
async def test_malformed_json_is_a_400_in_openais_shape(rig, body):
    rig.open_worker()

    async def complain(request, data):
        return web.json_response({"error": {"message": "empty", "code": 400}}, status=400)

    rig.engine.script["/v1/chat/completions"] = complain
    answer = await rig.client.post(CHAT, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert (await rig.row()).outcome is Outcome.REJECTED


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_refused_before_it_is_read(rig, announced):
    """413 in OpenAI's shape (vllm-worker.md §1.11), where the native routes have 400 (serverless-api.md §2.13)."""
    rig.open_worker()

    async def chunks():
        for _ in range(6):
            yield b"x" * 1000

    content = b"x" * 5001 if announced else chunks()
    answer = await rig.client.post(CHAT, content=content)
    assert answer.status_code == 413
    assert "5000" in answer.json()["error"]["message"]


async def test_the_list_of_models_wakes_nothing(rig):
    answer = await rig.client.get("/v2/ep/openai/v1/models")
    assert [card["id"] for card in answer.json()["data"]] == ["org/model"]
    assert (await rig.client.get("/v2/ep/openai/v1/models/org/model")).json()["id"] == "org/model"
    assert (await rig.client.get("/v2/ep/openai/v1/models/other")).status_code == 404
    assert (await rig.slots.traffic("ep", overdue_before_ms=0)).held == 0


async def test_a_request_without_a_ready_worker_waits_for_one(rig):
    task = asyncio.create_task(rig.client.post(CHAT, json=BODY))
    await waiting(rig)
    rig.open_worker()
    assert (await task).status_code == 200


async def test_a_full_hold_answers_429_with_retry_after(rig):
    tasks = [asyncio.create_task(rig.client.post(CHAT, json=BODY)) for _ in range(2)]
    await waiting(rig, 2)
    answer = await rig.client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    rig.open_worker()
    assert [(await task).status_code for task in tasks] == [200, 200]


async def test_a_failed_start_is_told_to_those_who_wait_and_those_who_come(rig):
    task = asyncio.create_task(rig.client.post(CHAT, json=BODY))
    await waiting(rig)
    rig.fleet.state = Health(
        failures=3, failure=Failure(kind="bad_flag", cause="no such flag --x", advice="drop it")
    )
    rig.slots.fail_held(
        "ep", StartFailedError("no worker could be started: no such flag --x", retry_after_s=30),
        retry_ms=rig.clock.now_ms() + 30_000,
    )  # fmt: skip
    for answer in (await task, await rig.client.post(CHAT, json=BODY)):
        assert answer.status_code == 503
        assert "no such flag --x" in answer.json()["error"]["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 30


async def test_a_client_that_leaves_ends_its_generation(rig):
    rig.open_worker()
    never = asyncio.Event()

    async def endless(request, body):
        return await rig.engine.stream(request, json.loads(body), then=lambda _: never.wait())

    rig.engine.script["/v1/chat/completions"] = endless
    async with rig.client.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
        async for _ in answer.aiter_bytes():
            break
    async with asyncio.timeout(20):
        await rig.engine.aborted.wait()
    row = await rig.row()
    assert (row.outcome, row.tokens_out, row.estimated) == (Outcome.DISCONNECTED, 3, True)
    assert rig.slots.worker("w1").occupied == 0


async def test_a_client_that_leaves_while_it_waits_frees_its_place(rig):
    task = asyncio.create_task(rig.client.post(CHAT, json=BODY))
    await waiting(rig)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    row = await rig.row()
    assert (row.outcome, row.worker_id) == (Outcome.DISCONNECTED, "")
    assert (await rig.slots.traffic("ep", overdue_before_ms=0)).held == 0


async def test_an_engine_that_dies_in_mid_stream_ends_it_with_an_error_event(rig):
    rig.open_worker()

    async def die(request):
        request.transport.abort()

    async def dying(request, body):
        return await rig.engine.stream(request, json.loads(body), then=die)

    rig.engine.script["/v1/chat/completions"] = dying
    answer = await rig.client.post(CHAT, json=BODY | {"stream": True})
    assert answer.status_code == 200
    events = [event for event in answer.text.split("\n\n") if event]
    assert len(events) == 4
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == (502, "server_error")
    row = await rig.row()
    assert (row.outcome, row.tokens_out, row.estimated) == (Outcome.FAILED, 3, True)


async def test_an_engine_that_dies_in_mid_body_does_not_leave_a_whole_answer(rig):
    rig.open_worker()

    async def dying(request, body):
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "1000"})
        await response.prepare(request)
        await response.write(b'{"choices":')
        request.transport.abort()
        return response

    rig.engine.script["/v1/chat/completions"] = dying
    with pytest.raises(httpx.RemoteProtocolError):
        await rig.client.post(CHAT, json=BODY)


async def test_a_worker_that_cannot_be_reached_is_passed_over(rig):
    """Between the death of an engine and the end of its worker, requests go to the others."""
    rig.slots.open_worker(
        "ep", "dead", capacity=9, registration=Registration(engine=Address(url="unix:/nowhere"))
    )
    rig.open_worker()
    assert (await rig.client.post(CHAT, json=BODY)).status_code == 200
    assert (await rig.row()).worker_id == "w1"
    assert rig.slots.worker("dead").occupied == 0


async def test_an_engine_that_cannot_be_reached_is_a_502(rig):
    rig.address = Address(url="unix:/nowhere")
    rig.open_worker()
    answer = await rig.client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.json()["error"]["type"]) == (502, "server_error")


async def test_an_address_that_is_none_is_told_at_once_and_frees_the_slot(rig):
    rig.address = Address(url="http://127.0.0.1:99999")
    rig.open_worker()
    async with asyncio.timeout(10):
        assert (await rig.client.post(CHAT, json=BODY)).status_code == 500
    assert rig.slots.worker("w1").occupied == 0


@pytest.mark.parametrize("field", [{"guided_regex": "a+"}, {"best_of": 2}])
async def test_bodies_that_need_rewriting_go_to_the_worker_program(rig, field):
    rig.open_worker(listener=rig.address)
    assert (await rig.client.post(CHAT, json=BODY | field)).status_code == 200
    rig.slots.drop_worker("w1")
    rig.open_worker()
    answer = await rig.client.post(CHAT, json=BODY | field)
    assert answer.status_code == 400
    assert "structured_outputs" in answer.json()["error"]["message"]


async def test_fields_that_ask_for_nothing_need_no_worker_program(rig):
    rig.open_worker()
    assert (await rig.client.post(CHAT, json=BODY | {"best_of": 1})).status_code == 200


async def test_engine_errors_keep_their_status_and_body(rig):
    rig.open_worker()

    async def refuse(request, body):
        return web.json_response({"error": {"message": "context length is 2048", "code": 400}}, status=400)

    rig.engine.script["/v1/chat/completions"] = refuse
    answer = await rig.client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "context length is 2048")
    assert (await rig.row()).outcome is Outcome.REJECTED


async def test_duplicate_slashes_collapse(rig):
    """serverless-api.md §2.1."""
    rig.open_worker()
    assert (await rig.client.post("/v2//ep/openai//v1/chat/completions", json=BODY)).status_code == 200


@pytest.mark.parametrize("path", [f"{CHAT}/", f"{CHAT}//", f"{CHAT}/?x=1"])
async def test_a_trailing_slash_is_ignored(rig, path):
    """serverless-api.md §2.1: also on the OpenAI routes, where it was 404."""
    rig.open_worker()
    assert (await rig.client.post(path, json=BODY)).status_code == 200
    assert rig.engine.requests[0][1] == "/v1/chat/completions" + ("?x=1" if "?" in path else "")


async def test_a_gateway_that_stops_says_so(rig):
    rig.app.closing = True
    answer = await rig.client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_workers_may_call_to_the_end():
    """worker-protocol.md §7.2: a gateway that stops takes what its workers still have to say."""
    assert {
        b"job-take", b"job-take-batch", b"job-stop", b"job-done", b"job-done-batch", b"job-stream", b"ping",
    } == WORKER_OPERATIONS  # fmt: skip


async def test_rows_of_strangers_name_no_key_and_are_short(rig):
    for path, key in ((CHAT, "rpa_WRONG"), (f"/v2/{'x' * 5000}/openai/v1/models", "")):
        await rig.client.get(path, headers={"authorization": key})
    assert [(row.key_id, row.status) for row in rig.records] == [("", 401)] * 2
    assert max(len(row.endpoint_id) for row in rig.records) == 64


async def test_a_body_that_does_not_come_ends(rig):
    rig.data_path.limits = rig.limits.model_copy(update={"body_s": 0.05})
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nhost: h\r\nauthorization: {RUN}\r\ncontent-length: 9\r\n\r\nhalf".encode()
    )
    assert (await reader.readline()).split()[1] == b"408"
    writer.close()


async def test_an_endpoint_deleted_while_the_body_came_is_gone(rig):
    rig.open_worker()

    async def body():
        yield b"{"
        await rig.store.delete_endpoint("ep", now_ms=1)
        await rig.directory.refresh()
        yield b"}"

    assert (await rig.client.post(CHAT, content=body())).status_code == 404


async def test_an_endpoint_deleted_while_a_request_waits_is_gone(rig):
    asking = asyncio.create_task(rig.client.post(CHAT, json=BODY))
    await waiting(rig)
    await rig.store.delete_endpoint("ep", now_ms=1)
    await rig.directory.refresh()
    rig.slots.fail_held("ep", StartFailedError("the endpoint was deleted", retry_after_s=1))
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "endpoint_not_found")


async def test_errors_on_the_messages_route_are_anthropics(rig):
    """vllm-worker.md §3.7."""
    answer = await rig.client.post("/v2/ep/openai/v1/messages", content=b"{")
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", "invalid_request_error")
    rig.open_worker()

    async def die(request):
        request.transport.abort()

    async def dying(request, body):
        return await rig.engine.stream(request, json.loads(body), then=die)

    rig.engine.script["/v1/messages"] = dying
    answer = await rig.client.post("/v2/ep/openai/v1/messages", json=BODY | {"stream": True})
    assert answer.text.split("\n\n")[-2].startswith('event: error\ndata: {"type":"error"')


async def test_a_fault_of_ours_is_a_500_with_an_id_and_frees_the_slot(rig, monkeypatch):
    rig.open_worker()
    monkeypatch.setattr(rig.pool, "take_idle", None)
    answer = await rig.client.post(CHAT, json=BODY)
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert rig.slots.worker("w1").occupied == 0


async def test_a_client_that_reads_slowly_slows_the_engine_and_misses_nothing(rig, monkeypatch):
    rig.open_worker()
    pauses = []
    pause = UpstreamResponse.pause

    def counted(connection):
        pauses.append(1)
        pause(connection)

    monkeypatch.setattr(UpstreamResponse, "pause", counted)
    event = b"data: " + b"x" * 65_000 + b"\n\n"
    produced = asyncio.Event()

    async def flood(request, body):
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(200):
            await response.write(event)
        produced.set()
        await response.write(b"data: [DONE]\n\n")
        return response

    rig.engine.script["/v1/chat/completions"] = flood
    async with rig.client.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
        async with asyncio.timeout(20):
            while not pauses:
                await asyncio.sleep(0.001)
        assert not produced.is_set(), "the engine must wait for the client"
        text = b"".join([piece async for piece in answer.aiter_bytes()])
    assert text == event * 200 + b"data: [DONE]\n\n"
