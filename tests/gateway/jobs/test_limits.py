"""What is refused because it is too much (serverless-api.md §2.13, §2.14).

Sizes of bodies, queue bounds, and the profile `runpod`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace

import pytest

from pilotlight.core.rate_limits import RUNPOD_LIMITS, OperationGroup
from pilotlight.domain.usage import Outcome
from pilotlight.gateway.errors import QueueFullError, RateLimitedError
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.openai_rates import LimitedOpenAI

ERROR_KEYS = {"error", "detail"}


def refused(answer):
    assert answer.status_code == 429
    assert answer.json().keys() == ERROR_KEYS
    assert answer.json()["error"].startswith("rate limit exceeded")
    return int(answer.headers["retry-after"])


MIB = 1_048_576


def body_of(size):
    """A submission of exactly that many bytes."""
    frame = b'{"input":"%b"}'
    return frame % (b"x" * (size - len(frame) + 2))


@pytest.mark.parametrize(("verb", "megabytes"), [("/run", 10), ("/runsync", 20), ("/run_sync", 20)])
async def test_sizes_of_submissions(platform, monkeypatch, verb, megabytes):
    """§2.4, §2.5, §2.13, §12 items 7 and 8: MiB, of which the last byte is accepted, and 400 beyond."""
    wait = platform.service.wait
    monkeypatch.setattr(
        platform.service, "wait", lambda *jobs, timeout_s, gone: wait(*jobs, timeout_s=0, gone=gone)
    )
    answer = await platform.call("POST", verb, content=body_of(megabytes * MIB))
    assert (answer.status_code, answer.json()["status"]) == (200, "IN_QUEUE")
    answer = await platform.call("POST", verb, content=body_of(megabytes * MIB + 1))
    text = f"request body exceeds {megabytes} MB limit"
    assert answer.status_code == 400
    assert answer.json() == {"error": text, "detail": text, "code": "payload_too_large"}
    assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 1


async def test_queue_of_jobs_is_bounded_for_all_at_once(make_platform):
    """§2.14: however many come together, no more are taken than fit."""
    async with make_platform(limits={"queue_jobs": 10}) as platform:
        calls = [platform.call("POST", "/run", json={"input": 1}) for _ in range(30)]
        answers = await asyncio.gather(*calls)
        assert sorted(answer.status_code for answer in answers) == [*[200] * 10, *[429] * 20]
        assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 10
        assert [row.outcome for row in platform.records] == [Outcome.SHED] * 20


async def test_queue_of_bytes_is_bounded(make_platform):
    """Many jobs or large ones: the disk is bounded, too."""
    async with make_platform(limits={"queue_bytes": 1000}) as platform:
        platform.fleet.add(capacity=1)
        body = {"input": "x" * 598}
        await platform.run(body)
        answer = await platform.call("POST", "/run", json=body)
        assert refused(answer) == 5
        assert "1000 bytes" in answer.json()["error"]
        await platform.run({"input": "x" * 300})
        job_id = (await platform.take()).json()["id"]
        await platform.done(job_id, {"output": 1})
        await platform.run(body)


async def test_retry_after_comes_from_how_fast_the_queue_moves(make_platform):
    """Five seconds when nothing is known, else what the last ten seconds say."""
    async with make_platform(limits={"queue_jobs": 2}) as platform:
        platform.fleet.add(capacity=1)
        for _ in range(2):
            job_id = await platform.run()
            await platform.take()
            await platform.done(job_id, {"output": 1})
        await platform.run()
        await platform.run()
        # One must leave, and two have ended in ten seconds.
        assert refused(await platform.call("POST", "/run", json={"input": 1})) == 5
        with pytest.raises(QueueFullError) as caught:
            await platform.service.bounds.reserve(platform.endpoint, 2, 10)
        assert caught.value.retry_after_s == 10
        platform.clock.advance(60)
        assert refused(await platform.call("POST", "/run", json={"input": 1})) == 5


async def test_retry_after_of_a_queue_that_waits_for_a_worker_is_when_there_will_be_one(make_platform):
    async with make_platform(limits={"queue_jobs": 1}) as platform:
        platform.estimates[platform.endpoint.id] = 21_400
        await platform.run()
        assert refused(await platform.call("POST", "/run", json={"input": 1})) == 22
        platform.fleet.add(capacity=1)
        assert refused(await platform.call("POST", "/run", json={"input": 1})) == 5


async def test_retry_counts_against_the_bound(make_platform):
    """§2.15: a job that is queued again is one more in the queue."""
    async with make_platform(limits={"queue_jobs": 1}) as platform:
        platform.fleet.add(capacity=1)
        job_id = await platform.run()
        await platform.take()
        await platform.done(job_id, {"error": "boom"})
        await platform.run()
        refused(await platform.call("POST", f"/retry/{job_id}"))
        assert (await platform.status(job_id))["status"] == "FAILED"


async def test_other_gateways_fill_the_same_queue(make_platform):
    """The room that is left is asked for again every second: not only this process submits."""
    async with make_platform(limits={"queue_jobs": 2}) as platform:
        first = await platform.run()
        stored = await platform.store.job(first)
        other = type(stored)(
            id="other-u1", endpoint_id="ep1", input=b"1", input_bytes=1, created_ms=stored.created_ms,
            queued_ms=stored.queued_ms, expires_ms=stored.expires_ms, execution_timeout_ms=1, retention_ms=1,
        )  # fmt: skip
        await platform.store.submit(other)
        platform.clock.advance(1)
        refused(await platform.call("POST", "/run", json={"input": 1}))


# The profile


@pytest.fixture
async def limited(make_platform):
    async with make_platform(
        limits={"profile": "runpod"}, jobs={"take_hold_s": 1, "stop_hold_s": 1}
    ) as platform:
        platform.clock.freeze()
        yield platform


async def test_request_1001_on_run(limited):
    """§13 item 12: 429 with Retry-After, and free again when ten seconds are over."""
    for _ in range(20):
        calls = [limited.call("POST", "/run", json={"input": 1}) for _ in range(50)]
        assert {answer.status_code for answer in await asyncio.gather(*calls)} == {200}
    answer = await limited.call("POST", "/run", json={"input": 1})
    assert 1 <= refused(answer) <= 10
    assert "1000 requests in 10 s to run" in answer.json()["error"]
    # Other operations, other keys and other endpoints have counts of their own.
    assert (await limited.call("GET", "/health")).status_code == 200
    assert (await limited.call("POST", "/run", key="rpa_RUNNER", json={"input": 1})).status_code == 200
    assert (await limited.call("POST", "/run", endpoint="ep2", json={"input": 1})).status_code == 200
    limited.clock.advance(10.2)
    assert (await limited.call("POST", "/run", json={"input": 1})).status_code == 200


async def test_profile_is_off_by_default(platform):
    """§2.14: limits may be switched off; ours are until somebody wants them."""
    for _ in range(5):
        assert (await platform.call("POST", "/purge-queue")).status_code == 200


async def test_purge_twice_in_ten_seconds(limited):
    """§2.2 row 8."""
    statuses = [(await limited.call("POST", "/purge-queue")).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


async def test_ten_requests_in_ten_seconds(limited):
    """§2.2 row 10, its first number."""
    for _ in range(10):
        assert (await limited.call("GET", "/requests")).status_code == 200
    refused(await limited.call("GET", "/requests"))


GROUPS = {
    ("POST", "/run"): OperationGroup.RUN,
    ("POST", "/runsync"): OperationGroup.RUNSYNC,
    ("POST", "/run_sync"): OperationGroup.RUNSYNC,
    ("GET", "/status/x"): OperationGroup.READ,
    ("POST", "/status/x"): OperationGroup.READ,
    ("GET", "/status-sync/x"): OperationGroup.READ,
    ("POST", "/status-sync/x"): OperationGroup.READ,
    ("GET", "/stream/x"): OperationGroup.READ,
    ("POST", "/stream/x"): OperationGroup.READ,
    ("POST", "/cancel/x"): OperationGroup.CANCEL,
    ("POST", "/retry/x"): OperationGroup.RETRY,
    ("POST", "/purge-queue"): OperationGroup.PURGE,
    ("GET", "/health"): OperationGroup.HEALTH,
    ("GET", "/requests"): OperationGroup.REQUESTS,
    ("POST", "/batch"): OperationGroup.BATCH,
    ("GET", "/batch"): OperationGroup.BATCH,
    ("GET", "/batch/x"): OperationGroup.BATCH,
    ("PUT", "/batch/x"): OperationGroup.BATCH,
    ("POST", "/batch/x/requests"): OperationGroup.BATCH,
    ("GET", "/batch/x/requests"): OperationGroup.BATCH,
    ("POST", "/batch/x/finalize"): OperationGroup.BATCH,
    ("POST", "/batch/x/cancel"): OperationGroup.BATCH,
    ("DELETE", "/batch/x/requests/y"): OperationGroup.BATCH,
}
"""Each route of §2.2 and what it is counted with."""


@pytest.mark.parametrize("group", [*dict.fromkeys(GROUPS.values())])
async def test_which_routes_share_a_count(limited, group):
    """§2.2: routes 3, 4 and 5 have one bucket, `run_sync` is `runsync`, and every other row has its own.

    As many requests of one group are under way as may be at once (§2.2, the second number); with
    `/purge-queue`, which has no such number, as many as may come in 10 s.
    """
    limit = RUNPOD_LIMITS[group]
    with contextlib.ExitStack() as under_way:
        for _ in range(limit.concurrent or limit.requests):
            under_way.enter_context(limited.service.rates.admitted(group, limited.endpoint, limited.key))
        how = (
            f"{limit.requests} requests in 10 s"
            if limit.concurrent is None
            else f"{limit.concurrent} requests at once"
        )
        for (method, path), its_group in GROUPS.items():
            answer = await limited.call(method, path, content=b"[1]")
            if its_group is group:
                refused(answer)
                assert f"rate limit exceeded: {how} to {group} of endpoint ep1" in answer.json()["error"]
            else:
                assert answer.status_code != 429, path


async def test_a_key_with_a_limit_of_its_own_may_submit_so_many_jobs_and_ask_for_them_as_often_as_it_likes(
    platform,
):
    await platform.store.update_key(replace(platform.key, requests_per_minute=2))
    await platform.directory.refresh()
    for verb in ("/run", "/runsync?wait=1000"):
        assert (await platform.call("POST", verb, json={"input": 1})).status_code == 200
    job = (await platform.call("GET", "/requests")).json()["requests"][0]["id"]
    for verb in ("/run", "/runsync"):
        answer = await platform.call("POST", verb, json={"input": 1})
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 30
        assert answer.json()["error"].startswith(f"rate limit reached for key {platform.key.id}: 2 requests")
    assert (await platform.call("GET", f"/status/{job}")).status_code == 200
    assert [row.outcome for row in platform.records if row.status == 429] == [Outcome.REJECTED] * 2


@pytest.mark.parametrize("requests", [1999, 2000])
async def test_status_and_stream_fill_one_bucket(limited, requests):
    """§2.2 rows 3 to 5: 2000 in 10 s, all together."""
    for _ in range(requests):
        with limited.service.rates.admitted(OperationGroup.READ, limited.endpoint, limited.key):
            pass
    job_id = (await limited.call("POST", "/run", json={"input": 1})).json()["id"]
    first, second = [
        await limited.call("GET", f"/{verb}/{job_id}?wait=1000") for verb in ("status", "stream")
    ]
    if requests == 2000:
        assert 1 <= refused(first) <= 10
    else:
        assert first.status_code == 200
    refused(second)


async def test_requests_that_are_held_count_at_once(limited):
    """§2.2: the second number; the 21st of twenty cancels under way is refused."""
    table = RateTable(limited.clock, limited.fleet)
    held = [table.admitted(OperationGroup.CANCEL, limited.endpoint, limited.key) for _ in range(21)]
    for one in held[:20]:
        one.__enter__()
    with pytest.raises(RateLimitedError, match="20 requests at once to cancel"):
        held[20].__enter__()
    held[0].__exit__(None, None, None)
    with table.admitted(OperationGroup.CANCEL, limited.endpoint, limited.key):
        pass


async def test_running_workers_raise_the_limit(limited):
    """§2.14: five running workers with 20 each are no more than 100, six are."""
    table = RateTable(limited.clock, limited.fleet)

    def ask():
        with table.admitted(OperationGroup.CANCEL, limited.endpoint, limited.key):
            pass

    for _ in range(100):
        ask()
    with pytest.raises(RateLimitedError):
        ask()
    for number in range(6):
        limited.fleet.add(f"w{number}", capacity=1)
    for _ in range(20):
        ask()
    with pytest.raises(RateLimitedError):
        ask()


async def test_table_forgets_who_asks_no_more(limited):
    """Memory is bounded by what was asked in the last ten seconds."""
    table = RateTable(limited.clock, limited.fleet)
    for group in OperationGroup:
        with table.admitted(group, limited.endpoint, limited.key):
            pass
    assert len(table) == len(OperationGroup)
    limited.clock.advance(11)
    with table.admitted(OperationGroup.RUN, limited.directory.endpoint("ep2"), limited.key):
        assert len(table) == 1


async def test_queue_limit_of_the_profile(limited):
    """§2.14, §12 item 30: more than 50 jobs and 500 for each worker (here none: paused)."""
    for _ in range(51):
        answer = await limited.call("POST", "/run", endpoint="ep2", json={"input": 1})
        assert answer.status_code == 200
    answer = await limited.call("POST", "/run", endpoint="ep2", json={"input": 1})
    refused(answer)
    assert "51 jobs" in answer.json()["error"]


async def test_batch_routes_have_a_limit_of_their_own(limited):
    """§2.2 row 12: 100 in ten seconds."""
    for _ in range(100):
        assert (await limited.call("GET", "/batch")).status_code == 200
    answer = await limited.call("GET", "/batch")
    refused(answer)
    assert "100 requests in 10 s to batch" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_openai_routes_are_limited_in_their_own_words(limited, path):
    """§2.2 row 11: 400 at once; who has no key is left to the road behind."""
    inside, entered, leave = 0, asyncio.Event(), asyncio.Event()
    sent = []

    async def road(scope, receive, send, *, endpoint_id, path):
        nonlocal inside
        inside += 1
        if inside == 400:
            entered.set()
        await leave.wait()

    async def send(event):
        sent.append(event)

    def call(key):
        scope = {"type": "http", "headers": [(b"authorization", key)]}
        return front(scope, None, send, endpoint_id="ep1", path=path)

    front = LimitedOpenAI(road, RateTable(limited.clock, limited.fleet), limited.directory)
    async with asyncio.TaskGroup() as group:
        for _ in range(400):
            group.create_task(call(b"rpa_ADMIN"))
        await entered.wait()
        await call(b"Bearer rpa_ADMIN")
        assert inside == 400
        head, body = sent
        assert head["status"] == 429
        assert dict(head["headers"])[b"retry-after"] == b"1"
        assert json.loads(body["body"])["error"]["type"] == "rate_limit_error"
        group.create_task(call(b"rpa_UNKNOWN"))
        leave.set()
    assert inside == 401
