"""What the fleet's news do to the rest of the gateway."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.core.admission import AdmissionLimits
from pilotlight.domain.worker import Address, Registration, Worker, WorkerState
from pilotlight.gateway.listener import FleetListener
from pilotlight.gateway.slots import SlotTable, WorkerGoneError
from pilotlight.system import SystemClock


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
    [(WorkerState.STARTING, False), (WorkerState.READY, False), (WorkerState.DRAINING, True)],
)
async def test_who_waits_for_a_worker_out_of_rotation_waits_on_unless_it_ends(state, gone):
    """One that starts says 204 for a while (serverless-api.md §3); a request pinned to it waits for its 200."""
    slots = SlotTable(SystemClock(), AdmissionLimits(requests=1, bytes=1))
    listener = FleetListener(slots, Kept(), Kept(), Kept())
    held = asyncio.Event()
    slots.on_demand = lambda _: held.set()
    waiting = asyncio.create_task(slots.hold("e", 0, timeout_s=60, worker_id="w1"))
    await held.wait()
    listener.withdrawn(Worker(id="w1", endpoint_id="e", version=1, state=state))
    if gone:
        with pytest.raises(WorkerGoneError):
            await waiting
        return
    worker = Worker(id="w1", endpoint_id="e", version=1, state=WorkerState.READY)
    listener.opened(worker, Registration(engine=Address(url="http://127.0.0.1:7001")), 1)
    assert (await waiting).worker_id == "w1"
