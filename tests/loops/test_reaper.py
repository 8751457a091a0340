"""The reaper: sweeps, prunes, survives failures, starts and stops idempotently."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pilotlight.errors import StoreError
from pilotlight.loops.reaper import Reaper
from pilotlight.settings import Settings, StoreSettings


class Clock:
    def __init__(self):
        self.now = 1_000_000_000

    def now_ms(self):
        return self.now

    def monotonic_ns(self):
        return self.now * 1_000_000


@dataclass
class Recorder:
    """Both the owner of the jobs and the store; notes every call."""

    calls: list[str] = field(default_factory=list)
    full_slices: int = 0
    purged_slices: int = 0
    broken: dict[str, Exception] = field(default_factory=dict)
    swept: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, name):
        self.calls.append(name)
        if name in self.broken:
            raise self.broken[name]

    async def end_overdue(self):
        self.note("end_overdue")

    async def lose_unconfirmed(self):
        self.note("lose_unconfirmed")

    async def kill_stuck(self):
        self.swept.set()
        self.note("kill_stuck")

    async def delete_purged(self, *, now_ms, limit):
        self.note("delete_purged")
        self.purged_slices -= 1
        return limit if self.purged_slices >= 0 else 0

    async def prune_jobs(self, *, now_ms, limit):
        self.note("prune_jobs")
        self.full_slices -= 1
        return limit if self.full_slices >= 0 else 0

    async def prune_batches(self, *, ended_before_ms, limit):
        self.note(f"prune_batches {ended_before_ms}")

    async def prune_requests(self, *, keep):
        self.note(f"prune_requests {keep}")

    async def prune_workers(self, *, ended_before_ms):
        self.note(f"prune_workers {ended_before_ms}")

    async def prune_logs(self, older_than_ms):
        self.note(f"prune_logs {older_than_ms}")
        return 0


SWEEP = ["end_overdue", "lose_unconfirmed", "kill_stuck", "delete_purged"]


def make(tmp_path, recorder, clock):
    settings = Settings(home=tmp_path, store=StoreSettings(request_log_rows=7))
    return Reaper(recorder, recorder, clock, settings, prune_logs=recorder.prune_logs)


async def test_first_sweep_does_everything_and_later_ones_what_is_due(tmp_path):
    recorder, clock = Recorder(), Clock()
    reaper = make(tmp_path, recorder, clock)
    await reaper.sweep()
    week_ago = clock.now - 7 * 86_400_000
    assert recorder.calls == [
        *SWEEP,
        "prune_jobs",
        f"prune_batches {week_ago}",
        "prune_requests 7",
        f"prune_workers {week_ago}",
        f"prune_logs {week_ago}",
    ]
    recorder.calls.clear()
    clock.now += 1000
    await reaper.sweep()
    assert recorder.calls == SWEEP
    recorder.calls.clear()
    clock.now += 5000
    await reaper.sweep()
    assert recorder.calls == [*SWEEP, "prune_jobs"]


async def test_clock_set_back_does_not_stop_the_pruning(tmp_path):
    recorder, clock = Recorder(), Clock()
    reaper = make(tmp_path, recorder, clock)
    await reaper.sweep()
    recorder.calls.clear()
    clock.now -= 100_000_000
    await reaper.sweep()
    assert "prune_jobs" in recorder.calls


async def test_pruning_goes_on_until_nothing_is_left(tmp_path):
    recorder = Recorder(full_slices=3)
    await make(tmp_path, recorder, Clock()).sweep()
    assert recorder.calls.count("prune_jobs") == 4


async def test_purged_jobs_go_in_slices_and_not_all_in_one_round(tmp_path):
    """A million of them must not hold up the deadlines of other jobs (serverless-api.md §2.15)."""
    recorder = Recorder(purged_slices=125)
    reaper = make(tmp_path, recorder, Clock())
    await reaper.sweep()
    assert recorder.calls.count("delete_purged") == 100
    await reaper.sweep()
    assert recorder.calls.count("delete_purged") == 126


async def test_failing_step_does_not_hinder_the_others(tmp_path):
    recorder = Recorder(broken={"end_overdue": StoreError("disk full"), "kill_stuck": ValueError("bug")})
    await make(tmp_path, recorder, Clock()).sweep()
    assert recorder.calls[:5] == [*SWEEP, "prune_jobs"]


async def test_start_and_stop_are_idempotent(tmp_path):
    recorder = Recorder()
    reaper = make(tmp_path, recorder, Clock())
    await reaper.stop()
    reaper.start()
    reaper.start()
    assert [task.get_name() for task in asyncio.all_tasks()].count("reaper") == 1
    await recorder.swept.wait()
    await reaper.stop()
    await reaper.stop()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "reaper"]
    recorder.swept.clear()
    reaper.start()
    await recorder.swept.wait()
    await reaper.stop()
