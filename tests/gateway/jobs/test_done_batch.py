"""Many results in one post: `job-done-batch`, our addition to worker-protocol.md §3.4."""

from __future__ import annotations

import json

import pytest

from pilotlight.errors import StoreError


async def taken(platform, count, worker="w1"):
    """Ids of jobs that a worker has in its hands."""
    ids = [await platform.run({"input": {"n": n}}) for n in range(count)]
    assert [job["id"] for job in (await platform.take(worker, batch=count)).json()] == ids
    return ids


async def post(platform, items, worker="w1", **arguments):
    content = items if isinstance(items, bytes) else json.dumps(items).encode()
    return await platform.ask(
        "POST", f"/job-done-batch/{worker}?gpu=x", worker=worker, content=content, **arguments
    )


@pytest.mark.parametrize("sqlite", [False, True])
async def test_every_item_has_its_effect_and_its_status(make_platform, sqlite):
    """In their order: a result, a failure, an end of a stream, a progress value and its result."""
    async with make_platform(sqlite=sqlite) as platform:
        platform.fleet.add(capacity=4)
        ids = await taken(platform, 4)
        items = [
            {"id": ids[0], "isStream": False, "body": {"output": {"n": 0}}},
            {"id": ids[1], "isStream": False, "body": {"error": "boom"}},
            {"id": ids[2], "isStream": True, "body": {"output": ["a"]}},
            {"id": ids[3], "body": {"status": "IN_PROGRESS", "output": "half"}},
            {"id": ids[3], "body": {"output": 3}},
        ]
        answer = await post(platform, items)
        assert answer.status_code == 200
        assert answer.json() == [{"id": item["id"], "status": 200} for item in items]
        jobs = [await platform.status(job_id) for job_id in ids]
        assert [(job["status"], job.get("output")) for job in jobs] == [
            ("COMPLETED", {"n": 0}),
            ("FAILED", None),
            ("COMPLETED", ["a"]),
            ("COMPLETED", 3),
        ]
        assert platform.slots.worker("w1").jobs == 0
        assert len(platform.records) == 4


async def test_bad_items_do_no_harm(platform):
    """Unknown, foreign, finished, malformed and nameless ones; the good one counts."""
    platform.fleet.add("w1", capacity=2)
    platform.fleet.add("w2", capacity=1)
    mine, other = await taken(platform, 2)
    (foreign,) = await taken(platform, 1, "w2")
    await platform.done(other, {"output": "first"})
    items = [
        {"id": "unknown", "body": {"output": 1}},
        {"id": foreign, "body": {"output": "forged"}},
        {"id": other, "body": {"output": "second"}},
        {"id": "", "body": {}},
        {"body": {}},
        {"id": 5, "body": {}},
        "what",
        {"id": mine, "body": {"output": "good"}},
    ]
    answer = (await post(platform, items)).json()
    assert [item["status"] for item in answer] == [200, 200, 200, 400, 400, 400, 400, 200]
    assert "id must not be empty" in answer[3]["error"]
    assert "`id`" in answer[4]["error"]
    assert (await platform.status(mine))["output"] == "good"
    assert (await platform.status(other))["output"] == "first"
    assert (await platform.status(foreign))["status"] == "IN_PROGRESS"


async def test_bodies_are_judged_like_single_ones(make_platform):
    """Oversize and unreadable results fail their jobs; `stopPod` asks for a new worker."""
    async with make_platform(jobs={"take_hold_s": 1}, limits={"result_bytes": 100}) as platform:
        platform.fleet.add(capacity=3)
        large, odd, last = await taken(platform, 3)
        items = [
            {"id": large, "body": {"output": "x" * 200}},
            {"id": odd, "body": [1]},
            {"id": last, "body": {"output": 1, "stopPod": True}},
        ]
        assert [item["status"] for item in (await post(platform, items)).json()] == [200] * 3
        assert "output exceeds" in (await platform.status(large))["error"]
        assert "not valid JSON" in (await platform.status(odd))["error"]
        assert (await platform.status(last))["status"] == "COMPLETED"
        while not platform.fleet.drained:
            await platform.fleet.changed.wait()
        await platform.run()
        assert (await platform.take(holding=True)).status_code == 204


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{}", 400), (b"[", 400), (b"[" + b"1," * 1000 + b"1]", 400), (b"[]", 200)],
)
async def test_bad_lists(platform, content, status):
    platform.fleet.add(capacity=1)
    answer = await post(platform, content)
    assert answer.status_code == status


async def test_list_that_is_too_large(make_platform):
    """Refused as a whole, which makes the worker post its results one by one."""
    async with make_platform(limits={"worker_body_bytes": 1000}) as platform:
        platform.fleet.add(capacity=1)
        (job_id,) = await taken(platform, 1)
        answer = await post(platform, [{"id": job_id, "body": {"output": "x" * 2000}}])
        assert answer.status_code == 400
        assert "one by one" in answer.json()["error"]
        assert (await platform.status(job_id))["status"] == "IN_PROGRESS"


async def test_only_the_worker_itself(platform):
    platform.fleet.add(capacity=1)
    (job_id,) = await taken(platform, 1)
    answer = await post(platform, [{"id": job_id, "body": {"output": 1}}], secret="wrong")
    assert answer.status_code == 401
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"


async def test_late_ones_of_an_ended_worker_change_nothing(platform):
    """worker-protocol.md §7.2, §14: 200, as for `job-done`; the list is not even read."""
    platform.fleet.add(capacity=1)
    (job_id,) = await taken(platform, 1)
    await platform.fleet.end("w1")
    answer = await post(platform, [{"id": job_id, "body": {"output": 1}}])
    assert (answer.status_code, answer.json()) == (200, [])
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"


async def test_failure_of_the_store_is_ours(platform):
    """503 for all of it, nothing applied, and remembered against us (worker-protocol.md §7.1 L2)."""
    platform.fleet.add(capacity=2)
    ids = await taken(platform, 2)
    apply_of_store = platform.store.apply_many

    async def broken(*_):
        raise StoreError("disk full")

    platform.store.apply_many = broken
    items = [{"id": job_id, "body": {"output": 1}} for job_id in ids]
    assert (await post(platform, items)).status_code == 503
    platform.store.apply_many = apply_of_store
    link = platform.service._ledger.links["w1"]
    assert all(link.hand_outs[job_id].post_failed for job_id in ids)
    assert [item["status"] for item in (await post(platform, items)).json()] == [200, 200]
    assert {(await platform.status(job_id))["status"] for job_id in ids} == {"COMPLETED"}
