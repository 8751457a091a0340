"""An owner of slots and fronts of its, with real links between them."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.deadlines import HoldBound
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.data_path.desk import LocalDesk, Use, Wish
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.fronts.front_side import FrontSide
from pilotlight.gateway.fronts.owner_side import OwnerSide
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.slots import Ask, SlotTable
from pilotlight.ports.fleet import Health
from pilotlight.settings import LimitSettings, Settings
from pilotlight.stores.memory import MemoryStore
from pilotlight.system import SystemClock

LONG = HoldBound(30.0, by_client=False)


class IdleFleet:
    """No workers that start (port `Fleet`)."""

    def health(self, endpoint_id):
        return Health()

    def workers(self, endpoint_id):
        return []

    def stages(self, worker_id):
        return ()


class Seeker:
    """Waits for a slot and keeps it."""

    def __init__(self):
        self.told = asyncio.get_running_loop().create_future()
        self.slot = None
        self.error = None

    def granted(self, slot):
        self.slot = slot
        self.told.set_result(slot)

    def refused(self, error):
        self.error = error
        self.told.set_result(None)


class Front:
    """A front, and what its requests have."""

    def __init__(self, attached, side):
        self.attached = attached
        self.side = side
        self.desk = side.desk

    def known(self):
        """Requests that the owner, and this front, remember."""
        return len(self.attached._requests), len(self.desk._requests)

    def wish(self, *, key="run", endpoint="ep", body_bytes=10, tokens=1, **ask):
        found = self.side.directory.key_of_id(key) or ApiKey(id=key, name=key, scope=Scope.ADMIN, hash=key)
        called = self.side.directory.endpoint(endpoint) or an_endpoint(endpoint)
        return Wish(called, found, Ask(body_bytes, found.id, found.share, **ask), tokens)

    def seek(self, wish, bound=LONG):
        seeker = Seeker()
        seeker.ticket = self.desk.seek(wish, bound, seeker)
        return seeker

    async def slot(self, wish, bound=LONG):
        """The slot that a request is granted."""
        seeker = self.seek(wish, bound)
        await seeker.told
        assert seeker.error is None, seeker.error
        return seeker.slot

    async def refusal(self, wish, bound=LONG):
        """What a request is told that gets none."""
        seeker = self.seek(wish, bound)
        await seeker.told
        assert seeker.slot is None
        return seeker.error

    async def settle(self):
        """Wait until the owner has done what it was told, and its answers have come."""
        await self.desk.lives(frozenset())

    def finish(self, wish, slot, *, cost=1, tokens=None):
        self.desk.give_back(wish, slot, Use(failed=False, cost=cost))
        self.desk.end(wish, tokens)


def an_endpoint(name="ep", **fields):
    return Endpoint(id=name, name=name, revision=Revision(endpoint_id=name, version=1, model="m"), **fields)


def a_key(name, **fields):
    return ApiKey(id=name, name=name, scope=Scope.ADMIN, hash=hash_secret(f"rpa_{name}"), **fields)


class Rig:
    """The owner."""

    limits = LimitSettings(hold_requests=1000, hold_bytes=10_000, hold_s=30)

    def __init__(self, **options):
        self.clock = SystemClock()
        self.slots = SlotTable(self.clock, AdmissionLimits(requests=1000, bytes=10_000), **options)
        self.store = MemoryStore()
        self.directory = Directory(self.store)
        self.key_limits = KeyLimits(self.clock)
        self.outlook = Outlook(fleet=IdleFleet(), clock=self.clock)
        self.observed = []
        self.rows = []
        self.leading, self.closing = True, False
        self.desk = LocalDesk(
            directory=self.directory,
            slots=self.slots,
            key_limits=self.key_limits,
            fleet=IdleFleet(),
            outlook=self.outlook,
            limits=self.limits,
            observed=lambda worker_id, **how: self.observed.append((worker_id, how)),
        )
        self.owner = self.own()
        self.fronts = []

    def own(self, *, rates=None, settings=None):
        self.owner = OwnerSide(
            desk=self.desk,
            directory=self.directory,
            record=self.rows.append,
            settings=settings or Settings(),
            rates=rates,
            leads=lambda: self.leading,
            closing=lambda: self.closing,
        )
        return self.owner

    async def fill(self, *keys):
        await self.store.add_endpoint(an_endpoint())
        for key in (a_key("run"), *keys):
            await self.store.add_key(key)
        await self.directory.refresh()

    async def front(self):
        ours, its = socket.socketpair()
        attached = await self.owner.attach(ours)
        front = Front(attached, await FrontSide.connect(its))
        self.fronts.append(front)
        return front

    async def raw_front(self):
        """A front of which only the socket is there."""
        ours, its = socket.socketpair()
        its.setblocking(False)
        return await self.owner.attach(ours), its

    def open_worker(self, name="w", capacity=1, *, url="unix:/engine"):
        registration = Registration(engine=Address(url=url, key="secret"))
        self.slots.open_worker("ep", name, capacity=capacity, registration=registration)
        return registration

    async def held(self):
        return (await self.slots.traffic("ep", overdue_before_ms=0)).held

    def in_flight(self):
        return sum(slots.requests for slots in self.slots.workers())

    async def until_held(self, count):
        while await self.held() != count:
            await asyncio.sleep(0)

    async def close(self):
        for front in self.fronts:
            await front.side.close()
            await front.attached.lost.wait()


@pytest.fixture
async def rig():
    made = Rig()
    await made.fill()
    yield made
    await made.close()
