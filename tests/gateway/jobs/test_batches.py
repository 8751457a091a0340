"""The batch API (serverless-api.md §2.16)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

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


async def test_a_draft_collects_requests_and_runs_nothing(platform):
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
    """The job handed to a worker carries `batchId`; a failed child never fails the batch."""
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
        assert "must be a number between" in answer.json()["error"]


async def test_single_jobs_go_before_batches(platform):
    """Separate from `/run` traffic: a batch never delays it."""
    platform.fleet.add(capacity=4)
    await finalized(platform, "batch")
    job_id = await platform.run({"input": "single"})
    low = await platform.run({"input": "low", "policy": {"lowPriority": True}})
    jobs = (await platform.take(batch=3)).json()
    assert [job["input"] for job in jobs] == ["single", "batch", "low"]
    assert (jobs[0]["id"], jobs[2]["id"]) == (job_id, low)


async def test_cancel_ends_what_is_queued_and_lets_the_rest_finish(platform):
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
    assert (view["status"], view["requestCompleted"]) == ("CANCELLED", 1)
    again = await platform.call("POST", f"/batch/{batch_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "CANCELLED")


async def test_a_request_of_a_cancelled_batch_is_not_run_again(platform):
    platform.fleet.add(capacity=1)
    batch_id = await finalized(platform, 1)
    await platform.take(batch=2)
    await platform.call("POST", f"/batch/{batch_id}/cancel")
    await platform.fleet.end("w1")
    view = await summary(platform, batch_id)
    assert (view["status"], view["requestInProgress"]) == ("CANCELLED", 0)


async def test_what_is_not_a_draft_cannot_be_changed(platform):
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
    batch_id = await draft(platform)
    answer = await platform.call("PUT", f"/batch/{batch_id}", json={"name": "nightly"})
    assert answer.json()["name"] == "nightly"
    for name in ("", 7, None, "x" * 192):
        answer = await platform.call("PUT", f"/batch/{batch_id}", json={"name": name})
        assert answer.status_code == 400
        assert "name must be a text of 1 to 191 characters" in answer.json()["error"]


async def test_batches_are_listed_newest_first(platform):
    first = await draft(platform, 1)
    platform.clock.advance(1)
    second = await draft(platform)
    listed = (await platform.call("GET", "/batch")).json()["batches"]
    assert [batch["id"] for batch in listed] == [second, first]
    assert (await platform.call("GET", "/batch", endpoint="ep2")).json() == {"batches": []}
    assert (await platform.call("GET", f"/batch/{first}", endpoint="ep2")).status_code == 404


async def test_limits(platform):
    """10 active batches, 5,000 requests, 50,000 queued; here 2, 5 and 6."""
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
    answer = await platform.call("POST", "/batch", content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]
    assert "status" not in answer.json()


async def test_an_empty_body_is_an_empty_draft(platform):
    answer = await platform.call("POST", "/batch", content=b"")
    assert (answer.status_code, answer.json()["status"]) == (200, "DRAFT")


async def test_unknown_things(platform):
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
    platform.fleet.add(capacity=1)
    batch_id = await finalized(platform, 1)
    (child,) = (await requests(platform, batch_id))["requests"]
    assert await platform.status(child["id"]) == {"id": child["id"], "status": "IN_QUEUE"}
    cancelled = await platform.call("POST", f"/cancel/{child['id']}")
    assert cancelled.json()["status"] == "CANCELLED"
    assert (await summary(platform, batch_id))["requestTotal"] == 1
