"""Deadlines, limits of keys, sessions and ids on the data path."""

from __future__ import annotations

import asyncio
import json

import pytest

from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.data_path.opened import open_request
from pilotlight.gateway.head import Head
from pilotlight.system import SystemClock

from .conftest import RUN
from .test_data_path import BODY, CHAT, waiting

LIMITED = {"authorization": "Bearer rpa_LIMITED"}


async def test_what_the_client_will_not_wait_for_is_answered_before_it_gives_up(rig):
    """OpenAI's package says how long it waits; ours says it more exactly."""
    for header in ("x-stainless-read-timeout", "x-request-timeout"):
        answer = await rig.client.post(CHAT, json=BODY, headers={header: "0.2"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert int(answer.headers["retry-after"]) >= 1
        assert (await rig.row()).outcome is Outcome.EXPIRED


async def test_what_could_not_be_served_in_time_is_shed_at_once(rig):
    rig.open_worker(capacity=1)
    for _ in range(3):
        rig.desk.patience.served("ep", 60_000)
    held = asyncio.Event()

    async def slow(request, body):
        await held.wait()

    rig.engine.script["/v1/chat/completions"] = slow
    busy = asyncio.create_task(rig.client.post(CHAT, json=BODY))
    async with asyncio.timeout(20):
        while not rig.slots.worker("w1").occupied:
            await asyncio.sleep(0.001)
    answer = await rig.client.post(CHAT, json=BODY, headers={"x-request-timeout": "5"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "deadline_unreachable")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    patient = asyncio.create_task(rig.client.post(CHAT, json=BODY))
    await waiting(rig)
    for task in (busy, patient):
        task.cancel()
    held.set()


async def test_a_running_answer_ends_at_the_clients_own_deadline(rig):
    rig.open_worker()

    async def silent(request, body):
        await asyncio.sleep(30)

    rig.engine.script["/v1/chat/completions"] = silent
    answer = await rig.client.post(CHAT, json=BODY, headers={"x-request-timeout": "0.2"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
    assert (await rig.row()).outcome is Outcome.TIMED_OUT


async def test_the_time_of_a_request_begins_with_its_head(rig):
    rig.open_worker()
    clock = Ahead()
    rig.data_path.clock = clock
    content = json.dumps(BODY).encode()

    async def body():
        yield content[:5]
        async with asyncio.timeout(20):
            while not clock.asked:
                await asyncio.sleep(0.001)
        clock.ahead_ns = 6 * 10**9
        yield content[5:]

    answer = await rig.client.post(CHAT, content=body(), headers={"x-request-timeout": "5"})
    assert (answer.status_code, (await rig.row()).outcome) == (504, Outcome.TIMED_OUT)


class Ahead(SystemClock):
    """The clock, and so much more; knows whether somebody has asked."""

    ahead_ns = 0
    asked = False

    def monotonic_ns(self):
        self.asked = True
        return super().monotonic_ns() + self.ahead_ns


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan"])
async def test_a_deadline_that_is_none_is_refused(rig, value):
    answer = await rig.client.post(CHAT, json=BODY, headers={"x-request-timeout": value})
    assert answer.status_code == 400
    assert "X-Request-Timeout" in answer.json()["error"]["message"]


@pytest.fixture
async def limited(rig):
    await rig.store.add_key(
        ApiKey(
            id="limited",
            name="limited",
            scope=Scope.RUN,
            endpoint_ids=frozenset({"ep"}),
            hash=hash_secret("rpa_LIMITED"),
            requests_per_minute=2,
            tokens_per_minute=100_000,
        )
    )
    await rig.directory.refresh()
    rig.open_worker()
    return rig


async def test_answers_say_what_is_left_of_a_keys_limits_and_refusals_when_to_come_back(limited):
    seen = []
    for _ in range(3):
        answer = await limited.client.post(CHAT, json=BODY, headers=LIMITED)
        seen.append((answer.status_code, answer.headers.get("x-ratelimit-remaining-requests")))
    assert seen == [(200, "1"), (200, "0"), (429, "0")]
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
    unlimited = await limited.client.post(CHAT, json=BODY)
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


async def test_so_do_errors_of_another_kind(limited):
    limited.slots.drop_worker("w1")
    limited.slots.open_worker(
        "ep", "dead", capacity=1, registration=Registration(engine=Address(url="unix:/nowhere"))
    )
    body = BODY | {"guided_regex": "a"}
    answer = await limited.client.post(CHAT, json=body, headers=LIMITED)
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (400, "1")


async def test_a_stream_has_the_headers_too_and_real_tokens_count_in_the_end(limited):
    async with limited.client.stream("POST", CHAT, json=BODY | {"stream": True}, headers=LIMITED) as answer:
        assert answer.headers["x-ratelimit-remaining-requests"] == "1"
        await answer.aread()
    row = await limited.row()
    use = limited.key_limits._uses["limited"]
    spent = 100_000 - use.tokens.remaining
    assert spent <= row.tokens_in + row.tokens_out + 1


@pytest.mark.parametrize(
    ("headers", "body"), [({"x-session-id": "s1"}, {}), ({}, {"user": "s1"})], ids=["header", "body"]
)
async def test_the_session_and_priority_of_a_request_reach_whoever_chooses_its_worker(rig, headers, body):
    asks = []
    admit = rig.slots.admit

    def seen(endpoint_id, ask, **more):
        asks.append(ask)
        return admit(endpoint_id, ask, **more)

    rig.slots.admit = seen
    rig.slots.open_worker("ep", "w1", capacity=2, registration=Registration(engine=rig.address))
    sent = BODY | body | {"priority": 3, "max_tokens": 7}
    assert (await rig.client.post(CHAT, json=sent, headers=headers)).status_code == 200
    (ask,) = asks
    assert (ask.session, ask.priority, ask.key_id) == ("s1", 3, "run")
    assert len(ask.prefix()) >= 1
    assert ask.cost >= 14


async def test_a_connection_that_outlives_many_workers_keeps_few_heads(rig):
    """What the requests of a connection have in common is kept with each worker's address."""
    head = Head(
        method="POST", path=CHAT.encode(), query=b"", fields=[], http_11=True, keep_alive=True, expects=False
    )
    key = rig.directory.key(RUN)
    path = "/v1/chat/completions"
    opened = open_request(head, key, "ep", path, directory=rig.directory, limits=rig.limits)
    for number in range(1000):
        address = Address(url=f"unix:/worker-{number}", key=f"k{number}")
        assert f"Bearer k{number}\r\n".encode() in opened.request_head(address, traced=False)
    assert len(opened._heads) <= 64


async def test_the_id_of_the_client_is_shown_everywhere_also_when_it_is_refused(rig):
    rig.open_worker()
    answer = await rig.client.post(CHAT, json=BODY, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    row = await rig.row()
    assert (row.client_id, row.id == "mine-1") == ("mine-1", False)
    sent = {name.lower(): value for name, value in rig.engine.requests[0][2].items()}
    assert sent["x-request-id"] == f"mine-1-{row.id}"
    refused = await rig.client.post(
        CHAT, json=BODY, headers={"x-request-id": "mine-2", "authorization": "Bearer nobody"}
    )
    assert (refused.status_code, refused.headers["x-request-id"]) == (401, "mine-2")
    assert json.loads(refused.content)["error"]["code"] == "invalid_api_key"
