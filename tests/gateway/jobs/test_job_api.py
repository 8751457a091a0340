"""The clients' side of the job road (serverless-api.md §2, §10, §12)."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import replace

import pytest

from pilotlight.domain.endpoint import RESERVED_ENDPOINT_IDS
from pilotlight.domain.usage import Outcome, Road
from pilotlight.domain.worker import Stage, WorkerState
from pilotlight.gateway.jobs import service as service_module
from pilotlight.ports.fleet import Health

ERROR_KEYS = {"error", "detail"}
ROUTES = [
    ("POST", "/run"), ("POST", "/runsync"), ("GET", "/status/x"), ("GET", "/status-sync/x"), ("GET", "/stream/x"),
    ("POST", "/cancel/x"), ("POST", "/retry/x"), ("POST", "/purge-queue"), ("GET", "/health"),
    ("GET", "/requests"), ("GET", "/batch"),
]  # fmt: skip


async def finish(platform, job_id, output, **more):
    taken = await platform.take()
    assert taken.json()["id"] == job_id
    await platform.done(job_id, {"output": output, **more})


@pytest.fixture
def holds(platform, monkeypatch):
    """How many seconds the service was asked to hold each request; it holds none of them."""
    asked = []
    wait, stream = platform.service.wait, platform.service.streams.read

    async def no_wait(*arguments, timeout_s, gone=None):
        asked.append(timeout_s)
        return await wait(*arguments, timeout_s=0, gone=gone)

    async def no_hold(*arguments, hold_s, gone=None):
        asked.append(hold_s)
        return await stream(*arguments, hold_s=0, gone=gone)

    monkeypatch.setattr(platform.service, "wait", no_wait)
    monkeypatch.setattr(platform.service.streams, "read", no_hold)
    return asked


async def test_run_answers_at_once_and_the_job_can_be_read(platform):
    """§2.4, §2.6, §2.9: no worker exists; keys that do not apply are left out."""
    answer = await platform.call("POST", "/run", json={"input": {"prompt": "hi"}, "unknown": 1})
    assert answer.status_code == 200
    job = answer.json()
    assert job == {"id": job["id"], "status": "IN_QUEUE"}
    assert job["id"].endswith("-u1")
    assert await platform.status(job["id"]) == {"id": job["id"], "status": "IN_QUEUE"}
    assert platform.woken == ["ep1"]


async def test_job_object_of_a_completed_job(platform):
    """§2.9."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await finish(platform, job_id, {"text": "hallo"})
    job = await platform.status(job_id)
    assert job.keys() == {"id", "status", "delayTime", "executionTime", "output", "workerId"}
    assert (job["status"], job["output"], job["workerId"]) == ("COMPLETED", {"text": "hallo"}, "w1")
    assert isinstance(job["delayTime"], int)
    assert isinstance(job["executionTime"], int)


@pytest.mark.parametrize("verb", ["/runsync", "/run_sync", "/runsync/", "//runsync"])
async def test_runsync_waits_for_the_result(platform, verb):
    """§2.5, §2.2 (alias), §2.1 (slashes)."""
    platform.fleet.add(capacity=1)
    take = asyncio.create_task(platform.take())
    await platform.parked()
    call = asyncio.create_task(platform.call("POST", verb, json={"input": 1}))
    job = (await take).json()
    assert job["id"].startswith("sync-")
    await platform.done(job["id"], {"output": [1, 2]})
    answer = (await call).json()
    assert (answer["status"], answer["output"]) == ("COMPLETED", [1, 2])


async def test_runsync_that_is_not_finished_in_time_is_still_200(platform):
    """§2.5: never 202 or 408; `wait` below the range is clamped to 1 s."""
    answer = await platform.call("POST", "/runsync?wait=1", json={"input": 1})
    assert (answer.status_code, answer.json()["status"]) == (200, "IN_QUEUE")


async def test_runsync_of_a_job_that_runs_is_200_with_what_is_known(platform, monkeypatch):
    """§2.5: `{"delayTime":…,"id":"sync-…","status":"IN_PROGRESS"}`, and the job goes on."""
    platform.fleet.add(capacity=1)
    wait = platform.service.wait

    async def taken_meanwhile(*arguments, timeout_s, gone=None):
        await platform.take()
        return await wait(*arguments, timeout_s=0, gone=gone)

    monkeypatch.setattr(platform.service, "wait", taken_meanwhile)
    answer = await platform.call("POST", "/runsync", json={"input": 1})
    job = answer.json()
    assert (answer.status_code, job["status"], job["workerId"]) == (200, "IN_PROGRESS", "w1")
    assert job.keys() == {"id", "status", "delayTime", "workerId"}
    await platform.done(job["id"], {"output": 1})
    assert (await platform.status(job["id"]))["status"] == "COMPLETED"


async def test_runsync_of_a_job_that_fails_is_200(platform):
    """§2.5: a handler failure is told by the status of the job."""
    platform.fleet.add(capacity=1)
    call = asyncio.create_task(platform.call("POST", "/runsync", json={"input": 1}))
    job_id = (await platform.take()).json()["id"]
    await platform.done(job_id, {"error": "boom"})
    answer = await call
    job = answer.json()
    assert (answer.status_code, job["status"], job["error"]) == (200, "FAILED", "boom")


@pytest.mark.parametrize(
    ("verb", "query", "seconds"),
    [
        ("runsync", "", 90),
        ("runsync", "?wait=", 90),
        ("runsync", "?wait=1000", 1),
        ("runsync", "?wait=999", 1),
        ("runsync", "?wait=0", 1),
        ("runsync", "?wait=-5", 1),
        ("runsync", "?wait=300000", 300),
        ("runsync", "?wait=300001", 300),
        ("runsync", "?wait=99999999999", 300),
        ("status-sync", "", 90),
        ("status-sync", "?wait=1", 1),
        ("status-sync", "?wait=300000", 300),
        ("status-sync", "?wait=300001", 300),
        ("stream", "", 8),
        ("stream", "?wait=1", 1),
        ("stream", "?wait=300000", 300),
        ("stream", "?wait=300001", 300),
    ],
)
async def test_how_long_requests_are_held(platform, holds, verb, query, seconds):
    """§2.5, §2.7, §2.8, §12 items 11 and 14: defaults, and 1 s to 300 s, outside of which `wait` is clamped.

    Python's client gives up reading a stream after 10 s, so that is not its default.
    """
    if verb == "runsync":
        answer = await platform.call("POST", f"/runsync{query}", json={"input": 1})
    else:
        answer = await platform.call("GET", f"/{verb}/{await platform.run()}{query}")
    assert (answer.status_code, holds) == (200, [seconds])


@pytest.mark.parametrize(("wait", "seconds"), [("1500.5", 1.5), ("0.5", 1), ("-0.5", 1), ("300000.9", 300)])
@pytest.mark.parametrize("verb", ["runsync", "status-sync", "stream"])
async def test_a_wait_may_be_a_fraction(platform, holds, verb, wait, seconds):
    """§2.5, §12 item 14: JavaScript's client sends what it was given, clamped and not rounded."""
    path = f"/{verb}" if verb == "runsync" else f"/{verb}/{await platform.run()}"
    answer = await platform.call("POST", f"{path}?wait={wait}", json={"input": 1})
    assert (answer.status_code, holds) == (200, [seconds])


@pytest.mark.parametrize("wait", ["NaN", "Infinity", "abc", "1e3", "1.", ".5", "--1", "1" * 19, "²", "1 000"])
async def test_a_wait_that_is_no_number_is_named(platform, wait):
    """§2.14: 400, and no job was queued by it."""
    job_id = await platform.run()
    for path in ("/runsync", f"/status-sync/{job_id}", f"/stream/{job_id}"):
        answer = await platform.call("POST", path, params={"wait": wait}, json={"input": 1})
        assert answer.status_code == 400
        assert "wait must be a number of milliseconds between 1000 and 300000" in answer.json()["error"]
    assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 1


async def test_runsync_goes_on_when_its_caller_hangs_up(platform):
    """§2.5: the job is not cancelled."""
    platform.fleet.add(capacity=1)
    call = asyncio.create_task(platform.call("POST", "/runsync", json={"input": 1}))
    job = (await platform.take()).json()
    call.cancel()
    await asyncio.wait({call})
    await platform.done(job["id"], {"output": 2})
    assert (await platform.status(job["id"]))["status"] == "COMPLETED"


async def test_sync_results_stay_as_long_as_the_caller_was_ready_to_wait(platform):
    """§2.11: 1 min, or the wait when that was longer; §2.9 expired records are 404."""
    platform.fleet.add(capacity=2)
    ids = []
    for query in ("", "?wait=200000"):
        call = asyncio.create_task(platform.call("POST", f"/runsync{query}", json={"input": 1}))
        job_id = (await platform.take(holding=True)).json()["id"]
        await platform.done(job_id, {"output": 1})
        ids.append((await call).json()["id"])
    platform.clock.advance(90)
    assert [(await platform.call("GET", f"/status/{job_id}")).status_code for job_id in ids] == [404, 200]


@pytest.mark.parametrize(
    "value", [{}, None, 0, False, "", [], "text", [1, {"a": None}], {"input": {"input": {}}}]
)
async def test_any_input_reaches_the_worker_unchanged(platform, value):
    """§2.3: falsy inputs too; §12 item 42."""
    platform.fleet.add(capacity=1)
    await platform.run({"input": value})
    assert (await platform.take()).json()["input"] == value


async def test_other_keys_are_discarded(platform):
    """§2.3: the handler sees neither what we do not know nor what is ours."""
    platform.fleet.add(capacity=1)
    body = {
        "input": {"a": 1}, "foo": 1, "id": "mine", "batchId": "mine", "retries": 7,
        "webhook": "https://example.com/", "policy": {"ttl": 20_000},
    }  # fmt: skip
    job_id = await platform.run(body)
    assert (await platform.take()).json() == {"id": job_id, "input": {"a": 1}}


@pytest.mark.parametrize("body", [{}, {"policy": {"ttl": 10_000}}])
async def test_missing_input_is_an_empty_one_when_nothing_else_is_there(platform, body):
    """§2.3, §12 item 42: the Go client drops empty maps."""
    platform.fleet.add(capacity=1)
    answer = await platform.call("POST", "/run", json=body)
    assert answer.status_code == 200
    assert (await platform.take()).json()["input"] == {}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{", "request body is not valid JSON"),
        (b"", "request body is not valid JSON"),
        (b'{"input": NaN}', "request body is not valid JSON"),
        (b'{"input": "\xff"}', "request body is not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "hi"}', 'input is required; wrap the payload in {"input": …}'),
        (b'{"input": 1, "policy": {"ttl": 9999}}', "policy.ttl must be between 10000 and 604800000"),
        (b'{"input": 1, "policy": {"ttl": 604800001}}', "policy.ttl must be between 10000 and 604800000"),
        (b'{"input": 1, "policy": {"ttl": 10000.5}}', "policy.ttl must be between 10000 and 604800000"),
        (b'{"input": 1, "policy": {"ttl": true}}', "policy.ttl must be between 10000 and 604800000"),
        (b'{"input": 1, "policy": {"ttl": "1"}}', "policy.ttl must be between 10000 and 604800000"),
        (
            b'{"input": 1, "policy": {"executionTimeout": 4999}}',
            "policy.executionTimeout must be between 5000 and 604800000",
        ),
        (
            b'{"input": 1, "policy": {"executionTimeout": 604800001}}',
            "policy.executionTimeout must be between 5000 and 604800000",
        ),
        (b'{"input": 1, "policy": {"lowPriority": 1}}', "policy.lowPriority must be true or false"),
        (b'{"input": 1, "policy": 3}', "policy must be an object"),
        (b'{"input": 1, "policy": {"ttl": ' + b"9" * 5000 + b"}}", "policy cannot be read"),
        (b'{"input": ' + b"[" * 100_000, "request body"),
    ],
)
async def test_bad_bodies_are_named(platform, body, text):
    """§2.3, §2.14: 400 with both keys and never a `status`."""
    answer = await platform.call("POST", "/run", content=body)
    assert answer.status_code == 400
    assert answer.json().keys() == ERROR_KEYS
    assert text in answer.json()["error"]
    assert [record.outcome for record in platform.records] == [Outcome.REJECTED]


async def test_half_an_emoji_is_legal_json(platform):
    platform.fleet.add(capacity=1)
    answer = await platform.call("POST", "/run", content=b'{"input": "cut \\ud83d"}')
    assert answer.status_code == 200
    assert "\\ud83d" in (await platform.take()).text


async def test_oversize_bodies(make_platform):
    """§2.13, §12 item 8: 400 with a code, because old code tests for 400; /runsync has a limit of its own."""
    limits = {"run_body_bytes": 1024 * 1024, "body_bytes": 2 * 1024 * 1024}
    async with make_platform(limits=limits) as platform:
        body = {"input": "x" * 1_500_000}
        answer = await platform.call("POST", "/run", json=body)
        assert answer.status_code == 400
        text = "request body exceeds 1 MB limit"
        assert answer.json() == {"error": text, "detail": text, "code": "payload_too_large"}
        answer = await platform.call("POST", "/runsync?wait=1000", json=body)
        assert answer.status_code == 200


async def test_full_queue_sheds(make_platform):
    """§2.14, §12 item 30: 429 with Retry-After; a freed place can be used again."""
    async with make_platform(limits={"queue_jobs": 2}) as platform:
        first = await platform.run()
        await platform.run()
        answer = await platform.call("POST", "/run", json={"input": 1})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert platform.records[-1].outcome is Outcome.SHED
        await platform.call("POST", f"/cancel/{first}")
        await platform.run()


DAY_MS, WEEK_MS = 86_400_000, 604_800_000


@pytest.mark.parametrize(
    ("policy", "ttl_ms", "execution_ms"),
    [
        (..., DAY_MS, 123_000),
        (None, DAY_MS, 123_000),
        ({}, DAY_MS, 123_000),
        ({"lowPriority": True}, DAY_MS, 123_000),
        ({"ttl": None, "executionTimeout": None}, DAY_MS, 123_000),
        ({"ttl": 10_000}, 10_000, 123_000),
        ({"ttl": WEEK_MS}, WEEK_MS, 123_000),
        ({"executionTimeout": 5_000}, DAY_MS, 5_000),
        ({"executionTimeout": WEEK_MS}, DAY_MS, WEEK_MS),
    ],
)
@pytest.mark.parametrize("verb", ["/run", "/runsync?wait=1000"])
async def test_times_a_job_is_given(platform, holds, verb, policy, ttl_ms, execution_ms):
    """§2.3, §2.11: 24 h and the endpoint's execution timeout, each where nothing else was asked for; the ends
    of both ranges are legal."""
    await platform.reshape(execution_timeout_ms=123_000)
    body = {"input": 1} if policy is ... else {"input": 1, "policy": policy}
    answer = await platform.call("POST", verb, json=body)
    assert answer.status_code == 200, answer.text
    job = await platform.store.job(answer.json()["id"])
    assert (job.expires_ms - job.created_ms, job.execution_timeout_ms) == (ttl_ms, execution_ms)


async def test_policy_reaches_the_job(platform):
    """§2.3: low priority is served last; ttl and execution timeout are kept."""
    platform.fleet.add(capacity=2)
    low = await platform.run(
        {"input": 1, "policy": {"lowPriority": True, "ttl": 20_000.0, "executionTimeout": 5000}}
    )
    high = await platform.run()
    taken = (await platform.take(batch=2)).json()
    assert [job["id"] for job in taken] == [high, low]
    job = await platform.store.job(low)
    assert (job.expires_ms - job.created_ms, job.execution_timeout_ms) == (20_000, 5_000)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("verb", ["status", "status-sync", "stream"])
async def test_job_routes_answer_get_and_post_with_or_without_bodies(platform, method, verb):
    """§2.1."""
    job_id = await platform.run()
    await platform.call("POST", f"/cancel/{job_id}")
    for content in (b"", b"{}", b"null"):
        answer = await platform.call(method, f"/{verb}/{job_id}/", content=content)
        assert answer.json()["status"] == "CANCELLED"


@pytest.mark.parametrize("verb", ["status", "status-sync", "stream", "cancel"])
async def test_unknown_and_foreign_jobs(platform, verb):
    """§2.14."""
    job_id = await platform.run()
    for endpoint, wanted in (("ep1", "nope"), ("ep2", job_id)):
        answer = await platform.call("POST", f"/{verb}/{wanted}", endpoint=endpoint)
        assert answer.status_code == 404
        assert answer.json() == {"error": "job not found", "detail": "job not found"}


async def test_keys_and_scopes(platform):
    """§10, §12 item 43."""

    async def health(key, endpoint="ep1", **headers):
        answer = await platform.call("GET", "/health", key=key, endpoint=endpoint, headers=headers)
        return answer.status_code

    assert await health(None) == 401
    assert await health("rpa_WRONG") == 401
    assert await health("rpa_ADMIN") == 200
    assert await health(None, authorization="rpa_ADMIN") == 200
    assert await health(None, authorization="bearer  rpa_ADMIN") == 200
    assert await health(None, **{"x-api-key": "rpa_ADMIN"}) == 200
    assert await health("rpa_RUNNER") == 200
    assert await health("rpa_RUNNER", "ep2") == 403
    assert await health("rpa_RUNNER", "ep9") == 404
    assert await health("rpa_ADMIN", "ep9") == 404


@pytest.mark.parametrize(
    ("key", "endpoint", "status", "text"),
    [
        (None, "ep1", 401, "unauthorized"),
        ("rpa_WRONG", "ep1", 401, "unauthorized"),
        ("rpa_WRONG", "ep9", 401, "unauthorized"),
        ("rpa_RUNNER", "ep2", 403, "access denied"),
        ("rpa_RUNNER", "ep9", 404, "endpoint not found"),
        ("rpa_ADMIN", "ep9", 404, "endpoint not found"),
    ],
)
async def test_who_may_not_is_told_why(platform, key, endpoint, status, text):
    """§2.14, §10, §12 items 10 and 43: the texts, in both keys, on every route."""
    for method, path in ROUTES:
        answer = await platform.call(method, path, key=key, endpoint=endpoint)
        assert (answer.status_code, answer.json()) == (status, {"error": text, "detail": text}), path


async def test_a_key_in_the_query_is_none(platform):
    """§10: queries end up in logs, so only REST v1 and GraphQL ever took keys there."""
    for path in ("/health?api_key=rpa_ADMIN", "/requests?api_key=rpa_ADMIN"):
        assert (await platform.call("GET", path, key=None)).status_code == 401


@pytest.mark.parametrize("form", ["{}", "Bearer {}"])
async def test_a_workers_secret_is_no_clients_key(platform, form):
    """§10: it is valid for that worker's callback routes only."""
    secret = platform.fleet.add(capacity=1)
    for method, path in ROUTES:
        answer = await platform.call(method, path, key=None, headers={"authorization": form.format(secret)})
        assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized"), path


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/run", "POST"),
        ("PUT", "/runsync", "POST"),
        ("GET", "/cancel/x", "POST"),
        ("POST", "/health", "GET"),
        ("DELETE", "/status/x", "GET, POST"),
        ("GET", "/retry/x", "POST"),
        ("GET", "/purge-queue", "POST"),
        ("POST", "/requests", "GET"),
    ],
)
async def test_wrong_verbs(platform, method, path, allow):
    """§2.14."""
    answer = await platform.call(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert answer.json()["error"] == "method not allowed"


@pytest.mark.parametrize("path", ["/status", "/run/x", "/retry", "/purge-queue/x", "/requests/x"])
async def test_what_is_not_there_is_404(platform, path):
    assert (await platform.call("POST", path)).status_code == 404


@pytest.mark.parametrize("word", sorted(RESERVED_ENDPOINT_IDS))
async def test_reserved_words_are_left_to_rest_v2(platform, word):
    """§1, §13 item 16: `/v2/serverless/health` is no endpoint of ours."""
    answer = await platform.call("GET", "/health", endpoint=word)
    assert (answer.status_code, answer.json()["error"]) == (404, "not found")


@pytest.mark.parametrize(("ttl", "seconds"), [("0", 1), ("1", 1), ("999", 1), ("1000", 1), ("5000", 5)])
async def test_status_ttl_shortens_the_record(platform, ttl, seconds):
    """§2.6: re-armed from now; values below 1 s are raised to it."""
    platform.clock.freeze()
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await finish(platform, job_id, 1)
    platform.clock.advance(100)
    assert (await platform.call("GET", f"/status/{job_id}?ttl={ttl}")).status_code == 200
    platform.clock.advance(seconds - 0.1)
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 200
    platform.clock.advance(0.2)
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 404


async def test_status_ttl_never_prolongs_the_record(platform):
    """§2.6, §2.11: 30 minutes remain 30 minutes."""
    platform.clock.freeze()
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await finish(platform, job_id, 1)
    for ttl in ("604800000", "99999999999"):
        assert (await platform.call("GET", f"/status/{job_id}?ttl={ttl}")).status_code == 200
    platform.clock.advance(1799)
    assert (await platform.call("GET", f"/status/{job_id}?ttl=604800000")).status_code == 200
    platform.clock.advance(2)
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 404


async def test_status_ttl_that_is_no_number_is_named(platform):
    """§2.14."""
    answer = await platform.call("GET", f"/status/{await platform.run()}?ttl=abc")
    assert answer.status_code == 400
    assert "ttl must be a number of milliseconds" in answer.json()["error"]


async def test_progress_is_visible_while_running(platform):
    """§2.6, worker-protocol.md §1 line 16: late progress changes nothing."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.done(job_id, {"status": "IN_PROGRESS", "output": "42 % done"})
    job = await platform.status(job_id)
    assert (job["status"], job["output"], job["workerId"]) == ("IN_PROGRESS", "42 % done", "w1")
    assert "executionTime" not in job
    await platform.done(job_id, {"output": "all"})
    await platform.done(job_id, {"status": "IN_PROGRESS", "output": "43 % done"})
    assert (await platform.status(job_id))["output"] == "all"


async def test_status_sync_holds_until_the_end(platform):
    """§2.7."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    call = asyncio.create_task(platform.call("POST", f"/status-sync/{job_id}?wait=30000"))
    await platform.done(job_id, {"error": "bad", "output": {"partial": 1}})
    job = (await call).json()
    assert (job["status"], job["error"], job["output"]) == ("FAILED", "bad", {"partial": 1})


@pytest.mark.parametrize("taken", [False, True])
async def test_status_sync_whose_wait_is_over_shows_the_job_as_it_is(platform, holds, taken):
    """§2.7: 200 with the current job object, as `/status` has it."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    if taken:
        await platform.take()
    answer = await platform.call("GET", f"/status-sync/{job_id}?wait=1000")
    assert (answer.status_code, answer.json()) == (200, await platform.status(job_id))
    assert answer.json()["status"] == ("IN_PROGRESS" if taken else "IN_QUEUE")
    assert holds == [1]


async def test_stream_drains_and_ends(platform):
    """§2.8, §12 item 12: destructive, ordered, terminal answer carries the rest, then empty lists."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    held = asyncio.create_task(platform.call("GET", f"/stream/{job_id}"))
    await platform.chunk(job_id, "a")
    assert (await held).json() == {"status": "IN_PROGRESS", "stream": [{"output": "a"}]}
    await platform.chunk(job_id, {"b": 1})
    await platform.chunk(job_id, "c")
    await platform.done(job_id, {"output": []}, stream=True)
    answer = await platform.call("POST", f"/stream/{job_id}")
    assert answer.json() == {"status": "COMPLETED", "stream": [{"output": {"b": 1}}, {"output": "c"}]}
    again = await platform.call("GET", f"/stream/{job_id}")
    assert again.json() == {"status": "COMPLETED", "stream": []}


async def test_stream_is_held_until_the_state_changes(platform):
    """§2.8."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    held = asyncio.create_task(platform.call("GET", f"/stream/{job_id}"))
    await platform.watched()
    await platform.take()
    assert (await held).json() == {"status": "IN_PROGRESS", "stream": []}
    held = asyncio.create_task(platform.call("GET", f"/stream/{job_id}"))
    await platform.watched()
    await platform.done(job_id, {"output": 5})
    assert (await held).json() == {"status": "COMPLETED", "stream": []}


async def test_large_streams_come_in_parts_and_end_with_the_last(platform):
    """§2.8: a terminal status only with every remaining chunk, and no answer without bound."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    for number in range(11):
        await platform.chunk(job_id, f"{number}" + "x" * 1_000_000)
    await platform.done(job_id, {"output": []}, stream=True)
    first = (await platform.call("GET", f"/stream/{job_id}")).json()
    second = (await platform.call("GET", f"/stream/{job_id}")).json()
    assert (first["status"], second["status"]) == ("IN_PROGRESS", "COMPLETED")
    assert len(first["stream"]) + len(second["stream"]) == 11


async def test_cancelled_stream_ends_for_readers_that_do_not_stop(platform):
    """§2.8: 404 sixty seconds after the first empty CANCELLED answer."""
    job_id = await platform.run()
    await platform.call("POST", f"/cancel/{job_id}")
    for _ in range(2):
        assert (await platform.call("GET", f"/stream/{job_id}")).json() == {
            "status": "CANCELLED",
            "stream": [],
        }
    platform.clock.advance(61)
    assert (await platform.call("GET", f"/stream/{job_id}")).status_code == 404
    assert (await platform.call("GET", f"/status/{job_id}")).status_code == 200


async def test_cancel(platform):
    """§2.15, §12 item 15: queued jobs never start; terminal ones stay as they are."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    assert (await platform.call("POST", f"/cancel/{job_id}")).json() == {"id": job_id, "status": "CANCELLED"}
    assert (await platform.take()).status_code == 204
    done = await platform.run()
    await finish(platform, done, 1)
    answer = (await platform.call("POST", f"/cancel/{done}")).json()
    assert (answer["status"], answer.keys()) == ("COMPLETED", {"id", "status", "delayTime", "executionTime"})


async def test_cancel_of_a_running_job_stops_it(platform):
    """§2.15, worker-protocol.md §3.3: one signal, the late result is dropped, the slot is free."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    poll = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
    answer = (await platform.call("POST", f"/cancel/{job_id}")).json()
    assert answer["status"] == "CANCELLED"
    assert (await poll).json() == {"jobsToStop": [job_id]}
    assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).status_code == 204
    assert (await platform.done(job_id, {"output": "late"})).status_code == 200
    assert (await platform.status(job_id))["status"] == "CANCELLED"
    assert platform.slots.worker("w1").free == 1


async def test_health_has_all_counters(platform):
    """§2.15."""
    platform.fleet.add("w1", capacity=2)
    platform.fleet.add("w2", capacity=1)
    platform.fleet.add("w3")
    platform.fleet.add("w4", capacity=1)
    platform.fleet.become("w4", WorkerState.DRAINING)
    platform.fleet.state = Health(failures=2, throttled="no memory")
    first = await platform.run()
    await platform.take()
    await platform.done(first, {"error": "no"})
    await platform.run()
    await platform.take()
    await platform.run()
    assert (await platform.call("GET", "/health")).json() == {
        "jobs": {"completed": 0, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0},
        "workers": {
            "idle": 1, "initializing": 1, "ready": 2, "running": 2, "throttled": 1, "unhealthy": 2,
        },
    }  # fmt: skip


async def test_health_wakes_nobody(platform):
    """§2.15: also with jobs in the queue, and however often it is asked."""
    await platform.run()
    platform.woken.clear()
    for _ in range(3):
        assert (await platform.call("GET", "/health")).status_code == 200
    assert platform.woken == []


async def test_a_worker_out_of_rotation_is_not_idle(platform):
    """§2.15: neither up and waiting nor able to take work; `unhealthy` is failing its checks."""
    for name, stage in (("w1", Stage.UNHEALTHY), ("w2", Stage.INITIALIZING), ("w3", Stage.READY)):
        platform.fleet.add(name, capacity=1)
        platform.fleet.living[name] = replace(platform.fleet.living[name], stage=stage)
        if stage is not Stage.READY:
            platform.slots.close_worker(name, for_good=False)
    assert (await platform.call("GET", "/health")).json()["workers"] == {
        "idle": 1, "initializing": 1, "ready": 1, "running": 0, "throttled": 0, "unhealthy": 1,
    }  # fmt: skip


async def test_paused_endpoint_queues(platform):
    """§12 item 40: until the time to live ends; `/health` shows no worker."""
    answer = await platform.call("POST", "/run", endpoint="ep2", json={"input": 1})
    assert (answer.status_code, answer.headers["x-endpoint-paused"]) == (200, "1")
    health = (await platform.call("GET", "/health", endpoint="ep2")).json()
    assert health["jobs"]["inQueue"] == 1
    assert set(health["workers"].values()) == {0}


async def test_one_row_per_job(platform):
    """Every job leaves one row of the request log, with the tokens its output speaks of."""
    platform.fleet.add(capacity=3)
    outputs = [
        [{"choices": [], "usage": {"input": 5, "output": 7}}],
        {"usage": {"prompt_tokens": 3, "completion_tokens": 4}},
        "no usage here",
    ]
    for output in outputs:
        job_id = await platform.run()
        await platform.take()
        await platform.done(job_id, {"output": output})
    rows = platform.records
    assert [(row.tokens_in, row.tokens_out) for row in rows] == [(5, 7), (3, 4), (None, None)]
    assert {(row.road, row.route, row.status, row.outcome, row.worker_id, row.key_id) for row in rows} == {
        (Road.JOB, "/run", 200, Outcome.OK, "w1", "k1")
    }


async def test_tokens_of_a_stream_come_from_its_last_chunk(platform):
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.chunk(job_id, "data: {}\n\n")
    usage = {"prompt_tokens": 9, "completion_tokens": 2}
    await platform.chunk(job_id, f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n")
    await platform.done(job_id, {"output": []}, stream=True)
    row = platform.records[-1]
    assert (row.tokens_in, row.tokens_out) == (9, 2)
    assert row.first_token_ms is not None


async def test_deleted_endpoint_cancels_its_jobs(platform):
    """§12 item 41: a caller that waits gets the answer."""
    platform.fleet.add(capacity=1)
    running = await platform.run()
    await platform.take()
    queued = await platform.run()
    waiting = asyncio.create_task(platform.call("GET", f"/status-sync/{queued}"))
    await platform.service.endpoint_deleted("ep1")
    assert (await platform.status(running))["status"] == "CANCELLED"
    assert (await waiting).json()["status"] == "CANCELLED"


async def test_deleted_endpoint_with_many_jobs_keeps_nobody_waiting(platform, monkeypatch):
    """§12 item 41 and §2.15: what is not cancelled at once is purged; the running one ends all the same."""
    monkeypatch.setattr(service_module, "_CANCELLED_SLICES", 2)
    cancel_all = platform.store.cancel_all
    platform.store.cancel_all = functools.partial(cancel_all, limit=1)
    platform.fleet.add(capacity=1)
    low = await platform.run({"input": 1, "policy": {"lowPriority": True}})
    await platform.take()
    hook = {"input": 1, "webhook": "https://example.com/"}
    queued = [await platform.run(hook) for _ in range(5)]
    waiting = asyncio.create_task(platform.call("GET", f"/status-sync/{queued[-1]}"))
    await platform.watched()
    await platform.service.endpoint_deleted("ep1")
    counts = await platform.store.counts("ep1")
    assert (counts.queued, counts.in_progress) == (0, 0)
    assert (await platform.status(low))["status"] == "CANCELLED"
    assert (await waiting).status_code == 404
    while await platform.store.delete_purged(now_ms=platform.clock.now_ms()):
        pass
    told = await platform.store.due_webhooks(now_ms=10**15)
    assert {json.loads(delivery.body)["status"] for delivery in told} == {"CANCELLED"}
    assert {delivery.job_id for delivery in told} == set(queued)


async def test_closing_answers_everybody(make_platform):
    """A gateway that ends leaves no request hanging."""
    async with make_platform() as platform:
        platform.fleet.add(capacity=1)
        take = asyncio.create_task(platform.take())
        await platform.parked()
        wait = asyncio.create_task(platform.call("POST", "/runsync", endpoint="ep2", json={"input": 1}))
        stop = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
        await platform.watched()
        await platform.service.close()
        assert (await take).status_code == 204
        assert (await wait).json()["status"] == "IN_QUEUE"
        assert (await stop).json() == {"jobsToStop": ["-"]}
