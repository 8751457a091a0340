"""The batch API (serverless-api.md §2.16)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pilotlight.domain.endpoint import EndpointKind
from pilotlight.settings import LimitSettings

from .conftest import Platform

MAKE = {"json": [{"input": {"n": 1}}, {"input": {"n": 2}}]}


@pytest.fixture
async def platform(make_platform: Any) -> AsyncIterator[Platform]:
    limits = {"batches": 2, "batch_requests": 5, "batch_queued": 6, "batch_body_bytes": 2000}
    async with make_platform(jobs={"take_hold_s": 1, "stop_hold_s": 1}, limits=limits) as made:
        yield made


async def draft(platform: Platform, *inputs: Any) -> str:
    answer = await platform.call("POST", "/batch", json=[{"input": value} for value in inputs])
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"id": answer.json()["id"], "status": "DRAFT"}
    assert answer.json()["id"].startswith("batch_")
    return str(answer.json()["id"])


async def finalized(platform: Platform, *inputs: Any) -> str:
    batch_id = await draft(platform, *inputs)
    answer = await platform.call("POST", f"/batch/{batch_id}/finalize")
    assert (answer.status_code, answer.json()["status"]) == (200, "FINALIZED"), answer.text
    return batch_id


async def requests(platform: Platform, batch_id: str, query: str = "") -> dict[str, Any]:
    answer = await platform.call("GET", f"/batch/{batch_id}/requests{query}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def summary(platform: Platform, batch_id: str) -> dict[str, Any]:
    answer = await platform.call("GET", f"/batch/{batch_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ended(view: dict[str, Any]) -> bool:
    """Whether a client that goes by the documented rule sees that a batch is done."""
    return view["requestCompleted"] + view["requestFailed"] == view["requestTotal"]


async def test_a_draft_collects_requests_and_runs_nothing(platform):
    """§2.16: DRAFT, its summary (§12 item 37), and what may be done to it."""
    platform.fleet.add(capacity=4)
    batch_id = await draft(platform)
    answer = await platform.call(
        "POST", f"/batch/{batch_id}/requests", json={"requests": [{"input": 1}, {"input": {}}, {}]}
    )
    view = answer.json()
    assert view == {
        "id": batch_id,
        "endpointId": "ep1",
        "name": "",
        "status": "DRAFT",
        "requestTotal": 3,
        "requestInProgress": 0,
        "requestCompleted": 0,
        "requestFailed": 0,
        "createdAt": view["createdAt"],
    }
    assert abs(view["createdAt"] - platform.clock.now_ms()) < 60_000
    page = await requests(platform, batch_id)
    assert [each["status"] for each in page["requests"]] == ["DRAFT"] * 3
    assert page["requests"][0]["id"].startswith("req_")
    assert (await platform.take()).status_code == 204
    removed = await platform.call("DELETE", f"/batch/{batch_id}/requests/{page['requests'][0]['id']}")
    assert (removed.status_code, removed.json()) == (200, {})
    assert (await summary(platform, batch_id))["requestTotal"] == 2


async def test_finalized_requests_run_as_jobs_that_carry_the_batch(platform):
    """§2.16: only FINALIZED batches execute; the job handed to a worker carries `batchId`; a failed child never
    fails the batch; child timestamps are RFC 3339."""
    platform.fleet.add(capacity=4)
    batch_id = await finalized(platform, {"n": 1}, {"n": 2}, {"n": 3})
    assert platform.woken[-1] == "ep1"
    jobs = (await platform.take(batch=2)).json()
    assert [(job["input"], job["batchId"]) for job in jobs] == [({"n": 1}, batch_id), ({"n": 2}, batch_id)]
    view = await summary(platform, batch_id)
    assert (view["requestInProgress"], view["requestCompleted"], view["requestFailed"]) == (2, 0, 0)
    await platform.done(jobs[0]["id"], {"output": {"embedding": [0.12]}})
    await platform.done(jobs[1]["id"], {"error": "Handler raised"})
    view = await summary(platform, batch_id)
    assert view["status"] == "FINALIZED"
    assert (view["requestInProgress"], view["requestCompleted"], view["requestFailed"]) == (0, 1, 1)
    first, second, third = (await requests(platform, batch_id))["requests"]
    assert first == {
        "id": jobs[0]["id"],
        "status": "COMPLETED",
        "output": {"embedding": [0.12]},
        "startedAt": first["startedAt"],
        "completedAt": first["completedAt"],
    }
    assert first["completedAt"].endswith("Z")
    assert (second["status"], second["error"]) == ("FAILED", "Handler raised")
    assert third == {"id": third["id"], "status": "IN_QUEUE"}


async def test_pages(platform):
    """§2.16: `offset` and `limit`, 50 by default."""
    batch_id = await finalized(platform, *range(5))
    whole = await requests(platform, batch_id)
    assert (whole["total"], whole["offset"], whole["limit"], whole["hasMore"]) == (5, 0, 50, False)
    part = await requests(platform, batch_id, "?offset=1&limit=2")
    assert part["requests"] == whole["requests"][1:3]
    assert part["hasMore"] is True
    assert (await requests(platform, batch_id, "?offset=9"))["requests"] == []
    for query in ("?limit=0", "?limit=101", "?offset=-1", "?limit=x"):
        answer = await platform.call("GET", f"/batch/{batch_id}/requests{query}")
        assert answer.status_code == 400, query
        assert "must be an integer between" in answer.json()["error"]


async def test_single_jobs_go_before_batches(platform):
    """§2.16: separate from `/run` traffic, which a batch never delays."""
    platform.fleet.add(capacity=4)
    await finalized(platform, "batch")
    job_id = await platform.run({"input": "single"})
    low = await platform.run({"input": "low", "policy": {"lowPriority": True}})
    jobs = (await platform.take(batch=3)).json()
    assert [job["input"] for job in jobs] == ["single", "batch", "low"]
    assert (jobs[0]["id"], jobs[2]["id"]) == (job_id, low)


async def test_cancel_ends_what_is_queued_and_lets_the_rest_finish(platform):
    """§2.16: CANCELLED at once, not counted as failed; the batch turns CANCELLED after the others drained."""
    platform.fleet.add(capacity=1)
    batch_id = await finalized(platform, 1, 2, 3)
    (job,) = (await platform.take(batch=2)).json()
    answer = await platform.call("POST", f"/batch/{batch_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "FINALIZED")
    assert [each["status"] for each in (await requests(platform, batch_id))["requests"]] == [
        "IN_PROGRESS",
        "CANCELLED",
        "CANCELLED",
    ]
    await platform.done(job["id"], {"output": 1})
    view = await summary(platform, batch_id)
    assert (view["status"], view["requestCompleted"], view["requestFailed"]) == ("CANCELLED", 1, 0)
    again = await platform.call("POST", f"/batch/{batch_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "CANCELLED")


async def test_a_request_of_a_cancelled_batch_is_not_run_again(platform):
    """§2.16, §2.10: the retry of a lost worker's job is for nobody any more."""
    platform.fleet.add(capacity=1)
    batch_id = await finalized(platform, 1)
    await platform.take(batch=2)
    await platform.call("POST", f"/batch/{batch_id}/cancel")
    await platform.fleet.end("w1")
    view = await summary(platform, batch_id)
    assert (view["status"], view["requestInProgress"]) == ("CANCELLED", 0)


async def test_what_is_not_a_draft_cannot_be_changed(platform):
    """§2.16: 409 `batch is not in DRAFT`."""
    batch_id = await finalized(platform, 1)
    (child,) = (await requests(platform, batch_id))["requests"]
    for method, path, body in (
        ("POST", "/requests", {"requests": [{"input": 1}]}),
        ("DELETE", f"/requests/{child['id']}", None),
        ("POST", "/finalize", None),
        ("PUT", "", {"name": "late"}),
    ):
        arguments = {"json": body} if body else {}
        answer = await platform.call(method, f"/batch/{batch_id}{path}", **arguments)
        assert (answer.status_code, answer.json()["error"]) == (409, "batch is not in DRAFT"), path


async def test_name(platform):
    """§2.16: `PUT` gives a display name and answers the summary (§12 item 37)."""
    batch_id = await draft(platform)
    answer = await platform.call("PUT", f"/batch/{batch_id}", json={"name": "nightly"})
    assert answer.json()["name"] == "nightly"
    for name in ("", 7, None, "x" * 192):
        answer = await platform.call("PUT", f"/batch/{batch_id}", json={"name": name})
        assert answer.status_code == 400
        assert "name must be a text of 1 to 191 characters" in answer.json()["error"]


async def test_batches_are_listed_newest_first(platform):
    """§2.16."""
    first = await draft(platform, 1)
    platform.clock.advance(1)
    second = await draft(platform)
    listed = (await platform.call("GET", "/batch")).json()["batches"]
    assert [batch["id"] for batch in listed] == [second, first]
    assert (await platform.call("GET", "/batch", endpoint="ep2")).json() == {"batches": []}
    assert (await platform.call("GET", f"/batch/{first}", endpoint="ep2")).status_code == 404


async def test_limits(platform):
    """§2.16: 10 active batches, 5,000 requests, 50,000 queued; here 2, 5 and 6."""
    first = await draft(platform, 1, 2, 3, 4)
    second = await draft(platform, 1, 2, 3, 4)
    third = await platform.call("POST", "/batch", json=[])
    assert third.status_code == 429
    assert "limit of 2 active batches" in third.json()["error"]
    assert int(third.headers["retry-after"]) > 0
    more = await platform.call("POST", f"/batch/{first}/requests", json={"requests": [{"input": 1}] * 2})
    assert (more.status_code, "limit of 5 requests per batch" in more.json()["error"]) == (429, True)
    assert (await platform.call("POST", f"/batch/{first}/finalize")).status_code == 200
    full = await platform.call("POST", f"/batch/{second}/finalize")
    assert (full.status_code, "limit of 6 queued batch requests" in full.json()["error"]) == (429, True)
    await platform.call("POST", f"/batch/{first}/cancel")
    assert (await platform.call("POST", f"/batch/{second}/finalize")).status_code == 200
    assert (await platform.call("POST", "/batch", json=[])).status_code == 200


def test_limits_are_those_of_the_contract() -> None:
    """§2.16, §2.13."""
    limits = LimitSettings()
    assert (limits.batches, limits.batch_requests, limits.batch_queued) == (10, 5_000, 50_000)
    assert limits.batch_body_bytes == 10 * 1_048_576


async def test_limits_of_an_installation_that_changed_none(make_platform):
    """§2.16: the tenth batch, its 5,000th request and its 10 MiB of body are taken, and no more."""
    async with make_platform() as platform:
        requests = [{"input": 1}] * 5_000
        answer = await platform.call("POST", "/batch", json=requests)
        assert answer.status_code == 200
        more = await platform.call(
            "POST", f"/batch/{answer.json()['id']}/requests", json={"requests": requests[:1]}
        )
        assert (more.status_code, "limit of 5000 requests per batch" in more.json()["error"]) == (429, True)
        for _ in range(9):
            last = await draft(platform)
        eleventh = await platform.call("POST", "/batch", json=[])
        assert (eleventh.status_code, "limit of 10 active batches" in eleventh.json()["error"]) == (429, True)
        body = b'{"requests":[{"input":1}]}'
        body += b" " * (10 * 1_048_576 - len(body))
        answer = await platform.call("POST", f"/batch/{last}/requests", content=body)
        assert (answer.status_code, answer.json()["requestTotal"]) == (200, 1)
        answer = await platform.call("POST", f"/batch/{last}/requests", content=body + b" ")
        text = "request body exceeds 10 MB limit"
        assert answer.status_code == 400
        assert answer.json() == {"error": text, "detail": text, "code": "payload_too_large"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{}", "request body must be a JSON array"),
        (b"[1]", "request 0 must be a JSON object"),
        (b'[{"input":1},{"prompt":"x"}]', "request 1: input is required"),
        (b"[", "request body must be a JSON array"),
        (b"\xff", "request body must be a JSON array"),
        (b'[{"input":"' + b"x" * 2000 + b'"}]', "request body exceeds"),
    ],
)
async def test_bad_bodies(platform, body, words):
    """§2.16, §2.14."""
    answer = await platform.call("POST", "/batch", content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]
    assert "status" not in answer.json()


async def test_an_empty_body_is_an_empty_draft(platform):
    """§2.16: `[]` is legal."""
    answer = await platform.call("POST", "/batch", content=b"")
    assert (answer.status_code, answer.json()["status"]) == (200, "DRAFT")


async def test_unknown_things(platform):
    """§2.14."""
    for method, path, status in (
        ("GET", "/batch/batch_none", 404),
        ("POST", "/batch/batch_none/finalize", 404),
        ("POST", "/batch/batch_none/cancel", 404),
        ("PATCH", "/batch", 405),
        ("DELETE", "/batch/batch_none/requests/req_none", 404),
        ("POST", "/batch/batch_none/nothing", 404),
        ("DELETE", "/batch/batch_none/nothing/req_none", 404),
        ("GET", "/batch/batch_none/finalize", 405),
    ):
        answer = await platform.call(method, path)
        assert answer.status_code == status, path
    batch_id = await draft(platform, 1)
    assert (await platform.call("DELETE", f"/batch/{batch_id}/requests/req_none")).status_code == 404
    assert (await platform.call("POST", "/batch", key=None, json=[])).status_code == 401


async def test_children_are_jobs_on_the_native_routes_too(platform):
    """§2.16, §2.15: a request that was cancelled by itself counts as failed, so that the batch ends.

    It counted as nothing, and a client that waited for `requestCompleted + requestFailed` waited for ever.
    """
    platform.fleet.add(capacity=1)
    batch_id = await finalized(platform, 1, 2)
    first, second = (await requests(platform, batch_id))["requests"]
    assert await platform.status(first["id"]) == {"id": first["id"], "status": "IN_QUEUE"}
    cancelled = await platform.call("POST", f"/cancel/{first['id']}")
    assert cancelled.json()["status"] == "CANCELLED"
    view = await summary(platform, batch_id)
    assert (view["requestTotal"], view["requestFailed"], ended(view)) == (2, 1, False)
    assert (await platform.take()).json()["id"] == second["id"]
    # A running one, too.
    await platform.call("POST", f"/cancel/{second['id']}")
    view = await summary(platform, batch_id)
    assert (view["status"], view["requestFailed"], ended(view)) == ("FINALIZED", 2, True)


async def test_a_purge_ends_a_batch(platform):
    """§2.15, §2.16: what is purged from the queue counts as failed, and what runs goes on."""
    platform.fleet.add(capacity=1)
    batch_id = await finalized(platform, 1, 2, 3)
    running = (await platform.take()).json()["id"]
    await platform.run()
    assert (await platform.call("POST", "/purge-queue")).json() == {"removed": 3, "status": "completed"}
    view = await summary(platform, batch_id)
    assert (view["requestTotal"], view["requestInProgress"], view["requestFailed"]) == (3, 1, 2)
    assert not ended(view)
    await platform.done(running, {"output": 1})
    view = await summary(platform, batch_id)
    assert (view["status"], view["requestCompleted"], view["requestFailed"]) == ("FINALIZED", 1, 2)
    assert ended(view)
    # It is no longer under way.
    assert (await platform.call("POST", "/batch", json=[])).status_code == 200
    assert (await platform.call("POST", "/batch", json=[])).status_code == 200


async def test_the_list_counts_as_the_summary_does(platform):
    """§2.16: `GET /batch` is a list of summaries."""
    batch_id = await finalized(platform, 1)
    await platform.call("POST", "/purge-queue")
    (listed,) = (await platform.call("GET", "/batch")).json()["batches"]
    assert listed == await summary(platform, batch_id)
    assert ended(listed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine_url": "http://127.0.0.1:1"}, "has a fixed engine and no workers that take jobs"),
        ({"kind": EndpointKind.LOAD_BALANCER}, "not allowed for QB API"),
    ],
)
async def test_an_endpoint_without_a_queue_takes_no_batches(platform, changes, words):
    """§2.14: as `/run`; its requests would wait for workers that never come."""
    endpoint = platform.endpoint
    revision = replace(endpoint.revision, endpoint_id="other", engine_url=changes.get("engine_url"))
    kind = changes.get("kind", endpoint.kind)
    await platform.store.add_endpoint(replace(endpoint, id="other", name="o", kind=kind, revision=revision))
    await platform.directory.refresh()
    for verb, body in (("/run", {"input": 1}), ("/batch", [{"input": 1}]), ("/batch", [])):
        answer = await platform.call("POST", verb, endpoint="other", json=body)
        assert answer.status_code == 400, verb
        assert words in answer.json()["error"]
    assert not await platform.store.batches("other")
