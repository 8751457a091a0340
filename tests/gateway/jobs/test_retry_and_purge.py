"""`/retry`, `/purge-queue` and `/requests` (serverless-api.md §2.15), and deadlines around them (§12)."""

from __future__ import annotations

import asyncio

import pytest

WEEK_S = 7 * 86_400
S3 = {"accessId": "a", "accessSecret": "b", "bucketName": "c", "endpointUrl": "https://s3.example.com"}


@pytest.fixture(params=["memory", "sqlite"])
async def platform(make_platform, request):
    """The same on every store that a test can have for nothing."""
    holds = {"take_hold_s": 1, "stop_hold_s": 1}
    async with make_platform(jobs=holds, sqlite=request.param == "sqlite") as made:
        yield made


async def fail(platform, job_id, error="boom"):
    assert (await platform.take()).json()["id"] == job_id
    await platform.done(job_id, {"error": error})


async def test_retry_of_a_failed_job(platform):
    """§2.10, §2.15: same id and input, output and error cleared, one more in `retried`, webhook once more."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": {"x": [1]}, "webhook": "https://example.com/"})
    await fail(platform, job_id)
    answer = await platform.call("POST", f"/retry/{job_id}")
    assert (answer.status_code, answer.json()) == (200, {"id": job_id, "status": "IN_QUEUE"})
    assert await platform.status(job_id) == {"id": job_id, "status": "IN_QUEUE"}
    assert (await platform.take()).json() == {"id": job_id, "input": {"x": [1]}}
    await platform.done(job_id, {"output": 2})
    assert (await platform.status(job_id))["output"] == 2
    health = (await platform.call("GET", "/health")).json()["jobs"]
    assert (health["retried"], health["completed"], health["failed"]) == (1, 1, 1)
    due = await platform.store.due_webhooks(now_ms=platform.clock.now_ms() + 1)
    assert len({delivery.id for delivery in due}) == 2
    assert [record.id for record in platform.records] == [job_id, f"{job_id}.2"]


async def test_retry_wakes_a_worker_that_polls(platform):
    """§2.15: the job goes to a take that is parked already."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await fail(platform, job_id)
    take = asyncio.create_task(platform.take())
    await platform.parked()
    await platform.call("POST", f"/retry/{job_id}")
    assert (await take).json()["id"] == job_id


async def test_retry_gives_a_new_time_to_live(platform):
    """§2.10: a window as long as the first one, counted from the retry; TIMED_OUT may be retried."""
    job_id = await platform.run({"input": 1, "policy": {"ttl": 20_000}})
    platform.clock.advance(21)
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["status"] == "TIMED_OUT"
    assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 200
    platform.clock.advance(15)
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    job = await platform.store.job(job_id)
    assert 19_000 <= job.expires_ms - job.queued_ms <= 20_000


@pytest.mark.parametrize("lost", [False, True])
async def test_every_retry_gives_the_same_time_to_live(platform, lost):
    """§2.10: `ttl` 20 s is 20 s after the first, second and third retry, also when a worker was lost in between.

    It was counted from the submission, so it grew with each retry.
    """
    platform.clock.freeze()
    job_id = await platform.run({"input": 1, "policy": {"ttl": 20_000}})
    for number in range(1, 4):
        platform.clock.advance(5)
        if lost:
            platform.fleet.add(f"lost{number}", capacity=1)
            await platform.take(f"lost{number}")
            await platform.fleet.end(f"lost{number}")
            platform.clock.advance(5)
        worker = f"w{number}"
        platform.fleet.add(worker, capacity=1)
        assert (await platform.take(worker)).json()["id"] == job_id
        await platform.done(job_id, {"error": "boom"}, worker)
        platform.clock.advance(1000)
        assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 200
        job = await platform.store.job(job_id)
        assert job.expires_ms - platform.clock.now_ms() == 20_000
    platform.clock.advance(19)
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    platform.clock.advance(2)
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["status"] == "TIMED_OUT"


async def test_time_to_live_of_a_job_that_timed_out_in_the_queue_again_and_again(platform):
    """§2.10: TIMED_OUT may be retried, as often as the record is there, each time for as long."""
    platform.clock.freeze()
    job_id = await platform.run({"input": 1, "policy": {"ttl": 20_000}})
    for _ in range(3):
        platform.clock.advance(21)
        await platform.service.end_overdue()
        platform.clock.advance(100)
        assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 200
        job = await platform.store.job(job_id)
        assert job.expires_ms - platform.clock.now_ms() == 20_000


async def test_retry_window_is_never_longer_than_a_time_to_live_may_be(platform):
    job_id = await platform.run({"input": 1, "policy": {"ttl": WEEK_S * 1000}})
    platform.clock.advance(WEEK_S + 1)
    await platform.service.end_overdue()
    await platform.call("POST", f"/retry/{job_id}")
    platform.clock.advance(WEEK_S + 1)
    await platform.service.end_overdue()
    assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 200
    job = await platform.store.job(job_id)
    assert job.expires_ms - job.queued_ms <= WEEK_S * 1000


@pytest.mark.parametrize("status", ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"])
async def test_what_did_not_fail_is_not_retried(platform, status):
    """§2.14, §13 item 3: no way out of COMPLETED or CANCELLED."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    if status == "CANCELLED":
        await platform.call("POST", f"/cancel/{job_id}")
    elif status != "IN_QUEUE":
        await platform.take()
    if status == "COMPLETED":
        await platform.done(job_id, {"output": 1})
    answer = await platform.call("POST", f"/retry/{job_id}")
    text = f"job cannot be retried in status {status}"
    assert (answer.status_code, answer.json()) == (400, {"error": text, "detail": text})
    assert (await platform.status(job_id))["status"] == status


async def test_retry_of_a_job_whose_credentials_are_gone(platform):
    """§2.3: s3Config is deleted at the end, so the job would have nowhere to put its result."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": 1, "s3Config": S3})
    await fail(platform, job_id)
    answer = await platform.call("POST", f"/retry/{job_id}")
    assert answer.status_code == 400
    assert "submit it again" in answer.json()["error"]
    assert (await platform.status(job_id))["status"] == "FAILED"


async def test_retry_after_the_record_has_expired(platform):
    """§2.15: only before the record expires; §2.14: 404 job not found."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await fail(platform, job_id)
    platform.clock.advance(1801)
    for wanted in (job_id, "unknown-u1"):
        answer = await platform.call("POST", f"/retry/{wanted}")
        assert (answer.status_code, answer.json()["error"]) == (404, "job not found")


async def test_two_retries_at_once_make_one(platform):
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await fail(platform, job_id)
    calls = [platform.call("POST", f"/retry/{job_id}") for _ in range(5)]
    assert sorted(answer.status_code for answer in await asyncio.gather(*calls)) == [200, *[400] * 4]


async def test_retry_of_a_paused_endpoint_says_so(platform):
    """§12 item 40."""
    answer = await platform.call("POST", "/run", endpoint="ep2", json={"input": 1, "policy": {"ttl": 10_000}})
    platform.clock.advance(11)
    await platform.service.end_overdue()
    again = await platform.call("POST", f"/retry/{answer.json()['id']}", endpoint="ep2")
    assert again.headers["x-endpoint-paused"] == "1"


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"anything"])
@pytest.mark.parametrize("headers", [{}, {"content-type": "application/json"}])
@pytest.mark.parametrize("verb", ["cancel", "retry", "purge-queue"])
async def test_routes_without_a_payload_take_any(platform, verb, content, headers):
    """§2.1: Go sends nothing, JavaScript `{}`, Python no body; slashes may be doubled and trailing."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    if verb == "retry":
        await fail(platform, job_id)
    path = f"//{verb}/" if verb == "purge-queue" else f"//{verb}//{job_id}/"
    answer = await platform.call("POST", path, content=content, headers=headers)
    assert answer.status_code == 200, answer.text


async def test_purge(platform):
    """§2.15: only what is queued; idempotent; §12 item 16: 404 afterwards, webhook CANCELLED."""
    platform.fleet.add(capacity=1)
    running = await platform.run()
    await platform.take()
    queued = [await platform.run({"input": n, "webhook": "https://example.com/"}) for n in range(3)]
    assert (await platform.call("POST", "/purge-queue")).json() == {"removed": 3, "status": "completed"}
    assert (await platform.call("POST", "/purge-queue")).json() == {"removed": 0, "status": "completed"}
    assert [(await platform.call("GET", f"/status/{job_id}")).status_code for job_id in queued] == [404] * 3
    assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 0
    await platform.done(running, {"output": 1})
    assert (await platform.status(running))["status"] == "COMPLETED"
    later = await platform.run()
    assert (await platform.take()).json()["id"] == later
    while await platform.store.delete_purged(now_ms=platform.clock.now_ms(), limit=2):
        pass
    due = await platform.store.due_webhooks(now_ms=platform.clock.now_ms() + 1)
    assert {delivery.job_id for delivery in due} == set(queued)
    assert all(b'"CANCELLED"' in delivery.body for delivery in due)


@pytest.mark.parametrize("verb", ["status-sync", "stream"])
async def test_purge_answers_who_waits(platform, verb):
    """§12 item 16: a waiting caller learns at once that the job is gone."""
    job_id = await platform.run()
    call = asyncio.create_task(platform.call("GET", f"/{verb}/{job_id}?wait=300000"))
    await platform.watched()
    await platform.call("POST", "/purge-queue")
    assert (await call).status_code == 404


async def test_purged_jobs_cannot_be_cancelled_or_retried(platform):
    job_id = await platform.run()
    await platform.call("POST", "/purge-queue")
    for verb in ("cancel", "retry", "stream", "status-sync"):
        answer = await platform.call("POST", f"/{verb}/{job_id}")
        assert (answer.status_code, answer.json()["error"]) == (404, "job not found")


@pytest.mark.parametrize("job_id", ["a%00b", "%FF", "..", "x" * 101, "%F0%9F%98%80"])
async def test_what_cannot_be_an_id_is_nobodys(platform, job_id):
    """§1, §2.14: 404 without asking a store that might choke on it."""
    for method, verb in (("GET", "status"), ("POST", "cancel"), ("POST", "retry"), ("GET", "stream")):
        answer = await platform.call(method, f"/{verb}/{job_id}")
        assert answer.status_code == 404, answer.text


async def test_purge_makes_room(make_platform):
    async with make_platform(limits={"queue_jobs": 1}) as platform:
        await platform.run()
        assert (await platform.call("POST", "/run", json={"input": 1})).status_code == 429
        await platform.call("POST", "/purge-queue")
        await platform.run()


# /requests


async def test_requests_lists_the_newest_first(platform):
    """§2.15, §12 item 28: shape."""
    platform.fleet.add(capacity=1)
    done = await platform.run()
    await platform.take()
    await platform.done(done, {"output": 1})
    platform.clock.advance(1)
    queued = await platform.run()
    answer = (await platform.call("GET", "/requests")).json()
    assert answer["cursor"] is None
    first, second = answer["requests"]
    assert first == {"id": queued, "status": "IN_QUEUE", "createdAt": first["createdAt"], "retries": 0}
    assert second.keys() == {
        "id", "status", "createdAt", "completedAt", "delayTime", "executionTime", "workerId", "retries",
    }  # fmt: skip
    assert first["createdAt"].endswith("Z")
    assert second["createdAt"] <= second["completedAt"] < first["createdAt"]


async def test_pages_are_stable_while_jobs_come_and_end(platform):
    """§2.15: `limit`, `cursor`; nothing is shown twice or left out."""
    ids = []
    for _ in range(7):
        ids.append(await platform.run())
        platform.clock.advance(0.01)
    seen, cursor = [], ""
    while cursor is not None:
        page = (await platform.call("GET", "/requests", params={"limit": 3, "cursor": cursor})).json()
        seen += [entry["id"] for entry in page["requests"]]
        cursor = page["cursor"]
        await platform.run()
        await platform.call("POST", f"/cancel/{ids[0]}")
        platform.clock.advance(0.01)
    assert seen == ids[::-1]


async def test_fifty_requests_on_a_page_unless_told_otherwise(platform):
    """§2.15: `limit` is 50 by default, and at most 100."""
    for _ in range(101):
        await platform.run()
    for query, length in (("", 50), ("?limit=100", 100), ("?limit=1", 1)):
        page = (await platform.call("GET", f"/requests{query}")).json()
        assert len(page["requests"]) == length
        assert page["cursor"] is not None


async def test_requests_by_status(platform):
    """§2.15."""
    cancelled = await platform.run()
    await platform.run()
    await platform.call("POST", f"/cancel/{cancelled}")
    page = (await platform.call("GET", "/requests?status=CANCELLED")).json()
    assert [entry["id"] for entry in page["requests"]] == [cancelled]
    assert (await platform.call("GET", "/requests?status=FAILED")).json()["requests"] == []
    assert (await platform.call("GET", "/requests", endpoint="ep2")).json()["requests"] == []


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("limit=0", "limit must be an integer between 1 and 100, got '0'"),
        ("limit=101", "limit must be an integer between 1 and 100"),
        ("limit=x", "limit must be an integer"),
        ("status=DONE", "status must be one of IN_QUEUE, IN_PROGRESS, COMPLETED"),
        ("cursor=!!", "cursor must be one that an earlier answer gave"),
        ("cursor=abc", "cursor must be one that an earlier answer gave"),
        ("cursor=%C3%A4", "cursor must be one that an earlier answer gave"),
        ("cursor=MTphAGI", "cursor must be one that an earlier answer gave"),
    ],
)
async def test_bad_queries_of_requests_are_named(platform, query, text):
    answer = await platform.call("GET", f"/requests?{query}")
    assert answer.status_code == 400
    assert text in answer.json()["error"]


async def test_requests_leaves_out_what_has_expired(platform):
    """§2.11: an expired record is unknown everywhere, even while it waits to be deleted."""
    job_id = await platform.run()
    await platform.call("POST", f"/cancel/{job_id}")
    platform.clock.advance(1801)
    assert (await platform.call("GET", "/requests")).json() == {"requests": [], "cursor": None}
