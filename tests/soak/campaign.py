"""A soak of the data path: mixed load and faults against a whole installation, and what must hold all along.

1. Every answer is the one that belongs to its request, whole and in order, or says properly that there is
   none; on endpoints without faults there is no such excuse. 2. Afterwards nothing is held: no slot, request,
   task, descriptor, zombie. 3. The memory of the gateway is flat. 4. Every request has exactly one row.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .asks import plain
from .clients import Client, Maker, fill_log
from .disturbance import Jobs
from .footprint import Footprint, census, left_over, thirds, watch, workers_of
from .ledger import check_accounts, streams_lost
from .site import Site, Target

GROWTH_MB = 5.0
"""What may be added to the median of resident memory from the second third of a soak to the last one. All that
grows with requests is bounded and full by then (measured: one megabyte more); the rest is the luck of the heap,
where what large requests leave is filled up anew. A hundred forgotten bytes per request would be 3 MB."""

GROWTH_BLOCKS = 25_000
"""What may be added to the live blocks of Python's allocator in all of a soak: numbers of workers that are gone
are told for five minutes more, and such. Measured: 8,000; one forgotten object in four requests would be as many."""

FLAT_S = 900
"""A shorter soak says nothing about growth: for five minutes the heap becomes as large as the most that is ever
under way at once."""

LOG_ROWS = 150_000
"""Rows of the request log that are written before such a soak: SQLite keeps the pages that it wrote last, up to
16 MiB, and so many fill that (measured: after 110,000 rows of 142 bytes the gateway grows no more). Else it
would be growing for most of the soak, as it should."""

SETTLE_S = 60
"""Bound of the wait for the end of all that was begun; nothing is asserted about how much of it is used."""

_AT_REST = re.compile(r"pilotlight_(requests_held|requests_in_flight|worker_slots_occupied|jobs)\{")


@dataclass
class Plan:
    """What is done to a site.

    Attributes:
        seconds: How long.
        seed: Chooses everything.
        clients: How many ask at the same time.
        pause_s: Mean pause of each between two requests.
        mix: See `Client`.
        prepare: Makes the endpoints.
        disturb: Makes what goes on beside the clients: coroutines that end when the soak is over.
        jobs_every_s: Mean time between two jobs; None for none.
        census: File for what the gateway tells of itself.
        maker: What is asked before and after the soak.
    """

    seconds: float
    seed: int
    clients: int
    pause_s: float
    mix: Mapping[bool, Mapping[Maker, float]]
    prepare: Callable[[Site], Awaitable[list[Target]]]
    disturb: Callable[[Site, list[Target]], list[Coroutine[Any, Any, None]]]
    jobs_every_s: float | None
    census: Path
    maker: Maker = plain


@dataclass
class Campaign:
    """One soak.

    Args:
        site: A running gateway without endpoints.
        plan: What is done to it.
    """

    site: Site
    plan: Plan
    footprints: list[Footprint] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._jobs = Jobs(self.site, f"{self.plan.seed}-jobs", every_s=self.plan.jobs_every_s or 1)

    def run(self, end: Callable[[], None]) -> None:
        """All of it; AssertionError tells everything that was wrong.

        Args:
            end: Ends the gateway, in order.
        """
        print(f"mixed load: {self.plan.seconds:g} s, seed {self.plan.seed}")
        try:
            asyncio.run(self._run())
            end()
            rows = check_accounts(self.site, self._jobs.submitted)
            self._check_variety(rows)
            lost = streams_lost(self.site.log)
            self.figures |= {"rows": dict(sorted(rows.items())), "streams_lost": dict(lost.most_common())}
        finally:
            self._print()
        assert not self.site.wrong, "\n".join(self.site.wrong)

    def _check_variety(self, rows: Counter[str]) -> None:
        """A soak in which little happened shows little."""
        for name in {target.name for target in self.site.targets}:
            if not self.site.counts[f"{name}.exact"]:
                self.site.report(f"nobody was served by {name}")
        if self.plan.seconds >= FLAT_S / 5 and not rows["streams_continued"]:
            self.site.report("no stream was continued")

    def _print(self) -> None:
        self.figures |= {
            "seconds": self.plan.seconds,
            "seed": self.plan.seed,
            "requests": len(self.site.sent),
            "jobs": len(self._jobs.submitted),
            "counts": dict(sorted(self.site.counts.items())),
            "wrong": len(self.site.wrong),
        }
        print(json.dumps({"mixed_load": self.figures}))

    async def _run(self) -> None:
        site, plan = self.site, self.plan
        targets = await plan.prepare(site)
        before, held_before = await self._warm_up(targets)
        began_s = time.monotonic()
        clients = [
            Client(site, f"{plan.seed}-{number}", plan.mix, pause_s=plan.pause_s)
            for number in range(plan.clients)
        ]
        async with asyncio.TaskGroup() as group:
            for work in (
                *(client.run() for client in clients),
                *plan.disturb(site, targets),
                *([self._jobs.run()] if plan.jobs_every_s else []),
                watch(site, self.footprints),
            ):
                group.create_task(work)
            await site.pause(plan.seconds)
            site.over.set()
        seconds = time.monotonic() - began_s
        self._check_limits(targets, seconds)
        await self._check_places(targets)
        after, held_after = await self._settle(held_before)
        self._check_footprint(before, after)
        blocks = held_after["blocks"] - held_before["blocks"]
        if blocks > GROWTH_BLOCKS:
            site.report(f"{blocks} live blocks more than before")
        self.figures |= {
            "tasks": [sum(held["tasks"].values()) for held in (held_before, held_after)],
            "blocks": [held["blocks"] for held in (held_before, held_after)],
            "threads": [held["threads"] for held in (held_before, held_after)],
        }

    async def _warm_up(self, targets: list[Target]) -> tuple[Footprint, dict[str, Any]]:
        """One round, so that what is made once is there before the first look."""
        client = Client(self.site, f"{self.plan.seed}-first", {}, pause_s=1, leaves=0)
        for target in targets:
            for key in target.keys:
                name = self.site.name()
                await client.ask(target, key, (name, self.plan.maker(client.choice, name)))
        client.close()
        if self.plan.seconds >= FLAT_S:
            await fill_log(self.site, targets[0], LOG_ROWS)
        return await self._settle()

    async def _settle(self, before: dict[str, Any] | None = None) -> tuple[Footprint, dict[str, Any]]:
        """Wait until nothing is held and the last worker is cleaned up; what is there then.

        What stays is reported.

        Args:
            before: What the gateway told of itself before; waits until it has no more than that.
        """
        deadline = time.monotonic() + SETTLE_S
        while True:
            metrics = await self.site.metrics()
            busy = {name: value for name, value in metrics.items() if _AT_REST.match(name) and value}
            living = workers_of(self.site.pid)
            footprint, held = Footprint.of(self.site.pid), await census(self.site, self.plan.census)
            # A worker that ended is a zombie first, and then its folder and its account are seen to.
            more = left_over(before, held) if before is not None else []
            if not (busy or living or footprint.zombies or more):
                return footprint, held
            if time.monotonic() > deadline:
                self.site.report(f"after {SETTLE_S} s there is still {busy} {living} {more}")
                return footprint, held
            await asyncio.sleep(0.1)

    def _check_limits(self, targets: list[Target], seconds: float) -> None:
        for key in {key for target in targets for key in target.keys if key.per_minute}:
            served, most = self.site.counts[f"served.{key.id}"], key.per_minute * (seconds / 60 + 1) + 1
            if served > most:
                self.site.report(f"{served} requests served of key {key.id}, which may have {most:.0f}")

    async def _check_places(self, targets: list[Target]) -> None:
        """A key with so many places has all of them again when none of its requests is under way."""
        for target in targets:
            for key in target.keys:
                names = [self.site.name() for _ in range(key.concurrent)]
                clients = [Client(self.site, name, {}, pause_s=1, leaves=0) for name in names]
                ends = await asyncio.gather(
                    *(
                        client.ask(target, key, (name, self.plan.maker(client.choice, name)))
                        for client, name in zip(clients, names, strict=True)
                    )
                )
                if "429" in ends:
                    self.site.report(f"places of key {key.id} are not given back: {ends}")
                for client in clients:
                    client.close()

    def _check_footprint(self, before: Footprint, after: Footprint) -> None:
        site = self.site
        more = after.descriptors - before.descriptors
        if more.total() > 4:
            site.report(f"descriptors left over: {more}")
        if after.zombies:
            site.report(f"{after.zombies} zombies")
        memory = thirds(self.footprints, self.plan.seconds) if self.footprints else []
        if self.plan.seconds >= FLAT_S and memory[2] > memory[1] + GROWTH_MB:
            site.report(f"memory grows: medians of the thirds are {memory} MB")
        self.figures |= {
            "memory_mb": {
                "before": round(before.memory_mb, 2), "thirds": memory, "after": round(after.memory_mb, 2),
            },
            "descriptors": [before.descriptors.total(), after.descriptors.total()],
            "zombies": after.zombies,
        }  # fmt: skip
