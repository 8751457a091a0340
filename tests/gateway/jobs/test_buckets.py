"""`s3Config`: sealed in the store, whole for the worker, used for results that are too large
(serverless-api.md §2.3, §2.13, §12 item 9)."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from pilotlight.gateway.jobs.buckets import Buckets
from pilotlight.net import GuardedHttp
from pilotlight.net.s3 import S3Uploader
from pilotlight.sealing import InstallationSecret
from pilotlight.testing.receiver import receiving

LIMIT = 100_000
BIG = {"text": "x" * LIMIT}
CONFIG = {
    "accessId": "AKIDEXAMPLE",
    "accessSecret": "very/secret+key",
    "bucketName": "results",
    "endpointUrl": "https://s3.example.com",
    "objectPath": "runs",
    "anything": "more",
}


@pytest.fixture
async def platform(make_platform):
    limits = {"result_bytes": LIMIT, "sync_result_bytes": LIMIT, "worker_body_bytes": 4 * LIMIT}
    async with make_platform(jobs={"take_hold_s": 1}, limits=limits, sqlite=True) as made:
        made.fleet.add("w1", capacity=4)
        yield made
        await made.service._buckets._uploader._http.close()


@pytest.fixture
async def bucket():
    async with receiving() as made:
        yield made


def in_bucket(bucket):
    return CONFIG | {"endpointUrl": f"http://127.0.0.1:{bucket.port}"}


async def taken(platform, config):
    job_id = await platform.run({"input": 1, "s3Config": config} if config else None)
    answer = (await platform.take()).json()
    assert answer["id"] == job_id
    return job_id, answer


async def test_the_worker_gets_it_unchanged_and_nothing_else(platform):
    job_id, answer = await taken(platform, CONFIG)
    assert answer == {"id": job_id, "input": 1, "s3Config": CONFIG}


async def test_a_job_without_one_has_no_such_key(platform):
    _, answer = await taken(platform, None)
    assert answer.keys() == {"id", "input"}


async def test_batches_of_jobs_carry_it_too(platform):
    plain = await platform.run()
    with_config = await platform.run({"input": 1, "s3Config": CONFIG})
    jobs = (await platform.take(batch=2)).json()
    assert [(job["id"], job.get("s3Config")) for job in jobs] == [(plain, None), (with_config, CONFIG)]


async def test_a_requeued_job_carries_it_again(platform):
    job_id, _ = await taken(platform, CONFIG)
    await platform.fleet.end("w1")
    platform.fleet.add("w2", capacity=1)
    answer = (await platform.take("w2")).json()
    assert (answer["id"], answer["s3Config"]) == (job_id, CONFIG)


async def test_the_store_never_holds_it_readable_and_forgets_it_at_the_end(platform, tmp_path, caplog):
    job_id, _ = await taken(platform, CONFIG)
    assert b"very/secret" not in (await platform.store.job(job_id)).s3_config
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert any(job_id.encode() in path.read_bytes() for path in files)
    for path in files:
        assert b"very/secret" not in path.read_bytes()
        assert b"AKIDEXAMPLE" not in path.read_bytes()
    await platform.done(job_id, {"output": 1})
    assert (await platform.store.job(job_id)).s3_config == b""
    status = json.dumps(await platform.status(job_id))
    assert "AKID" not in status
    assert "s3Config" not in status
    assert "AKID" not in caplog.text


async def test_a_lost_secret_fails_the_job_once_with_words_and_the_worker_goes_on(platform):
    lost = await platform.run({"input": 1, "s3Config": CONFIG})
    good = await platform.run()
    uploader = S3Uploader(http=GuardedHttp(allow_private=True), clock=platform.clock, timeout_s=5)
    other = Buckets(InstallationSecret(b"\x07" * 32), uploader, platform.store)
    platform.service.workers._buckets = other
    answer = await platform.take()
    while answer.status_code == 204:
        answer = await platform.take()
    assert answer.json()["id"] == good
    failed = await platform.status(lost)
    assert failed["status"] == "FAILED"
    assert failed["error"].startswith("s3Config can no longer be read")


async def test_a_result_that_is_too_large_goes_into_the_bucket(platform, bucket):
    """The job completes and says where its output is."""
    job_id, _ = await taken(platform, in_bucket(bucket))
    assert (await platform.done(job_id, {"output": BIG})).status_code == 200
    status = await platform.status(job_id)
    (request,) = bucket.requests
    assert request.path == f"/results/runs/{job_id}.json"
    assert json.loads(request.body) == BIG
    assert status["status"] == "COMPLETED"
    assert status["output"] == {
        "s3": {
            "bucketName": "results",
            "key": f"runs/{job_id}.json",
            "url": f"http://127.0.0.1:{bucket.port}/results/runs/{job_id}.json",
            "bytes": len(request.body),
        }
    }


async def test_a_result_of_a_normal_size_does_not(platform, bucket):
    job_id, _ = await taken(platform, in_bucket(bucket))
    await platform.done(job_id, {"output": "small"})
    assert (await platform.status(job_id))["output"] == "small"
    assert bucket.requests == []


async def test_without_a_bucket_the_job_fails_with_the_size(platform):
    """§12 item 9, §13 item 4."""
    job_id, _ = await taken(platform, None)
    await platform.done(job_id, {"output": BIG})
    status = await platform.status(job_id)
    size = len(json.dumps(BIG, separators=(",", ":")))
    assert (status["status"], status["error"]) == (
        "FAILED",
        f"output exceeds {LIMIT / 1048576:g} MB limit (got {size} bytes)",
    )


async def test_a_bucket_that_refuses_fails_the_job_with_both_reasons(platform, bucket):
    bucket.answer = lambda request: web.Response(
        status=403, text="<Error><Code>AccessDenied</Code><Message>no very/secret+key</Message></Error>"
    )
    job_id, _ = await taken(platform, in_bucket(bucket))
    await platform.done(job_id, {"output": BIG})
    status = await platform.status(job_id)
    assert status["status"] == "FAILED"
    assert status["error"].startswith("output exceeds ")
    assert (
        "storing it in the job's bucket failed: 127.0.0.1 answered HTTP 403 AccessDenied" in status["error"]
    )
    assert "very/secret" not in status["error"]


async def test_an_error_with_a_large_output_is_no_result(platform, bucket):
    job_id, _ = await taken(platform, in_bucket(bucket))
    await platform.done(job_id, {"output": BIG, "error": "broken"})
    assert (await platform.status(job_id))["status"] == "FAILED"
    assert bucket.requests == []


async def test_a_post_too_large_to_be_kept_fails_the_job(platform, bucket):
    job_id, _ = await taken(platform, in_bucket(bucket))
    await platform.done(job_id, {"output": "x" * 5 * LIMIT})
    status = await platform.status(job_id)
    assert (status["status"], bucket.requests) == ("FAILED", [])
    assert "limit (got " in status["error"]


async def test_an_upload_that_breaks_fails_the_job(platform, bucket, monkeypatch):
    async def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(platform.service._buckets._uploader, "upload", broken)
    job_id, _ = await taken(platform, in_bucket(bucket))
    await platform.done(job_id, {"output": BIG})
    assert (await platform.status(job_id))["error"].endswith("bucket failed: ZeroDivisionError")


async def test_a_job_cancelled_during_its_upload_stays_cancelled(platform, bucket):
    """Its worker's post waits for the bucket meanwhile."""
    import asyncio

    bucket.hang()
    job_id, _ = await taken(platform, in_bucket(bucket))
    posting = asyncio.create_task(platform.done(job_id, {"output": BIG}))
    await bucket.count(1)
    await platform.call("POST", f"/cancel/{job_id}")
    bucket.released.set()
    assert (await posting).status_code == 200
    assert (await platform.status(job_id))["status"] == "CANCELLED"
