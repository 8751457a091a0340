"""What callers are told while their streams wait for a worker, and what becomes of the streams then."""

from __future__ import annotations

import asyncio
import contextlib
import json

import anthropic
import openai
import pytest
from aiohttp import web

from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address, Registration, Rung, Stage, Worker
from pilotlight.gateway.data_path import StartFailedError
from pilotlight.gateway.heartbeats import Heartbeats

from .conftest import BEAT, RUN
from .jobs.conftest import serving
from .test_data_path import waiting

V1 = "/v2/ep/openai/v1"
CHAT, MESSAGES, RESPONSES = f"{V1}/chat/completions", f"{V1}/messages", f"{V1}/responses"
QUESTION = [{"role": "user", "content": "hi"}]
BODY = {"model": "m", "messages": QUESTION, "stream": True}
KEY = {"authorization": f"Bearer {BEAT}"}
DONE = "data: [DONE]\n\n"


@pytest.fixture
async def base(rig):
    """The same gateway on TCP, for clients that know nothing else."""
    async with serving(rig.app) as url:
        yield url + "/v2/ep/openai"


@contextlib.asynccontextmanager
async def held(rig, path=CHAT, body=BODY):
    """A stream that waits and has got two comments: (its answer, an iterator of what else comes)."""
    async with rig.client.stream("POST", path, json=body, headers=KEY) as answer:
        lines = answer.aiter_lines()
        for _ in range(2):
            assert (await anext(lines)).startswith(": pilotlight ")
            assert await anext(lines) == ""
        yield answer, lines


async def rest(lines):
    """What follows the comments."""
    told = [line async for line in lines]
    while told and told[0].startswith(":"):
        del told[:2]
    return "".join(f"{line}\n" for line in told)


async def chunk(reader):
    """One chunk of a body; b"" at its end."""
    size = int(await reader.readline(), 16)
    data = await reader.readexactly(size)
    await reader.readexactly(2)
    return data


async def test_a_held_stream_says_how_its_start_goes_and_then_passes_unchanged(rig):
    """1. Status and headers come before there is a worker, a comment at once, and more. 2. The engine's bytes
    follow as they are; usage is counted and kept back. 3. The connection can be used again."""
    rig.estimate_ms, rig.rung = 8000, Rung.COLD
    rig.fleet.living = [
        Worker(id="w1", endpoint_id="ep", version=1, stage=Stage.IMPORTING, state_ms=rig.clock.now_ms())
    ]
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    body = json.dumps(BODY).encode()
    request = (
        f"POST {CHAT} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {BEAT}\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert head.startswith("http/1.1 200 ")
    assert {"content-type: text/event-stream", "cache-control: no-cache"} <= set(head.split("\r\n"))
    request_id = head.partition("x-request-id: ")[2].partition("\r\n")[0]
    for _ in range(3):
        words = (await chunk(reader)).decode()
        assert words.endswith("\n\n")
        name, program, state, stage, elapsed, estimate, rung = words.split()
        assert (name, program, state, stage, rung) == (
            ":", "pilotlight", "starting", "stage=importing", "rung=cold",
        )  # fmt: skip
        assert 0 <= float(elapsed.removeprefix("elapsed_s=")) <= float(estimate.removeprefix("estimate_s="))
    rig.open_worker()
    answer = b""
    while data := await chunk(reader):
        answer += b"" if data.startswith(b":") else data
    events = b"".join(
        b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % number for number in range(3)
    )
    assert answer == events + DONE.encode()
    row = await rig.row()
    assert (row.id, row.status, row.outcome, row.tokens_out) == (request_id, 200, Outcome.OK, 3)
    assert row.first_token_ms >= row.wait_ms
    engine_saw = {name.lower(): value for name, value in rig.engine.requests[0][2].items()}
    assert engine_saw["x-request-id"] == request_id

    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert "charset=utf-8" in head, "the engine's own head, as nothing had to wait"
    assert (await chunk(reader)).startswith(b"data: ")
    writer.close()


@pytest.mark.parametrize(
    ("key", "path", "body"),
    [
        (RUN, CHAT, BODY),
        (BEAT, CHAT, BODY | {"stream": False}),
        (BEAT, f"{V1}/embeddings", {"input": "x", "stream": True}),
    ],
)
async def test_whoever_did_not_ask_gets_no_comments(rig, key, path, body):
    headers = {"authorization": f"Bearer {key}"}
    task = asyncio.create_task(rig.client.post(path, json=body, headers=headers))
    await waiting(rig)
    async with held(rig):
        # The other one waits no less than this one, which came later and got its comments.
        rig.slots.fail_held("ep", StartFailedError("no", retry_after_s=7))
        answer = await task
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["message"] == "no"


ERROR = {"message": "context length is 2048", "type": "BadRequestError", "param": None, "code": 400}
ANTHROPIC = {"type": "error", "error": {"type": "BadRequestError", "message": "context length is 2048"}}


@pytest.mark.parametrize(
    ("path", "status", "said", "told"),
    [
        (CHAT, 400, {"error": ERROR}, f"data: {json.dumps({'error': ERROR}, separators=(',', ':'))}\n\n{DONE}"),
        (
            RESPONSES, 404, {"error": {"message": "no model x", "code": 404}},
            'data: {"error":{"message":"no model x","code":404}}\n\n',
        ),
        (
            MESSAGES, 400, ANTHROPIC,
            f"event: error\ndata: {json.dumps(ANTHROPIC, separators=(',', ':'))}\n\n",
        ),
        (
            MESSAGES, 500, {"error": ERROR},
            'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"context length is 2048"}}\n\n',
        ),
        (
            CHAT, 422, {"detail": "a\nb"},
            'data: {"error":{"message":"a\\nb","type":"invalid_request_error","param":null,"code":422}}\n\n' + DONE,
        ),
        (
            CHAT, 502, "<html>\nbad gateway",
            'data: {"error":{"message":"<html>\\nbad gateway","type":"server_error","param":null,"code":502}}\n\n'
            + DONE,
        ),
        (
            CHAT, 500, "",
            'data: {"error":{"message":"the engine answered 500","type":"server_error","param":null,"code":500}}\n\n'
            + DONE,
        ),
    ],
)  # fmt: skip
async def test_what_the_engine_refuses_is_the_last_event(rig, path, status, said, told):
    """The status is sent before the engine is asked; the request log has the true one."""

    async def refuse(request, body):
        if isinstance(said, str):
            return web.Response(text=said, status=status)
        return web.Response(text=json.dumps(said, indent=2), status=status, content_type="application/json")

    rig.engine.script[path.removeprefix("/v2/ep/openai")] = refuse
    async with held(rig, path) as (answer, lines):
        rig.open_worker()
        assert await rest(lines) == told
        assert answer.status_code == 200
    row = await rig.row()
    assert (row.status, row.outcome) == (status, Outcome.REJECTED if status < 500 else Outcome.FAILED)
    assert rig.slots.worker("w1").occupied == 0


async def test_an_answer_that_is_no_stream_becomes_one_event(rig):
    """As vLLM itself has it where it cannot stream."""
    usage = {"prompt_tokens": 5, "completion_tokens": 2}

    async def whole(request, body):
        return web.Response(
            text=json.dumps({"id": "x", "usage": usage}, indent=1), content_type="application/json"
        )

    rig.engine.script["/v1/chat/completions"] = whole
    async with held(rig) as (_, lines):
        rig.open_worker()
        event, end, _ = (await rest(lines)).split("\n\n")
    assert json.loads("".join(line.removeprefix("data: ") for line in event.split("\n"))) == {
        "id": "x",
        "usage": usage,
    }
    assert f"{end}\n\n" == DONE
    row = await rig.row()
    assert (row.status, row.outcome, row.tokens_in, row.tokens_out) == (200, Outcome.OK, 5, 2)


async def test_an_answer_that_is_no_stream_is_not_kept_without_bound(rig):
    async def huge(request, body):
        return web.Response(body=bytes(4 * 1024 * 1024 + 1), content_type="application/json")

    rig.engine.script["/v1/chat/completions"] = huge
    async with held(rig) as (_, lines):
        rig.open_worker()
        assert "larger than 4194304 bytes" in await rest(lines)
    assert (await rig.row()).status == 502


@pytest.mark.parametrize(
    ("error", "code", "outcome"),
    [
        (StartFailedError("no such flag --x", retry_after_s=30), "start_failed", Outcome.FAILED),
        (None, "no_worker", Outcome.EXPIRED),
    ],
)
async def test_an_endpoint_that_gives_up_says_why_in_the_stream(rig, error, code, outcome):
    if error is None:
        rig.data_path.limits = rig.limits.model_copy(update={"hold_s": 0.1})
    async with held(rig) as (_, lines):
        if error is not None:
            rig.slots.fail_held("ep", error)
        event, end, _ = (await rest(lines)).split("\n\n")
    told = json.loads(event.removeprefix("data: "))["error"]
    assert told["message"].startswith(str(error or "no worker became free within 0.1 s"))
    assert (told["code"], f"{end}\n\n") == (code, DONE)
    row = await rig.row()
    assert (row.status, row.outcome, row.worker_id) == (503, outcome, "")


async def test_a_request_that_takes_too_long_is_told_so(rig):
    rig.data_path.limits = rig.limits.model_copy(update={"data_path_s": 0.1})
    async with held(rig) as (_, lines):
        assert "the request took longer than 0.1 s" in await rest(lines)
    assert ((await rig.row()).status, rig.records[-1].outcome) == (504, Outcome.TIMED_OUT)


async def test_a_client_that_leaves_gives_up_its_place(rig):
    async with held(rig):
        assert (await rig.slots.traffic("ep", overdue_before_ms=0)).held == 1
    row = await rig.row()
    assert (row.outcome, row.worker_id) == (Outcome.DISCONNECTED, "")
    assert (await rig.slots.traffic("ep", overdue_before_ms=0)).held == 0
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "heartbeats"]


async def test_a_worker_that_cannot_be_reached_does_not_end_the_wait(rig):
    """Its comments go on while another worker is waited for."""
    async with held(rig) as (_, lines):
        rig.slots.open_worker(
            "ep", "dead", capacity=1, registration=Registration(engine=Address(url="unix:/nowhere"))
        )
        await waiting(rig)
        rig.slots.drop_worker("dead")
        for _ in range(2):
            assert (await anext(lines)).startswith(": pilotlight ")
            await anext(lines)
        rig.open_worker()
        assert (await rest(lines)).endswith(DONE)
    assert ((await rig.row()).worker_id, rig.records[-1].outcome) == ("w1", Outcome.OK)


async def test_an_engine_that_dies_in_mid_stream_is_told_as_ever(rig):
    async def die(request):
        request.transport.abort()

    async def dying(request, body):
        return await rig.engine.stream(request, json.loads(body), then=die)

    rig.engine.script["/v1/chat/completions"] = dying
    async with held(rig) as (_, lines):
        rig.open_worker()
        events = (await rest(lines)).split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 502
    row = await rig.row()
    assert (row.status, row.outcome, row.tokens_out) == (200, Outcome.FAILED, 3)


async def test_a_client_that_does_not_read_gets_no_more_comments_than_fit():
    """One is made when the one before it has gone out, and none is on its way after `stop`."""
    sent, room, blocked = [], asyncio.Event(), asyncio.Event()

    async def send(message):
        if len(sent) == 2:
            blocked.set()
            await room.wait()
        sent.append(message)

    heartbeats = Heartbeats(send, lambda: b": %d\n\n" % len(sent), period_s=0)
    heartbeats.start()
    await blocked.wait()
    await heartbeats.stop()
    assert heartbeats.begun
    assert [message.get("body") for message in sent] == [None, b": 1\n\n"]


async def test_a_start_that_is_over_at_once_begins_nothing():
    async def send(message):
        raise AssertionError

    heartbeats = Heartbeats(send, bytes, period_s=1)
    heartbeats.start()
    await heartbeats.stop()
    assert not heartbeats.begun


async def test_a_fault_in_the_comments_is_not_lost():
    async def send(message):
        raise ValueError("broken")

    heartbeats = Heartbeats(send, bytes, period_s=1)
    heartbeats.start()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="broken"):
        await heartbeats.stop()


async def test_a_fault_of_ours_while_it_waits_is_told_and_logged(rig, monkeypatch):
    async with held(rig) as (_, lines):
        monkeypatch.setattr(rig.pool, "take_idle", None)
        rig.open_worker()
        assert "internal server error" in await rest(lines)
    assert ((await rig.row()).status, rig.slots.worker("w1").occupied) == (500, 0)


# The packages that people use.


def script(rig):
    """Answers as the packages read them, after a while in which nothing was there."""
    stages = [("message_start", {"message": {"id": "m", "usage": {"input_tokens": 1, "output_tokens": 1}}})]
    stages += [
        ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": word}}) for word in "ab"
    ]
    stages += [("message_stop", {})]

    async def messages(request, body):
        text = "".join(
            f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n" for name, data in stages
        )
        return web.Response(text=text, content_type="text/event-stream")

    rig.engine.script["/v1/messages"] = messages


async def asked(rig, call):
    """What a blocking call returns that has to wait for a worker, which comes after some comments."""
    task = asyncio.create_task(asyncio.to_thread(call))
    await waiting(rig)
    async with held(rig):
        rig.open_worker(capacity=8)
    return await task


async def test_openai_does_not_notice(rig, base):
    def call():
        with openai.OpenAI(base_url=f"{base}/v1", api_key=BEAT, max_retries=0) as client:
            chunks = list(client.chat.completions.create(model="m", messages=QUESTION, stream=True))
            return [piece.choices[0].delta.content for piece in chunks]

    assert await asked(rig, call) == ["0", "1", "2"]
    rig.slots.drop_worker("w1")
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=BEAT, max_retries=0) as client:
        stream = await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
        await waiting(rig)
        rig.open_worker()
        assert [piece.choices[0].delta.content async for piece in stream] == ["0", "1", "2"]


async def test_anthropic_does_not_notice(rig, base):
    script(rig)

    def call():
        with (
            anthropic.Anthropic(base_url=base, auth_token=BEAT, api_key=None, max_retries=0) as client,
            client.messages.create(model="m", max_tokens=9, messages=QUESTION, stream=True) as stream,
        ):
            return [event.type for event in stream]

    expected = ["message_start", "content_block_delta", "content_block_delta", "message_stop"]
    assert await asked(rig, call) == expected
    rig.slots.drop_worker("w1")
    async with anthropic.AsyncAnthropic(
        base_url=base, auth_token=BEAT, api_key=None, max_retries=0
    ) as client:
        stream = await client.messages.create(model="m", max_tokens=9, messages=QUESTION, stream=True)
        await waiting(rig)
        rig.open_worker()
        assert [event.type async for event in stream] == expected


async def test_the_packages_raise_what_a_held_stream_is_told(rig, base):
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=BEAT, max_retries=0) as client:
        for create in (client.chat.completions.create, client.responses.create):
            named = {"input": "hi"} if create == client.responses.create else {"messages": QUESTION}
            stream = await create(model="m", stream=True, **named)
            rig.slots.fail_held("ep", StartFailedError("no such flag --x", retry_after_s=1))
            with pytest.raises(openai.APIError, match="no such flag --x"):
                [event async for event in stream]
    async with anthropic.AsyncAnthropic(
        base_url=base, auth_token=BEAT, api_key=None, max_retries=0
    ) as client:
        stream = await client.messages.create(model="m", max_tokens=9, messages=QUESTION, stream=True)
        rig.slots.fail_held("ep", StartFailedError("no such flag --x", retry_after_s=1))
        with pytest.raises(anthropic.APIStatusError, match="no such flag --x"):
            [event async for event in stream]


# When to come again.


async def test_retry_after_comes_from_the_estimate(rig):
    """Of who finds no place to wait, who waited in vain, and who was told that nothing can start."""
    rig.estimate_ms = 7_300
    rig.data_path.limits = rig.limits.model_copy(update={"hold_s": 0.05})
    answer = await rig.client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
    assert answer.headers["retry-after"] == "8"
    rig.data_path.limits = rig.limits
    tasks = [asyncio.create_task(rig.client.post(CHAT, json=BODY)) for _ in range(2)]
    await waiting(rig, 2)
    answer = await rig.client.post(CHAT, json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "8")
    rig.slots.fail_held("ep", StartFailedError("no", retry_after_s=2), retry_ms=rig.clock.now_ms() + 7_000)
    answers = [*[await task for task in tasks], await rig.client.post(CHAT, json=BODY)]
    assert [(answer.status_code, answer.headers["retry-after"]) for answer in answers] == [(503, "8")] * 3
    rig.slots.fail_held("ep", StartFailedError("no", retry_after_s=60), retry_ms=rig.clock.now_ms() + 60_000)
    assert int((await rig.client.post(CHAT, json=BODY)).headers["retry-after"]) > 8


async def test_without_an_estimate_retry_after_is_what_it_was(rig):
    rig.data_path.limits = rig.limits.model_copy(update={"hold_s": 0.05})
    assert (await rig.client.post(CHAT, json=BODY)).headers["retry-after"] == "10"
