"""How jobs of unmodified workers get lost or doubled, and what comes of it (worker-protocol.md §7, §15)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest

from pilotlight.errors import StoreError

pytestmark = pytest.mark.timeout(400)  # the first test of a machine builds the environment of its release


@contextlib.asynccontextmanager
async def sweeping(lab):
    """What the reaper does once a second, done more often."""

    async def sweep():
        while True:
            for step in ("end_overdue", "lose_unconfirmed", "kill_stuck"):
                await getattr(lab.platform.service, step)()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_result_of_a_long_blocking_handler_arrives(lab):
    """§15 scenario 5, §10.5: six seconds without a turn of the worker's event loop."""
    await lab.worker("sync")
    done = await lab.result({"do": "block", "seconds": 6})
    assert (done["status"], "retries" in done) == ("COMPLETED", False)


@pytest.mark.parametrize("release", ["1.12", "1.9"])
async def test_result_of_a_worker_that_blocks_between_connecting_and_posting(lab, monkeypatch, release):
    """§10.5, §15 scenario 5: connected for a first result, then blocked by the handlers of other jobs.

    The connection was closed when no head had come for 30 s, the library wrote its result into it and does not
    post a second time, and a job whose handler had succeeded was FAILED with "worker produced no result".
    """
    monkeypatch.setattr("pilotlight.gateway.protocol.HEAD_S", 0.5)
    app = lab._app

    async def closing_takes(scope, receive, send):
        # As when the pool has let go of the connection, after 15 s: the next post needs a new one.
        async def last(message):
            if message["type"] == "http.response.start" and "/job-take" in scope["path"]:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await app(scope, receive, last)

    lab._app = closing_takes
    ids = [await lab.run({"do": "block", "seconds": 1, "n": number}) for number in range(3)]
    worker = await lab.worker("sync", release=release, concurrency=3)
    done = [await lab.finished(job_id) for job_id in ids]
    assert [(job["status"], "retries" in job) for job in done] == [("COMPLETED", False)] * 3
    assert [seen.status for seen in lab.requests("job-done", worker.worker_id)] == [200] * 3


async def test_result_that_met_our_own_failure(lab):
    """§15 scenario 6: 5xx twice, then 200: one final result, one row in the account."""
    worker = await lab.worker()
    apply_of_store, failures = lab.platform.store.apply, []

    async def broken(*_, **__):
        failures.append(1)
        if len(failures) == 2:
            lab.platform.store.apply = apply_of_store
        raise StoreError("disk full")

    gate = lab.gate("end")
    job_id = await lab.run(gate.input)
    await lab.until(lambda: gate.started)
    # Confirmed, so that no heartbeat needs the store before the result does.
    await lab.until(lambda: any(job_id in seen.query and seen.status for seen in lab.requests("ping")))
    lab.platform.store.apply = broken
    gate.open()
    done = await lab.finished(job_id)
    assert (done["status"], "retries" in done) == ("COMPLETED", False)
    posts = lab.requests("job-done", worker.worker_id, job_id)
    await lab.until(lambda: posts[-1].status)
    assert [seen.status for seen in posts] == [503, 503, 200]
    assert [record.id for record in lab.platform.records] == [job_id]


async def test_result_posted_again(lab):
    """§15 scenario 8, §7.2: by hand, by the same worker and by another: 200, and the first stays."""
    worker = await lab.worker()
    lab.platform.fleet.add("other", capacity=1)
    done = await lab.result({"n": 1})
    for worker_id in (worker.worker_id, "other"):
        answer = await lab.platform.done(done["id"], {"output": "forged"}, worker_id)
        assert answer.status_code == 200
    assert await lab.platform.status(done["id"]) == done
    assert len(lab.platform.records) == 1


async def test_death_of_the_main_process_only(lab):
    """§15 scenario 9, §6.5: heartbeats go on, the stop poll breaks: the job runs elsewhere."""
    first = await lab.worker()
    await lab.ready(first)
    gate = lab.gate("end")
    job_id = await lab.run(gate.input)
    await lab.until(lambda: gate.started)
    os.kill(first.pid, signal.SIGKILL)
    await first.exit_code()
    pings = len(lab.requests("ping", first.worker_id))
    async with sweeping(lab):
        second = await lab.worker()
        await lab.until(lambda: gate.started == [first.worker_id, second.worker_id])
    assert len(lab.requests("ping", first.worker_id)) > pings
    assert [worker_id for worker_id, _ in lab.platform.fleet.killed] == [first.worker_id]
    assert "stop poll broke" in lab.platform.fleet.killed[0][1]
    gate.open()
    done = await lab.finished(job_id)
    assert (done["status"], done["retries"], done["workerId"]) == ("COMPLETED", 1, second.worker_id)


async def test_death_of_everything_and_a_cut_network(lab):
    """§15 scenario 10: a group that was stopped is silent like one behind a cut cable."""
    first = await lab.worker()
    await lab.ready(first)
    gate = lab.gate("end")
    job_id = await lab.run(gate.input)
    await lab.until(lambda: gate.started)
    await lab.until(lambda: lab.requests("ping", first.worker_id))
    first.kill_group(signal.SIGSTOP)
    link = lab.platform.service._ledger.links[first.worker_id]
    await lab.until(lambda: not link.stop_polls)
    async with sweeping(lab):
        await asyncio.sleep(0)
        for _ in range(4):
            # In steps, as time passes: a jump would look as if the gateway had been suspended.
            lab.platform.clock.advance(4)
            await lab.platform.service.kill_stuck()
        second = await lab.worker()
        await lab.until(lambda: gate.started == [first.worker_id, second.worker_id])
    assert "no sign of life" in lab.platform.fleet.killed[0][1]
    second.kill_group()
    await second.exit_code()
    await lab.platform.fleet.end(second.worker_id, "signal 9")
    done = await lab.platform.status(job_id)
    assert (done["status"], done["error"]) == ("FAILED", "job timed out after 1 retries")


async def test_worker_that_hangs_up_while_it_is_given_a_job(lab):
    """§15 scenario 12: the job goes back untouched and runs once."""
    first = await lab.worker()
    await lab.ready(first)
    take_of_store, entered, gate = lab.platform.store.take, asyncio.Event(), asyncio.Event()

    async def slow(*arguments, **named):
        jobs = await take_of_store(*arguments, **named)
        entered.set()
        await gate.wait()
        return jobs

    lab.platform.store.take = slow
    job_id = await lab.run({"n": 1})
    await entered.wait()
    first.kill_group()
    await first.exit_code()
    await lab.platform.parked(0)
    lab.platform.store.take = take_of_store
    gate.set()
    second = await lab.worker()
    done = await lab.finished(job_id)
    assert (done["status"], done["workerId"], "retries" in done) == ("COMPLETED", second.worker_id, False)


async def test_job_offered_to_a_worker_that_is_blocked(make_lab):
    """§15 scenario 13, L4: it runs somewhere, and has exactly one final result."""
    jobs = {"take_hold_s": 2, "stop_hold_s": 2, "ping_interval_ms": 1000, "confirm_s": 2}
    async with make_lab(jobs=jobs) as lab, sweeping(lab):
        blocked = await lab.worker("sync", concurrency=4)
        await lab.ready(blocked)
        gate = lab.gate("end")
        long = await lab.run(gate.input)
        await lab.until(lambda: gate.started)
        second = await lab.run({"n": 2})
        other = await lab.worker("sync", concurrency=4)
        done = await lab.finished(second)
        assert (done["status"], done["workerId"]) == ("COMPLETED", other.worker_id)
        gate.open()
        assert (await lab.finished(long))["status"] == "COMPLETED"
        await lab.result({"n": 3})
        assert sorted(record.id for record in lab.platform.records)[:2] == sorted([long, second])
        assert len(lab.platform.records) == 3


async def test_stop_signals(lab):
    """§15 scenario 14, §3.3: running, blocking, just delivered, unknown and finished jobs."""
    for endpoint in ("coroutine", "function"):
        await lab.endpoint(endpoint)
    worker = await lab.worker("async", endpoint="coroutine", concurrency=2)
    function = await lab.worker("sync", endpoint="function")
    await lab.ready(worker, function)
    running, blocking, early = lab.gate("running"), lab.gate("blocking"), lab.gate("early")
    first = await lab.run(running.input, "coroutine")
    sync = await lab.run(blocking.input, "function")
    await lab.until(lambda: running.started and blocking.started)
    for endpoint, job_id in (("coroutine", first), ("function", sync)):
        answer = await lab.platform.call("POST", f"/cancel/{job_id}", endpoint=endpoint)
        assert answer.json()["status"] == "CANCELLED"
    link = lab.platform.service._ledger.links[worker.worker_id]
    await lab.until(lambda: not link.stopping and not link.listed)
    assert lab.requests("job-done", worker.worker_id, first) == []
    # Nobody can stop a function: it runs to its end, and its result changes nothing.
    blocking.open()
    await lab.until(lambda: not lab.platform.service._ledger.links[function.worker_id].listed)
    assert (await lab.platform.call("GET", f"/status/{sync}", endpoint="function")).json()[
        "status"
    ] == "CANCELLED"
    # Before its handler runs a signal is ignored (up to 100 ms); the heartbeats show it and it is sent again.
    job_id = await lab.run(early.input, "coroutine")
    await lab.until(lambda: job_id in link.hand_outs)
    await lab.platform.call("POST", f"/cancel/{job_id}", endpoint="coroutine")
    await lab.until(lambda: not link.stopping and not link.listed)
    link.stop("unknown", deadline_ns=0)
    link.stop(first, deadline_ns=0)
    await lab.until(lambda: not link.stop_pending)
    # All slots are free again: both of these run side by side.
    both = lab.gate("both")
    ids = [await lab.run(both.input, "coroutine") for _ in range(2)]
    await lab.until(lambda: len(both.started) == 2)
    both.open()
    assert {(await lab.finished(job_id, "coroutine"))["status"] for job_id in ids} == {"COMPLETED"}
    assert lab.platform.fleet.killed == []


async def test_same_id_is_not_given_to_a_worker_that_still_runs_it(lab):
    """§3.2: a job that timed out and is retried by its client waits until its old attempt is over."""
    worker = await lab.worker("sync", concurrency=2)
    await lab.ready(worker)
    gate = lab.gate("end")
    job_id = await lab.run(gate.input)
    await lab.until(lambda: gate.started)
    await lab.until(lambda: any(job_id in seen.query for seen in lab.requests("ping", worker.worker_id)))
    lab.platform.clock.advance(700)
    await lab.platform.service.end_overdue()
    assert (await lab.platform.status(job_id))["error"] == "executionTimeout exceeded"
    await lab.platform.call("POST", f"/retry/{job_id}")
    await lab.until(lambda: len(lab.requests("ping", worker.worker_id)) > 3)
    assert gate.started == [worker.worker_id]
    gate.open()
    done = await lab.finished(job_id)
    assert done["status"] == "COMPLETED"
    assert gate.started == [worker.worker_id] * 2


@pytest.mark.parametrize("do", ["exit", "os_exit"])
async def test_handler_that_ends_its_process(lab, do):
    """§4.2, L6: requeued once; a job that kills every worker ends FAILED."""
    job_id = await lab.run({"do": do})
    for _ in range(2):
        worker = await lab.worker()
        assert await worker.exit_code() == 3
        await lab.platform.fleet.end(worker.worker_id, "exit status 3")
    done = await lab.platform.status(job_id)
    assert (done["status"], done["error"]) == ("FAILED", "job timed out after 1 retries")
