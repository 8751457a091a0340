"""What the fleet's news do to the rest of the gateway."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.core.admission import AdmissionLimits
from pilotlight.domain.endpoint import Endpoint, EndpointKind, Revision
from pilotlight.domain.worker import Address, Registration, Worker, WorkerState
from pilotlight.gateway.listener import FleetListener
from pilotlight.gateway.slots import Ask, SlotTable, WorkerGoneError
from pilotlight.system import SystemClock

ASK = Ask(1)


class Kept:
    """Notes what it is told to drop or to release."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return self.told.append


async def test_a_worker_that_ended_loses_its_connections_on_both_roads():
    """Its port goes to the next worker, which must not be sent requests over an old connection."""
    slots = SlotTable(SystemClock(), AdmissionLimits(requests=1, bytes=1))
    pool, balanced, folder, ports = Kept(), Kept(), Kept(), Kept()
    listener = FleetListener(slots, pool, folder, ports)
    listener.balanced = balanced
    worker = Worker(id="w1", endpoint_id="e", version=1, state=WorkerState.READY)
    address = Address(url="http://127.0.0.1:7001")
    listener.opened(worker, Registration(engine=address), 1)
    await listener.ended(worker, "test")
    assert pool.told == balanced.told == [[address.url]]
    assert slots.worker("w1") is None


@pytest.mark.parametrize(
    ("state", "gone"),
    [
        (WorkerState.STARTING, False),
        (WorkerState.READY, False),
        (WorkerState.FROZEN, False),
        (WorkerState.DRAINING, True),
    ],
)
async def test_who_waits_for_a_worker_out_of_rotation_waits_on_unless_it_ends(state, gone):
    """One that starts says 204 for a while (serverless-api.md §3); a request pinned to it waits for its 200."""
    slots = SlotTable(SystemClock(), AdmissionLimits(requests=1, bytes=1))
    listener = FleetListener(slots, Kept(), Kept(), Kept())
    held = asyncio.Event()
    slots.on_demand = lambda _: held.set()
    waiting = asyncio.create_task(slots.hold("e", ASK, timeout_s=60, worker_id="w1"))
    await held.wait()
    listener.withdrawn(Worker(id="w1", endpoint_id="e", version=1, state=state))
    if gone:
        with pytest.raises(WorkerGoneError):
            await waiting
        return
    worker = Worker(id="w1", endpoint_id="e", version=1, state=WorkerState.READY)
    listener.opened(worker, Registration(engine=Address(url="http://127.0.0.1:7001")), 1)
    assert (await waiting).worker_id == "w1"


class Called:
    """Notes every call by name."""

    def __init__(self, at_rest=True):
        self.calls = []
        self._at_rest = at_rest

    def at_rest(self, worker_id):
        return self._at_rest

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append(
            (name, *(getattr(each, "id", each) for each in arguments))
        )


def frozen_and_thawed(kind, *, whole):
    """A listener that has been told of a freeze and a thaw; its slots, connections, checks and jobs."""
    slots = SlotTable(SystemClock(), AdmissionLimits(requests=1, bytes=1))
    pool, checker, jobs = Kept(), Called(), Called()
    listener = FleetListener(slots, pool, Kept(), Kept())
    listener.checker, listener.jobs = checker, jobs
    worker = Worker(id="w1", endpoint_id="e", version=1, state=WorkerState.READY)
    server, own = Address(url="unix:/engine"), Address(url="unix:/listener")
    listener.opened(worker, Registration(engine=server, listener=own), 3)
    listener.frozen(worker)
    assert slots.worker("w1").free == 0
    revision = Revision(endpoint_id="e", version=1, model="m")
    listener.thawed(worker, Endpoint(id="e", name="e", kind=kind, revision=revision), whole=whole)
    assert slots.worker("w1").free == 0, "it is opened when its old polls are out of the way"
    listener.opened(worker, Registration(engine=server, listener=own), 3)
    assert slots.worker("w1").free == 3
    return pool.told, checker.calls, jobs.calls


async def test_a_frozen_worker_loses_its_connections():
    """The engine's end of them stands still; the first request after a thaw opens a new one."""
    dropped, checks, jobs = frozen_and_thawed(EndpointKind.VLLM, whole=False)
    assert dropped == [["unix:/engine", "unix:/listener"]]
    assert checks == [("forget", "w1")]
    assert jobs == [("slots_freed", "e"), ("slots_freed", "e")]


async def test_the_polls_of_a_worker_that_stood_still_are_answered_before_it_is_opened():
    _, _, jobs = frozen_and_thawed(EndpointKind.QUEUE, whole=True)
    assert jobs == [("slots_freed", "e"), ("thawed", "w1"), ("slots_freed", "e")]


async def test_health_checks_pause_while_a_worker_is_frozen():
    _, checks, _ = frozen_and_thawed(EndpointKind.LOAD_BALANCER, whole=True)
    assert checks == [("forget", "w1"), ("watch", "w1", "e")]


@pytest.mark.parametrize("jobs_at_rest", [True, False])
async def test_a_worker_is_at_rest_when_neither_a_slot_nor_a_job_is_left(jobs_at_rest):
    slots = SlotTable(SystemClock(), AdmissionLimits(requests=1, bytes=1))
    listener = FleetListener(slots, Kept(), Kept(), Kept())
    listener.jobs = Called(jobs_at_rest)
    worker = Worker(id="w1", endpoint_id="e", version=1, state=WorkerState.READY)
    listener.opened(worker, Registration(engine=Address(url="unix:/engine")), 1)
    assert listener.at_rest("w1") is jobs_at_rest
    assert slots.admit("e", ASK)[1] is not None
    assert not listener.at_rest("w1")
