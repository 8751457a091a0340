"""The unmodified `openai` package against an endpoint whose workers only take jobs (serverless-api.md §2.15)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from pilotlight.errors import StoreError
from pilotlight.gateway.jobs.openai import JobOpenAI

from .conftest import ADMIN, ENDPOINT, Platform, serving

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
    road = JobOpenAI(platform.service, platform.directory, platform.settings.limits)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        _, _, endpoint_id, _, rest = scope["path"].split("/", 4)
        await road(scope, receive, send, endpoint_id=endpoint_id, path=f"/{rest}")

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


async def test_an_answer_that_was_only_streamed_is_read_from_the_stream(platform, client):
    """Without aggregation the output is an empty list (§2.8)."""
    async with asked(chat(client), platform) as (call, job):
        await platform.chunk(job["id"], WHOLE)
        await platform.done(job["id"], {"output": []}, stream=True)
        assert (await call).choices[0].message.content == "Hello there"


async def test_a_get_has_a_route_and_no_input(platform, client):
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

    monkeypatch.setattr(platform.service, "stream" if stream else "wait", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        await chat(client, stream=stream)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "2")
    jobs, _ = await platform.service.jobs(ENDPOINT, status=None, before=None, limit=2)
    assert [job.status for job in jobs] == ["CANCELLED"]


async def test_refusals(platform, base):
    async def post(**arguments: Any) -> Any:
        return await platform.client.post(f"{base}/chat/completions", **arguments)

    key = {"authorization": f"Bearer {ADMIN}"}
    assert (await post(json={})).status_code == 401
    form = await post(headers=key, files={"file": b"x"})
    assert (form.status_code, "multipart" in form.json()["error"]["message"]) == (400, True)
    broken = await post(headers=key, content=b"[1]")
    assert (broken.status_code, "JSON object" in broken.json()["error"]["message"]) == (400, True)
    elsewhere = await platform.client.get(base.replace(ENDPOINT, "nowhere") + "/models", headers=key)
    assert elsewhere.status_code == 404
    assert (await platform.store.demand(ENDPOINT, overdue_before_ms=0)).queued == 0
