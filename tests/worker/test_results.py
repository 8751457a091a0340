"""Handing in results together, and by themselves where the platform knows no other way."""

from __future__ import annotations

import asyncio
import io
import json

import msgspec
import pytest

from pilotlight.worker.log import LogSink
from pilotlight.worker.results import ITEMS_MAX, ResultPoster


class Platform:
    """Takes posts; `gate` holds them up."""

    def __init__(self, status=200):
        self.status = status
        self.singles = []
        self.lists = []
        self.wanted = []
        self.knows_no_takes = False
        self.refused = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def one(self, job_id, body):
        self.singles.append((job_id, body))
        await self.gate.wait()
        return job_id not in self.refused

    async def many(self, body, wanted):
        items = json.loads(body)
        self.lists.append(items)
        self.wanted.append(wanted)
        await self.gate.wait()
        if self.status != 200:
            return self.status, b"{}"
        answer = [{"id": item["id"], "status": 400 if item["id"] in self.refused else 200} for item in items]
        if not wanted or self.knows_no_takes:
            return 200, msgspec.json.encode(answer)
        jobs = [{"id": f"next-{number}"} for number in range(wanted)]
        return 200, msgspec.json.encode({"results": answer, "jobs": jobs})


@pytest.fixture
def log():
    sink = LogSink(io.BytesIO())
    yield sink
    sink.close()


async def test_one_result_goes_by_itself(log):
    platform = Platform()
    assert await ResultPoster(platform.one, platform.many, log).post("a", b'{"output":1}')
    assert (platform.singles, platform.lists) == ([("a", b'{"output":1}')], [])


async def test_what_is_ready_together_goes_together(log):
    platform = Platform()
    poster = ResultPoster(platform.one, platform.many, log)
    platform.refused = {"2"}
    posts = [poster.post(str(number), b'{"output":%d}' % number) for number in range(3)]
    assert await asyncio.gather(*posts) == [True, True, False]
    assert platform.singles == []
    assert platform.lists == [
        [{"id": str(number), "isStream": True, "body": {"output": number}} for number in range(3)]
    ]


async def test_what_gets_ready_during_a_post_waits_for_its_end(log):
    platform = Platform()
    poster = ResultPoster(platform.one, platform.many, log)
    platform.gate.clear()
    first = asyncio.create_task(poster.post("first", b"{}"))
    while not platform.singles:
        await asyncio.sleep(0)
    later = [asyncio.create_task(poster.post(str(number), b"{}")) for number in range(ITEMS_MAX + 2)]
    while len(poster._waiting) < len(later):
        await asyncio.sleep(0)
    platform.gate.set()
    assert all(await asyncio.gather(first, *later))
    assert [len(items) for items in platform.lists] == [ITEMS_MAX, 2]
    assert len(platform.singles) == 1


async def test_large_result_does_not_hold_up_small_ones(log):
    platform = Platform()
    poster = ResultPoster(platform.one, platform.many, log)
    platform.gate.clear()
    large = asyncio.create_task(poster.post("large", b'"' + b"x" * 2_000_000 + b'"'))
    small = asyncio.create_task(poster.post("small", b"{}"))
    while len(platform.singles) < 2:
        await asyncio.sleep(0)
    platform.gate.set()
    assert await asyncio.gather(large, small) == [True, True]


@pytest.mark.parametrize(("status", "again"), [(404, 0), (405, 0), (400, 1), (413, 1)])
async def test_platform_without_the_route(log, status, again):
    """Every result goes by itself then; a platform that does not know the route is not asked again."""
    platform = Platform(status)
    poster = ResultPoster(platform.one, platform.many, log)
    for _ in range(2):
        assert all(await asyncio.gather(*(poster.post(name, b"{}") for name in "abc")))
    assert len(platform.lists) == 1 + again
    assert [name for name, _ in platform.singles] == [*"abc"] * 2


async def test_jobs_come_with_the_answer(log):
    """As many as there is room for, before the result counts as handed in; a single result asks, too."""
    platform, taken, room = Platform(), [], [2, 0, 1]
    poster = ResultPoster(platform.one, platform.many, log)
    poster.room, poster.taken = lambda _: room.pop(0), taken.append
    assert await poster.post("a", b"{}")
    assert [json.loads(jobs) for jobs in taken] == [[{"id": "next-0"}, {"id": "next-1"}]]
    assert await poster.post("b", b"{}")
    assert [name for name, _ in platform.singles] == ["b"]
    platform.knows_no_takes = True
    assert await poster.post("c", b"{}")
    assert (platform.wanted, len(taken)) == ([2, 1], 1)


async def test_room_is_asked_for_when_earlier_results_are_handed_in(log):
    platform, running, asked = Platform(), {"a", "b"}, []

    def room(results):
        asked.append((results, set(running)))
        return 1

    poster = ResultPoster(platform.one, platform.many, log)
    poster.room = room

    async def run(name):
        await poster.post(name, b"{}")
        running.discard(name)

    platform.gate.clear()
    first = asyncio.create_task(run("a"))
    while not platform.lists:
        await asyncio.sleep(0)
    second = asyncio.create_task(run("b"))
    while not poster._waiting:
        await asyncio.sleep(0)
    platform.gate.set()
    await asyncio.gather(first, second)
    assert asked == [(1, {"a", "b"}), (1, {"b"})]


async def test_given_up(log):
    platform = Platform()

    async def lost(*_):
        return None, b""

    poster = ResultPoster(platform.one, lost, log)
    assert await asyncio.gather(poster.post("a", b"{}"), poster.post("b", b"{}")) == [False, False]


async def test_close_gives_up(log):
    platform = Platform()
    platform.gate.clear()
    poster = ResultPoster(platform.one, platform.many, log)
    waiting = [asyncio.create_task(poster.post(name, b"{}")) for name in "ab"]
    while not platform.lists:
        await asyncio.sleep(0)
    await poster.close()
    assert await asyncio.gather(*waiting) == [False, False]
