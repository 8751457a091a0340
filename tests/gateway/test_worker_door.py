"""What the fleet asks workers, and what it makes of every answer; on real sockets."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from aiohttp import web

from pilotlight.domain.worker import Address
from pilotlight.gateway.worker_door import HttpDoor
from pilotlight.ports.door import DoorError, DoorRefusedError, Kept, Refusal


@contextlib.asynccontextmanager
async def worker(folder, handle):
    """A server in a worker's place; its address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    path = folder / "listener"
    await web.UnixSite(runner, str(path)).start()
    try:
        yield Address(url=f"unix:{path}", key="k")
    finally:
        await runner.cleanup()


def answering(status, body, seen):
    async def handle(request):
        seen.append((request.method, request.path_qs, request.headers.get("Authorization")))
        return web.json_response(body, status=status)

    return handle


def error(reason):
    return {"error": {"message": f"why: {reason}", "type": "x", "code": 409, "reason": reason}}


async def test_a_freeze_says_what_is_kept_and_a_thaw_how_long_it_may_take(tmp_path):
    seen = []
    body = {"memory_bytes": 12345, "slept": True, "took_ms": 4}
    async with worker(tmp_path, answering(200, body, seen)) as address:
        door = HttpDoor()
        assert await door.freeze(address, timeout_s=5) == Kept(memory_bytes=12345, slept=True)
        await door.thaw(address, answers_s=1.0, timeout_s=5)
        await door.look(address, "/ping", timeout_s=5)
    assert seen == [
        ("POST", "/worker/freeze", "Bearer k"),
        ("POST", "/worker/thaw?timeout_s=1", "Bearer k"),
        ("GET", "/ping", "Bearer k"),
    ]


@pytest.mark.parametrize(
    ("reason", "refusal"),
    [("busy", Refusal.BUSY), ("not_serving", Refusal.BUSY), ("unable", Refusal.UNABLE)],
)
async def test_a_refusal_is_told_apart_from_a_failure(tmp_path, reason, refusal):
    async with worker(tmp_path, answering(409, error(reason), [])) as address:
        with pytest.raises(DoorRefusedError, match=reason) as refused:
            await HttpDoor().freeze(address, timeout_s=5)
    assert refused.value.refusal is refusal


@pytest.mark.parametrize(
    ("status", "body"),
    [(409, error("frozen")), (404, "what?"), (200, {"slept": "perhaps"}), (503, error("x"))],
)
async def test_any_other_answer_leaves_the_worker_in_doubt(tmp_path, status, body):
    async with worker(tmp_path, answering(status, body, [])) as address:
        with pytest.raises(DoorError) as failed:
            await HttpDoor().freeze(address, timeout_s=5)
        assert not isinstance(failed.value, DoorRefusedError)
        if status != 200:
            with pytest.raises(DoorError):
                await HttpDoor().thaw(address, answers_s=1, timeout_s=5)
            with pytest.raises(DoorError):
                await HttpDoor().look(address, "/ping", timeout_s=5)


async def test_silence_and_absence_end_in_time(tmp_path):
    async def silent(_):
        await asyncio.Event().wait()

    async def in_the_middle(request):
        answer = web.StreamResponse(headers={"Content-Length": "10"})
        await answer.prepare(request)
        await answer.write(b"{")
        await asyncio.Event().wait()

    for handle in (silent, in_the_middle):
        async with worker(tmp_path, handle) as address:
            with pytest.raises(DoorError, match=r"no answer|sent nothing"):
                await HttpDoor().thaw(address, answers_s=0.05, timeout_s=0.05)
    with pytest.raises(DoorError, match="cannot be reached"):
        await HttpDoor().thaw(Address(url=f"unix:{tmp_path}/nobody"), answers_s=1, timeout_s=5)
