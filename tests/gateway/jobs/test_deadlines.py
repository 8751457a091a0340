"""What the reaper makes the job service do: timeouts, unconfirmed hand-outs, workers that will not let go.

A bare § is one of serverless-api.md (§2.10, §2.11, §12 items 1, 3 and 4).
"""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Failure
from pilotlight.ports.fleet import Health

NO_FIT = Failure(kind="out_of_memory", cause="900 GiB are too much", advice="less", line="not for callers")


async def test_execution_timeout_fails_the_job_and_stops_it(platform):
    """serverless-api.md §2.10, §12 item 1."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": 1, "policy": {"executionTimeout": 5000}})
    await platform.take()
    await platform.ping(job_id)
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    platform.clock.advance(6)
    await platform.service.end_overdue()
    job = await platform.status(job_id)
    assert (job["status"], job["error"]) == ("FAILED", "executionTimeout exceeded")
    assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).json() == {"jobsToStop": [job_id]}
    assert platform.slots.worker("w1").free == 1


async def test_ttl_of_a_queued_job_leaves_a_record(platform):
    """§12 item 3; a caller that waits is told."""
    job_id = await platform.run({"input": 1, "policy": {"ttl": 10_000}})
    call = asyncio.create_task(platform.call("GET", f"/status-sync/{job_id}"))
    await platform.watched()
    platform.clock.advance(11)
    await platform.service.end_overdue()
    assert (await call).json()["status"] == "TIMED_OUT"
    assert platform.records[-1].outcome is Outcome.TIMED_OUT


@pytest.mark.parametrize(
    ("health", "why"),
    [
        (Health(), ""),
        (
            Health(failures=2, failure=NO_FIT),
            ": no worker could be started: 900 GiB are too much (out_of_memory: less)",
        ),
        (Health(throttled="every GPU is taken"), ": every GPU is taken"),
        (Health(failure=NO_FIT), ""),
    ],
)
async def test_a_job_that_no_worker_could_be_started_for_says_why(platform, health, why):
    """vllm-worker.md §7 start failure: class, cause and advice are in the job's error, too."""
    job_id = await platform.run({"input": 1, "policy": {"ttl": 10_000}})
    platform.fleet.state = health
    platform.clock.advance(11)
    await platform.service.end_overdue()
    job = await platform.status(job_id)
    assert (job["status"], job["error"]) == ("TIMED_OUT", f"job exceeded its time to live{why}")


async def test_ttl_of_a_running_job_removes_it(platform):
    """§12 item 4: 404 at once, the worker is stopped."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": 1, "policy": {"ttl": 10_000}})
    await platform.take()
    platform.clock.advance(11)
    await platform.service.end_overdue()
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 404
    assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).json() == {"jobsToStop": [job_id]}


async def test_unconfirmed_hand_out_goes_back(platform):
    """worker-protocol.md §8: six seconds without a sign; a confirmed one stays."""
    platform.fleet.add("w1", capacity=2)
    platform.fleet.add("w2", capacity=1)
    ids = [await platform.run() for _ in range(2)]
    await platform.take(batch=2)
    await platform.ping(ids[0])
    await platform.pass_time(7)
    first, second = [await platform.store.job(job_id) for job_id in ids]
    assert (first.status, second.status, second.retries) == ("IN_PROGRESS", "IN_QUEUE", 1)
    assert platform.slots.worker("w1").jobs == 1
    assert (await platform.take("w2")).json()["id"] == ids[1]


async def test_worker_that_does_not_let_go_is_ended(platform):
    """worker-protocol.md §8: two heartbeats after the signal, with nothing else in hand."""
    platform.fleet.add(capacity=2)
    ids = [await platform.run() for _ in range(2)]
    await platform.take(batch=2)
    await platform.ping(*ids)
    await platform.call("POST", f"/cancel/{ids[0]}")
    platform.clock.advance(5)
    await platform.ping(*ids)
    await platform.service.kill_stuck()
    assert platform.fleet.killed == []
    await platform.done(ids[1], {"output": 1})
    await platform.service.kill_stuck()
    await platform.fleet.changed.wait()
    assert [worker_id for worker_id, _ in platform.fleet.killed] == ["w1"]
    assert ids[0] in platform.fleet.killed[0][1]


async def test_worker_that_lets_go_lives(platform):
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.ping(job_id)
    await platform.call("POST", f"/cancel/{job_id}")
    await platform.ping()
    platform.clock.advance(60)
    await platform.service.kill_stuck()
    assert platform.fleet.killed == []


async def test_worker_with_requests_of_the_data_path_is_not_ended(platform):
    platform.fleet.add(capacity=2)
    job_id = await platform.run()
    await platform.take()
    await platform.ping(job_id)
    platform.slots.worker("w1").requests = 1
    await platform.call("POST", f"/cancel/{job_id}")
    platform.clock.advance(60)
    await platform.service.kill_stuck()
    assert platform.fleet.killed == []


async def test_ttl_without_tombstones(make_platform):
    """§12 item 3: `ttl_tombstone=false` gives the strict 404, also to who waits and to `/retry`."""
    async with make_platform(jobs={"ttl_tombstone": False}) as platform:
        job_id = await platform.run(
            {"input": 1, "policy": {"ttl": 10_000}, "webhook": "https://example.com/"}
        )
        call = asyncio.create_task(platform.call("GET", f"/status-sync/{job_id}"))
        await platform.watched()
        platform.clock.advance(11)
        await platform.service.end_overdue()
        assert (await call).status_code == 404
        for method, verb in (("GET", "status"), ("POST", "retry"), ("GET", "stream")):
            assert (await platform.call(method, f"/{verb}/{job_id}")).status_code == 404
        assert (await platform.call("GET", "/requests")).json()["requests"] == []
        (delivery,) = await platform.store.due_webhooks(now_ms=platform.clock.now_ms() + 1)
        assert b'"TIMED_OUT"' in delivery.body


async def test_ttl_of_a_queued_job_is_told_by_webhook_and_forgotten_in_time(platform):
    """§12 item 3: a TIMED_OUT record for the retention time, the webhook, then 404."""
    job_id = await platform.run({"input": 1, "policy": {"ttl": 10_000}, "webhook": "https://example.com/"})
    platform.clock.advance(11)
    await platform.service.end_overdue()
    job = await platform.status(job_id)
    assert (job["status"], job.keys()) == ("TIMED_OUT", {"id", "status", "error"})
    (delivery,) = await platform.store.due_webhooks(now_ms=platform.clock.now_ms() + 1)
    assert b'"TIMED_OUT"' in delivery.body
    platform.clock.advance(1801)
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 404


async def test_ttl_while_running_is_told_by_webhook_although_the_job_is_gone(platform):
    """§12 item 4: removed at once, also for who waits; a TIMED_OUT webhook avoids silent loss."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": 1, "policy": {"ttl": 10_000}, "webhook": "https://example.com/"})
    await platform.take()
    calls = [
        asyncio.create_task(platform.call("GET", f"/{verb}/{job_id}?wait=300000"))
        for verb in ("status-sync", "stream")
    ]
    await platform.watched(2)
    platform.clock.advance(11)
    await platform.service.end_overdue()
    assert [(await call).status_code for call in calls] == [404, 404]
    (delivery,) = await platform.store.due_webhooks(now_ms=platform.clock.now_ms() + 1)
    assert b'"TIMED_OUT"' in delivery.body
    assert (await platform.done(job_id, {"output": "late"})).status_code in {200, 404}
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 404
    assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 404


async def test_execution_timeout_is_per_attempt_and_its_policy_wins(platform):
    """§2.11: the request's value overrides the endpoint's, and each attempt has its own time."""
    platform.fleet.add("w1", capacity=1)
    platform.fleet.add("w2", capacity=1)
    job_id = await platform.run({"input": 1, "policy": {"executionTimeout": 10_000}})
    await platform.take("w1")
    platform.clock.advance(8)
    await platform.fleet.end("w1", "exit status 1")
    await platform.take("w2")
    platform.clock.advance(8)
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    platform.clock.advance(3)
    await platform.service.end_overdue()
    job = await platform.status(job_id)
    assert (job["status"], job["error"], job["retries"]) == ("FAILED", "executionTimeout exceeded", 1)
    assert 11_000 <= job["executionTime"] < 60_000


async def test_worker_that_ignores_the_stop_after_a_timeout_is_ended(platform):
    """§2.10: the job FAILED, and a worker that goes on with it is stopped.

    1. The job runs too long; it fails and the worker is told to stop it.
    2. The worker goes on and says so with every heartbeat.
    3. Two heartbeats later it is ended; the job stays FAILED, without a second run.
    """
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": 1, "policy": {"executionTimeout": 5000}})
    await platform.take()
    await platform.ping(job_id)
    platform.clock.advance(6)
    await platform.ping(job_id)
    await platform.service.end_overdue()
    assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).json() == {"jobsToStop": [job_id]}
    platform.clock.advance(5)
    await platform.ping(job_id)
    await platform.service.kill_stuck()
    await platform.fleet.changed.wait()
    assert [worker_id for worker_id, _ in platform.fleet.killed] == ["w1"]
    job = await platform.status(job_id)
    assert (job["status"], job["error"]) == ("FAILED", "executionTimeout exceeded")
    assert "retries" not in job


async def test_worker_with_other_work_gets_nothing_new_and_is_ended_after_it(platform):
    """§2.10: a handler that never returns is not kept alive by the other work of its worker."""
    platform.fleet.add(capacity=2)
    stuck = await platform.run({"input": 1, "policy": {"executionTimeout": 5000}})
    other = await platform.run()
    await platform.take(batch=2)
    await platform.ping(stuck, other)
    platform.clock.advance(6)
    await platform.service.end_overdue()
    platform.clock.advance(40)
    await platform.ping(stuck, other)
    await platform.service.kill_stuck()
    await platform.fleet.changed.wait()
    platform.fleet.changed.clear()
    assert platform.fleet.killed == []
    assert [worker_id for worker_id, _ in platform.fleet.drained] == ["w1"]
    late = await platform.run()
    assert (await platform.take(holding=True)).status_code == 204
    await platform.done(other, {"output": 1})
    await platform.ping(stuck)
    await platform.service.kill_stuck()
    await platform.fleet.changed.wait()
    assert [worker_id for worker_id, _ in platform.fleet.killed] == ["w1"]
    assert (await platform.status(late))["status"] == "IN_QUEUE"
