"""Greedy streams outlive their worker: token for token what they would have been, wherever they are cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import LiveInstallation, await_engine

from pilotlight.bench.harness.wire import connect, request_bytes
from pilotlight.core.continuation import (
    CHAT,
    COMPLETIONS,
    Continuation,
    Ending,
    limit_question,
    plan_continuation,
    read_limit,
)
from pilotlight.gateway.continuation import Splice, hide_tokens

from .conftest import SMALL, Served
from .waking import end, processes_of, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

STREAMED = {"model": "pilotlight/ember", "temperature": 0, "stream": True, "ignore_eos": True}
USAGE = {"stream_options": {"include_usage": True}}
TOKENS = {"return_token_ids": True}
ROOMY = {**SMALL, "NUM_GPU_BLOCKS_OVERRIDE": "1024", "MAX_NUM_SEQS": "128"}
STREAMS = 100
BEGUN = 5
"""Events of each stream before its worker dies."""
LENGTH = 400
"""Tokens of each stream: an engine that has the processors to itself is far ahead of who reads the events."""


def chat(content: str, **fields: object) -> dict:
    return {**STREAMED, **USAGE, "messages": [{"role": "user", "content": content}], **fields}


def completion(prompt: str | list[int], **fields: object) -> dict:
    return {**STREAMED, **USAGE, "prompt": prompt, **fields}


def route_of(body: dict) -> str:
    return CHAT if "messages" in body else COMPLETIONS


REQUESTS = {
    "chat": chat("What is 7 times 8?", max_tokens=40),
    "completion": completion("one two", max_tokens=40),
    "tokens": completion([1, 4, 289, 271, 5], max_tokens=40, skip_special_tokens=False),
    "halves of characters": completion("Repeat after me: é à 😀 日本", max_tokens=40),
    "stop strings": chat("Count from 1 to 9.", max_tokens=60, stop=["What is", "zzzz"], min_tokens=12),
    "stop strings, shown": completion(
        "one two", max_tokens=60, stop=["Hello!"], include_stop_str_in_output=True
    ),
    "penalty": completion("Hello", max_tokens=40, repetition_penalty=1.3, seed=7),
    "biased": chat("Hello!", max_tokens=40, logit_bias={"19": -3, "36": 1.5}),
    "its own end": chat("What is the capital of France?", ignore_eos=False),
}


def summary(stream: bytes) -> dict:
    """What a client makes of a stream."""
    blocks = [block for block in stream.split(b"\n\n") if not block.startswith(b":")]
    assert blocks[-2:] == [b"data: [DONE]", b""], stream[-500:]
    events = [json.loads(block.removeprefix(b"data: ")) for block in blocks[:-2]]
    assert not [event for event in events if "error" in event], stream[-500:]
    choices = [event["choices"][0] for event in events if event["choices"]]
    deltas = [choice.get("delta") or {"content": choice["text"]} for choice in choices]
    return {
        "names": len({(event["id"], event["object"], event["created"], event["model"]) for event in events}),
        "roles": [delta["role"] for delta in deltas if "role" in delta],
        "text": "".join(delta["content"] for delta in deltas),
        "tokens": [token for choice in choices for token in choice.get("token_ids") or ()],
        "ends": [(c["finish_reason"], c["stop_reason"]) for c in choices if c["finish_reason"]],
        "usage": [event["usage"] for event in events if event.get("usage")],
    }


@pytest.fixture(scope="module")
def exact(serve: Callable[..., Served]) -> Served:
    """The model in float32: in bfloat16, kernels that read a prompt round otherwise than those that add a token to it
    (AMX), and these requests, to which the model was not trained, come to tokens that are nearly as likely as others."""
    return serve("pilotlight/ember", "exact", DTYPE="float32")


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_that_is_cut_anywhere_goes_on_as_it_would_have(exact, name):
    """Its beginning and another stream from there, on every fifth event: same text, tokens, end and usage."""
    body = REQUESTS[name]
    route, raw = route_of(body), json.dumps(body).encode()
    undisturbed = exact.call(route, {**body, **TOKENS}).content
    events = undisturbed.split(b"\n\n")[:-1]
    expected = summary(undisturbed)
    for cut in (*range(1, len(events), 5), len(events) - 2):
        delivered = b"".join(event + b"\n\n" for event in events[:cut])
        plan = plan_continuation(route, raw, delivered)
        if isinstance(plan, Ending):
            assert summary(delivered + plan.data) == expected
            continue
        assert isinstance(plan, Continuation), plan
        limit = read_limit(exact.call(route, json.loads(limit_question(raw))).content)
        assert isinstance(limit, int), limit
        request = plan.request(limit)
        assert isinstance(request, bytes)
        rest = Splice(plan).feed(exact.call(COMPLETIONS, json.loads(request)).content)
        assert summary(delivered + rest) == expected, f"cut after {cut} of {len(events)} events"


@pytest.mark.parametrize("name", ["chat", "completion"])
def test_hidden_tokens_leave_a_stream_as_it_is_without_them(ember, name):
    """Byte for byte, but for what names the answer; but for how vLLM merged tokens into events, too."""
    body = REQUESTS[name]

    def shapes(stream: bytes) -> set[str]:
        parsed = [json.loads(block[6:]) for block in stream.split(b"\n\n") if block.startswith(b"data: {")]
        for event in parsed:
            event.update(id="", created=0)
            for choice in event["choices"]:
                choice.update({"text": ""} if "text" in choice else {"delta": sorted(choice["delta"])})
        return {json.dumps(event) for event in parsed}

    asked = ember.call(route_of(body), {**body, **TOKENS}).content
    plain = ember.call(route_of(body), {**body, "return_token_ids": False}).content
    assert shapes(hide_tokens(asked)) == shapes(plain)


@pytest.fixture(scope="module")
def lone(installation: LiveInstallation) -> Iterator[Served]:
    """An endpoint whose one worker has room for all streams."""
    endpoint = installation.deploy(
        "pilotlight/ember", "survival", idle_timeout_s=3600, max=1, concurrency=STREAMS, env=ROOMY
    )
    await_engine(installation, endpoint)
    yield Served(installation.api, endpoint)
    installation.api.delete(f"/v2/serverless/{endpoint['id']}").raise_for_status()


def bodies() -> list[dict]:
    """Chats and completions, half of which have not asked for usage."""
    made = []
    for number in range(STREAMS):
        content = f"What is {number} plus {number % 7}?"
        body = chat(content, max_tokens=LENGTH) if number % 2 else completion(content, max_tokens=LENGTH)
        made.append(body if number % 4 < 2 else {k: v for k, v in body.items() if k not in USAGE})
    return made


async def streams(served: Served, on_event: Callable[[int], None]) -> list[bytes]:
    """All streams at once, each whole; told of each event as it comes.

    By a client that is quicker than the engine: what one that lags behind is being told is long past.
    """
    key, port = served.api.headers["authorization"].removeprefix("Bearer "), served.api.base_url.port
    assert port is not None

    async def one(number: int, body: dict) -> bytes:
        pieces: list[bytes] = []

        def note(piece: bytes) -> None:
            pieces.append(piece)
            for _ in range(piece.count(b"\n\n")):
                on_event(number)

        connection = await connect(port)
        try:
            request = request_bytes(f"{served.path}/openai{route_of(body)}", body, key=key)
            status = await connection.ask(request, note)
        finally:
            connection.close()
        assert status == 200, pieces
        return b"".join(pieces)

    return list(await asyncio.gather(*(one(*each) for each in enumerate(bodies()))))


def continued(served: Served) -> float:
    """How many streams of the endpoint went on with another worker."""
    wanted = f'pilotlight_streams_continued_total{{endpoint="{served.endpoint["id"]}"}} '
    lines = served.api.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))


def worker_of(served: Served) -> str:
    workers = served.api.get(f"/pilotlight/v1/endpoints/{served.endpoint['id']}/workers").json()["workers"]
    (worker,) = [worker for worker in workers if worker["state"] == "ready"]
    return worker["id"]


def title_of(pid: int) -> str:
    """What a process calls itself; "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def core_of(worker_id: str) -> list[int]:
    """The process that computes: where it dies, the engine's server says so in the streams, and ends them."""
    return [pid for pid in processes_of(worker_id) if title_of(pid).startswith("VLLM::EngineCore")]


async def test_a_hundred_streams_outlive_their_worker(lone: Served) -> None:
    """1. undisturbed; 2. the worker with all its processes is killed in the middle; 3. only the engine's core."""
    expected = [summary(data) for data in await streams(lone, lambda _: None)]
    assert not any(each["tokens"] for each in expected), "nobody has asked for the ids of tokens"
    for number, processes in enumerate((processes_of, core_of), start=1):
        begun = [0] * STREAMS
        doomed = await asyncio.to_thread(worker_of, lone)

        def note(
            stream: int, begun: list[int] = begun, doomed: str = doomed, find: Callable = processes
        ) -> None:
            begun[stream] += 1
            if begun[stream] == BEGUN and min(begun) >= BEGUN:
                end(find(doomed))

        survived = [summary(data) for data in await streams(lone, note)]
        assert survived == expected
        # Of those that were cut; some may have been complete but for their end, or complete.
        await asyncio.to_thread(until, lambda number=number: continued(lone) >= number * STREAMS // 2)
        assert await asyncio.to_thread(worker_of, lone) != doomed
