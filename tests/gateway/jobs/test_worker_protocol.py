"""The workers' side of the job road (serverless-api.md §4.2 to §4.4, §4.7).

A bare § is one of worker-protocol.md, which supersedes much of that (its §14).
"""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from pilotlight.core.lifecycle import STREAM_BEGUN
from pilotlight.domain.worker import DownloadProgress, Stage, WorkerState
from pilotlight.errors import NotFoundError, StoreError

ENVELOPE = {"error": {"message": "engine died", "type": "InternalServerError", "code": 500}}


async def signal(predicate):
    """Return when a condition of the platform holds; each turn lets its I/O happen."""
    while not predicate():
        await asyncio.sleep(0.001)


async def test_single_take(platform):
    """§3.1, serverless-api.md §4.2: an object with `id` and `input`; the first take makes it ready (§6.1)."""
    platform.fleet.add()
    job_id = await platform.run({"input": {"prompt": "hi"}})
    answer = await platform.take()
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"id": job_id, "input": {"prompt": "hi"}}
    assert platform.fleet.worker("w1").state is WorkerState.READY
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"


async def test_empty_take_is_held_and_answered_204(platform):
    """§8, serverless-api.md §4.2."""
    platform.fleet.add(capacity=1)
    answer = await platform.take()
    assert (answer.status_code, answer.content) == (204, b"")


async def test_parked_take_gets_a_job_at_once(make_platform):
    """With production holds: no polling in between."""
    async with make_platform() as platform:
        platform.fleet.add(capacity=1)
        take = asyncio.create_task(platform.take())
        await platform.parked()
        job_id = await platform.run()
        assert (await take).json()["id"] == job_id


async def test_batch_is_filled(platform):
    """§3.2, §10.2, serverless-api.md §4.2: a list of up to n, bounded by free slots."""
    platform.fleet.add(capacity=3)
    ids = [await platform.run() for _ in range(4)]
    assert [job["id"] for job in (await platform.take(batch=4)).json()] == ids[:3]
    assert platform.slots.worker("w1").free == 0


async def test_batch_of_one_is_a_list(platform):
    """§3.2."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    assert [job["id"] for job in (await platform.take(batch=4)).json()] == [job_id]


async def test_longest_waiting_take_is_served_first(make_platform):
    """serverless-api.md §12 item 35."""
    async with make_platform() as platform:
        takes = []
        for number in range(3):
            platform.fleet.add(f"w{number}", capacity=1)
            takes.append(asyncio.create_task(platform.take(f"w{number}")))
            await platform.parked(number + 1)
        for take in takes:
            job_id = await platform.run()
            assert (await take).json()["id"] == job_id


async def test_no_slot_no_job_until_one_is_free(make_platform):
    """One slot count covers both roads: a request on the data path keeps the take waiting."""
    async with make_platform() as platform:
        platform.fleet.add(capacity=1)
        assert platform.slots.reserve_jobs("w1", 1) == 1
        job_id = await platform.run()
        take = asyncio.create_task(platform.take())
        await platform.parked()
        platform.slots.release_jobs("w1")
        assert (await take).json()["id"] == job_id


async def test_take_of_a_worker_that_hung_up_costs_no_retry(make_platform):
    """§7.1 L3, scenario 12, serverless-api.md §4.2: the job goes back untouched and runs once elsewhere."""
    async with make_platform() as platform:
        platform.fleet.add("w1", capacity=1)
        platform.fleet.add("w2", capacity=1)
        gone = asyncio.create_task(platform.take("w1"))
        await platform.parked()
        gone.cancel()
        await asyncio.wait({gone})
        job_id = await platform.run()
        assert (await platform.take("w2")).json()["id"] == job_id
        job = await platform.store.job(job_id)
        assert (job.retries, job.worker_id) == (0, "w2")


async def test_job_handed_over_while_the_worker_hangs_up_goes_back(make_platform):
    """As above, with the store's take under way when the connection breaks."""
    async with make_platform() as platform:
        platform.fleet.add("w1", capacity=1)
        gate, entered = asyncio.Event(), asyncio.Event()
        take_of_store = platform.store.take

        async def slow(*arguments, **named):
            jobs = await take_of_store(*arguments, **named)
            entered.set()
            await gate.wait()
            return jobs

        platform.store.take = slow
        job_id = await platform.run()
        take = asyncio.create_task(platform.take())
        await entered.wait()
        take.cancel()
        await asyncio.wait({take})
        await platform.parked(0)
        platform.store.take = take_of_store
        gate.set()
        assert (await platform.take()).json()["id"] == job_id
        job = await platform.store.job(job_id)
        assert (job.retries, job.attempt) == (0, 2)
        assert platform.slots.worker("w1").jobs == 1


async def test_cancel_between_the_take_and_the_hand_out(make_platform):
    """A job cancelled in that moment is not delivered, and its slot is counted once."""
    async with make_platform() as platform:
        platform.fleet.add("w1", capacity=1)
        gate, entered = asyncio.Event(), asyncio.Event()
        take_of_store = platform.store.take

        async def slow(*arguments, **named):
            jobs = await take_of_store(*arguments, **named)
            entered.set()
            await gate.wait()
            return jobs

        platform.store.take = slow
        take = asyncio.create_task(platform.take())
        first = await platform.run()
        await entered.wait()
        await platform.call("POST", f"/cancel/{first}")
        platform.store.take = take_of_store
        second = await platform.run()
        gate.set()
        assert (await take).json()["id"] == second
        assert platform.slots.worker("w1").jobs == 1


async def test_cancel_between_the_hand_out_and_the_answer(make_platform):
    """§3.2: what has ended meanwhile is not in the answer."""
    async with make_platform() as platform:
        platform.fleet.add("w1", capacity=2)
        kept, ended = await platform.run(), await platform.run()
        worker = platform.fleet.worker("w1")
        desk = platform.service.workers
        hand_out = desk._ledger.dispatcher._hand_out

        def cancelling(poll, jobs):
            answer = hand_out(poll, jobs)
            desk.link(worker).hand_outs.pop(ended)
            return answer

        desk._ledger.dispatcher._hand_out = cancelling
        gone = asyncio.get_running_loop().create_future()
        jobs = await desk.take(worker, count=2, holding=False, gone=gone)
        assert [job.id for job in jobs] == [kept]


async def test_job_that_cannot_be_given_back_at_once_keeps_its_retry(make_platform):
    """§7.1: it never reached the worker; the store's failure is not the job's fault."""
    async with make_platform() as platform:
        platform.fleet.add("w1", capacity=1)
        job_id = await platform.run()
        worker = platform.fleet.worker("w1")
        apply_of_store, failed = platform.store.apply, asyncio.Event()

        async def broken(*_):
            failed.set()
            raise StoreError("disk full")

        platform.store.apply = broken
        gone = asyncio.get_running_loop().create_future()
        gone.set_result(None)
        assert not await platform.service.workers.take(worker, count=1, holding=False, gone=gone)
        await failed.wait()
        platform.clock.advance(3600)
        platform.store.apply = apply_of_store
        await platform.service.lose_unconfirmed()
        await signal(lambda: platform.slots.worker("w1").jobs == 0)
        job = await platform.store.job(job_id)
        assert (job.status, job.retries) == ("IN_QUEUE", 0)


async def test_loss_that_the_store_did_not_take_is_found_again(platform):
    """§5: a heartbeat that met our 5xx decides nothing; the next one does."""
    platform.fleet.add(capacity=2)
    lost, held = await platform.run(), await platform.run()
    await platform.take(batch=2)
    await platform.ping(lost)
    apply_of_store = platform.store.apply_many

    async def broken(*_):
        raise StoreError("disk full")

    platform.store.apply_many = broken
    await platform.ping(held)
    platform.store.apply_many = apply_of_store
    assert (await platform.store.job(held)).confirmed_ms is None
    await platform.ping(held)
    assert (await platform.status(lost))["status"] == "FAILED"
    assert (await platform.store.job(held)).confirmed_ms is not None


async def test_job_whose_record_is_gone_frees_its_slot(platform):
    """§7.2: a post for it is answered 200, and the worker's slot takes the next job."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()

    async def unknown(*_):
        raise NotFoundError("job not found")

    apply_of_store = platform.store.apply
    platform.store.apply = unknown
    assert (await platform.done(job_id, {"output": 1})).status_code == 200
    platform.store.apply = apply_of_store
    assert platform.slots.worker("w1").jobs == 0
    assert job_id not in platform.service._ledger.links["w1"].hand_outs


async def test_chunk_that_comes_twice_is_stored_once(platform):
    """§3.5 with `seq`: both at once, and again after half of it was stored."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    worker, desk = platform.fleet.worker("w1"), platform.service.workers
    body = json.dumps({"output": "x" * 1_500_000}).encode()
    append_of_store, calls = platform.store.append_chunk, []

    async def second_fails(*arguments, **named):
        calls.append(1)
        await asyncio.sleep(0)
        if len(calls) == 2:
            raise StoreError("disk full")
        return await append_of_store(*arguments, **named)

    platform.store.append_chunk = second_fails
    with pytest.raises(StoreError):
        await desk.chunk(worker, job_id, body, len(body), sequence=0)
    await asyncio.gather(*(desk.chunk(worker, job_id, body, len(body), sequence=0) for _ in range(2)))
    chunks = (await platform.call("GET", f"/stream/{job_id}")).json()["stream"]
    assert "".join(chunk["output"] for chunk in chunks) == "x" * 1_500_000


async def test_late_posts_of_an_ended_worker_are_taken_and_change_nothing(platform):
    """§7.2, §14: 200, as a worker library does nothing sensible with anything else."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.fleet.end("w1")
    assert (await platform.done(job_id, {"output": 1})).status_code == 200
    assert (await platform.chunk(job_id, "x")).status_code == 200
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"


async def test_store_failure_during_a_take_is_survived(make_platform):
    """The take stays parked and is served when the store is well again."""
    async with make_platform() as platform:
        platform.fleet.add("w1", capacity=1)
        take_of_store, failed = platform.store.take, asyncio.Event()

        async def broken(*_, **__):
            platform.store.take = take_of_store
            failed.set()
            raise StoreError("disk full")

        platform.store.take = broken
        job_id = await platform.run()
        assert (await platform.take()).json()["id"] == job_id
        assert failed.is_set()
        assert platform.slots.worker("w1").jobs == 1


async def test_draining_worker_gets_nothing(platform):
    """§8, §6.3: held as usual, then 204."""
    platform.fleet.add(capacity=1)
    platform.fleet.become("w1", WorkerState.DRAINING)
    await platform.run()
    assert (await platform.take()).status_code == 204


async def test_released_polls_are_answered_at_once(make_platform):
    """§6.3 step 3, serverless-api.md §4.7: 204 on the take, `-` on the stop poll; jobs in hand can be posted."""
    async with make_platform() as platform:
        platform.fleet.add(capacity=2)
        job_id = await platform.run()
        await platform.take()
        take = asyncio.create_task(platform.take(holding=True))
        stop = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
        await platform.parked()
        platform.fleet.become("w1", WorkerState.DRAINING)
        platform.service.release_polls("w1")
        assert (await take).status_code == 204
        assert (await stop).json() == {"jobsToStop": ["-"]}
        assert (await platform.take(holding=True)).status_code == 204
        await platform.done(job_id, {"output": 1})
        assert (await platform.status(job_id))["status"] == "COMPLETED"


async def test_wrong_keys(platform, monkeypatch):
    """§13: takes and stops are held and answered 429, posts 401, and nothing is lost by it."""
    monkeypatch.setattr("pilotlight.gateway.worker_protocol._REFUSED_HOLD_S", 0.01)
    platform.fleet.add(capacity=1)
    platform.fleet.add("w2", capacity=1)
    job_id = await platform.run()
    for verb in ("job-take/w1", "job-take-batch/w1", "job-stop/w1", "job-take/w9"):
        for secret in ("wrong", "secret-w2"):
            answer = await platform.ask("GET", f"/{verb}?gpu=x&job_in_progress=0", secret=secret)
            assert answer.status_code == 429
    assert (await platform.ask("GET", "/ping/w1?gpu=x", secret="wrong")).status_code == 401
    answer = await platform.ask("POST", f"/job-done/w1/{job_id}?gpu=x", secret="wrong", json={"output": 1})
    assert answer.status_code == 401
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"


@pytest.mark.parametrize("key", ["rpa_ADMIN", "Bearer rpa_ADMIN", "rpa_RUNNER"])
async def test_clients_keys_are_no_workers_keys(platform, monkeypatch, key):
    """serverless-api.md §10, §13: who may call the endpoint may not speak for its workers."""
    monkeypatch.setattr("pilotlight.gateway.worker_protocol._REFUSED_HOLD_S", 0.01)
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    take = await platform.ask("GET", "/job-take/w1?gpu=x&job_in_progress=0", secret=key)
    assert take.status_code == 429
    assert (await platform.ask("GET", "/ping/w1?gpu=x", secret=key)).status_code == 401
    await platform.take()
    for verb in ("job-done", "job-stream"):
        path = f"/{verb}/w1/{job_id}?gpu=x&isStream=false"
        assert (await platform.ask("POST", path, secret=key, json={"output": 1})).status_code == 401
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"


async def test_worker_of_another_endpoint(platform):
    """§13: the key is bound to endpoint and worker."""
    platform.fleet.add("w1", endpoint_id="ep2", capacity=1)
    assert (await platform.ask("GET", "/ping/w1?gpu=x")).status_code == 401


async def test_posts_for_jobs_of_others_change_nothing(platform):
    """§13, §7.2: late, duplicate and unknown results are answered 200; the first one stays."""
    platform.fleet.add("w1", capacity=1)
    platform.fleet.add("w2", capacity=1)
    job_id = await platform.run()
    await platform.take("w1")
    assert (await platform.done(job_id, {"output": "forged"}, worker="w2")).status_code == 200
    assert (await platform.chunk(job_id, "forged", worker="w2")).status_code == 200
    assert (await platform.done("unknown", {"output": 1})).status_code == 200
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.done(job_id, {"output": "first"})
    await platform.done(job_id, {"output": "second"})
    assert (await platform.status(job_id))["output"] == "first"
    assert (await platform.call("GET", f"/stream/{job_id}")).json()["stream"] == []


async def test_ping_confirms_and_its_silence_loses(platform):
    """§5, serverless-api.md §4.3: listed once, absent the next time, without a result: lost; L1 is not retried."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.ping()
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.ping(job_id)
    assert (await platform.store.job(job_id)).confirmed_ms is not None
    await platform.ping()
    job = await platform.status(job_id)
    assert (job["status"], job["error"]) == ("FAILED", "worker produced no result")


async def test_lost_result_that_is_our_fault_is_retried(platform):
    """§7.1 L2: the post met our 5xx."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.ping(job_id)
    apply_of_store = platform.store.apply

    async def broken(*_):
        raise StoreError("disk full")

    platform.store.apply = broken
    assert (await platform.done(job_id, {"output": 1})).status_code == 503
    platform.store.apply = apply_of_store
    await platform.ping()
    job = await platform.status(job_id)
    assert (job["status"], job["retries"]) == ("IN_QUEUE", 1)


async def test_ping_during_a_post_decides_nothing(platform):
    """§5: compared in the order of commits; the result that is being received counts."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.ping(job_id)
    gate = asyncio.Event()

    async def body():
        yield b'{"output": '
        await gate.wait()
        yield b"5}"

    post = asyncio.create_task(
        platform.client.post(
            f"/v2/ep1/job-done/w1/{job_id}?gpu=x&isStream=false",
            content=body(),
            headers={"authorization": "secret-w1"},
        )
    )
    await signal(lambda: platform.service._ledger.links["w1"].hand_outs[job_id].posts)
    await platform.ping()
    gate.set()
    await post
    assert (await platform.status(job_id))["status"] == "COMPLETED"


async def test_idle_take_closes_earlier_hand_outs(platform):
    """§5: what is not final then never will be; a confirmed job had no result, another never arrived."""
    platform.fleet.add(capacity=1)
    confirmed = await platform.run()
    await platform.take()
    await platform.ping(confirmed)
    assert (await platform.take()).status_code == 204
    assert (await platform.status(confirmed))["error"] == "worker produced no result"
    lost = await platform.run()
    async with httpx.AsyncClient(base_url=platform.base) as other:
        headers = {"authorization": "secret-w1"}
        await other.get("/v2/ep1/job-take/w1?gpu=x&job_in_progress=0", headers=headers)
    assert (await platform.take()).json()["id"] == lost
    assert (await platform.store.job(lost)).retries == 1


async def test_idle_take_on_the_same_connection_proves_delivery(platform):
    """§7.1 L1 without a heartbeat in between: FAILED at once, not run again."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    async with httpx.AsyncClient(base_url=platform.base) as worker:
        headers = {"authorization": "secret-w1"}
        for _ in range(2):
            await worker.get("/v2/ep1/job-take/w1?gpu=x&job_in_progress=0", headers=headers)
    assert (await platform.status(job_id))["error"] == "worker produced no result"


async def test_worker_end_requeues_once(platform):
    """§7.1 L6, serverless-api.md §2.10: retried once, then failed with the text clients know."""
    for number in range(2):
        platform.fleet.add(f"w{number}", capacity=1)
    job_id = await platform.run()
    await platform.take("w0")
    await platform.fleet.end("w0")
    job = await platform.status(job_id)
    assert (job["status"], job["retries"]) == ("IN_QUEUE", 1)
    await platform.take("w1")
    await platform.fleet.end("w1")
    job = await platform.status(job_id)
    assert (job["status"], job["error"]) == ("FAILED", "job timed out after 1 retries")


async def test_worker_end_after_a_chunk_was_read_begins_the_stream_anew(platform):
    """§7.2, serverless-api.md §2.10: retried once like any, then failed with the text clients know.

    1. A reader gets what the first worker said, and that one ends. 2. The job is in the queue, with the break in
    its story. 3. The reader gets all that the second worker says. 4. That one ends, too.
    """
    platform.fleet.add("w1", capacity=1)
    platform.fleet.add("w2", capacity=1)
    job_id = await platform.run()
    await platform.take("w1")
    for value in ("read", "unread"):
        await platform.chunk(job_id, value)
    await platform.call("GET", f"/stream/{job_id}?cursor=0")
    await platform.fleet.end("w1", "exit status 137")
    assert await platform.status(job_id) == {"id": job_id, "status": "IN_QUEUE", "retries": 1}
    [attempt] = (await platform.store.job(job_id)).attempts
    assert attempt.reason == f"exit status 137{STREAM_BEGUN}"
    await platform.take("w2")
    for value in ("a", "b"):
        await platform.chunk(job_id, value, "w2")
    stream = (await platform.call("GET", f"/stream/{job_id}")).json()
    assert stream == {"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": "b"}]}
    await platform.fleet.end("w2", "exit status 137")
    job = await platform.status(job_id)
    assert (job["status"], job["error"], job["retries"]) == ("FAILED", "job timed out after 1 retries", 1)


async def test_worker_end_while_the_store_fails_is_settled_later(platform):
    """The reaper's next sweep does it."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    running = platform.store.running

    async def broken(**_):
        raise StoreError("disk full")

    platform.store.running = broken
    await platform.fleet.end("w1")
    platform.store.running = running
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.service.lose_unconfirmed()
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"


async def test_gateway_restart_uses_up_no_retry(platform):
    """`recover` at the start: interruptions by the platform are not the job's fault, whatever was read of it."""
    platform.fleet.add(capacity=2)
    ids = [await platform.run() for _ in range(2)]
    await platform.take(batch=2)
    await platform.chunk(ids[1], "a")
    await platform.call("GET", f"/stream/{ids[1]}")
    assert await platform.service.recover() == 2
    assert [await platform.status(job_id) for job_id in ids] == [
        {"id": job_id, "status": "IN_QUEUE"} for job_id in ids
    ]
    stories = [(await platform.store.job(job_id)).attempts[0].reason for job_id in ids]
    assert [story.endswith(STREAM_BEGUN) for story in stories] == [False, True]


async def test_gateway_stop_uses_up_no_retry(platform):
    """Workers that end because the gateway ends."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.service.close()
    await platform.fleet.end("w1")
    job = await platform.store.job(job_id)
    assert (job.status, job.retries) == ("IN_QUEUE", 0)


async def test_replacement_on_request(platform):
    """§6.4, serverless-api.md §4.5: `stopPod` drains the worker; it gets nothing from that moment on."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.done(job_id, {"output": 1, "stopPod": True})
    await platform.fleet.changed.wait()
    assert platform.fleet.drained == [("w1", "the worker asked to be replaced")]
    await platform.run()
    assert (await platform.take()).status_code == 204
    assert (await platform.status(job_id))["status"] == "COMPLETED"


async def test_unhealthy_worker_is_ended_with_its_reason(platform):
    """§3.6, scenario 16, serverless-api.md §4.3."""
    platform.fleet.add()
    query = "status=unhealthy&check=my_check&reason=RuntimeError%3A+model+file+is+missing"
    assert (await platform.ask("GET", f"/ping/w1?gpu=x&{query}")).status_code == 200
    await platform.fleet.changed.wait()
    text = "fitness check my_check failed: RuntimeError: model file is missing"
    assert platform.fleet.killed == [("w1", text)]
    assert platform.fleet.reports[0][1].failure.cause == text


async def test_stop_signals_are_repeated_while_the_worker_goes_on(platform):
    """§3.3, serverless-api.md §4.4: a signal within 100 ms of the delivery is ignored by the library."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.call("POST", f"/cancel/{job_id}")
    for _ in range(2):
        assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).json() == {"jobsToStop": [job_id]}
        await platform.ping(job_id)
    await platform.ping()
    assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).status_code == 204


async def test_state_reports(platform):
    """The state URL of our own worker program."""
    platform.fleet.add()

    async def report(worker="w1", secret=None, **body):
        return await platform.client.post(
            f"/pilotlight/v1/worker-state/ep1/{worker}",
            json=body,
            headers={"authorization": secret or f"secret-{worker}"},
        )

    server = {"address": "unix:/run/engine.sock", "key": "k"}
    answer = await report(
        stage="ready",
        detail={"seconds": 3},
        engine=server,
        listener={"address": "http://127.0.0.1:9", "key": "l"},
        models=["m"],
        max_concurrency=30,
        versions={"vllm": "0.32.0"},
    )
    assert answer.status_code == 200
    worker_id, stage = platform.fleet.reports[0]
    assert (worker_id, stage.stage, stage.detail) == ("w1", Stage.READY, {"seconds": 3})
    registration = stage.registration
    assert (registration.engine.url, registration.engine.key) == ("unix:/run/engine.sock", "k")
    assert (registration.max_concurrency, registration.listener.url) == (30, "http://127.0.0.1:9")
    detail = {"kind": "out_of_memory", "cause": "OOM", "advice": "smaller"}
    assert (await report(stage="failed", detail=detail)).status_code == 200
    assert platform.fleet.reports[1][1].failure.kind == "out_of_memory"
    progress = {"done_bytes": 5, "total_bytes": 9, "elapsed_ms": 1}
    for detail, expected in (
        (progress, DownloadProgress(done_bytes=5, total_bytes=9)),
        ({"done_bytes": 5, "total_bytes": None}, DownloadProgress(done_bytes=5)),
        ({"waits_for": "another worker"}, None),
    ):
        assert (await report(stage="downloading", detail=detail)).status_code == 200
        assert platform.fleet.reports.pop()[1].progress == expected
    assert (await report(worker="w9", stage="ready")).status_code == 410
    assert (await report(secret="wrong", stage="ready")).status_code == 401
    for bad in (
        {"stage": "nonsense"},
        {},
        {"stage": "ready", "engine": {"address": "ftp://x"}},
        {"stage": "ready", "engine": server, "max_concurrency": 0},
        {"stage": "ready", "detail": "text"},
    ):
        assert (await report(**bad)).status_code == 400
    assert len(platform.fleet.reports) == 2
