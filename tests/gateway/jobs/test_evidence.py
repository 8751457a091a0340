"""What takes, heartbeats and polls say of the jobs at a worker, and of the worker (worker-protocol.md §5 to §7)."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pilotlight.core.explain import WaitReason
from pilotlight.domain.job import JobStatus
from pilotlight.domain.worker import WorkerState
from pilotlight.errors import StoreError


def link_of(platform, worker="w1"):
    return platform.service._ledger.links[worker]


async def open_take(platform, worker="w1", *, batch=4):
    """A take that stays open."""
    take = asyncio.create_task(platform.take(worker, holding=True, batch=batch))
    await platform.parked()
    return take


async def open_stop_poll(platform):
    """A stop poll that stays open."""
    poll = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
    while not link_of(platform).stop_polls:
        await asyncio.sleep(0.001)
    return poll


def fail_second_piece(platform):
    """The second chunk that is appended meets a full disk; those after it do not."""
    append_of_store, calls = platform.store.append_chunk, []

    async def failing(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 2:
            raise StoreError("disk full")
        return await append_of_store(*arguments, **named)

    platform.store.append_chunk = failing


async def end(task):
    task.cancel()
    await asyncio.wait({task})


async def test_a_job_without_a_result_at_a_worker_of_several_slots(platform):
    """§7.1 L1, §15.2: received, as a later take shows, but in no heartbeat: it ends FAILED and runs once.

    With several slots the next take says `job_in_progress=1` and stays open, so that a handler which ends before
    a heartbeat could list it left no sign. It was requeued after six seconds and ran again.
    """
    platform.fleet.add(capacity=8)
    job_id = await platform.run()
    await platform.take(batch=8)
    take = await open_take(platform, batch=7)
    await platform.ping()
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.ping()
    job = await platform.store.job(job_id)
    assert (job.status, job.error, job.retries) == (JobStatus.FAILED, "worker produced no result", 0)
    assert platform.slots.worker("w1").jobs == 0
    await end(take)


async def test_a_job_whose_take_was_hung_up_has_not_been_received(platform):
    """§7.1 L3: a later take says nothing of what was written to a connection that was closed."""
    platform.fleet.add("w1", capacity=4)
    job_id = await platform.run()
    await platform.take(batch=4)
    link_of(platform).hand_outs[job_id].connection = None
    take = await open_take(platform)
    for _ in range(3):
        await platform.ping()
    await platform.pass_time(4)
    await platform.ping()
    await platform.pass_time(4)
    job = await platform.store.job(job_id)
    assert (job.status, job.retries) == (JobStatus.IN_QUEUE, 1)
    await end(take)


async def test_heartbeats_before_the_hand_out_say_nothing_of_it(platform):
    """§7.1 L3: only a heartbeat that was sent after the hand-out can lack the job."""
    platform.fleet.add(capacity=1)
    await platform.ping()
    platform.clock.advance(1)
    job_id = await platform.run()
    await platform.take()
    await platform.pass_time(8)
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.ping()
    await platform.pass_time(1)
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"


async def test_nothing_is_lost_for_a_pause_of_ours(platform):
    """§6.5: heartbeats that came while we stood still are yet to be read."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.pass_time(1)
    platform.clock.advance(60)
    await platform.service.lose_unconfirmed()
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.ping(job_id)
    await platform.pass_time(8)
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"


class TestNeverTwice:
    """§3.2: a worker gets no id that it may still hold, in its hands or in its socket."""

    async def lose(self, platform):
        """A job that its worker, which is blocked, has not read: requeued, and offered to nobody else."""
        platform.fleet.add("w1", capacity=4)
        job_id = await platform.run()
        await platform.take(batch=4)
        await platform.pass_time(4)
        await platform.ping()
        await platform.pass_time(4)
        assert (await platform.status(job_id))["status"] == "IN_QUEUE"
        return job_id

    async def test_until_a_later_take_and_a_heartbeat(self, platform):
        """One worker, four slots, blocked for twelve seconds: both deliveries ran, at the same worker."""
        job_id = await self.lose(platform)
        for _ in range(3):
            await platform.ping()
            await platform.pass_time(2)
        take = await open_take(platform)
        assert link_of(platform).withheld() == {job_id}
        await platform.ping(job_id)
        await platform.ping(job_id)
        assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).json() == {"jobsToStop": [job_id]}
        assert not take.done()
        await platform.ping()
        assert [job["id"] for job in (await take).json()] == [job_id]

    async def test_until_an_idle_take(self, platform):
        """§5: a take with `job_in_progress=0` closes every earlier hand-out."""
        job_id = await self.lose(platform)
        assert (await platform.take(batch=4)).json()[0]["id"] == job_id

    async def test_other_jobs_are_not_held_up(self, platform):
        """The job at the head of the queue is passed by, and its story tells of no attempt that was none."""
        job_id = await self.lose(platform)
        take = await open_take(platform)
        await platform.pass_time(5)
        other_id = await platform.run()
        assert [job["id"] for job in (await take).json()] == [other_id]
        job = await platform.store.job(job_id)
        assert (job.attempt, len(job.attempts)) == (1, 1)

    async def test_why_it_waits(self, platform):
        job_id = await self.lose(platform)
        platform.fleet.become("w1", WorkerState.READY)
        view = (await platform.call("GET", f"/status/{job_id}?timeline=true")).json()
        assert view["waiting"]["reason"] == WaitReason.WITHHELD

    async def test_another_worker_gets_it(self, platform):
        job_id = await self.lose(platform)
        take = await open_take(platform)
        platform.fleet.add("w2", capacity=1)
        assert (await platform.take("w2")).json()["id"] == job_id
        await end(take)

    async def test_a_worker_without_heartbeats_gets_it_when_it_is_idle(self, platform):
        """Its takes tell that it has read everything, not that it has let go."""
        platform.fleet.add(capacity=2)
        job_id = await platform.run()
        await platform.take(batch=2)
        await platform.pass_time(8)
        assert (await platform.status(job_id))["status"] == "IN_QUEUE"
        for _ in range(2):
            await end(await open_take(platform, batch=2))
            await platform.parked(0)
        assert link_of(platform).withheld() == {job_id}
        assert (await platform.take(batch=2)).json()[0]["id"] == job_id


async def test_a_heartbeat_counts_although_the_store_fails(platform):
    """§3.6: 200 always; the disk was full for four seconds, and a running job was requeued and told to stop."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    apply_of_store = platform.store.apply_many

    async def full(_):
        raise StoreError("disk full")

    platform.store.apply_many = full
    for _ in range(3):
        assert (await platform.ping(job_id)).status_code == 200
        await platform.pass_time(2)
    platform.store.apply_many = apply_of_store
    await platform.pass_time(4)
    assert (await platform.store.job(job_id)).confirmed_ms is None
    await platform.ping(job_id)
    job = await platform.store.job(job_id)
    assert (job.status, job.retries) == (JobStatus.IN_PROGRESS, 0)
    assert job.confirmed_ms is not None


@pytest.mark.parametrize("sign", ["take", "post"])
async def test_a_worker_without_a_stop_poll_lives_while_it_calls(platform, sign):
    """§6.5, §8: of libraries before 1.10 whose heartbeat has died takes and posts are signs of life."""
    platform.fleet.add(capacity=2)
    job_id = await platform.run()
    await platform.take(batch=2)
    await platform.ping(job_id)
    if sign == "take":
        call = await open_take(platform, batch=1)
    else:
        link_of(platform).hand_outs[job_id].posts += 1
    await platform.pass_time(30)
    assert platform.fleet.killed == []
    if sign == "take":
        await end(call)
        await platform.parked(0)
    else:
        link_of(platform).hand_outs[job_id].posts -= 1
    await platform.pass_time(5)
    await platform.fleet.changed.wait()
    assert "no sign of life" in platform.fleet.killed[0][1]


async def test_a_worker_that_hangs_and_never_sent_a_heartbeat(platform):
    """§7.1 L7: its job times out, and it is ended, for nothing else will ever end it."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": 1, "policy": {"executionTimeout": 5000}})
    await platform.take()
    await platform.done(job_id, {"status": "IN_PROGRESS", "output": 1})
    await platform.pass_time(6)
    await platform.service.end_overdue()
    assert (await platform.status(job_id))["error"] == "executionTimeout exceeded"
    await platform.pass_time(6)
    await platform.fleet.changed.wait()
    assert "goes on with job" in platform.fleet.killed[0][1]


async def test_main_process_that_is_gone_while_its_worker_is_drained(platform):
    """§6.5, §15.9: behind a wrapper the heartbeats of a dead worker went on until the end of the drain."""
    platform.fleet.add(capacity=2)
    job_id = await platform.run()
    await platform.take()
    poll = await open_stop_poll(platform)
    link = link_of(platform)
    platform.fleet.become("w1", WorkerState.DRAINING)
    await end(poll)
    while link.stop_polls:
        await asyncio.sleep(0.001)
    for _ in range(2):
        await platform.ping(job_id)
        await platform.pass_time(2)
    await platform.fleet.changed.wait()
    assert "stop poll broke" in platform.fleet.killed[0][1]


async def test_pieces_of_a_chunk_are_stored_once(platform):
    """§7.2: never 5xx after append; a text that is split was stored in part, and whole when it came again."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    fail_second_piece(platform)
    text = "ab" * 750_000
    assert (await platform.chunk(job_id, text)).status_code == 503
    assert (await platform.chunk(job_id, text)).status_code == 200
    assert (await platform.chunk(job_id, text)).status_code == 200
    await platform.done(job_id, {"output": []})
    stream = (await platform.call("GET", f"/stream/{job_id}")).json()["stream"]
    assert "".join(chunk["output"] for chunk in stream) == text * 2


async def hold_up(platform):
    """The writer of SQLite, kept busy; what is asked for until `go` is set makes one group."""
    go, busy = threading.Event(), threading.Event()

    def wait(_):
        busy.set()
        go.wait(30)

    blocked = platform.store._writer.submit(wait)
    await asyncio.to_thread(busy.wait, 30)
    return go, blocked


async def test_a_job_that_is_taken_away_while_its_worker_takes(make_platform):
    """§3.2: the loss and the take were one group of the store, whose take is answered first.

    The same worker got the job again, was told to stop it for the sake of the first attempt, and it FAILED.
    """
    async with make_platform(sqlite=True) as platform:
        platform.fleet.add("w1", capacity=2)
        job_id = await platform.run()
        await platform.take(batch=1)
        link_of(platform).hand_outs[job_id].connection = None
        take = await open_take(platform, batch=1)
        await platform.ping()
        await platform.pass_time(5)
        await platform.ping()
        go, blocked = await hold_up(platform)
        other = asyncio.create_task(platform.run())
        while not link_of(platform).asking:
            await asyncio.sleep(0.001)
        platform.clock.advance(2)
        losing = asyncio.create_task(platform.service.lose_unconfirmed())
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(blocked, losing)
        assert [job["id"] for job in (await take).json()] == [await other]
        assert job_id in link_of(platform).withheld()
        job = await platform.store.job(job_id)
        assert (job.status, job.retries) == (JobStatus.IN_QUEUE, 1)


async def test_a_job_that_only_its_progress_has_shown(platform):
    """§7.1 L1: it was in no heartbeat, before or after; a worker with other work kept it until its time was over."""
    platform.fleet.add(capacity=2)
    job_id, other_id = await platform.run(), await platform.run()
    await platform.take(batch=2)
    await platform.done(job_id, {"status": "IN_PROGRESS", "output": 1})
    take = await open_take(platform, batch=1)
    await platform.ping(other_id)
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.ping(other_id)
    assert (await platform.status(job_id))["error"] == "worker produced no result"
    await end(take)


async def test_heartbeats_that_have_ended_do_not_keep_a_job(platform):
    """§7.1 L3: none will come any more that could lack the job."""
    platform.fleet.add(capacity=1)
    await platform.ping()
    platform.clock.advance(1)
    job_id = await platform.run()
    await platform.take()
    poll = await open_stop_poll(platform)
    await platform.pass_time(10)
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.pass_time(4)
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    assert platform.fleet.killed == []
    await end(poll)


async def test_a_worker_that_lets_go_while_the_store_is_asked_for_it(platform):
    """Its take was made to wait for what it had been withheld, and nothing woke it any more."""
    platform.fleet.add(capacity=2)
    job_id, other_id = await platform.run(), await platform.run()
    await platform.take(batch=2)
    await platform.ping(job_id, other_id)
    link = link_of(platform)
    link.hand_outs[job_id].post_failed = True
    take_of_store, asked, go = platform.store.take, asyncio.Event(), asyncio.Event()

    async def slow(*arguments, **named):
        jobs = await take_of_store(*arguments, **named)
        asked.set()
        await go.wait()
        return jobs

    platform.store.take = slow
    await platform.ping(other_id)
    take = await open_take(platform, batch=1)
    await asked.wait()
    assert link.withheld() == {job_id}
    await platform.ping(other_id)
    go.set()
    assert [job["id"] for job in (await take).json()] == [job_id]


async def test_what_is_done_is_not_withheld(platform):
    """A job stays in the list of the last heartbeat after its result has come."""
    platform.fleet.add(capacity=2)
    ids = [await platform.run() for _ in range(2)]
    await platform.take(batch=2)
    await platform.ping(*ids)
    for job_id in ids:
        await platform.done(job_id, {"output": 1})
    assert link_of(platform).withheld() == frozenset()


async def test_pieces_of_a_chunk_that_was_given_up_are_not_missing_in_the_next(platform):
    """A worker that numbers its chunks goes on with the next one when its tries are over."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    fail_second_piece(platform)
    statuses = []
    for number, letter in enumerate("ab"):
        path = f"/job-stream/w1/{job_id}?gpu=x&seq={number}"
        answer = await platform.ask("POST", path, json={"output": letter * 1_500_000})
        statuses.append(answer.status_code)
    await platform.done(job_id, {"output": []})
    stream = (await platform.call("GET", f"/stream/{job_id}")).json()["stream"]
    assert statuses == [503, 200]
    assert "".join(chunk["output"] for chunk in stream) == "a" * 750_000 + "b" * 1_500_000


async def test_a_list_that_was_cut_short_loses_nothing(platform):
    """§3.6: the library cuts a heartbeat's list at 64 KiB; what is missing then may have been cut off."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.ping(job_id)
    # More does not fit into an address here: there are no workers with so many jobs at a time.
    others = ",".join(f"{number:036d}-u1" for number in range(2_000))[:62_000]
    assert (await platform.ask("GET", f"/ping/w1?gpu=x&job_id={others}")).status_code == 200
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.ping("another")
    assert (await platform.status(job_id))["error"] == "worker produced no result"


async def test_a_worker_whose_heartbeat_has_died_lives_by_its_stop_poll(platform):
    """§6.5: heartbeats that stop while the stop poll stands do not say that the worker is dead."""
    platform.fleet.add(capacity=1)
    platform.fleet.become("w1", WorkerState.READY)
    await platform.ping()
    poll = await open_stop_poll(platform)
    await platform.pass_time(60)
    assert platform.fleet.killed == []
    await end(poll)


@pytest.mark.parametrize(("seconds", "entropy", "hold"), [(25, 0, 22.5), (25, 255, 27.5), (60, 255, 60.0)])
async def test_holds_are_spread_and_bounded(platform, seconds, entropy, hold):
    """§8: 25 s ± 10 %, so that the polls of many workers do not end together, and never more than 60 s."""
    desk = platform.service.workers
    desk._entropy = lambda _: bytes([entropy])
    assert desk._spread(seconds) == pytest.approx(hold)


async def test_the_log_of_a_worker_names_its_library(platform):
    """§11: the version that its heartbeats give is recorded, once."""
    platform.fleet.add(capacity=1)
    for _ in range(2):
        await platform.ping()
    assert platform.notes == [("w1", "the worker's library is 1.12.0")]
