"""What workers post and what becomes of it (serverless-api.md §2.13, §4.5, §4.6; worker-protocol.md §4)."""

from __future__ import annotations

import asyncio
import json

import pytest

from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.usage import Outcome
from pilotlight.gateway.jobs.results import usage_of

MIB = 1_048_576
ENVELOPE = {"error": {"message": "engine died", "type": "InternalServerError", "code": 500}}


async def signal(predicate):
    """Return when a condition of the platform holds; each turn lets its I/O happen."""
    while not predicate():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("body", "state", "output", "error"),
    [
        ({"output": {"x": 1}}, "COMPLETED", {"x": 1}, None),
        ({"output": None}, "COMPLETED", None, None),
        ({"output": False}, "COMPLETED", False, None),
        ({}, "COMPLETED", ..., None),
        ({"error": "bad"}, "FAILED", ..., "bad"),
        ({"error": {"code": 5}}, "FAILED", ..., '{"code":5}'),
        ({"output": {"detail": 42}, "error": "user level"}, "FAILED", {"detail": 42}, "user level"),
        ({"output": 1, "error": ""}, "COMPLETED", 1, None),
        (
            b'{"output": [NaN, Infinity, -Infinity, 1e999, "x"]}',
            "COMPLETED",
            [None, None, None, None, "x"],
            None,
        ),
        (b'{"output": "caf\xe9"}', "COMPLETED", "caf\ufffd", None),
        (b'{"output": "\\ud83d"}', "COMPLETED", "\ud83d", None),
        (b'{"error": "cut \\ud83d"}', "FAILED", ..., "cut \ufffd"),
        (b"nonsense", "FAILED", ..., "the worker posted a result that is not valid JSON"),
        (b"[1]", "FAILED", ..., "the worker posted a result that is not valid JSON"),
        (b'{"output": ' + b"[" * 200_000, "FAILED", ..., "the worker posted a result that is not valid JSON"),
    ],
)
async def test_result_bodies(platform, body, state, output, error):
    """serverless-api.md §4.5, worker-protocol.md §4.1, §4.2: JSON whatever the content type, lenient numbers,
    error strings untouched."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    assert (await platform.done(job_id, body)).status_code == 200
    answer = await platform.call("GET", f"/status/{job_id}")
    job = json.loads(answer.content)
    assert (job["status"], job.get("output", ...), job.get("error")) == (
        state,
        output,
        error,
    )
    assert platform.slots.worker("w1").jobs == 0


async def test_exception_text_is_kept(platform):
    """serverless-api.md §4.5: stored untouched; worker-protocol.md §4.2, Appendix A."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    text = json.dumps({"error_type": "<class 'ValueError'>", "error_message": "boom"})
    await platform.done(job_id, {"error": text})
    assert (await platform.status(job_id))["error"] == text


async def test_retryable_envelope_requeues_once(platform):
    """vllm-worker.md §3.7: the engine's failure is tried again, the request's is not."""
    platform.fleet.add("w1", capacity=1)
    job_id = await platform.run()
    await platform.take()
    envelope = json.dumps({"error": {**ENVELOPE["error"], "retryable": True}})
    await platform.done(job_id, {"error": envelope})
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    await platform.take()
    await platform.done(job_id, {"error": envelope})
    job = await platform.status(job_id)
    assert (job["status"], job["retries"], job["error"]) == ("FAILED", 1, envelope)
    other = await platform.run()
    await platform.take()
    await platform.done(other, {"error": json.dumps(ENVELOPE)})
    assert (await platform.status(other))["status"] == "FAILED"
    assert [record.outcome for record in platform.records] == [Outcome.FAILED] * 2


@pytest.mark.parametrize(
    "error",
    [
        {"error": {**ENVELOPE["error"], "retryable": True}},
        {"message": "mine", "retryable": True},
        {"retryable": True},
    ],
)
@pytest.mark.parametrize("as_text", [True, False])
async def test_handler_of_another_program_cannot_ask_for_a_retry(platform, error, as_text):
    """serverless-api.md §12 item 17: never after a handler error; the word is our own worker program's.

    A handler that passed on an error object of some API ran, and was billed, twice.
    """
    await platform.reshape(kind=EndpointKind.QUEUE)
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.done(job_id, {"error": json.dumps(error) if as_text else error})
    job = await platform.status(job_id)
    assert job["status"] == "FAILED"
    assert json.loads(job["error"]) == error
    assert "retries" not in job
    assert (await platform.call("GET", "/health")).json()["jobs"]["retried"] == 0


async def test_handler_that_fails_while_the_gateway_stops_fails_its_job(platform):
    """§12 item 17 of serverless-api.md: of our own program's workers it is the end of the gateway, else not."""
    await platform.reshape(kind=EndpointKind.QUEUE)
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.service.close()
    await platform.done(job_id, {"error": json.dumps({"retryable": True})})
    assert (await platform.store.job(job_id)).status == "FAILED"


async def test_retried_job_is_not_handed_to_a_worker_that_may_hold_it(make_platform):
    """worker-protocol.md §3.2: the same id twice at one worker cannot be told apart.

    Its next heartbeat frees it.
    """
    async with make_platform() as platform:
        platform.fleet.add("w1", capacity=2)
        job_id = await platform.run()
        await platform.take()
        take = asyncio.create_task(platform.take(holding=True))
        await platform.parked()
        await platform.done(job_id, {"error": json.dumps({"error": {"retryable": True}})})
        await signal(lambda: platform.service._ledger.links["w1"].waits)
        assert not take.done()
        await platform.ping()
        assert (await take).json()["id"] == job_id
        assert platform.slots.worker("w1").jobs == 1


async def test_limits_of_results(make_platform):
    """serverless-api.md §2.13, worker-protocol.md §8: 200, and FAILED with the documented text."""
    async with make_platform(
        limits={
            "result_bytes": 1024 * 1024,
            "sync_result_bytes": 2 * 1024 * 1024,
            "worker_body_bytes": 3_000_000,
        }
    ) as platform:
        platform.fleet.add(capacity=1)
        for length, text in (
            (1024 * 1024, "output exceeds 1 MB limit (got 1048578 bytes)"),
            (4_000_000, "output exceeds 1 MB limit (got 4000012 bytes)"),
        ):
            job_id = await platform.run()
            await platform.take()
            body = (
                b'{"output":"' + b"x" * length + b'"}'
                if length < 2_000_000
                else b'{"output":"' + b"x" * (length - 1) + b'"}'
            )
            assert (await platform.done(job_id, body)).status_code == 200
            job = await platform.status(job_id)
            assert (job["status"], job["error"]) == ("FAILED", text)
        call = asyncio.create_task(platform.call("POST", "/runsync", json={"input": 1}))
        sync_id = (await platform.take()).json()["id"]
        await platform.done(sync_id, {"output": "x" * 1_500_000})
        assert (await call).json()["status"] == "COMPLETED"


@pytest.mark.parametrize(("verb", "megabytes"), [("/run", 10), ("/runsync", 20)])
async def test_sizes_of_results(platform, verb, megabytes):
    """serverless-api.md §2.13, §12 items 7 and 9: MiB; the last byte is accepted, one more fails the job."""
    platform.fleet.add(capacity=1)
    for size in (megabytes * MIB, megabytes * MIB + 1):
        call = asyncio.create_task(platform.call("POST", verb, json={"input": 1}))
        job_id = (await platform.take()).json()["id"]
        # Two of them are the quotes.
        await platform.done(job_id, b'{"output":"%b"}' % (b"x" * (size - 2)))
        await call
        job = await platform.status(job_id)
        if size == megabytes * MIB:
            assert (job["status"], len(job["output"])) == ("COMPLETED", size - 2)
        else:
            text = f"output exceeds {megabytes} MB limit (got {size} bytes)"
            assert (job["status"], job["error"], "output" in job) == ("FAILED", text, False)


async def test_size_of_a_chunk(platform):
    """serverless-api.md §2.8, §2.13: one MiB of JSON is accepted, and a byte more fails the job."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    for more in (0, 1):
        value = ["x" * (MIB - len('[""]') + more)]
        await platform.chunk(job_id, value)
        job = await platform.status(job_id)
        assert job["status"] == ("FAILED" if more else "IN_PROGRESS")
    assert job["error"].startswith("stream chunk exceeds 1 MB limit")
    stream = (await platform.call("GET", f"/stream/{job_id}")).json()["stream"]
    assert [len(chunk["output"][0]) for chunk in stream] == [MIB - 4]


@pytest.mark.parametrize("error", ["the true reason", {"code": 5, "why": "no"}])
async def test_error_of_a_handler_outlives_an_output_that_is_too_large(make_platform, error):
    """serverless-api.md §4.5, §2.13: it says more than that what came with it was too large."""
    async with make_platform(limits={"result_bytes": 1000}) as platform:
        platform.fleet.add(capacity=1)
        job_id = await platform.run()
        await platform.take()
        await platform.done(job_id, {"output": "x" * 2000, "error": error})
        job = await platform.status(job_id)
        text = error if isinstance(error, str) else '{"code":5,"why":"no"}'
        assert (job["status"], job["error"], "output" in job) == ("FAILED", text, False)


@pytest.mark.parametrize("size", [2000, 50_000], ids=["read", "not even read"])
@pytest.mark.parametrize("with_error", [False, True])
async def test_a_result_that_is_too_large_is_told_to_the_workers_owner(make_platform, size, with_error):
    """serverless-api.md §2.13: in the log of the worker, where the author of the handler looks."""
    async with make_platform(limits={"result_bytes": 1000, "worker_body_bytes": 10_000}) as platform:
        platform.fleet.add(capacity=1)
        job_id = await platform.run()
        await platform.take()
        await platform.done(job_id, {"output": "x" * size, **({"error": "no"} if with_error else {})})
        assert (await platform.status(job_id))["status"] == "FAILED"
        [(worker_id, line)] = platform.notes
        assert worker_id == "w1"
        assert job_id in line
        assert "output exceeds" in line


@pytest.mark.parametrize("size", [2000, 50_000], ids=["read", "not even read"])
async def test_a_chunk_that_is_too_large_is_told_to_the_workers_owner(make_platform, size):
    """serverless-api.md §2.13: dropped, in the log of the worker, and the job fails."""
    async with make_platform(limits={"chunk_bytes": 1000, "worker_body_bytes": 10_000}) as platform:
        platform.fleet.add(capacity=1)
        job_id = await platform.run()
        await platform.take()
        await platform.chunk(job_id, ["x" * size])
        job = await platform.status(job_id)
        assert job["status"] == "FAILED"
        [(worker_id, line)] = platform.notes
        assert worker_id == "w1"
        assert job_id in line
        assert job["error"] in line


async def test_what_is_not_too_large_is_not_talked_of(platform):
    """A long text is split, and a failure is the job's own affair."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.chunk(job_id, "x" * (2 * MIB))
    await platform.done(job_id, {"error": "boom"})
    assert platform.notes == []


async def test_chunks_over_the_limit(make_platform):
    """serverless-api.md §2.8, §2.13: strings are split, anything else fails the job."""
    async with make_platform(limits={"chunk_bytes": 1000}) as platform:
        platform.fleet.add(capacity=1)
        job_id = await platform.run()
        await platform.take()
        text = "é\n" * 2000
        await platform.chunk(job_id, text)
        parts = (await platform.call("GET", f"/stream/{job_id}")).json()["stream"]
        assert "".join(part["output"] for part in parts) == text
        assert len(parts) > 1
        assert (await platform.chunk(job_id, ["x" * 2000])).status_code == 200
        job = await platform.status(job_id)
        assert job["status"] == "FAILED"
        assert job["error"].startswith("stream chunk exceeds")
        assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).json() == {"jobsToStop": [job_id]}


async def test_counted_chunks_are_stored_once(platform):
    """A worker that numbers its chunks may offer one again when it had no answer.

    serverless-api.md §2.8: what it posts beside `output`, as older images do with `metrics`, is passed on.
    """
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    for number in (0, 0, 1, 0, 1):
        path = f"/job-stream/w1/{job_id}?gpu=x&isStream=false&seq={number}"
        await platform.ask("POST", path, json={"output": number, "metrics": {}})
    stream = (await platform.call("GET", f"/stream/{job_id}")).json()["stream"]
    assert stream == [{"output": 0, "metrics": {}}, {"output": 1, "metrics": {}}]


def test_usage_beyond_what_a_store_keeps_is_no_usage():
    """A count of tokens that no column holds must not cost the row, nor those written with it."""
    assert usage_of(b'{"usage": {"input": 9223372036854775808, "output": 1}}') == (None, 1)
