"""Streams whose worker dies, on the data path: two engines that draw alike, one of which is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from aiohttp import web

from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.body import BodyPlan
from pilotlight.gateway.data_path import survival
from pilotlight.gateway.data_path.streams import EventPass
from pilotlight.gateway.events import TokenCount
from pilotlight.system import SystemClock

from .test_continuation import Engine, summary

CHAT = "/v2/ep/openai/v1/chat/completions"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}


class Worker:
    """An engine on a socket; it dies after so many events of its next stream."""

    def __init__(self, path):
        self.address = Address(url=f"unix:{path}", key="k")
        self.path = path
        self.dies_after = self.dies_always = None
        self.says_so = False
        self.stays_broken = self.broken = False
        self.bodies = []

    async def handle(self, request):
        body = json.loads(await request.read())
        self.bodies.append(body)
        engine = Engine()
        if self.broken:
            return web.json_response({"error": {"message": "dead", "code": 500}}, status=500)
        if not body.get("stream") or body.get("min_tokens", 0) > 1000:
            return web.Response(status=400, body=engine.refusal(body), content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        dies_after = self.dies_always if self.dies_after is None else self.dies_after
        self.dies_after = None
        for number, event in enumerate(engine.answer(body, f"id-{self.path.name}", [1, 2, 1, 3] * 20)):
            if number == dies_after:
                await self.die(request, response, event)
                return response
            await response.write(event)
            await asyncio.sleep(0)
        return response

    async def die(self, request, response, event):
        """In the midst of an event, or with the last words of vLLM's server."""
        self.broken = self.stays_broken
        if self.says_so:
            error = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}
            await response.write(f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode())
        else:
            await response.write(event[: len(event) // 2])
            request.transport.abort()


@pytest.fixture
async def pair(rig, tmp_path, monkeypatch):
    """Two workers of the endpoint."""
    monkeypatch.setattr(survival, "OTHERS_S", 0.2)
    workers = [Worker(tmp_path / name) for name in ("one", "two")]
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            application = web.Application()
            application.router.add_route("*", "/{tail:.*}", worker.handle)
            runner = web.AppRunner(application)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.UnixSite(runner, str(worker.path)).start()
            open_worker(rig, worker)
        yield workers


def open_worker(rig, worker):
    rig.slots.open_worker(
        "ep", worker.path.name, capacity=4, registration=Registration(engine=worker.address)
    )


async def stream(rig, **more):
    async with rig.client.stream("POST", CHAT, json=ASKED | more) as answer:
        assert answer.status_code == 200
        return b"".join([piece async for piece in answer.aiter_bytes()])


def told(raw):
    """What a client makes of a stream, and that it sees nothing of how it was kept alive."""
    assert b'"token_ids":[' not in raw
    return summary([event + b"\n\n" for event in raw.split(b"\n\n")[:-1]])


@pytest.mark.parametrize("says_so", [False, True])
@pytest.mark.parametrize("dies_after", [1, 2, 5])
async def test_a_greedy_stream_goes_on_with_another_worker(rig, pair, says_so, dies_after):
    undisturbed = told(await stream(rig))
    row = await rig.row()
    assert (row.continued, row.outcome) == (0, Outcome.OK)
    dying = next(worker for worker in pair if worker.bodies)
    dying.dies_after, dying.says_so = dies_after, says_so
    assert told(await stream(rig)) == undisturbed
    row = await rig.row()
    assert (row.continued, row.outcome, row.estimated) == (1, Outcome.OK, False)
    assert row.worker_id != dying.path.name
    assert [rig.slots.worker(worker.path.name).occupied for worker in pair] == [0, 0]


async def test_one_that_had_delivered_nothing_begins_anew(rig, pair):
    undisturbed = told(await stream(rig))
    dying = next(worker for worker in pair if worker.bodies)
    dying.dies_after = 0
    assert told(await stream(rig)) | {"names": None} == undisturbed | {"names": None}


async def test_the_next_worker_may_die_too(rig, pair):
    """And the first one may go on, if it has only lost a connection."""
    undisturbed = told(await stream(rig))
    await rig.row()
    for worker in pair:
        worker.dies_after = 3
    assert told(await stream(rig)) == undisturbed
    assert (await rig.row()).continued == 2


async def test_the_only_worker_goes_on_by_itself_if_it_has_only_lost_a_connection(rig, pair):
    undisturbed = told(await stream(rig))
    first, second = pair
    rig.slots.drop_worker(second.path.name)
    first.dies_after = 2
    assert told(await stream(rig)) == undisturbed


async def test_a_worker_whose_server_outlives_its_engine_is_passed_over(rig, pair):
    """Its answers with status 500 are no answer; the other worker goes on."""
    undisturbed = told(await stream(rig))
    for worker in pair:
        worker.dies_after, worker.stays_broken = 2, worker is pair[0]
    assert told(await stream(rig)) == undisturbed


async def test_a_request_that_kills_whatever_it_meets_meets_few(rig, pair):
    for worker in pair:
        worker.dies_always = 3
    raw = await stream(rig)
    assert json.loads(raw.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == 502
    streams = sum(body.get("stream") is True for worker in pair for body in worker.bodies)
    assert streams == 4


@pytest.mark.parametrize(
    "more", [{"temperature": 0.5}, {"n": 2}, {"logprobs": True}, {"tools": [{"type": "function"}]}]
)
async def test_what_cannot_go_on_exactly_ends_with_an_error_event(rig, pair, more):
    for worker in pair:
        worker.dies_after = 2
    raw = await stream(rig, **more)
    last = raw.split(b"\n\n")[-2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 502
    assert (await rig.row()).outcome is Outcome.FAILED
    assert [rig.slots.worker(worker.path.name).occupied for worker in pair] == [0, 0]


async def test_a_client_that_leaves_while_its_stream_waits_for_a_worker_is_forgotten(rig, pair):
    first, second = pair
    rig.slots.drop_worker(second.path.name)
    first.dies_after = 2
    async with rig.client.stream("POST", CHAT, json=ASKED) as answer:
        pieces = answer.aiter_bytes()
        await anext(pieces)
        async with asyncio.timeout(20):
            while not (await rig.slots.traffic("ep", overdue_before_ms=0)).held:
                await asyncio.sleep(0.001)
    assert (await rig.row()).outcome is Outcome.DISCONNECTED
    assert not (await rig.slots.traffic("ep", overdue_before_ms=0)).held


async def test_one_whose_endpoint_was_deleted_waits_for_nobody(rig, pair):
    first, second = pair
    rig.slots.drop_worker(second.path.name)
    first.dies_after = 2
    die = first.die

    async def die_with_its_endpoint(*more):
        await rig.store.delete_endpoint("ep", now_ms=1)
        await rig.directory.refresh()
        await die(*more)

    first.die = die_with_its_endpoint
    async with asyncio.timeout(10):
        raw = await stream(rig)
    assert json.loads(raw.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == 502


async def test_its_key_pays_for_it_once(rig, pair):
    paid = []
    release = rig.slots.release_request

    def noted(slots, ask, *, tokens=None):
        paid.append(tokens)
        release(slots, ask, tokens=tokens)

    rig.slots.release_request = noted
    for worker in pair:
        worker.dies_after = 3
    await stream(rig)
    assert (await rig.row()).continued == 2
    assert paid == [None, 0, 0], "as much as was expected of it, with the first slot"


class Client:
    """Keeps what is written to it."""

    def __init__(self):
        self.seen = b""

    def write(self, data):
        self.seen += data
        return True

    def passage(self):
        raise AssertionError("passed on as it came")


def test_a_stream_that_became_too_long_to_be_kept_still_hides_its_tokens():
    client = Client()
    plan = BodyPlan(b"", stream=True, survives=True, hide_tokens=True)
    passing = EventPass(client, plan, TokenCount(), kept_bytes=100, clock=SystemClock())
    event = b'data: {"id":"c","choices":[{"index":0,"text":"a","token_ids":[7]}]}\n\n'
    for _ in range(4):
        assert passing.feed(event)
        assert passing.passage() is None
    assert passing.delivered is None
    assert client.seen == event.replace(b"[7]", b"null") * 4


async def test_a_stream_waits_for_a_worker_that_is_started_for_it(rig, pair):
    undisturbed = told(await stream(rig))
    first, second = pair
    rig.slots.drop_worker(second.path.name)
    first.dies_after = 2
    asking = asyncio.create_task(stream(rig))
    async with asyncio.timeout(20):
        while not (await rig.slots.traffic("ep", overdue_before_ms=0)).held:
            await asyncio.sleep(0.001)
    open_worker(rig, second)
    assert told(await asking) == undisturbed
