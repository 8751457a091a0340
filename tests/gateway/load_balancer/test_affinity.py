"""Worker affinity (serverless-api.md §3): the header, its three strengths, and what happens when it fails.

A bare § is one of serverless-api.md.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from aiohttp import web

from pilotlight.gateway.slots import Ask

ASK = Ask(1)

ID = "lbendpoint1234"
HEADER = "X-Runpod-Worker-Id"


def named(name):
    async def answer(_):
        return web.Response(text=name)

    return answer


@pytest.mark.parametrize("form", ["{}", "strict {}", "strict-resume {}"])
async def test_a_pinned_request_goes_to_its_worker(balanced, form):
    """§3, "Worker affinity": `<id>`, `strict <id>`, `strict-resume <id>`; the response names the worker."""
    for name in ("w1", "w2", "w3"):
        await balanced.worker(name, named(name))
    for name in ("w3", "w1", "w2"):
        async with balanced.ask(headers={HEADER: form.format(name)}) as answer:
            assert (await answer.text(), answer.headers[HEADER]) == (name, name)


async def test_a_preference_falls_back_silently(balanced):
    """§3: `<id>` prefers; empty is the normal selection."""
    await balanced.worker("w1", named("w1"))
    await balanced.worker("w2", named("w2"), capacity=1)
    balanced.slots.take_of(ID, "w2", ASK)
    for wanted in ("w2", "never", ""):
        async with balanced.ask(headers={HEADER: wanted}) as answer:
            assert (answer.status, answer.headers[HEADER]) == (200, "w1")


async def test_a_strict_pin_waits_for_its_worker_while_others_are_free(balanced):
    """§3: only that worker."""
    await balanced.worker("w1", named("w1"))
    await balanced.worker("w2", named("w2"), capacity=1)
    taken = balanced.slots.take_of(ID, "w2", ASK)
    asking = asyncio.create_task(
        balanced.client.get(f"{balanced.url}/lb/{ID}/", headers={HEADER: "strict w2"})
    )
    await balanced.waiting.wait()
    async with balanced.ask() as answer:
        assert await answer.text() == "w1", "others are not held up by it"
    balanced.slots.release_request(taken, ASK)
    async with await asking as answer:
        assert await answer.text() == "w2"


async def test_a_strict_pin_that_waits_in_vain_is_400_with_its_reason(make_balanced):
    """§3: `timed out waiting for worker`, reason `worker_timeout`."""
    balanced = await make_balanced(pinned_wait_s=1)
    await balanced.worker("w1", named("w1"), capacity=1)
    balanced.slots.take_of(ID, "w1", ASK)
    async with balanced.ask(headers={HEADER: "strict w1"}) as answer:
        assert answer.status == 400
        assert await answer.json() == {"error": "timed out waiting for worker", "reason": "worker_timeout"}


@pytest.mark.parametrize("pin", ["strict", "strict-resume"])
async def test_a_worker_that_is_gone_is_404(balanced, pin):
    """§3: `affinity_worker_gone`."""
    await balanced.worker("w1", named("w1"))
    async with balanced.ask(headers={HEADER: f"{pin} gone"}) as answer:
        assert (answer.status, await answer.json()) == (404, {"error": "affinity_worker_gone"})


async def test_a_worker_that_goes_while_it_is_waited_for_is_404(balanced):
    await balanced.worker("w1", named("w1"), capacity=1)
    balanced.slots.take_of(ID, "w1", ASK)
    asking = asyncio.create_task(
        balanced.client.get(f"{balanced.url}/lb/{ID}/", headers={HEADER: "strict w1"})
    )
    await balanced.waiting.wait()
    balanced.drain("w1")
    async with await asking as answer:
        assert (answer.status, await answer.json()) == (404, {"error": "affinity_worker_gone"})


async def test_a_worker_that_is_only_unhealthy_is_waited_for(balanced):
    port = await balanced.worker("w1", named("w1"))
    balanced.slots.close_worker("w1", for_good=False)
    asking = asyncio.create_task(
        balanced.client.get(f"{balanced.url}/lb/{ID}/", headers={HEADER: "strict w1"})
    )
    await balanced.waiting.wait()
    balanced.add("w1", port)
    async with await asking as answer:
        assert await answer.text() == "w1"


@pytest.mark.parametrize("pin", ["strict", "strict-resume"])
async def test_a_frozen_worker_that_a_request_is_pinned_to_is_thawed(balanced, pin):
    """The autoscaler would thaw any."""
    await balanced.worker("w1", named("w1"))
    balanced.freeze("w1", comes_back=True)
    async with balanced.ask(headers={HEADER: f"{pin} w1"}) as answer:
        assert await answer.text() == "w1"


async def test_a_frozen_worker_that_does_not_go_on_is_gone(balanced):
    await balanced.worker("w1", named("w1"))
    balanced.freeze("w1", comes_back=False)
    async with balanced.ask(headers={HEADER: "strict w1"}) as answer:
        assert (answer.status, await answer.json()) == (404, {"error": "affinity_worker_gone"})


async def test_strict_resume_outlives_a_frozen_worker_that_does_not_go_on(balanced):
    """Its GPU was given away, say: it ends like one that is scaled down."""
    port = await balanced.worker("w1", named("w1"))
    balanced.freeze("w1", comes_back=False)
    asking = resuming(balanced)
    await until_awaited(balanced)
    balanced.end("w1")
    await balanced.waiting.wait()
    assert balanced.fleet.resumed == ["w1"]
    balanced.add("w1", port)
    async with await asking as answer:
        assert (answer.status, await answer.text()) == (200, "w1")


async def test_those_who_wait_for_a_thaw_have_their_place_in_the_hold(balanced):
    """They could be without number otherwise; they are no demand, though: no other worker would do."""
    await balanced.worker("w1", named("w1"))
    balanced.freeze("w1", comes_back=True)
    thaw, asked, go_on = balanced.fleet.thaw, asyncio.Event(), asyncio.Event()

    async def slow(worker_id):
        asked.set()
        await go_on.wait()
        return await thaw(worker_id)

    balanced.fleet.thaw = slow
    balanced.slots._limits = replace(balanced.slots._limits, requests=1)
    asking = asyncio.create_task(
        balanced.client.get(f"{balanced.url}/lb/{ID}/", headers={HEADER: "strict w1"})
    )
    await asked.wait()
    async with balanced.ask(headers={HEADER: "strict w1"}) as answer:
        assert (answer.status, await answer.json()) == (400, {"error": "no workers available"})
    assert not balanced.waiting.is_set()
    go_on.set()
    async with await asking as answer:
        assert await answer.text() == "w1"


async def test_strict_resume_starts_a_worker_that_was_scaled_down(balanced):
    """§3."""
    port = await balanced.worker("other", named("w1"))
    balanced.fleet.stopped.add("w1")
    asking = asyncio.create_task(
        balanced.client.get(f"{balanced.url}/lb/{ID}/", headers={HEADER: "strict-resume w1"})
    )
    await balanced.waiting.wait()
    assert balanced.fleet.resumed == ["w1"]
    balanced.add("w1", port)
    async with await asking as answer:
        assert answer.headers[HEADER] == "w1"


def resuming(balanced, worker_id="w1"):
    """A request that insists on a worker, on its way."""
    headers = {HEADER: f"strict-resume {worker_id}"}
    return asyncio.create_task(balanced.client.get(f"{balanced.url}/lb/{ID}/", headers=headers))


async def until_awaited(balanced, worker_id="w1"):
    """Until somebody waits for the end of a worker."""
    async with asyncio.timeout(20):
        while worker_id not in balanced.slots._ends._waiters:
            await asyncio.sleep(0.01)


async def test_strict_resume_waits_for_the_end_of_a_worker_that_drains(balanced):
    """§3: restarted when it was scaled down; while it drains it is only not down yet."""
    port = await balanced.worker("w1", named("w1"))
    balanced.drain("w1")
    async with balanced.ask(headers={HEADER: "strict w1"}) as answer:
        assert answer.status == 404, "only strict-resume starts it again"
    first, second = resuming(balanced), resuming(balanced)
    await until_awaited(balanced)
    assert not balanced.waiting.is_set(), "no other worker would do, so it is no demand"
    assert not balanced.fleet.resumed
    balanced.end("w1")
    await balanced.waiting.wait()
    balanced.add("w1", port)
    for asking in (first, second):
        async with await asking as answer:
            assert (answer.status, await answer.text()) == (200, "w1")


async def test_strict_resume_waits_for_an_end_no_longer_than_for_a_worker(make_balanced):
    balanced = await make_balanced(pinned_wait_s=1)
    await balanced.worker("w1", named("w1"))
    balanced.drain("w1")
    async with await resuming(balanced) as answer:
        assert answer.status == 400
        assert await answer.json() == {"error": "timed out waiting for worker", "reason": "worker_timeout"}
    assert not balanced.fleet.resumed


async def test_strict_resume_outlives_a_drain_that_begins_while_it_waits(balanced):
    port = await balanced.worker("w1", named("w1"), capacity=1)
    balanced.slots.take_of(ID, "w1", ASK)
    asking = resuming(balanced)
    await balanced.waiting.wait()
    balanced.drain("w1")
    await until_awaited(balanced)
    balanced.waiting.clear()
    balanced.end("w1")
    await balanced.waiting.wait()
    balanced.add("w1", port)
    async with await asking as answer:
        assert (answer.status, await answer.text()) == (200, "w1")


async def test_a_worker_that_fails_instead_of_ending_is_not_resumed(balanced):
    await balanced.worker("w1", named("w1"))
    balanced.drain("w1")
    asking = resuming(balanced)
    await until_awaited(balanced)
    balanced.end("w1")
    balanced.fleet.stopped.clear()
    async with await asking as answer:
        assert (answer.status, await answer.json()) == (404, {"error": "affinity_worker_gone"})


async def test_an_endpoint_that_is_deleted_meanwhile_starts_nothing(balanced):
    await balanced.worker("w1", named("w1"))
    balanced.drain("w1")
    asking = resuming(balanced)
    await until_awaited(balanced)
    await balanced.store.delete_endpoint(ID, now_ms=0)
    await balanced.directory.refresh()
    balanced.end("w1")
    async with await asking as answer:
        assert (answer.status, await answer.json()) == (404, {"error": "affinity_worker_gone"})
    assert not balanced.fleet.resumed


@pytest.mark.parametrize("form", ["{}", "strict {}", "strict-resume {}"])
async def test_pinned_traffic_keeps_its_worker_from_being_idle(balanced, form):
    """§3: continuous pinned traffic keeps resetting the idle timer, so such a worker never scales down.

    One minute passes between two requests; the other worker has been idle all the time.
    """
    for name in ("w1", "w2"):
        await balanced.worker(name, named(name))
    began_ms = balanced.clock.now_ms()
    for minute in range(1, 4):
        balanced.clock.shift_ms += 60_000
        async with balanced.ask(headers={HEADER: form.format("w1")}) as answer:
            assert await answer.text() == "w1"
        async with asyncio.timeout(20):
            while balanced.slots.worker("w1").occupied:
                await asyncio.sleep(0.001)
        idle_since_ms = (await balanced.slots.traffic(ID, overdue_before_ms=0)).idle_since_ms
        assert idle_since_ms["w1"] - began_ms >= minute * 60_000
        assert idle_since_ms["w2"] - began_ms < 60_000


async def test_pins_never_cross_endpoints(balanced):
    """§3."""
    await balanced.deploy("otherbalancer1")
    await balanced.worker("w1", named("mine"))
    await balanced.worker("w2", named("theirs"), endpoint_id="otherbalancer1")
    async with balanced.ask(headers={HEADER: "strict w2"}) as answer:
        assert (answer.status, await answer.json()) == (404, {"error": "affinity_worker_gone"})
    async with balanced.ask(headers={HEADER: "w2"}) as answer:
        assert await answer.text() == "mine"
    balanced.drain("w2")
    async with balanced.ask(headers={HEADER: "strict-resume w2"}) as answer:
        assert answer.status == 404, "the end of theirs is not waited for"
