"""A fleet and an autoscaler on the in-memory store, with a cluster whose processes are entries in a list."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import pytest

from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.placement import HostResources
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.worker import ProcessIdentity
from pilotlight.errors import ClusterError
from pilotlight.gateway.slots import SlotTable
from pilotlight.loops.autoscaler import Autoscaler
from pilotlight.loops.fleet import WorkerFleet
from pilotlight.ports.cluster import WorkerExit
from pilotlight.ports.door import Kept
from pilotlight.settings import WorkerSettings
from pilotlight.stores.memory import MemoryStore

GIB = 1024**3


class HandClock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def now_ms(self) -> int:
        return self.now

    def monotonic_ns(self) -> int:
        return self.now * 1_000_000


@dataclass
class PaperCluster:
    """Implements the port `Cluster` on paper: processes end when the test says so."""

    running: dict = field(default_factory=dict)
    log: list = field(default_factory=list)
    leftovers: set = field(default_factory=set)
    refuse: str | None = None
    unstoppable: Exception | None = None
    unkillable: set = field(default_factory=set)
    kept_bytes: int = GIB
    gpu_bytes: int = 0

    async def start(self, spec, on_exit):
        if self.refuse:
            raise ClusterError(self.refuse)
        self.running[spec.worker_id] = (spec, on_exit)
        self.log.append(("start", spec.worker_id))
        return ProcessIdentity(pid=4_000_000 + len(self.log), started_ticks=1, boot_id="b")

    def end(self, worker_id, code=0):
        _, on_exit = self.running.pop(worker_id)
        on_exit(WorkerExit(worker_id=worker_id, code=code))

    async def terminate(self, worker_id):
        self.log.append(("terminate", worker_id))

    async def kill(self, worker_id):
        self.log.append(("kill", worker_id))
        while worker_id in self.unkillable:
            await asyncio.sleep(0.001)
        if worker_id in self.running:
            self.end(worker_id, -9)

    async def freeze(self, worker_id):
        self.log.append(("freeze", worker_id))
        if self.unstoppable:
            raise self.unstoppable
        return self.kept_bytes

    async def thaw(self, worker_id):
        self.log.append(("thaw", worker_id))
        if self.unstoppable:
            raise self.unstoppable

    async def gpu_memory(self, worker_id, devices):
        return self.gpu_bytes

    async def sweep(self, workers):
        self.log.append(("sweep", tuple(workers)))
        return [worker_id for worker_id in workers if worker_id in self.leftovers]

    async def close(self):
        self.unkillable.clear()
        for worker_id in list(self.running):
            self.end(worker_id, 0)


class PaperDoor:
    """Implements the port `WorkerDoor` on paper: every call waits for the test, where the test wants that.

    `answers` has what each call returns or raises.
    """

    def __init__(self):
        self.log = []
        self.answers = {"freeze": Kept(memory_bytes=GIB, slept=False), "thaw": None, "look": None}
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def _ask(self, what, address):
        self.log.append((what, address.url))
        self.asked.set()
        await self.go_on.wait()
        answer = self.answers[what]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def freeze(self, listener, *, timeout_s):
        self.timeout_s = timeout_s
        return await self._ask("freeze", listener)

    async def thaw(self, listener, *, answers_s, timeout_s):
        self.timeout_s = timeout_s
        await self._ask("thaw", listener)

    async def look(self, server, path, *, timeout_s):
        await self._ask("look", server)


class SlotListener:
    """The part of the bootstrap's listener that concerns slots."""

    def __init__(self, slots):
        self.slots = slots
        self.lost = []
        self.thaws = []
        self.rest = True

    def spawned(self, worker, endpoint):
        pass

    def opened(self, worker, registration, capacity):
        self.slots.open_worker(worker.endpoint_id, worker.id, capacity=capacity, registration=registration)

    def withdrawn(self, worker):
        self.slots.close_worker(worker.id)

    def at_rest(self, worker_id):
        return self.rest

    def frozen(self, worker):
        self.slots.close_worker(worker.id, for_good=False)

    def thawed(self, worker, endpoint, *, whole):
        self.thaws.append((worker.id, whole))

    def closed(self, worker):
        self.slots.close_worker(worker.id)

    def occupied(self, worker_id):
        slots = self.slots.worker(worker_id)
        return slots.occupied if slots else 0

    async def ended(self, worker, reason):
        self.lost.append((worker.id, reason))
        self.slots.drop_worker(worker.id)


class World:
    """Everything a loop test needs, wired as `bootstrap` does it."""

    def __init__(self, *, clock=None, store=None):
        self.clock = clock or HandClock()
        self.store = store or MemoryStore()
        self.cluster = PaperCluster()
        self.door = PaperDoor()
        self.slots = SlotTable(self.clock, AdmissionLimits(requests=10, bytes=1000))
        self.listener = SlotListener(self.slots)
        self.endpoints = {}
        self.given_up = []
        self.memory = 64 * GIB
        self.gpus = ()
        counter = itertools.count(1)
        self.fleet = WorkerFleet(
            store=self.store,
            cluster=self.cluster,
            door=self.door,
            listener=self.listener,
            clock=self.clock,
            settings=WorkerSettings(),
            entropy=lambda count: next(counter).to_bytes(2, "big") * count,
            environment=lambda endpoint, worker_id, secret: {"SECRET": secret},
            command=("worker",),
            host=lambda: HostResources(
                memory_bytes_total=self.memory, memory_bytes_available=self.memory, gpus=self.gpus
            ),
        )
        self.autoscaler = Autoscaler(
            endpoint=self.endpoints.get,
            store=self.store,
            traffic=self.slots,
            fleet=self.fleet,
            clock=self.clock,
            on_give_up=lambda endpoint, retry_ms: self.given_up.append((endpoint.id, retry_ms)),
        )

    def deploy(self, **changes):
        revision = Revision(endpoint_id="e", version=1, model="m", memory_bytes=GIB)
        endpoint = Endpoint(**({"id": "e", "name": "e", "revision": revision, "concurrency": 2} | changes))
        self.endpoints["e"] = endpoint
        return endpoint

    async def settle(self):
        """Let every task the fleet spawned finish."""
        await asyncio.sleep(0)
        while tasks := self.fleet._tasks.pending:
            await asyncio.gather(*tasks)


@pytest.fixture
async def world():
    made = World()
    yield made
    await made.autoscaler.stop()
    await made.fleet.close()
