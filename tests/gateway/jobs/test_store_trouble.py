"""A store that cannot do its work, such as with a full disk: 503 and nothing half accepted."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.errors import StoreError

ROUTES = [
    ("POST", "/run"), ("POST", "/runsync"), ("GET", "/status/{job}"), ("GET", "/status/{job}?ttl=5000"),
    ("GET", "/status/{job}?timeline=true"), ("GET", "/status-sync/{job}"), ("GET", "/stream/{job}"),
    ("GET", "/stream/{job}?cursor=0"), ("POST", "/cancel/{job}"), ("POST", "/retry/{job}"),
    ("POST", "/purge-queue"), ("GET", "/health"), ("GET", "/requests"),
]  # fmt: skip


class BrokenStore:
    """Every call fails while it is broken; otherwise it is the store that it stands before."""

    def __init__(self, store, *, broken=None):
        self._store = store
        self.broken = broken

    def __getattr__(self, name):
        if self.broken is None or name in self.broken:

            async def fail(*_, **__):
                raise StoreError("database or disk is full")

            return fail
        return getattr(self._store, name)


def break_store(platform, *names):
    """Make some methods fail, or all; returns the working store."""
    service = platform.service
    working = service._store
    broken = BrokenStore(working, broken=set(names) or None)
    for owner in (service, service.bounds, service._sight):
        owner._store = broken
    service._ledger.store = broken
    return working


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_answers_503(platform, method, path):
    """serverless-api.md §2.14: a body of the data plane's errors without `status`, and Retry-After."""
    job_id = await platform.run()
    working = break_store(platform)
    body = {"json": {"input": 1}} if path in {"/run", "/runsync"} else {}
    answer = await platform.call(method, path.format(job=job_id), **body)
    assert answer.status_code == 503
    assert answer.json() == {"error": "database or disk is full", "detail": "database or disk is full"}
    assert int(answer.headers["retry-after"]) > 0
    counts = await working.counts("ep1")
    assert (counts.queued, counts.retried, counts.failed) == (1, 0, 0)


async def test_room_is_given_back(make_platform):
    """A submission that failed takes no place in the queue."""
    async with make_platform(limits={"queue_jobs": 1}) as platform:
        service = platform.service
        working = break_store(platform, "submit")
        for _ in range(3):
            assert (await platform.call("POST", "/run", json={"input": 1})).status_code == 503
            platform.clock.advance(1)
        service._store = working
        assert (await platform.call("POST", "/run", json={"input": 1})).status_code == 200


async def test_runsync_that_was_accepted_is_not_refused(platform):
    """The job is in the queue: the caller gets its id, and must not submit it once more."""
    break_store(platform, "job")
    answer = await platform.call("POST", "/runsync", json={"input": 1})
    assert (answer.status_code, answer.json()["status"]) == (200, "IN_QUEUE")


async def test_retry_that_fails_changes_nothing(platform):
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.done(job_id, {"error": "boom"})
    working = break_store(platform, "apply")
    assert (await platform.call("POST", f"/retry/{job_id}")).status_code == 503
    assert (await working.job(job_id)).status == "FAILED"


async def test_waiting_callers_are_told(platform):
    """A store that fails while a request is held ends the wait with 503."""
    job_id = await platform.run()
    call = asyncio.create_task(platform.call("GET", f"/status-sync/{job_id}"))
    await platform.watched()
    break_store(platform)
    platform.service._ledger.signals.notify(job_id)
    assert (await call).status_code == 503
