"""The unmodified `openai` package against an endpoint whose workers only take jobs (serverless-api.md §2.15).

"Mechanics" are the numbered ones of `/openai/{path…}` there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest

from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.key import hash_secret
from pilotlight.errors import StoreError
from pilotlight.gateway.asgi import GONE

from .conftest import ADMIN, ENDPOINT, Platform, job_openai, serving

KEY = {"authorization": f"Bearer {ADMIN}"}
MESSAGES = [{"role": "user", "content": "hi"}]
WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello there"}}
    ],
}


def event(text: str) -> str:
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}}],
    }
    return f"data: {json.dumps(chunk)}\n\n"


@pytest.fixture
async def base(platform: Platform) -> AsyncIterator[str]:
    """Base URL of the OpenAI routes beside the platform's own."""
    road = job_openai(platform)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        _, _, endpoint_id, _, rest = scope["path"].split("/", 4)
        await road(scope, receive, send, endpoint_id=endpoint_id, path=f"/{rest}")

    await platform.reshape(kind=EndpointKind.QUEUE)
    platform.fleet.add(capacity=8)
    async with serving(app) as url:
        yield f"{url}/v2/{ENDPOINT}/openai/v1"


@pytest.fixture
async def client(base: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=ADMIN, base_url=base, max_retries=0, timeout=30) as made:
        yield made


@contextlib.asynccontextmanager
async def asked(call: Any, platform: Platform) -> AsyncIterator[tuple[asyncio.Future[Any], dict[str, Any]]]:
    """A call on its way and the job a worker got for it."""
    task = asyncio.ensure_future(call)
    taken = await platform.take()
    assert taken.status_code == 200
    try:
        yield task, taken.json()
    finally:
        task.cancel()
        await asyncio.wait({task})


def chat(client: openai.AsyncOpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="any", messages=MESSAGES, **more)


async def test_a_call_becomes_a_synchronous_job(platform, client):
    """Mechanics 1, 3, 5: the request travels whole, the model is not looked at."""
    async with asked(chat(client, temperature=0.5), platform) as (call, job):
        assert job["id"].startswith("sync-")
        assert job["input"] == {
            "openai_route": "/v1/chat/completions",
            "openai_input": {"model": "any", "messages": MESSAGES, "temperature": 0.5},
        }
        await platform.done(job["id"], {"output": [WHOLE]}, stream=True)
        assert (await call).choices[0].message.content == "Hello there"


async def test_our_own_worker_program_is_asked_for_single_pieces(platform, client):
    """vllm-worker.md §1.9: the caller reads live; workers of other programs are not told of it."""
    await platform.reshape(kind=EndpointKind.VLLM)
    async with asked(chat(client), platform) as (call, job):
        assert job["input"] == {
            "openai_route": "/v1/chat/completions",
            "openai_input": {"model": "any", "messages": MESSAGES},
            "max_batch_size": 1,
        }
        await platform.done(job["id"], {"output": [WHOLE]}, stream=True)
        assert (await call).choices[0].message.content == "Hello there"


@pytest.mark.parametrize(
    ("method", "route", "status", "word"),
    [
        ("GET", "/chat/completions", 405, "POST"),
        ("POST", "/nothing", 404, "not a route"),
        ("POST", "/load_lora_adapter", 403, "administers"),
        ("GET", "/realtime", 400, "WebSocket"),
        ("GET", "/models/nobody", 404, "nobody"),
    ],
)
async def test_our_own_program_is_asked_for_routes_of_the_engine_only(
    platform, base, method, route, status, word
):
    """vllm-worker.md §1.10: as on a gateway that leads, and without a job."""
    await platform.reshape(kind=EndpointKind.VLLM)
    body = {} if method == "POST" else None
    answer = await platform.client.request(method, f"{base}{route}", headers=KEY, json=body)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]
    assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 0


async def test_models_of_our_own_program_need_no_worker(platform, base, client):
    """vllm-worker.md §6.1."""
    await platform.reshape(kind=EndpointKind.VLLM)
    (model,) = (await client.models.list()).data
    assert (await client.models.retrieve(model.id)).owned_by == "pilotlight"


async def test_a_paused_endpoint_is_refused_at_once(platform, client):
    await platform.reshape(kind=EndpointKind.VLLM, workers_max=0)
    with pytest.raises(openai.InternalServerError, match="paused") as caught:
        await chat(client)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]


async def test_usage_is_asked_for_and_kept_from_who_did_not_ask(platform, client):
    """vllm-worker.md §6.3: so that the tokens of a stream are in the request log."""
    await platform.reshape(kind=EndpointKind.VLLM)
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    last = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    end = f"data: {json.dumps({**last, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
    async with asked(chat(client, stream=True), platform) as (call, job):
        assert job["input"]["openai_input"]["stream_options"] == {"include_usage": True}
        for text in (event("Hello"), event(" there"), end):
            await platform.chunk(job["id"], text)
        await platform.done(job["id"], {"output": [event("Hello"), event(" there"), end]}, stream=True)
        chunks = [chunk async for chunk in await call]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "Hello there"
    assert [chunk.usage for chunk in chunks] == [None, None]
    (row,) = platform.records
    assert (row.tokens_in, row.tokens_out) == (3, 2)


async def test_an_answer_that_was_only_streamed_is_read_from_the_stream(platform, client):
    """Without aggregation the output is an empty list (§2.8)."""
    async with asked(chat(client), platform) as (call, job):
        await platform.chunk(job["id"], WHOLE)
        await platform.done(job["id"], {"output": []}, stream=True)
        assert (await call).choices[0].message.content == "Hello there"


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
async def test_any_verb_and_any_path_becomes_a_job(platform, base, method):
    """§2.15: any verb, any sub-path; Mechanics 1: without a body only the route is set."""
    url = base.removesuffix("/v1") + "/v2/things/7?x=1"
    for content in (b"", b'{"a": 1}'):
        call = platform.client.request(method, url, headers=KEY, content=content)
        async with asked(call, platform) as (answer, job):
            body = {"openai_input": {"a": 1}} if content else {}
            assert job["input"] == {"openai_route": "/v2/things/7", **body}
            await platform.done(job["id"], {"output": {"ok": True}})
            assert ((await answer).status_code, (await answer).json()) == (200, {"ok": True})


async def test_a_get_has_a_route_and_no_input(platform, client):
    """Mechanics 1."""
    async with asked(client.models.list(), platform) as (call, job):
        assert job["input"] == {"openai_route": "/v1/models"}
        await platform.done(job["id"], {"output": {"object": "list", "data": [{"id": "m"}]}})
        assert [model.id async for model in await call] == ["m"]


async def test_streams_are_written_verbatim_as_they_come(platform, client):
    """Mechanics 2: chunks are text, several events or a part of one; `[DONE]` is the worker's."""
    async with asked(chat(client, stream=True), platform) as (call, job):
        first = event("Hel")
        await platform.chunk(job["id"], first[:20])
        stream = await call
        await platform.chunk(job["id"], first[20:] + event("lo"))
        texts = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        assert texts == ["Hel", "lo"]
        await platform.chunk(job["id"], event("!"))
        await platform.chunk(job["id"], "data: [DONE]\n\n")
        await platform.done(job["id"], {"output": []}, stream=True)
        assert [chunk.choices[0].delta.content async for chunk in stream] == ["!"]


async def test_a_stream_is_sent_as_events_that_nobody_keeps(platform, base):
    """Mechanics 2: `text/event-stream`, `Cache-Control: no-cache`."""
    request = platform.client.build_request(
        "POST", f"{base}/chat/completions", headers=KEY, json={"stream": True}
    )
    async with asked(platform.client.send(request, stream=True), platform) as (call, job):
        await platform.chunk(job["id"], "data: 1\n\n")
        answer = await call
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        await platform.done(job["id"], {"output": []}, stream=True)
        assert await answer.aread() == b"data: 1\n\n"


async def test_a_call_is_not_waited_for_beyond_300_s(platform, client, monkeypatch):
    """Mechanics 3: then there is no answer, and its job, which nobody can ask for, does not go on."""
    asked_s, wait = [], platform.service.wait

    async def no_wait(*arguments: Any, timeout_s: float, gone: Any) -> Any:
        asked_s.append(timeout_s)
        await platform.take()
        return await wait(*arguments, timeout_s=0, gone=gone)

    monkeypatch.setattr(platform.service, "wait", no_wait)
    with pytest.raises(openai.InternalServerError, match="no answer within 300 s") as caught:
        await chat(client)
    assert (caught.value.status_code, asked_s) == (504, [300])
    jobs, _ = await platform.service.jobs(ENDPOINT, status=None, before=None, limit=2)
    assert [job.status for job in jobs] == ["CANCELLED"]


async def test_a_call_whose_worker_is_lost_is_answered_by_another(platform, client):
    """§2.10: retried once, as any job."""
    platform.fleet.add("w2", capacity=1)
    async with asked(chat(client), platform) as (call, job):
        await platform.chunk(job["id"], {**WHOLE, "id": "of the first"})
        await platform.fleet.end("w1")
        assert (await platform.take("w2")).json()["id"] == job["id"]
        await platform.chunk(job["id"], WHOLE, "w2")
        await platform.done(job["id"], {"output": []}, "w2", stream=True)
        assert (await call).id == "chatcmpl-1"


async def test_a_stream_that_had_not_begun_goes_on_with_another_worker(platform, client):
    """worker-protocol.md §7.2: its caller has seen nothing of the first attempt, and sees nothing of the loss."""
    platform.fleet.add("w2", capacity=1)
    async with asked(chat(client, stream=True), platform) as (call, job):
        await platform.fleet.end("w1")
        assert (await platform.take("w2")).json()["id"] == job["id"]
        await platform.chunk(job["id"], event("Hello"), "w2")
        await platform.chunk(job["id"], "data: [DONE]\n\n", "w2")
        await platform.done(job["id"], {"output": []}, "w2", stream=True)
        assert [chunk.choices[0].delta.content async for chunk in await call] == ["Hello"]


async def test_a_stream_that_had_begun_ends_when_its_worker_is_lost(platform, client):
    """worker-protocol.md §7.2, Mechanics 4: a final error event, not two attempts in one answer; nobody would
    read what another worker says, so none runs it."""
    platform.fleet.add("w2", capacity=1)
    async with asked(chat(client, stream=True), platform) as (call, job):
        await platform.chunk(job["id"], event("Hel"))
        stream = await call
        assert (await anext(stream)).choices[0].delta.content == "Hel"
        await platform.fleet.end("w1")
        with pytest.raises(
            openai.APIError, match="the worker was lost after part of the answer had been sent"
        ):
            await anext(stream)
        assert (await platform.status(job["id"]))["status"] == "CANCELLED"
        assert (await platform.take("w2")).status_code == 204


@pytest.mark.parametrize("finished", [False, True])
async def test_a_stream_that_had_begun_does_not_go_on_with_another_worker(
    platform, client, monkeypatch, finished
):
    """As above, when the next worker streams, or has even finished, before the gateway looks again."""
    platform.fleet.add("w2", capacity=1)
    look, begun, may_look = platform.service.streams.read, asyncio.Event(), asyncio.Event()

    async def stream_later(*arguments: Any, **named: Any) -> Any:
        if begun.is_set():
            await may_look.wait()
        part = await look(*arguments, **named)
        if part.chunks:
            begun.set()
        return part

    monkeypatch.setattr(platform.service.streams, "read", stream_later)
    async with asked(chat(client, stream=True), platform) as (call, job):
        await platform.chunk(job["id"], event("Hel"))
        stream = await call
        assert (await anext(stream)).choices[0].delta.content == "Hel"
        await platform.fleet.end("w1")
        await platform.take("w2")
        await platform.chunk(job["id"], event("Hello"), "w2")
        if finished:
            await platform.done(job["id"], {"output": []}, "w2", stream=True)
        may_look.set()
        with pytest.raises(openai.APIError, match="the worker was lost"):
            await anext(stream)
        assert (await platform.status(job["id"]))["status"] == ("COMPLETED" if finished else "CANCELLED")
        if not finished:
            stops = await platform.ask("GET", "/job-stop/w2?gpu=x", worker="w2")
            assert stops.json() == {"jobsToStop": [job["id"]]}


async def test_a_stream_whose_worker_is_lost_for_the_last_time_fails_with_that(make_platform):
    """§2.10: `job timed out after 0 retries`, in the stream."""
    async with make_platform(jobs={"retries_max": 0}) as platform:
        platform.fleet.add(capacity=1)
        road = job_openai(platform)
        sent: list[dict[str, Any]] = []
        received = asyncio.Event()
        body = {"type": "http.request", "body": b'{"stream":true}', "more_body": False}

        async def receive() -> dict[str, Any]:
            return body

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            received.set()

        scope = {
            "type": "http",
            "method": "POST",
            "headers": [(b"authorization", ADMIN.encode()), (b"content-length", b"15")],
            "extensions": {GONE: asyncio.get_running_loop().create_future},
        }
        call = asyncio.create_task(road(scope, receive, send, endpoint_id=ENDPOINT, path="/v1/completions"))
        job_id = (await platform.take()).json()["id"]
        await platform.chunk(job_id, "data: 1\n\n")
        await received.wait()
        await platform.fleet.end("w1")
        await call
        assert sent[-1]["more_body"] is False
        assert b"job timed out after 0 retries" in sent[-1]["body"]


async def test_a_failure_before_the_stream_is_an_http_error(platform, client):
    """Mechanics 4."""
    async with asked(chat(client, stream=True), platform) as (call, job):
        envelope = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "code": 400}}
        await platform.done(job["id"], {"error": json.dumps(envelope)})
        with pytest.raises(openai.BadRequestError) as caught:
            await call
        assert caught.value.body == {
            "message": "max_tokens is too large",
            "type": "worker_error",
            "code": None,
        }


async def test_a_failure_within_the_stream_is_its_last_event(platform, client):
    """Mechanics 4."""
    async with asked(chat(client, stream=True), platform) as (call, job):
        await platform.chunk(job["id"], event("Hel"))
        stream = await call
        assert (await anext(stream)).choices[0].delta.content == "Hel"
        await platform.done(job["id"], {"error": "out of memory"}, stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            await anext(stream)


async def test_a_failed_job_is_500(platform, client):
    """Mechanics 4: an uncaught exception in the handler, as the library posts it."""
    async with asked(chat(client), platform) as (call, job):
        error = {"error_type": "<class 'ValueError'>", "error_message": "boom", "error_traceback": "…"}
        await platform.done(job["id"], {"error": json.dumps(error)})
        with pytest.raises(openai.InternalServerError, match="boom"):
            await call


async def test_an_error_object_gets_its_true_status(platform, client):
    """§12 item 38."""
    async with asked(chat(client), platform) as (call, job):
        value = {"object": "error", "message": "The model `any` does not exist.", "code": 404}
        await platform.done(job["id"], {"output": [value]}, stream=True)
        with pytest.raises(openai.NotFoundError):
            await call


async def test_a_cancelled_job_ends_its_call(platform, client):
    async with asked(chat(client), platform) as (call, job):
        await platform.call("POST", f"/cancel/{job['id']}")
        with pytest.raises(openai.InternalServerError, match="the job was cancelled"):
            await call


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_that_goes_away_cancels_its_job(platform, client, stream):
    """Mechanics 6."""
    async with asked(chat(client, stream=stream), platform) as (call, job):
        if stream:
            await platform.chunk(job["id"], event("Hel"))
            await (await call).close()
        else:
            call.cancel()
        while (await platform.status(job["id"]))["status"] != "CANCELLED":
            await asyncio.sleep(0.01)
        stops = await platform.ask("GET", "/job-stop/w1?gpu=x")
        assert stops.json() == {"jobsToStop": [job["id"]]}


async def test_anthropic_routes_fail_in_their_own_shape(platform, base):
    root = base.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(api_key=ADMIN, base_url=root, max_retries=0, timeout=30) as client:
        message = client.messages.create(model="any", max_tokens=5, messages=MESSAGES)
        async with asked(message, platform) as (call, job):
            assert job["input"]["openai_route"] == "/v1/messages"
            await platform.done(job["id"], {"error": '{"error":{"message":"bad","code":400}}'})
            with pytest.raises(anthropic.BadRequestError) as caught:
                await call
            assert caught.value.body["type"] == "error"
            assert caught.value.body["error"]["message"] == "bad"


@pytest.mark.parametrize("stream", [False, True])
async def test_failure_of_the_store_after_the_job_was_queued(platform, client, monkeypatch, stream):
    """§2.15: the caller is told to come back, and the job, which nobody can ask for, does not run."""

    async def broken(*_: Any, **__: Any) -> Any:
        raise StoreError("disk full")

    where, name = (platform.service.streams, "read") if stream else (platform.service, "wait")
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(openai.InternalServerError) as caught:
        await chat(client, stream=stream)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "2")
    jobs, _ = await platform.service.jobs(ENDPOINT, status=None, before=None, limit=2)
    assert [job.status for job in jobs] == ["CANCELLED"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_gateway_that_stops_says_so(platform, client, stream):
    """A stream was read again and again until the end, any other call was told that 300 s were over."""
    async with asked(chat(client, stream=stream), platform) as (call, job):
        drains, drain = [], platform.store.drain_chunks

        async def counted(*arguments, **named):
            drains.append(arguments)
            return await drain(*arguments, **named)

        platform.store.drain_chunks = counted
        platform.service.begin_close()
        with pytest.raises(openai.InternalServerError, match="the gateway is stopping") as caught:
            await call
        assert caught.value.status_code == 503
        assert len(drains) <= 1
        assert (await platform.status(job["id"]))["status"] == "CANCELLED"


async def test_a_body_that_is_too_large_is_413_in_openais_shape(platform, base):
    """20 MiB (§2.13); not 400 as on the native routes: OpenAI's clients know 413 (vllm-worker.md §1.11)."""
    for more in (0, 1):
        body = b'{"a":"%b"}' % (b"x" * (20 * 1_048_576 - len('{"a":""}') + more))
        call = platform.client.post(f"{base}/chat/completions", headers=KEY, content=body)
        if more:
            answer = await call
            assert answer.status_code == 413
            assert answer.json()["error"]["message"]
            assert "status" not in answer.json()
        else:
            async with asked(call, platform) as (accepted, job):
                await platform.done(job["id"], {"output": {}})
                assert (await accepted).status_code == 200


async def test_a_load_balancing_endpoint_has_no_openai_routes(platform, base):
    """§2.14, §3."""
    endpoint = replace(platform.endpoint, id="lb1", name="lb", kind=EndpointKind.LOAD_BALANCER)
    endpoint = replace(endpoint, revision=replace(endpoint.revision, endpoint_id="lb1", command=("serve",)))
    await platform.store.add_endpoint(endpoint)
    await platform.directory.refresh()
    answer = await platform.client.get(base.replace(ENDPOINT, "lb1") + "/models", headers=KEY)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "not allowed for QB API")


async def test_refusals(platform, base):
    """§2.14, in OpenAI's shape."""

    async def post(**arguments: Any) -> Any:
        return await platform.client.post(f"{base}/chat/completions", **arguments)

    assert (await post(json={})).status_code == 401
    form = await post(headers=KEY, files={"file": b"x"})
    assert (form.status_code, "multipart" in form.json()["error"]["message"]) == (400, True)
    broken = await post(headers=KEY, content=b"[1]")
    assert (broken.status_code, "JSON object" in broken.json()["error"]["message"]) == (400, True)
    elsewhere = await platform.client.get(base.replace(ENDPOINT, "nowhere") + "/models", headers=KEY)
    assert elsewhere.status_code == 404
    assert (await platform.store.demand(ENDPOINT, overdue_before_ms=0)).queued == 0


# Comments for those who wait.

STREAM = {"model": "any", "messages": MESSAGES, "stream": True}


@pytest.fixture
async def beating(platform: Platform, base: str) -> AsyncIterator[str]:
    """The base URL for a key that asked for comments, with no worker there."""
    await platform.fleet.end("w1")
    await platform.store.delete_key("k1")
    await platform.store.add_key(replace(platform.key, heartbeat_s=0.01))
    await platform.directory.refresh()
    return base


@contextlib.asynccontextmanager
async def commented(platform: Platform, url: str, route: str = "/chat/completions") -> AsyncIterator[Any]:
    """A call that got two comments: (its answer, the lines that follow)."""
    async with platform.client.stream("POST", f"{url}{route}", headers=KEY, json=STREAM) as answer:
        assert answer.status_code == 200
        lines = answer.aiter_lines()
        for _ in range(2):
            assert (await anext(lines)).startswith(": pilotlight starting stage=decision elapsed_s=")
            await anext(lines)
        yield answer, lines


async def taken(platform: Platform, answer: Any) -> str:
    """The job of a call, which a worker takes that has come now."""
    platform.fleet.add(capacity=1)
    job_id = (await platform.take()).json()["id"]
    assert answer.headers["x-job-id"] == job_id
    return str(job_id)


async def rest(lines: Any) -> str:
    """What follows the comments."""
    told = [line async for line in lines]
    while told and told[0].startswith(":"):
        del told[:2]
    return "\n".join(told)


async def test_a_key_over_its_own_limit_is_told_in_openais_words(platform, beating):
    await platform.store.update_key(replace(platform.key, requests_per_minute=1))
    await platform.directory.refresh()
    async with commented(platform, beating):
        answer = await platform.client.post(f"{beating}/chat/completions", headers=KEY, json=STREAM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(answer.headers["retry-after"]) <= 60


async def test_a_stream_that_waits_for_a_worker_gets_comments_and_then_its_words(platform, beating):
    async with commented(platform, beating) as (answer, lines):
        job_id = await taken(platform, answer)
        await platform.chunk(job_id, event("a"))
        await platform.done(job_id, {"output": []}, stream=True)
        assert f"{await rest(lines)}\n" == event("a")


async def test_openai_does_not_notice_the_comments(platform, beating, client):
    stream = await chat(client, stream=True)
    platform.fleet.add(capacity=1)
    job_id = (await platform.take()).json()["id"]
    await platform.chunk(job_id, event("a") + event("b"))
    await platform.done(job_id, {"output": []}, stream=True)
    assert [chunk.choices[0].delta.content async for chunk in stream] == ["a", "b"]


@pytest.mark.parametrize(
    ("route", "result", "told"),
    [
        (
            "/chat/completions", {"error": "it broke"},
            'data: {"error":{"message":"it broke","type":"worker_error","code":null}}\n\ndata: [DONE]\n',
        ),
        (
            "/messages", {"error": "it broke"},
            'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"it broke"}}\n',
        ),
        (
            "/chat/completions", {"output": {"error": {"message": "too long", "code": 400}}},
            'data: {"error":{"message":"too long","code":400}}\n\ndata: [DONE]\n',
        ),
        ("/chat/completions", {"output": {"id": "x"}}, 'data: {"id":"x"}\n\ndata: [DONE]\n'),
    ],
)  # fmt: skip
async def test_what_is_no_stream_is_told_in_an_event_after_comments(platform, beating, route, result, told):
    async with commented(platform, beating, route) as (answer, lines):
        await platform.done(await taken(platform, answer), result)
        assert await rest(lines) == told


async def test_a_gateway_that_stops_says_so_after_comments(platform, beating):
    async with commented(platform, beating) as (_, lines):
        platform.service.begin_close()
        assert "the gateway is stopping" in await rest(lines)


@pytest.mark.parametrize(
    ("error", "told"), [(StoreError("disk full"), "disk full"), (ValueError(), "internal server error")]
)
async def test_failures_of_the_store_and_of_ours_are_told_after_comments(
    platform, beating, monkeypatch, error, told
):
    fails = asyncio.Event()

    async def broken(*_: Any, **__: Any) -> Any:
        await fails.wait()
        raise error

    monkeypatch.setattr(platform.service.streams, "read", broken)
    async with commented(platform, beating) as (answer, lines):
        fails.set()
        assert told in await rest(lines)
    status = await platform.client.get(f"/v2/{ENDPOINT}/status/{answer.headers['x-job-id']}", headers=KEY)
    assert status.json()["status"] == "CANCELLED"


async def test_a_stream_that_workers_take_soon_begins_with_their_words(platform, beating, client):
    """Where a worker is ready nothing is said for a while, so that a failure has its status."""
    await platform.store.add_key(replace(platform.key, id="k9", hash=hash_secret("rpa_SLOW"), heartbeat_s=60))
    await platform.directory.refresh()
    platform.fleet.add(capacity=1)
    async with asked(chat(client.with_options(api_key="rpa_SLOW"), stream=True), platform) as (call, job):
        await platform.done(job["id"], {"error": "it broke"})
        with pytest.raises(openai.InternalServerError, match="it broke"):
            await call
