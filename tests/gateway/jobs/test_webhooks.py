"""Webhooks from the job's end to the receiver: job routes, worker routes, store, sender
(serverless-api.md §2.12, §12 items 3, 4, 16, 25 to 27, §13 item 11)."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from pilotlight.core.webhooks import signature
from pilotlight.loops.webhooks import WebhookSender
from pilotlight.net import GuardedHttp
from pilotlight.settings import WebhookSettings
from pilotlight.testing.receiver import receiving

SECRET = "whsec_test"


@pytest.fixture(params=["memory", "sqlite"])
async def world(request, make_platform):
    """A platform with a sender that its ledger wakes, and a receiver."""
    async with (
        make_platform(
            jobs={"take_hold_s": 1, "stop_hold_s": 1}, sqlite=request.param == "sqlite"
        ) as platform,
        receiving() as receiver,
        contextlib.AsyncExitStack() as stack,
    ):
        sender = WebhookSender(
            store=platform.store,
            http=GuardedHttp(allow_private=True),
            clock=platform.clock,
            settings=WebhookSettings(),
            secret=lambda endpoint_id: SECRET,
        )
        platform.service._ledger.webhook_due = sender.wake
        sender.start()
        stack.push_async_callback(sender.stop)
        platform.sender = sender
        yield platform, receiver


def body_of(request):
    """The body, after its signature was checked."""
    stamp = request.headers["X-Webhook-Timestamp"]
    assert request.headers["X-Webhook-Signature"] == signature(SECRET, stamp, request.body)
    return json.loads(request.body)


async def taken(platform, receiver, **fields):
    """A running job with a webhook; its id."""
    platform.fleet.add("w1", capacity=1)
    job_id = await platform.run({"input": {"prompt": "hi"}, "webhook": receiver.url, **fields})
    assert (await platform.take()).json()["id"] == job_id
    return job_id


async def test_a_completed_job(world):
    platform, receiver = world
    job_id = await taken(platform, receiver)
    await platform.done(job_id, {"output": {"text": "hello"}})
    await receiver.count(1)
    sent = body_of(receiver.requests[0])
    assert {name: sent[name] for name in ("id", "status", "output", "input", "webhook", "workerId")} == {
        "id": job_id,
        "status": "COMPLETED",
        "output": {"text": "hello"},
        "input": {"prompt": "hi"},
        "webhook": receiver.url,
        "workerId": "w1",
    }
    assert {"delayTime", "executionTime"} <= sent.keys()


async def test_a_failed_job(world):
    platform, receiver = world
    job_id = await taken(platform, receiver)
    await platform.done(job_id, {"error": "bad seed"})
    await receiver.count(1)
    sent = body_of(receiver.requests[0])
    assert (sent["status"], sent["error"], sent["input"]) == ("FAILED", "bad seed", {"prompt": "hi"})


async def test_a_cancelled_job_queued_or_running(world):
    """§12 item 26."""
    platform, receiver = world
    running = await taken(platform, receiver)
    queued = await platform.run({"input": 1, "webhook": receiver.url})
    for job_id in (running, queued):
        await platform.call("POST", f"/cancel/{job_id}")
    await receiver.count(2)
    sent = {body_of(request)["id"]: body_of(request)["status"] for request in receiver.requests}
    assert sent == {running: "CANCELLED", queued: "CANCELLED"}


async def test_a_job_whose_time_to_live_ends_queued_or_running(world):
    """§12 items 3 and 4: the webhook of the running one is all that is left of it."""
    platform, receiver = world
    policy = {"policy": {"ttl": 10_000}}
    running = await taken(platform, receiver, **policy)
    queued = await platform.run({"input": 1, "webhook": receiver.url, **policy})
    platform.clock.advance(11)
    await platform.service.end_overdue()
    platform.sender.wake()
    await receiver.count(2)
    sent = {body_of(request)["id"]: body_of(request)["status"] for request in receiver.requests}
    assert sent == {running: "TIMED_OUT", queued: "TIMED_OUT"}
    assert (await platform.call("GET", f"/status/{running}")).status_code == 404


async def test_purged_jobs(world):
    """§12 item 16: removed, and their owners learn of it."""
    platform, receiver = world
    ids = {await platform.run({"input": n, "webhook": receiver.url}) for n in range(3)}
    answer = await platform.call("POST", "/purge-queue")
    assert answer.json() == {"removed": 3, "status": "completed"}
    # What the reaper does in the background.
    while await platform.store.delete_purged(now_ms=platform.clock.now_ms()):
        pass
    platform.sender.wake()
    await receiver.count(3)
    sent = [body_of(request) for request in receiver.requests]
    assert {one["id"] for one in sent} == ids
    assert {one["status"] for one in sent} == {"CANCELLED"}


async def test_the_synonym(world):
    """§12 item 27."""
    platform, receiver = world
    job_id = await platform.run({"input": 1, "webhookV2": receiver.url})
    await platform.call("POST", f"/cancel/{job_id}")
    await receiver.count(1)


async def test_a_retried_job_sends_another_one_with_another_id(world):
    platform, receiver = world
    job_id = await taken(platform, receiver)
    await platform.done(job_id, {"error": "no"})
    await receiver.count(1)
    assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 200
    assert (await platform.take()).json()["id"] == job_id
    await platform.done(job_id, {"output": 1})
    await receiver.count(2)
    assert [body_of(request)["status"] for request in receiver.requests] == ["FAILED", "COMPLETED"]
    assert len({request.headers["X-Webhook-Id"] for request in receiver.requests}) == 2


async def test_a_delivery_that_fails_changes_nothing_for_the_job(world):
    """§2.12."""
    platform, receiver = world
    receiver.statuses(500)
    job_id = await taken(platform, receiver)
    await platform.done(job_id, {"output": 1})
    for number in (1, 2, 3):
        await receiver.count(number)
        while True:
            dead = await platform.store.dead_webhooks()
            due_ms = await platform.store.next_webhook_ms()
            if dead or (due_ms is not None and due_ms > platform.clock.now_ms()):
                break
            await asyncio.sleep(0.001)
        platform.clock.advance(10)
        platform.sender.wake()
    assert (await platform.status(job_id))["status"] == "COMPLETED"
    (dead,) = await platform.store.dead_webhooks()
    assert (dead.job_id, dead.tries, dead.last_status) == (job_id, 3, 500)


async def test_no_job_without_a_webhook_sends_one(world):
    platform, receiver = world
    job_id = await platform.run()
    await platform.call("POST", f"/cancel/{job_id}")
    assert await platform.store.next_webhook_ms() is None
    assert receiver.requests == []
