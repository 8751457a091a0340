"""`WebhookStore` (serverless-api.md §2.12), on every implementation: one delivery per terminal state."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from pilotlight.core.lifecycle import (
    Cancelled,
    ExecutionTimedOut,
    PlatformInterrupted,
    Progressed,
    ResultPosted,
    Retried,
    TtlReached,
)
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.errors import NotFoundError

E1, E2 = "endpoint1", "endpoint2"
URL = "https://example.com/hook?a='b'"
DEAD_KEPT = 1_000
BOUNDS = {"host_bytes": 250, "all_bytes": 10_000, "before_ms": 0}


def delivery(number: int, **changes: object) -> WebhookDelivery:
    values: dict[str, object] = {
        "id": f"j{number}.1",
        "job_id": f"j{number}",
        "endpoint_id": E1,
        "url": URL,
        "body": b"{}",
        "created_ms": number,
        "next_ms": number,
    }
    return WebhookDelivery(**{**values, **changes})


class TestMade:
    async def test_the_body_is_the_job_object_with_input_and_url(self, store, queue) -> None:
        await queue.running("a", at=1_000, now_ms=3_208, input=b'{"prompt":"hi"}', webhook=URL)
        await queue.finish("a", now_ms=8_332, output=b'{"text":"hello"}')
        [made] = await queue.webhooks()
        assert json.loads(made.body) == {
            "delayTime": 2_208,
            "executionTime": 5_124,
            "id": "a",
            "input": {"prompt": "hi"},
            "output": {"text": "hello"},
            "status": "COMPLETED",
            "webhook": URL,
            "workerId": "w1",
        }
        assert (made.job_id, made.endpoint_id, made.url) == ("a", E1, URL)
        assert (made.created_ms, made.next_ms, made.tries) == (8_332, 8_332, 0)
        assert (made.last_status, made.last_error) == (None, "")
        assert await store.webhook(made.id) == made
        assert await store.next_webhook_ms() == 8_332

    async def test_one_for_each_way_to_end(self, store, queue) -> None:
        ends = {
            "completed": ResultPosted(worker_id="w1", now_ms=3_000, output=b"1"),
            "failed": ResultPosted(worker_id="w1", now_ms=3_000, error="bad", output=b"2"),
            "slow": ExecutionTimedOut(now_ms=3_000),
            "late": TtlReached(now_ms=3_000),
            "cancelled": Cancelled(now_ms=3_000),
        }
        await queue.running(*ends, webhook=URL)
        for job_id, event in ends.items():
            assert (await store.apply(job_id, event)).finished
        await queue.submit("queued-late", "queued-cancelled", webhook=URL)
        await store.apply("queued-late", TtlReached(now_ms=3_000))
        await store.apply("queued-cancelled", Cancelled(now_ms=3_000))
        bodies = {made.job_id: json.loads(made.body) for made in await queue.webhooks()}
        assert {job_id: body["status"] for job_id, body in bodies.items()} == {
            "completed": "COMPLETED",
            "failed": "FAILED",
            "slow": "FAILED",
            "late": "TIMED_OUT",
            "cancelled": "CANCELLED",
            "queued-late": "TIMED_OUT",
            "queued-cancelled": "CANCELLED",
        }
        assert (bodies["failed"]["error"], bodies["failed"]["output"]) == ("bad", 2)
        assert {body["input"]["prompt"] for body in bodies.values()} == {"hi"}
        assert set(bodies["queued-cancelled"]) == {"id", "status", "input", "webhook"}

    async def test_none_without_a_url_and_none_before_the_end(self, store, queue) -> None:
        await queue.running("silent")
        await queue.finish("silent")
        await queue.running("a", webhook=URL)
        await store.apply("a", Progressed(worker_id="w1", now_ms=2_100, output=b"1"))
        await queue.chunk("a")
        await queue.lose("a")
        await queue.take("w1")
        await store.apply("a", PlatformInterrupted(now_ms=2_600))
        assert list(await queue.webhooks()) == []
        assert await store.next_webhook_ms() is None

    async def test_late_and_double_events_make_none(self, store, queue) -> None:
        await queue.running("a", webhook=URL)
        await queue.finish("a")
        await queue.finish("a", now_ms=3_100, output=b"2")
        await store.apply("a", Cancelled(now_ms=3_200))
        await store.apply_many([("a", Cancelled(now_ms=3_300)), ("a", TtlReached(now_ms=3_300))])
        [made] = await queue.webhooks()
        assert json.loads(made.body)["status"] == "COMPLETED"

    async def test_a_delivered_one_does_not_come_back(self, store, queue) -> None:
        await queue.running("a", webhook=URL)
        await queue.finish("a")
        [made] = await queue.webhooks()
        await store.delete_webhook(made.id)
        await queue.finish("a")
        await store.apply("a", Cancelled(now_ms=3_200))
        await store.prune_jobs(now_ms=10**12)
        assert list(await queue.webhooks()) == []

    async def test_by_apply_many_and_cancel_all(self, store, queue) -> None:
        await queue.running("a", "b", webhook=URL)
        await queue.submit("c", "d", webhook=URL)
        await store.apply_many(
            [
                ("a", ResultPosted(worker_id="w1", now_ms=3_000, output=b"1")),
                ("c", Cancelled(now_ms=3_000)),
                ("a", Cancelled(now_ms=3_000)),
            ]
        )
        while await store.cancel_all(E1, Cancelled(now_ms=4_000), limit=1):
            pass
        made = await queue.webhooks()
        assert sorted(each.job_id for each in made) == ["a", "b", "c", "d"]
        assert {each.created_ms for each in made} == {3_000, 4_000}

    async def test_by_a_purge_once_the_jobs_are_deleted(self, store, queue) -> None:
        """`delete_purged` leaves CANCELLED webhooks behind."""
        await queue.running("running", "a", webhook=URL)
        await queue.lose("a")
        await queue.submit("silent")
        await store.purge(E1, now_ms=5_000)
        while await store.delete_purged(now_ms=6_000):
            pass
        [made] = await queue.webhooks()
        body = json.loads(made.body)
        assert (body["id"], body["status"], body["input"]) == ("a", "CANCELLED", {"prompt": "hi"})
        assert body["retries"] == 1
        assert (made.url, made.endpoint_id, made.tries) == (URL, E1, 0)
        assert made.next_ms in {5_000, 6_000}
        assert await store.delete_purged(now_ms=7_000) == 0
        assert len(await queue.webhooks()) == 1

    async def test_by_a_batch(self, store, queue) -> None:
        await queue.batch("req_a", "req_b", "req_c", webhook=URL)
        await queue.take(count=2)
        await queue.finish("req_a")
        await store.cancel_batch("batch_1", now_ms=4_000)
        await queue.lose("req_b")
        bodies = {made.job_id: json.loads(made.body) for made in await queue.webhooks()}
        assert {job_id: body["status"] for job_id, body in bodies.items()} == {
            "req_a": "COMPLETED",
            "req_b": "CANCELLED",
            "req_c": "CANCELLED",
        }
        assert bodies["req_c"]["input"] == {"n": "req_c"}

    async def test_a_retry_by_the_client_makes_another_one(self, store, queue) -> None:
        await queue.running("a", webhook=URL)
        await queue.fail("a")
        await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))
        await queue.take(now_ms=5_000)
        await queue.finish("a", now_ms=6_000)
        made = await queue.webhooks()
        assert [json.loads(each.body)["status"] for each in made] == ["FAILED", "COMPLETED"]
        assert len({each.id for each in made}) == 2

    @pytest.mark.parametrize("delivered", [False, True])
    async def test_a_retry_that_ends_without_having_run_makes_another_one(
        self, store, queue, delivered: bool
    ) -> None:
        """Receivers tell a repetition by its id: two ends of a job must not look like one."""
        await queue.submit("a", webhook=URL)
        await store.apply("a", TtlReached(now_ms=3_000))
        [first] = await queue.webhooks()
        if delivered:
            await store.delete_webhook(first.id)
        await store.apply("a", Retried(now_ms=4_000, expires_ms=5_000))
        await store.apply("a", TtlReached(now_ms=5_000))
        made = await queue.webhooks()
        assert len(made) == (1 if delivered else 2)
        assert len({each.id for each in [first, *made]}) == 2

    async def test_ids_of_different_jobs_differ(self, store, queue) -> None:
        ids = [f"j{number}" for number in range(100)]
        await queue.submit(*ids, webhook=URL)
        await asyncio.gather(*(store.apply(each, Cancelled(now_ms=3_000)) for each in ids))
        made = await queue.webhooks()
        assert len({each.id for each in made}) == 100
        assert sorted(each.job_id for each in made) == sorted(ids)


class TestDue:
    async def test_the_longest_due_first(self, store, queue) -> None:
        for number in (3, 1, 2):
            await store.put_webhook(delivery(number, next_ms=10 * number))
        assert await store.next_webhook_ms() == 10
        assert [each.id for each in await store.due_webhooks(now_ms=9)] == []
        assert [each.id for each in await store.due_webhooks(now_ms=20)] == ["j1.1", "j2.1"]
        assert [each.id for each in await store.due_webhooks(now_ms=99, limit=1)] == ["j1.1"]

    async def test_looking_takes_nothing(self, store) -> None:
        await store.put_webhook(delivery(1))
        assert await store.due_webhooks(now_ms=9) == await store.due_webhooks(now_ms=9)

    async def test_a_failed_try_is_put_off(self, store, queue) -> None:
        await queue.running("a", webhook=URL)
        await queue.finish("a")
        [made] = await queue.webhooks()
        tried = replace(made, tries=1, next_ms=13_000, last_status=503, last_error='it\'s "down" \u202e é')
        await store.put_webhook(tried)
        assert list(await store.due_webhooks(now_ms=12_999)) == []
        assert list(await store.due_webhooks(now_ms=13_000)) == [tried]
        assert await store.webhook(made.id) == tried
        assert await store.next_webhook_ms() == 13_000

    async def test_a_delivered_one_is_forgotten(self, store) -> None:
        await store.put_webhook(delivery(1))
        await store.delete_webhook("j1.1")
        await store.delete_webhook("j1.1")
        await store.delete_webhook("nobody")
        assert await store.next_webhook_ms() is None
        with pytest.raises(NotFoundError):
            await store.webhook("j1.1")

    async def test_a_delivery_outlives_its_job(self, store, queue) -> None:
        """serverless-api.md §2.11: the job's retention is not extended by a failed webhook."""
        await queue.running("a", webhook=URL)
        await queue.finish("a")
        assert await store.prune_jobs(now_ms=10**12) == 1
        assert [each.job_id for each in await queue.webhooks()] == ["a"]


class TestDead:
    async def test_dead_letters_are_never_due(self, store) -> None:
        await store.put_webhook(delivery(1))
        dead = delivery(1, tries=3, next_ms=None, last_error="no answer")
        await store.put_webhook(dead)
        assert list(await store.due_webhooks(now_ms=10**15)) == []
        assert await store.next_webhook_ms() is None
        assert list(await store.dead_webhooks()) == [replace(dead, body=b"", size=len(dead.body))]
        assert await store.webhook("j1.1") == dead

    async def test_newest_first_of_all_or_of_one_endpoint(self, store) -> None:
        for number in (2, 1, 3):
            await store.put_webhook(delivery(number, next_ms=None, endpoint_id=E2 if number == 1 else E1))
        await store.put_webhook(delivery(9))
        assert [each.job_id for each in await store.dead_webhooks()] == ["j3", "j2", "j1"]
        assert [each.job_id for each in await store.dead_webhooks(endpoint_id=E1)] == ["j3", "j2"]
        assert [each.job_id for each in await store.dead_webhooks(limit=1)] == ["j3"]

    async def test_one_is_sent_again(self, store) -> None:
        await store.put_webhook(delivery(1, next_ms=None))
        await store.put_webhook(delivery(1, next_ms=77))
        assert list(await store.dead_webhooks()) == []
        assert await store.next_webhook_ms() == 77

    async def test_the_newest_thousand_are_kept(self, store) -> None:
        await store.put_webhook(delivery(0, created_ms=0, next_ms=0))
        for first in range(1, DEAD_KEPT + 51, 50):
            await asyncio.gather(
                *(store.put_webhook(delivery(number, next_ms=None)) for number in range(first, first + 50))
            )
        dead = await store.dead_webhooks(limit=5_000)
        assert [each.created_ms for each in dead] == list(range(DEAD_KEPT + 50, 50, -1))
        assert await store.next_webhook_ms() == 0


class TestTrimmed:
    async def test_the_oldest_of_a_host_are_given_up(self, store) -> None:
        for number in range(1, 5):
            await store.put_webhook(delivery(number, body=b"x" * 100))
        await store.put_webhook(delivery(9, body=b"x" * 100, url="https://other.example/", created_ms=0))
        assert await store.trim_webhooks(**BOUNDS) == 2
        assert await store.trim_webhooks(**BOUNDS) == 0, "what waits and what is dead count apart"
        due = await store.due_webhooks(now_ms=100)
        assert [each.job_id for each in due] == ["j3", "j4", "j9"]
        dead = await store.dead_webhooks()
        assert [(each.job_id, each.size) for each in dead] == [("j2", 0), ("j1", 0)]
        assert dead[0].last_error.startswith("given up")

    async def test_in_all_and_by_age(self, store) -> None:
        for number in range(1, 5):
            url = f"https://h{number}.example/"
            await store.put_webhook(
                delivery(number, body=b"x" * 100, url=url, next_ms=None, last_error="answered 500")
            )
        assert await store.trim_webhooks(**{**BOUNDS, "all_bytes": 300}) == 1
        assert await store.trim_webhooks(**{**BOUNDS, "before_ms": 3}) == 1
        dead = await store.dead_webhooks()
        assert [(each.job_id, each.size) for each in dead] == [("j4", 100), ("j3", 100), ("j2", 0), ("j1", 0)]
        assert {each.last_error for each in dead} == {"answered 500"}
