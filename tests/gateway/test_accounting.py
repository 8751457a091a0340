"""What a request on the data path is charged to its key, and to its worker, when it does not end well."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from pilotlight.core.request_totals import ErrorClass, error_class
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.usage import Outcome

CHAT = "/v2/ep/openai/v1/chat/completions"
BODY = {"model": "org/model", "messages": [{"role": "user", "content": "hi"}]}
LIMIT = 1200
METERED = ApiKey(
    id="metered",
    name="metered",
    scope=Scope.RUN,
    endpoint_ids=frozenset({"ep"}),
    hash=hash_secret("rpa_METERED"),
    tokens_per_minute=LIMIT,
)
HEADERS = {"authorization": "Bearer rpa_METERED"}


@pytest.fixture
async def metered(rig):
    """The rig with a key that has a limit of tokens, and a list of what is told of workers."""
    await rig.store.add_key(METERED)
    await rig.directory.refresh()
    rig.told = []
    rig.desk.observed = lambda worker_id, *, failed, first_byte_ms: rig.told.append((worker_id, failed))
    return rig


def remaining(rig):
    headers = dict(rig.key_limits.take(METERED, 0).headers)
    return int(headers[b"x-ratelimit-remaining-tokens"])


async def test_a_request_that_got_no_worker_has_cost_nothing(metered):
    metered.slots.fail_held("ep", RuntimeError("no GPU"), retry_ms=metered.clock.now_ms() + 60_000)
    answer = await metered.client.post(CHAT, json=BODY | {"max_tokens": 900}, headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "start_failed")
    assert remaining(metered) == LIMIT


async def test_a_request_that_the_engine_refused_has_cost_nothing(metered):
    metered.open_worker()

    async def refuse(_request, _body):
        return web.json_response({"error": {"message": "too long", "code": 400}}, status=400)

    metered.engine.script["/v1/chat/completions"] = refuse
    answer = await metered.client.post(CHAT, json=BODY | {"max_tokens": 900}, headers=HEADERS)
    assert answer.status_code == 400
    assert (remaining(metered), metered.told) == (LIMIT, [("w1", False)])


async def test_a_stream_that_its_client_leaves_has_cost_its_prompt(metered):
    """The engine tells of the prompt at the end only, and it is the larger part of many requests."""
    metered.open_worker()
    never = asyncio.Event()

    async def endless(request, body):
        return await metered.engine.stream(request, json.loads(body), then=lambda _: never.wait())

    metered.engine.script["/v1/chat/completions"] = endless
    body = BODY | {"stream": True, "messages": [{"role": "user", "content": "long " * 800}]}
    async with metered.client.stream("POST", CHAT, json=body, headers=HEADERS) as answer:
        async for _ in answer.aiter_bytes():
            break
    assert (await metered.row()).outcome is Outcome.DISCONNECTED
    assert remaining(metered) < LIMIT - 500
    assert metered.told == [("w1", False)]


async def test_a_deadline_of_the_client_says_nothing_of_the_worker(metered):
    metered.open_worker()
    never = asyncio.Event()

    async def silent(_request, _body):
        await never.wait()

    metered.engine.script["/v1/chat/completions"] = silent
    answer = await metered.client.post(CHAT, json=BODY, headers={"x-request-timeout": "0.05"})
    assert answer.status_code == 504
    assert metered.told == [("w1", False)]


async def test_an_engine_that_answers_500_is_at_fault(metered):
    metered.open_worker()

    async def broken(_request, _body):
        return web.json_response({"error": {"message": "no", "code": 500}}, status=500)

    metered.engine.script["/v1/chat/completions"] = broken
    assert (await metered.client.post(CHAT, json=BODY, headers=HEADERS)).status_code == 500
    assert (remaining(metered), metered.told) == (LIMIT, [("w1", True)])


async def test_a_key_over_its_limit_is_told_apart_from_a_full_endpoint(metered):
    metered.key_limits.take(METERED, LIMIT)
    answer = await metered.client.post(CHAT, json=BODY, headers=HEADERS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    row = await metered.row()
    assert (row.outcome, error_class(row)) == (Outcome.REJECTED, ErrorClass.RATE_LIMITED)
