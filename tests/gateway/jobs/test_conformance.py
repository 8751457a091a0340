"""The conformance checklist of serverless-api.md §13, as far as other files do not have it.

Item 11 (webhooks) is in the tests of webhooks, item 12 (rate limits) in `test_limits.py`; item 6 with a real
worker and a clock in `real_sdk`; items 14 and 15 belong to the fleet, item 16 to the management API.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pilotlight.core.placement import HostResources
from pilotlight.domain.worker import Stage, WorkerState
from pilotlight.management.views import v2_workers
from pilotlight.ports.fleet import Health

from .conftest import ADMIN, ENDPOINT

MIB = 1_048_576


async def test_1_submission_is_answered_with_a_thousand_jobs_queued(platform):
    """§13 item 1: the time itself is measured by `pilotlight bench queue`."""
    for _ in range(20):
        await asyncio.gather(*(platform.run() for _ in range(50)))
    answer = await platform.call("POST", "/run", json={"input": 1})
    assert answer.json()["status"] == "IN_QUEUE"
    assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 1001


async def test_2_empty_input_reaches_the_handler(platform):
    """§13 item 2, §2.3: the key `input` is always handed over."""
    platform.fleet.add(capacity=2)
    await platform.run({"input": {}})
    await platform.call("POST", "/run", json={})
    for _ in range(2):
        assert (await platform.take(holding=True)).json()["input"] == {}


async def test_3_terminal_status_comes_once_and_stays(platform):
    """§13 item 3, §2.10: nothing leads out of COMPLETED or CANCELLED, and nothing is done twice."""
    platform.fleet.add(capacity=1)
    completed = await platform.run()
    await platform.take()
    await platform.done(completed, {"output": "first"})
    cancelled = await platform.run()
    await platform.call("POST", f"/cancel/{cancelled}")
    for job_id, status in ((completed, "COMPLETED"), (cancelled, "CANCELLED")):
        await platform.done(job_id, {"output": "second"})
        await platform.done(job_id, {"error": "late"})
        await platform.done(job_id, {"status": "IN_PROGRESS", "output": "later"})
        answer = (await platform.call("POST", f"/cancel/{job_id}")).json()
        assert answer["status"] == status
        assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 400
        assert (await platform.status(job_id))["status"] == status
    assert (await platform.status(completed))["output"] == "first"
    ended = [record.id for record in platform.records]
    assert sorted(ended) == sorted([completed, cancelled])


async def test_4_result_of_25_mb_fails_loudly(platform):
    """§13 item 4, §2.13, §12 item 9."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.done(job_id, b'{"output": "' + b"x" * (25 * MIB) + b'"}')
    job = await platform.status(job_id)
    assert job["status"] == "FAILED"
    assert job["error"].startswith("output exceeds 10 MB limit (got 262")


async def test_5_lost_worker(platform):
    """§13 item 5, §2.10, §12 item 17: one re-dispatch, `retries: 1`, then the documented error."""
    for name in ("w1", "w2"):
        platform.fleet.add(name, capacity=1)
    job_id = await platform.run()
    await platform.take("w1")
    await platform.fleet.end("w1", "killed")
    assert await platform.status(job_id) == {"id": job_id, "status": "IN_QUEUE", "retries": 1}
    await platform.take("w2")
    job = await platform.status(job_id)
    assert (job["status"], job["workerId"], job["retries"]) == ("IN_PROGRESS", "w2", 1)
    await platform.fleet.end("w2", "killed")
    job = await platform.status(job_id)
    assert (job["status"], job["error"], job["retries"]) == (
        "FAILED", "job timed out after 1 retries", 1,
    )  # fmt: skip
    assert (await platform.call("GET", "/health")).json()["jobs"]["retried"] == 1


@pytest.mark.parametrize("retries_max", [0, 3])
async def test_5_number_of_re_dispatches_is_a_setting(make_platform, retries_max):
    """§12 item 17: 0 to 5, and never after the handler's own error."""
    async with make_platform(jobs={"retries_max": retries_max}) as platform:
        job_id = await platform.run()
        for number in range(retries_max + 1):
            platform.fleet.add(f"w{number}", capacity=1)
            await platform.take(f"w{number}")
            await platform.fleet.end(f"w{number}", "killed")
        job = await platform.status(job_id)
        assert (job["status"], job.get("retries", 0)) == ("FAILED", retries_max)
        platform.fleet.add("last", capacity=1)
        failing = await platform.run()
        await platform.take("last")
        await platform.done(failing, {"error": "deterministic"}, worker="last")
        assert "retries" not in await platform.status(failing)


async def test_5_retried_job_goes_to_the_head(platform):
    """§12 item 34: FIFO, and a job that lost its worker before all others."""
    platform.fleet.add("w1", capacity=1)
    platform.fleet.add("w2", capacity=3)
    first = await platform.run()
    await platform.take("w1")
    others = [await platform.run() for _ in range(2)]
    await platform.fleet.end("w1", "killed")
    taken = (await platform.take("w2", batch=3)).json()
    assert [job["id"] for job in taken] == [first, *others]


async def test_6_cancel_reaches_the_worker_and_discards_the_result(platform):
    """§13 item 6, §2.15: told over the stop channel at once; the job stays as it was cancelled."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    poll = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
    answer = (await platform.call("POST", f"/cancel/{job_id}")).json()
    assert answer.keys() == {"id", "status", "delayTime", "executionTime"}
    assert (await asyncio.wait_for(poll, 5)).json() == {"jobsToStop": [job_id]}
    await platform.done(job_id, {"output": "late"})
    job = await platform.status(job_id)
    assert job["status"] == "CANCELLED"
    assert "output" not in job


async def test_7_progress_after_completion_is_ignored(platform):
    """§13 item 7, §2.10."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.done(job_id, {"status": "IN_PROGRESS", "output": "50 %"})
    await platform.done(job_id, {"output": "result"})
    before = await platform.status(job_id)
    await platform.done(job_id, {"status": "IN_PROGRESS", "output": "51 %"})
    assert await platform.status(job_id) == before
    assert before["output"] == "result"


async def test_8_long_stream_in_order_with_the_rest_at_the_end(platform):
    """§13 item 8: nothing lost or out of order, whoever reads when; restarts are in the tests of stores."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    link = platform.fleet.worker("w1")
    seen = []
    for number in range(10_000):
        await platform.service.workers.chunk(link, job_id, b'{"output":%d}' % number, 20)
        if number % 2500 == 1000:
            answer = (await platform.call("GET", f"/stream/{job_id}")).json()
            seen += [chunk["output"] for chunk in answer["stream"]]
    await platform.done(job_id, {"output": []}, stream=True)
    answer = (await platform.call("GET", f"/stream/{job_id}")).json()
    seen += [chunk["output"] for chunk in answer["stream"]]
    assert answer["status"] == "COMPLETED"
    assert seen == list(range(10_000))


async def test_8_stream_over_a_restart(make_platform):
    """§13 item 8: what was read stays read, and what was not comes in order, from the next gateway."""
    async with make_platform(sqlite=True) as first:
        first.fleet.add(capacity=1)
        job_id = await first.run()
        await first.take()
        worker = first.fleet.worker("w1")
        for number in range(300):
            await first.service.workers.chunk(worker, job_id, b'{"output":%d}' % number, 20)
            if number == 100:
                before = (await first.call("GET", f"/stream/{job_id}")).json()["stream"]
        await first.done(job_id, {"output": []}, stream=True)
    async with make_platform(sqlite=True) as second:
        rest = (await second.call("GET", f"/stream/{job_id}")).json()
        assert rest["status"] == "COMPLETED"
        assert [chunk["output"] for chunk in before + rest["stream"]] == list(range(300))
        again = (await second.call("GET", f"/stream/{job_id}?cursor=0")).json()
        assert len(again["stream"]) == 300


async def test_8_restart_in_the_middle_of_a_stream(make_platform):
    """§13 item 8, §2.10: the job goes on with another worker, at no price, and its stream begins anew.

    1. A reader has some of what the first worker said. 2. The gateway restarts. 3. The reader asks again and gets
    all that the second worker says, in order, and the end.
    """
    async with make_platform(sqlite=True) as first:
        first.fleet.add(capacity=1)
        job_id = await first.run()
        await first.take()
        for number in range(3):
            await first.chunk(job_id, f"first {number}")
            if number == 1:
                await first.call("GET", f"/stream/{job_id}")
    async with make_platform(sqlite=True) as second:
        await second.service.recover()
        assert await second.status(job_id) == {"id": job_id, "status": "IN_QUEUE"}
        held = asyncio.create_task(second.call("GET", f"/stream/{job_id}?wait=300000"))
        await second.watched()
        second.fleet.add("w2", capacity=1)
        assert (await second.take("w2")).json()["id"] == job_id
        assert (await held).json() == {"status": "IN_PROGRESS", "stream": []}
        for number in range(3):
            await second.chunk(job_id, f"second {number}", "w2")
        await second.done(job_id, {"output": []}, "w2", stream=True)
        answer = (await second.call("GET", f"/stream/{job_id}")).json()
        assert answer["status"] == "COMPLETED"
        assert [chunk["output"] for chunk in answer["stream"]] == [f"second {number}" for number in range(3)]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("sqlite", [False, True])
async def test_8_answer_that_was_lost(make_platform, sqlite, ended):
    """§13 item 8, §2.8: a client that hung up while its chunks were read gets them the next time.

    Python's client gives up after 10 s; the read of the store and the answer are not one moment.
    """
    async with make_platform(sqlite=sqlite) as platform:
        platform.fleet.add(capacity=1)
        job_id = await platform.run()
        await platform.take()
        for number in range(3):
            await platform.chunk(job_id, number)
        if ended:
            await platform.done(job_id, {"output": []}, stream=True)
        stream, drain = platform.service.streams.read, platform.store.drain_chunks
        drained, served, left = asyncio.Event(), asyncio.Event(), []

        async def noting_who_leaves(*arguments, hold_s, gone):
            left.append(gone)
            try:
                return await stream(*arguments, hold_s=hold_s, gone=gone)
            finally:
                served.set()

        async def drain_slowly(*arguments, **named):
            found = await drain(*arguments, **named)
            drained.set()
            await asyncio.wait(left)
            return found

        platform.service.streams.read, platform.store.drain_chunks = noting_who_leaves, drain_slowly
        host, port = platform.base.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"GET /v2/{ENDPOINT}/stream/{job_id} HTTP/1.1\r\nhost: h\r\nauthorization: {ADMIN}\r\n\r\n".encode()
        )
        await drained.wait()
        platform.service.streams.read, platform.store.drain_chunks = stream, drain
        writer.close()
        await served.wait()
        answer = (await platform.call("GET", f"/stream/{job_id}")).json()
        assert answer == {
            "status": "COMPLETED" if ended else "IN_PROGRESS",
            "stream": [{"output": number} for number in range(3)],
        }


async def test_queue_survives_a_restart(make_platform):
    """§2.4: what was answered 200 is there, with its idempotency key; what ran goes back to the head."""
    headers = {"idempotency-key": "order-1"}
    async with make_platform(sqlite=True) as first:
        first.fleet.add(capacity=1)
        running = await first.run()
        await first.take()
        queued = (await first.call("POST", "/run", content=b'{"input":2}', headers=headers)).json()["id"]
    async with make_platform(sqlite=True) as second:
        await second.service.recover()
        again = await second.call("POST", "/run", content=b'{"input":2}', headers=headers)
        assert (again.json()["id"], again.headers["idempotency-replayed"]) == (queued, "true")
        second.fleet.add("w9", capacity=2)
        taken = (await second.take("w9", batch=2)).json()
        assert [job["id"] for job in taken] == [running, queued]
        assert "retries" not in await second.status(running)


async def test_9_long_wait_survives(platform):
    """§13 item 9, §2.5: nothing of ours ends a call of 300 s, or its job, within 290 s."""
    platform.fleet.add(capacity=1)
    call = asyncio.create_task(platform.call("POST", "/runsync?wait=300000", json={"input": 1}))
    job_id = (await platform.take()).json()["id"]
    for _ in range(29):
        platform.clock.advance(10)
        await platform.ping(job_id)
        await platform.service.end_overdue()
        await platform.service.lose_unconfirmed()
        await platform.service.kill_stuck()
    assert not call.done()
    await platform.done(job_id, {"output": "at last"})
    job = (await call).json()
    assert (job["status"], job["output"]) == ("COMPLETED", "at last")
    assert job["executionTime"] >= 290_000


@pytest.mark.parametrize(
    ("verb", "seconds"), [("/run", 1800), ("/runsync", 60), ("/runsync?wait=200000", 200)]
)
async def test_10_results_vanish_in_time(platform, verb, seconds):
    """§13 item 10, §2.11: 30 min, or 1 min for synchronous ones, ± 5 s; §12 item 5."""
    platform.fleet.add(capacity=1)
    call = asyncio.create_task(platform.call("POST", verb, json={"input": 1, "policy": {"ttl": 10_000}}))
    job_id = (await platform.take()).json()["id"]
    await platform.done(job_id, {"output": 1})
    await call
    platform.clock.advance(seconds - 5)
    # §12 item 6: retention counts from the end and ignores what was left of the time to live.
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["output"] == 1
    platform.clock.advance(10)
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 404
    while await platform.store.prune_jobs(now_ms=platform.clock.now_ms()):
        pass
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 404


async def test_13_health_agrees_with_the_list_of_workers(platform):
    """§13 item 13, §2.15, §5.4: every counter that both have, and the same sums, whatever the fleet looks like.

    Workers come up one by one in every state, with and without work, in and out of rotation; starts fail, and
    there is no room for one.
    """

    async def compare(failures=0, throttled=None):
        platform.fleet.state = Health(failures=failures, throttled=throttled)
        workers = platform.fleet.workers(ENDPOINT)
        slots = {
            worker.id: found for worker in workers if (found := platform.slots.worker(worker.id)) is not None
        }
        host = HostResources(memory_bytes_total=1, memory_bytes_available=1, gpus=())
        view = v2_workers(platform.endpoint, workers, slots, platform.fleet.state, now_ms=0, host=host)
        shown = (await platform.call("GET", "/health")).json()["workers"]
        ready = shown.pop("ready")
        assert ready <= shown["idle"] + shown["running"]
        assert view["summary"] == shown | {"total": len(view["workers"])}
        listed = [worker["status"].lower() for worker in view["workers"]]
        if not failures and not throttled:
            assert {name: listed.count(name) for name in shown} == shown
        return shown

    fleet = [(state, Stage.READY, busy) for state in WorkerState for busy in (0, 1)]
    fleet += [(WorkerState.READY, stage, busy) for stage in Stage for busy in (0, 1)]
    for number, (state, stage, busy) in enumerate(fleet):
        name = f"w{number}"
        platform.fleet.add(name, capacity=2)
        platform.fleet.living[name] = replace(platform.fleet.living[name], stage=stage)
        platform.slots.reserve_jobs(name, busy)
        if platform.fleet.living[name].out_of_rotation:
            platform.slots.close_worker(name, for_good=False)
        platform.fleet.become(name, state)
        await compare()
    shown = await compare(failures=7, throttled="no room")
    assert (shown["throttled"], shown["unhealthy"]) == (1, 7)


async def test_delay_time_is_absent_until_a_worker_took_the_job(platform):
    """§2.9, §12 item 36; recomputed for each attempt."""
    platform.fleet.add("w1", capacity=1)
    platform.fleet.add("w2", capacity=1)
    job_id = await platform.run()
    assert "delayTime" not in await platform.status(job_id)
    platform.clock.advance(7)
    await platform.take("w1")
    assert 7000 <= (await platform.status(job_id))["delayTime"] < 60_000
    await platform.fleet.end("w1", "killed")
    assert "delayTime" not in await platform.status(job_id)
    platform.clock.advance(100)
    await platform.take("w2")
    assert 100_000 <= (await platform.status(job_id))["delayTime"] < 160_000


async def test_longest_waiting_poll_gets_the_job(platform):
    """§12 item 35: never the last poller."""
    for name in ("w1", "w2"):
        platform.fleet.add(name, capacity=1)
    first = asyncio.create_task(platform.take("w1"))
    await platform.parked(1)
    second = asyncio.create_task(platform.take("w2"))
    await platform.parked(2)
    job_id = await platform.run()
    assert (await first).json()["id"] == job_id
    assert (await second).status_code == 204


async def test_running_is_never_shown(platform):
    """§2.10, §12 item 2: six states and no seventh."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    for path in (f"/status/{job_id}", f"/status-sync/{job_id}?wait=1000", f"/stream/{job_id}?wait=1000"):
        assert (await platform.call("GET", path)).json()["status"] == "IN_PROGRESS"


async def test_errors_never_carry_a_status(platform):
    """§2.14, §12 item 10: the asynchronous Python client would take it for a job's status."""
    answers = [
        await platform.call("POST", "/run", content=b"{"),
        await platform.call("GET", "/status/unknown"),
        await platform.call("GET", "/run"),
        await platform.call("GET", "/health", key="rpa_WRONG"),
        await platform.call("GET", "/health", endpoint="unknown"),
        await platform.call("GET", "/nothing"),
        await platform.call("GET", "/requests?limit=0"),
    ]
    assert [answer.status_code for answer in answers] == [400, 404, 405, 401, 404, 404, 400]
    for answer in answers:
        assert answer.json().keys() == {"error", "detail"}
        assert answer.json()["error"] == answer.json()["detail"]
