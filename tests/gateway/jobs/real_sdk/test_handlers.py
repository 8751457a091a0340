"""What handlers of unmodified workers do, and what the platform records of it (worker-protocol.md §15)."""

from __future__ import annotations

import asyncio

import pytest

RELEASES = ["1.12", "1.9", "1.6"]
KINDS = ("sync", "async", "generator", "generator-list", "async-generator", "async-generator-list")

pytestmark = pytest.mark.timeout(400)  # the first test of a machine builds the environment of its release


def streams(kind):
    return "generator" in kind


async def results(lab, bodies, endpoint):
    """The jobs of many submissions, in order."""
    ids = [await lab.run(body, endpoint) for body in bodies]
    return [await lab.finished(job_id, endpoint) for job_id in ids]


@pytest.mark.parametrize("release", RELEASES)
async def test_every_kind_of_handler(lab, release):
    """§15 scenarios 1 and 21: state, body, `isStream` and order of each kind of handler."""
    workers = {}
    for kind in KINDS:
        await lab.endpoint(kind)
        workers[kind] = await lab.worker(kind, release=release, endpoint=kind)
    await lab.ready(*workers.values())
    words = ["one", {"two": 2}, "drei"]
    good = {kind: {"words": words} if streams(kind) else {"n": 7} for kind in KINDS}
    bad = {kind: {"words": ["one", "raise"]} if streams(kind) else {"do": "raise"} for kind in KINDS}
    done = await asyncio.gather(*(results(lab, [good[kind], bad[kind]], kind) for kind in KINDS))
    for kind, (well, badly) in zip(KINDS, done, strict=True):
        assert well["status"] == "COMPLETED", (kind, well)
        if not streams(kind):
            assert well["output"] == {"echo": 7, "keys": ["id", "input"]}
        else:
            assert well["output"] == (words if kind.endswith("-list") else [])
            answer = await lab.platform.call("GET", f"/stream/{well['id']}", endpoint=kind)
            assert [item["output"] for item in answer.json()["stream"]] == words
            posted = [item.query for item in lab.requests("job-stream", workers[kind].worker_id, well["id"])]
            assert len(posted) == 3
            assert all(query.endswith("isStream=false") for query in posted)
        (final,) = lab.requests("job-done", workers[kind].worker_id, well["id"])
        assert final.query.endswith(f"isStream={str(streams(kind)).lower()}")
        assert badly["status"] == "FAILED", (kind, badly)
        assert "boom" in badly["error"]
        assert "retries" not in badly


@pytest.mark.parametrize("release", ["1.12", "1.9"])
async def test_every_row_of_the_table_of_results(lab, release):
    """§15 scenario 2: each row of §4.2 ends in the right state."""
    for kind in ("async", "generator"):
        await lab.endpoint(kind)
        await lab.worker(kind, release=release, endpoint=kind, concurrency=8)
    no_result = ("FAILED", None, "worker produced no result")
    rows = {
        "none": ("COMPLETED", None, None),
        "error": ("FAILED", {"detail": 42}, "user level"),
        "error_only": ("FAILED", None, '{"code": 5}'),
        "falsy_error": ("COMPLETED", {"ok": 1}, None),
        "output": ("COMPLETED", {"output": {"deep": 1}}, None),
        "nan": ("COMPLETED", None, None),
        "infinity": ("COMPLETED", {"value": None}, None),
        "tuple": ("COMPLETED", [1, 2], None),
        "integer_keys": ("COMPLETED", {"1": "one"}, None),
        "bytes": no_result,
        "set": no_result,
        "object": no_result,
        "circle": no_result,
        "cancelled": no_result,
    }
    done = await results(lab, [{"do": do} for do in rows], "async")
    got = {
        do: (job["status"], job.get("output"), job.get("error")) for do, job in zip(rows, done, strict=True)
    }
    got["error_only"] = (*got["error_only"][:2], (got["error_only"][2] or "").replace(":5", ": 5"))
    assert got == rows
    (empty,) = await results(lab, [{"do": "empty"}], "async")
    assert (empty["status"], empty.get("output")) == ("COMPLETED", None)
    (memory, mid) = (
        (await results(lab, [{"do": "memory"}], "async"))[0],
        (await results(lab, [{"words": ["one", "error", "never"]}], "generator"))[0],
    )
    assert memory["status"] == mid["status"] == "FAILED"
    assert "MemoryError" in memory["error"]
    assert mid["error"] == "{'code': 7}"
    answer = await lab.platform.call("GET", f"/stream/{mid['id']}", endpoint="generator")
    assert [item["output"] for item in answer.json()["stream"]] == ["one"]


@pytest.mark.parametrize("release", ["1.12", "1.9", "1.6"])
async def test_concurrency(lab, release):
    """§15 scenario 19: slots are filled, with coroutines and with functions that block."""
    eight, blocking = await lab.endpoint("eight"), await lab.endpoint("blocking")
    worker = await lab.worker("async", release=release, concurrency=8, endpoint=eight)
    await lab.worker("sync", release=release, concurrency=4, endpoint=blocking)
    gate = lab.gate("all")
    waiting = [await lab.run(gate.input | {"n": n}, eight) for n in range(8)]
    sync = [await lab.run({"do": "block", "seconds": 0.1, "n": n}, blocking) for n in range(4)]
    # Eight coroutines run side by side: none is done before all have begun.
    await lab.until(lambda: len(gate.started) == 8)
    gate.open()
    jobs = [await lab.finished(job_id, eight) for job_id in waiting]
    assert [job["output"]["echo"] for job in jobs] == list(range(8))
    jobs = [await lab.finished(job_id, blocking) for job_id in sync]
    assert [job["output"]["echo"] for job in jobs] == list(range(4))
    slots = lab.platform.slots.worker(worker.worker_id)
    assert slots.jobs == 0
    assert slots.capacity >= 8
    if release != "1.6":
        assert slots.capacity == 8
        assert "batch_size=8" in lab.requests("job-take-batch", worker.worker_id)[0].query


@pytest.mark.parametrize("release", ["1.12", "1.9"])
async def test_progress(lab, release):
    """§15 scenario 17: values are accepted in any order; one that comes after the result changes nothing."""
    worker = await lab.worker("sync", release=release)
    gate = lab.gate("end")
    job_id = await lab.run({"do": "progress", "steps": 3, "release": str(gate.path)})
    await lab.until(lambda: len(lab.requests("job-done", worker.worker_id, job_id)) == 3)
    await lab.until(lambda: all(seen.status for seen in lab.requests("job-done", worker.worker_id, job_id)))
    assert (await lab.platform.status(job_id))["output"].startswith("step ")
    gate.open()
    done = await lab.finished(job_id)
    assert (done["status"], done["output"]["echo"]) == ("COMPLETED", None)
    late = await lab.platform.done(job_id, {"status": "IN_PROGRESS", "output": "late"}, worker.worker_id)
    assert late.status_code == 200
    assert await lab.platform.status(job_id) == done


async def test_large_and_odd_results(make_lab):
    """§15 scenario 18: 30 MB arrive; over the limit the job fails loudly, and the worker goes on."""
    async with make_lab(limits={"result_bytes": 32_000_000}) as lab:
        await lab.worker("async", concurrency=4)
        jobs = await results(lab, [{"do": "big", "megabytes": size} for size in (30, 33)], "ep1")
        assert [job["status"] for job in jobs] == ["COMPLETED", "FAILED"]
        assert len(jobs[0]["output"]) == 30_000_000
        assert "output exceeds" in jobs[1]["error"]
        assert (await lab.result({"do": "nan"}))["status"] == "COMPLETED"
