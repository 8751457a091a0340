"""What becomes of jobs when the gateway loses the lead, and of those that no worker was ever given."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from pilotlight.domain.job import JobStatus
from pilotlight.domain.worker import WorkerState
from pilotlight.gateway.elsewhere import Elsewhere, FleetElsewhere, JobsElsewhere


async def test_nothing_is_handed_out_without_the_lead_and_takes_are_answered(platform):
    """worker-protocol.md §3.1: an open take is answered with nothing; later the queue is served again."""
    platform.fleet.add(capacity=1)
    take = asyncio.create_task(platform.take())
    await platform.parked()
    platform.service.ledger.suspend()
    assert (await take).status_code in {204, 400}
    job_id = await platform.run()
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    await platform.fleet.end("w1", "the gateway lost the lead")
    platform.service.ledger.resume()
    platform.fleet.add("w2", capacity=1)
    assert (await platform.take("w2")).json()["id"] == job_id


async def test_losing_the_lead_uses_up_no_retry(platform):
    """serverless-api.md §5: the platform took the worker away."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    platform.service.ledger.suspend()
    await platform.fleet.end("w1", "the gateway lost the lead")
    job = await platform.store.job(job_id)
    assert (job.status, job.retries) == (JobStatus.IN_QUEUE, 0)


async def test_a_job_that_no_hand_out_backs_is_queued_again(platform):
    """The answer to a take was lost, its commit was not (worker-protocol.md §8)."""
    platform.fleet.add(capacity=2)
    lost, held = await platform.run(), await platform.run()
    await platform.store.take("ep1", "w1", count=1, now_ms=platform.clock.now_ms())
    await platform.take()
    await platform.ping(held)
    for _ in range(4):
        platform.clock.advance(6)
        await platform.service.lose_unconfirmed()
    job = await platform.store.job(lost)
    assert (job.status, job.retries) == (JobStatus.IN_QUEUE, 0)
    assert (await platform.store.job(held)).status is JobStatus.IN_PROGRESS


async def test_a_slot_is_given_back_once_when_a_job_ended_elsewhere(platform):
    """1. A result is being committed. 2. The job is seen to be over. 3. The result is settled."""
    platform.fleet.add(capacity=2)
    ledger = platform.service.ledger
    first, _second = await platform.run(), await platform.run()
    await platform.take()
    await platform.take(holding=True)
    [hand_out, _] = ledger.links["w1"].hand_outs.values()
    before = platform.slots.worker("w1").jobs
    jobs = JobsElsewhere(ledger)
    link = ledger.links["w1"]
    hand_out.posts = 1
    await platform.store.take("ep1", "w1", count=0, now_ms=0)
    await jobs._settle([(link, hand_out)])
    assert link.hand_outs[first] is hand_out
    del link.hand_outs[first]
    platform.slots.release_jobs("w1")
    await platform.service.cancel("ep1", first)
    assert platform.slots.worker("w1").jobs == before - 1


class Acted:
    """What `Elsewhere` made happen."""

    def __init__(self, platform):
        self.changed: list[str] = []
        self.deleted: list[str] = []
        self.served: set[str] = set()
        self.failures = 0
        self.leads = False
        self.fleet = FleetElsewhere(platform.fleet, platform.store, lambda: self.leads)
        self.elsewhere = Elsewhere(
            jobs=JobsElsewhere(platform.service.ledger),
            directory=platform.directory,
            changed=self.changed.append,
            deleted=self._delete,
            served=lambda: self.served,
            fleet=self.fleet,
            webhook_due=lambda: None,
        )

    async def _delete(self, endpoint_id: str) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("once")
        self.deleted.append(endpoint_id)
        self.served.discard(endpoint_id)

    async def look(self) -> None:
        self.elsewhere.resync()
        await self.elsewhere._reading


async def test_a_deletion_is_acted_on_although_the_directory_knows_it_already(platform):
    """Another reader of the directory was faster, and the first try failed."""
    acted = Acted(platform)
    await acted.look()
    assert acted.changed == ["ep1", "ep2"]
    await platform.store.delete_endpoint("ep1", now_ms=2)
    await platform.directory.refresh()
    acted.failures = 1
    await acted.look()
    assert acted.deleted == []
    await acted.look()
    await acted.look()
    assert acted.deleted == ["ep1"]
    assert acted.changed == ["ep1", "ep2"]


async def test_workers_of_an_endpoint_that_is_gone_are_ended(platform):
    acted = Acted(platform)
    acted.served = {"gone"}
    await acted.look()
    assert acted.deleted == ["gone"]


async def test_a_follower_shows_the_workers_of_the_leader(platform):
    """Its own fleet is empty; what it shows is what the leader has written down, living ones only."""
    acted = Acted(platform)
    platform.fleet.add("w1", capacity=1)
    mine = platform.fleet.worker("w1")
    theirs = replace(mine, id="w9")
    await platform.store.put_worker(theirs)
    await platform.store.put_worker(replace(mine, id="w8", endpoint_id="ep2"))
    await platform.store.put_worker(replace(mine, id="w7", state=WorkerState.STOPPED, ended_ms=5))
    assert list(acted.fleet.workers("ep1")) == []
    await acted.look()
    assert acted.fleet.workers("ep1") == [theirs]
    assert [worker.id for worker in acted.fleet.workers("ep2")] == ["w8"]
    acted.leads = True
    assert acted.fleet.workers("ep1") == [mine]
    await acted.look()
    acted.leads = False
    assert list(acted.fleet.workers("ep1")) == []


async def test_a_resync_wakes_waiters_some_after_the_other(platform):
    """Each of them asks the store: all at once they would hold up everybody else."""
    ledger = platform.service.ledger
    with contextlib.ExitStack() as watching:
        events = [watching.enter_context(ledger.signals.watch(f"j{number}")) for number in range(120)]
        JobsElsewhere(ledger).resync([])
        await asyncio.sleep(0)
        assert sum(event.is_set() for event in events) == 50
        await asyncio.gather(*(asyncio.wait_for(event.wait(), 10) for event in events))
