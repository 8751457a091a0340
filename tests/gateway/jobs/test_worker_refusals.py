"""What workers are told that get nothing, or whose posts cannot be taken (worker-protocol.md §8, §9)."""

from __future__ import annotations

import asyncio
import time

import pytest

from pilotlight.domain.worker import WorkerState
from pilotlight.gateway import worker_protocol

HOLD_S = 0.3


@pytest.fixture(autouse=True)
def holds(monkeypatch):
    monkeypatch.setattr("pilotlight.gateway.worker_protocol._REFUSED_HOLD_S", HOLD_S)
    monkeypatch.setattr("pilotlight.gateway.worker_protocol._CLOSING_HOLD_S", HOLD_S)


async def timed(call):
    """An answer, and how long it took."""
    began = time.monotonic()
    return await call, time.monotonic() - began


async def test_a_take_that_meets_a_defect_of_ours_is_held_before_it_is_refused(platform):
    """§9: 429 makes newer libraries pause for 5 s; those before 1.7 ask again at once, 12 times a second."""

    async def defective(*_, **__):
        raise RuntimeError("a defect of ours")

    platform.fleet.add(capacity=1)
    platform.fleet.took = defective
    answer, taken_s = await timed(platform.take())
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert taken_s >= HOLD_S
    assert "defect" not in answer.text


async def test_a_take_more_than_any_library_opens_is_held_before_it_is_refused(platform, monkeypatch):
    """§3.1, §9: as above."""
    monkeypatch.setattr("pilotlight.gateway.jobs.desk._POLLS_MAX", 1)
    platform.fleet.add(capacity=1)
    parked = asyncio.create_task(platform.take())
    await platform.parked()
    answer, taken_s = await timed(platform.take())
    assert answer.status_code == 429
    assert "open takes" in answer.text
    assert taken_s >= HOLD_S
    assert (await parked).status_code == 204


async def test_polls_stay_open_until_their_worker_has_been_told_to_end(make_platform):
    """§6.3, steps 2 and 3, at the stop of the gateway.

    Polls were answered first, so the worker asked again before it had the signal, was answered 429, slept 5 s
    and met SIGKILL.
    """
    async with make_platform() as platform:
        platform.fleet.add(capacity=1)
        take = asyncio.create_task(platform.take())
        stop = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
        await platform.parked()
        job_id = await platform.run()
        assert (await take).json()["id"] == job_id
        take = asyncio.create_task(platform.take(holding=True))
        await platform.parked()
        platform.service.begin_close()
        await platform.ping(job_id)
        assert not take.done()
        assert not stop.done()
        platform.fleet.become("w1", WorkerState.STOPPING)
        platform.service.release_polls("w1")
        assert (await take).status_code == 204
        assert (await stop).json() == {"jobsToStop": ["-"]}
        # Its job may still be finished, and what it asks after that neither storms nor puts it to sleep.
        assert (await platform.done(job_id, {"output": 1})).status_code == 200
        for batch in (0, 4):
            answer, taken_s = await timed(platform.take(batch=batch))
            assert answer.status_code == 204
            assert HOLD_S <= taken_s < 5
        assert (await platform.status(job_id))["status"] == "COMPLETED"


async def test_nothing_is_handed_out_once_the_gateway_stops(make_platform):
    """§6.3 step 1: not even into a take that was open before."""
    async with make_platform() as platform:
        platform.fleet.add(capacity=1)
        take = asyncio.create_task(platform.take())
        await platform.parked()
        platform.service.begin_close()
        job_id = await platform.run()
        platform.slots.on_free("ep1")
        platform.service.release_polls("w1")
        assert (await take).status_code == 204
        assert (await platform.take()).status_code == 204
        assert (await platform.store.job(job_id)).attempt == 0


async def test_strangers_are_refused_while_the_gateway_stops(platform):
    """§13: with the shorter hold, as nobody's exit may wait for them."""
    platform.service.begin_close()
    answer, taken_s = await timed(platform.take("unknown"))
    assert answer.status_code == 429
    assert taken_s >= HOLD_S


@pytest.mark.parametrize(
    "path",
    ["job-done/w1/{job_id}?isStream=false", "job-stream/w1/{job_id}?isStream=false", "job-done-batch/w1?x=1"],
)
async def test_a_result_whose_body_does_not_arrive_may_be_posted_again(platform, monkeypatch, path):
    """§3.4: 408, like any 4xx, loses the result, as the library posts again after 5xx only."""
    monkeypatch.setattr("pilotlight.gateway.worker_protocol._POST_BODY_S", 0.05)
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    answered = asyncio.Event()

    async def body():
        yield b'{"output": '
        await answered.wait()
        yield b"5}"

    url = "/" + path.format(job_id=job_id)
    post = asyncio.create_task(platform.ask("POST", url, content=body()))
    hand_out = platform.service._ledger.links["w1"].hand_outs[job_id]
    while not hand_out.post_failed:
        await asyncio.sleep(0.001)
    answered.set()
    assert (await post).status_code == 503
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.done(job_id, {"output": 5})
    assert (await platform.status(job_id))["output"] == 5


async def test_results_have_more_time_to_arrive_than_what_clients_send(platform, monkeypatch):
    """§3.4, §8: a worker may block in the middle of an upload; 120 s are enough for clients only."""
    assert worker_protocol._POST_BODY_S >= 600
    monkeypatch.setattr(platform.app, "_body_s", 0.05)
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()

    async def body():
        yield b'{"output": '
        await asyncio.sleep(0.3)
        yield b"5}"

    answer = await platform.ask("POST", f"/job-done/w1/{job_id}?isStream=false", content=body())
    assert answer.status_code == 200
    assert (await platform.status(job_id))["output"] == 5
