"""Who leads: taken at the start or later, ended when lost, taken again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pilotlight.errors import StoreError
from pilotlight.loops import leadership as module
from pilotlight.loops.leadership import Leadership


class Store:
    """Gives the lead as a test wants it."""

    def __init__(self, *, free: bool) -> None:
        self.free = free
        self.broken = False
        self.lose: Callable[[], None] = lambda: None

    async def lead(self, lost: Callable[[], None]) -> bool:
        if self.broken:
            raise StoreError("gone")
        self.lose = lost
        return self.free


class Work:
    """What the leader does."""

    def __init__(self, store: Store) -> None:
        self.said: list[str] = []
        self.failures = 0
        self._changed = asyncio.Event()
        self.leadership = Leadership(lead=store.lead, begin=self.begin, end=self.end)

    async def begin(self) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("cannot recover")
        self._say("begin")

    async def end(self) -> None:
        self._say("end")

    def _say(self, word: str) -> None:
        self.said.append(word)
        self._changed.set()

    async def until(self, *words: str) -> None:
        async with asyncio.timeout(30):
            while self.said != list(words):
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_S", 0.01)


async def test_a_free_lead_is_taken_at_the_start() -> None:
    work = Work(Store(free=True))
    await work.leadership.start()
    assert work.leadership.leading
    assert work.said == ["begin"]
    await work.leadership.stop()
    await work.leadership.stop()
    assert work.said == ["begin"]


async def test_a_follower_takes_over_when_the_lead_is_free() -> None:
    store = Store(free=False)
    work = Work(store)
    await work.leadership.start()
    assert not work.leadership.leading
    store.broken = True
    await asyncio.sleep(0.03)
    store.broken, store.free = False, True
    await work.until("begin")
    await work.leadership.stop()


async def test_who_watches_is_told_once_the_lead_counts() -> None:
    store = Store(free=True)
    work, seen, told = Work(store), [], asyncio.Event()

    def leading() -> None:
        seen.append((work.leadership.leading, list(work.said)))
        told.set()

    work.leadership.on_leading = leading
    await work.leadership.start()
    assert seen == [(True, ["begin"])]
    told.clear()
    store.lose()
    async with asyncio.timeout(30):
        await told.wait()
    assert seen[1:] == [(True, ["begin", "end", "begin"])]
    await work.leadership.stop()


async def test_a_lost_lead_is_ended_and_taken_again() -> None:
    store = Store(free=True)
    work = Work(store)
    await work.leadership.start()
    store.free = False
    store.lose()
    await work.until("begin", "end")
    assert not work.leadership.leading
    store.free = True
    await work.until("begin", "end", "begin")
    await work.leadership.stop()


async def test_the_loss_cuts_at_once_and_an_end_under_way_is_not_broken_off() -> None:
    store, said, go = Store(free=True), [], asyncio.Event()

    async def begin() -> None:
        said.append("begin")

    async def end() -> None:
        said.append("ending")
        await go.wait()
        said.append("ended")

    leadership = Leadership(lead=store.lead, begin=begin, cut=lambda: said.append("cut"), end=end)
    await leadership.start()
    store.lose()
    assert said == ["begin", "cut"]
    async with asyncio.timeout(30):
        while "ending" not in said:
            await asyncio.sleep(0)
    stopping = asyncio.create_task(leadership.stop())
    await asyncio.sleep(0.01)
    go.set()
    await stopping
    assert said == ["begin", "cut", "ending", "ended"]


async def test_a_beginning_that_fails_is_tried_again() -> None:
    store = Store(free=False)
    work = Work(store)
    await work.leadership.start()
    work.failures, store.free = 2, True
    await work.until("begin")
    await work.leadership.stop()


async def test_a_start_fails_when_the_store_does() -> None:
    store = Store(free=True)
    work = Work(store)
    work.failures = 1
    with pytest.raises(StoreError, match="cannot recover"):
        await work.leadership.start()
    await work.leadership.stop()
