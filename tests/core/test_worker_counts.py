"""Workers in the words of the service (serverless-api.md §2.15, §5.4, §13 item 13)."""

from __future__ import annotations

import itertools

import pytest

from pilotlight.core.worker_counts import ServiceStatus, count_workers, service_status
from pilotlight.domain.worker import Stage, Worker, WorkerState

IDLE, RUNNING = ServiceStatus.IDLE, ServiceStatus.RUNNING
INITIALIZING, UNHEALTHY = ServiceStatus.INITIALIZING, ServiceStatus.UNHEALTHY

# By state: without work, and with a slot in use.
EXPECTED = {
    WorkerState.STARTING: (INITIALIZING, INITIALIZING),
    WorkerState.READY: (IDLE, RUNNING),
    WorkerState.DRAINING: (RUNNING, RUNNING),
    WorkerState.FROZEN: (None, None),
    WorkerState.STOPPING: (None, None),
    WorkerState.STOPPED: (None, None),
    WorkerState.FAILED: (UNHEALTHY, UNHEALTHY),
}
COUNTERS = {"idle", "running", "initializing", "throttled", "unhealthy"}


def worker(state: WorkerState, stage: Stage = Stage.READY) -> Worker:
    return Worker(id="w", endpoint_id="e", version=1, state=state, stage=stage)


@pytest.mark.parametrize("state", WorkerState)
def test_every_state_has_its_word(state: WorkerState) -> None:
    """§5.4: initializing is starting, idle is up and waiting, running is processing, unhealthy has crashed."""
    found = tuple(service_status(worker(state), occupied=occupied) for occupied in (0, 1))
    assert found == EXPECTED[state]


def test_every_state_is_written_down_here() -> None:
    assert set(EXPECTED) == set(WorkerState)


@pytest.mark.parametrize("occupied", [0, 1])
@pytest.mark.parametrize(
    ("stage", "status"), [(Stage.UNHEALTHY, UNHEALTHY), (Stage.INITIALIZING, INITIALIZING)]
)
def test_a_worker_out_of_rotation_is_neither_idle_nor_running(
    stage: Stage, status: ServiceStatus, occupied: int
) -> None:
    """§2.15: `idle` is up and waiting, `unhealthy` is failing its checks; §3: 204 is initializing."""
    assert service_status(worker(WorkerState.READY, stage), occupied=occupied) is status


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("state", WorkerState)
def test_no_stage_breaks_a_state(state: WorkerState, stage: Stage) -> None:
    """Stages come from worker programs in any order; the word is one of the five, or none."""
    statuses = {service_status(worker(state, stage), occupied=occupied) for occupied in (0, 1)}
    assert statuses <= {None, *ServiceStatus}


def test_nothing_has_five_zeros() -> None:
    """§2.15: all counters are always there."""
    assert count_workers([], failed_starts=0, throttled=False) == dict.fromkeys(COUNTERS, 0)


def test_each_worker_counts_once() -> None:
    """§13 item 13: the counters add up to the workers that are shown."""
    statuses = [IDLE, IDLE, RUNNING, INITIALIZING, UNHEALTHY, None, None]
    counts = count_workers(statuses, failed_starts=0, throttled=False)
    assert counts == {"idle": 2, "running": 1, "initializing": 1, "throttled": 0, "unhealthy": 1}
    assert sum(counts.values()) == len([status for status in statuses if status is not None])


@pytest.mark.parametrize(("failed_starts", "unhealthy"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_failed_starts_are_unhealthy_and_not_counted_twice(failed_starts: int, unhealthy: int) -> None:
    """§2.15, `unhealthy`: crashed. A failed worker that is still listed is one of the failed starts."""
    counts = count_workers([UNHEALTHY, UNHEALTHY, IDLE], failed_starts=failed_starts, throttled=False)
    assert (counts["unhealthy"], counts["idle"]) == (unhealthy, 1)


@pytest.mark.parametrize("throttled", [False, True])
def test_wanted_but_no_capacity_is_one_throttled(throttled: bool) -> None:
    """§2.15, §5.3."""
    assert count_workers([IDLE], failed_starts=0, throttled=throttled)["throttled"] == int(throttled)


def test_whatever_the_fleet_is_every_counter_is_there() -> None:
    for size in range(3):
        for statuses in itertools.product([*ServiceStatus, None], repeat=size):
            assert count_workers(statuses, failed_starts=1, throttled=True).keys() == COUNTERS
