"""The sender with real receivers on loopback, the in-memory store and a clock that moves when told to
(serverless-api.md §2.12, §12 items 24 and 25, §13 item 11)."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

import pilotlight
from pilotlight.core.webhooks import revived, signature
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.errors import StoreError
from pilotlight.loops.webhooks import WebhookSender
from pilotlight.net import GuardedHttp
from pilotlight.settings import WebhookSettings
from pilotlight.stores import MemoryStore, open_sqlite_store
from pilotlight.system import SystemClock
from pilotlight.testing.receiver import receiving

START_MS = 1_700_000_000_000


class Clock:
    def __init__(self):
        self.ms = START_MS

    def now_ms(self):
        return self.ms

    def monotonic_ns(self):
        return self.ms * 1_000_000


class WatchedStore(MemoryStore):
    """Tells when it was asked and when it was written to; fails when told to."""

    def __init__(self):
        super().__init__()
        self.changed = asyncio.Condition()
        self.looks = self.writes = 0
        self.refuse_writes = 0

    async def due_webhooks(self, **arguments):
        found = await super().due_webhooks(**arguments)
        await self._tell("looks")
        return found

    async def put_webhook(self, delivery):
        self._refuse()
        await super().put_webhook(delivery)
        await self._tell("writes")

    async def delete_webhook(self, delivery_id):
        self._refuse()
        await super().delete_webhook(delivery_id)
        await self._tell("writes")

    async def reach(self, **counts):
        """Return when there were that many looks or writes."""
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(
                lambda: all(getattr(self, name) >= count for name, count in counts.items())
            )

    def _refuse(self):
        if self.refuse_writes:
            self.refuse_writes -= 1
            raise StoreError("disk full")

    async def _tell(self, name):
        async with self.changed:
            setattr(self, name, getattr(self, name) + 1)
            self.changed.notify_all()


class World:
    def __init__(self):
        self.clock, self.store = Clock(), WatchedStore()
        self.senders = []

    def sender(self, *, store=None, allow_private=True, start=True, **settings):
        sender = WebhookSender(
            store=store or self.store,
            http=GuardedHttp(allow_private=allow_private),
            clock=self.clock,
            settings=WebhookSettings(**settings),
            secret=lambda endpoint_id: f"whsec_{endpoint_id}",
        )
        self.senders.append(sender)
        if start:
            sender.start()
            sender.start()
        return sender

    def delivery(self, url, id="job1.1", **changes):
        return WebhookDelivery(
            **{
                "id": id,
                "job_id": id.partition(".")[0],
                "endpoint_id": "ep1",
                "url": url,
                "body": b'{"id":"job1","status":"COMPLETED"}',
                "created_ms": START_MS,
                "next_ms": START_MS,
            }
            | changes
        )

    async def look(self, sender):
        """Let the sender look twice: the second time it has seen everything that was there before."""
        for _ in range(2):
            looks = self.store.looks
            sender.wake()
            await self.store.reach(looks=looks + 1)


@pytest.fixture
async def world():
    made = World()
    yield made
    for sender in made.senders:
        await sender.stop()
        await sender.stop()


@pytest.fixture
async def receiver():
    async with receiving() as made:
        yield made


async def test_a_delivery_that_is_answered_204_is_sent_once_and_forgotten(world, receiver):
    """§13 item 11, §12 item 25."""
    receiver.statuses(204)
    await world.store.put_webhook(world.delivery(receiver.url))
    sender = world.sender()
    await world.store.reach(writes=2)
    world.clock.ms += 60_000
    await world.look(sender)
    (request,) = receiver.requests
    assert await world.store.next_webhook_ms() is None
    assert await world.store.dead_webhooks() == []
    assert (request.method, request.path, request.body) == ("POST", "/hook", world.delivery("").body)


async def test_its_headers(world, receiver):
    """§2.12: content type, timestamp, signature; ours: an id, the same for all tries."""
    await world.store.put_webhook(world.delivery(receiver.url))
    world.sender()
    await receiver.count(1)
    (request,) = receiver.requests
    headers = request.headers
    assert headers["Content-Type"] == "application/json"
    assert headers["User-Agent"] == f"Pilotlight/{pilotlight.__version__}"
    assert headers["X-Webhook-Id"] == "job1.1"
    assert headers["X-Webhook-Timestamp"] == str(START_MS // 1000)
    assert headers["X-Webhook-Signature"] == signature("whsec_ep1", str(START_MS // 1000), request.body)


async def test_three_tries_at_0_10_and_20_seconds_and_then_a_dead_letter(world, receiver):
    """§13 item 11: the receiver answers 500; each try has the same id, its own timestamp and signature."""
    receiver.statuses(500)
    await world.store.put_webhook(world.delivery(receiver.url))
    sender = world.sender()
    for number in (1, 2, 3):
        await world.store.reach(writes=1 + number)
        assert len(receiver.requests) == number
        world.clock.ms += 9_999
        await world.look(sender)
        assert len(receiver.requests) == number
        world.clock.ms += 1
        sender.wake()
    await world.look(sender)
    assert len(receiver.requests) == 3
    stamps = [int(request.headers["X-Webhook-Timestamp"]) for request in receiver.requests]
    assert [stamp - START_MS // 1000 for stamp in stamps] == [0, 10, 20]
    assert {request.headers["X-Webhook-Id"] for request in receiver.requests} == {"job1.1"}
    assert len({request.headers["X-Webhook-Signature"] for request in receiver.requests}) == 3
    (dead,) = await world.store.dead_webhooks()
    assert (dead.tries, dead.next_ms, dead.last_status) == (3, None, 500)
    assert dead.last_error == "the receiver answered 500"


async def test_a_receiver_that_recovers_gets_it_at_the_second_try(world, receiver):
    receiver.statuses(503, 200)
    await world.store.put_webhook(world.delivery(receiver.url))
    sender = world.sender()
    await world.store.reach(writes=2)
    world.clock.ms += 10_000
    sender.wake()
    await world.store.reach(writes=3)
    assert len(receiver.requests) == 2
    assert await world.store.dead_webhooks() == []


async def test_it_wakes_by_itself_for_a_retry(world, receiver, monkeypatch):
    """Nobody calls `wake`, and the look that comes anyway is far off."""
    monkeypatch.setattr("pilotlight.loops.webhooks._LOOK_S", 600)
    receiver.statuses(500, 200)
    world.clock = SystemClock()
    now_ms = world.clock.now_ms()
    await world.store.put_webhook(world.delivery(receiver.url, created_ms=now_ms, next_ms=now_ms))
    world.sender(retry_delays_s=(1,))
    await receiver.count(2)


async def test_a_retry_that_an_earlier_gateway_left_behind_wakes_it(world, receiver, monkeypatch):
    monkeypatch.setattr("pilotlight.loops.webhooks._LOOK_S", 600)
    world.clock = SystemClock()
    now_ms = world.clock.now_ms()
    await world.store.put_webhook(
        world.delivery(receiver.url, created_ms=now_ms, next_ms=now_ms + 500, tries=1)
    )
    world.sender()
    await receiver.count(1)


async def test_what_another_gateway_added_is_found_without_being_woken(world, receiver, monkeypatch):
    monkeypatch.setattr("pilotlight.loops.webhooks._LOOK_S", 0.01)
    world.sender()
    await world.store.reach(looks=2)
    await world.store.put_webhook(world.delivery(receiver.url))
    await receiver.count(1)


async def test_redirects_are_failures(world, receiver):
    receiver.statuses(301)
    await world.store.put_webhook(world.delivery(receiver.url))
    world.sender(retry_delays_s=())
    await world.store.reach(writes=2)
    (dead,) = await world.store.dead_webhooks()
    assert (dead.last_status, len(receiver.requests)) == (301, 1)


async def test_a_private_address_is_refused_and_not_tried_again(world, receiver):
    """§2.12, last point."""
    await world.store.put_webhook(world.delivery(receiver.url))
    world.sender(allow_private=False)
    await world.store.reach(writes=2)
    (dead,) = await world.store.dead_webhooks()
    assert (dead.tries, dead.last_status, receiver.requests) == (1, None, [])
    assert dead.last_error.startswith("not sent: 127.0.0.1 is not a public address")


async def test_a_receiver_that_hangs_times_out(world, receiver):
    receiver.hang()
    await world.store.put_webhook(world.delivery(receiver.url))
    world.sender(timeout_s=1, retry_delays_s=())
    await world.store.reach(writes=2)
    (dead,) = await world.store.dead_webhooks()
    assert dead.last_error == "no answer within 1 s"


async def test_a_slow_receiver_does_not_hold_up_another(world, receiver):
    """Fifty deliveries to a receiver that hangs are due before one to somebody else."""
    receiver.hang()
    for number in range(50):
        await world.store.put_webhook(world.delivery(receiver.url, f"slow{number}.1"))
    world.clock.ms += 1
    async with receiving() as other:
        await world.store.put_webhook(
            world.delivery(f"http://localhost:{other.port}/", "quick.1", next_ms=world.clock.ms)
        )
        world.sender(timeout_s=600, concurrency=8)
        await other.count(1)
        await receiver.count(2)
        await world.look(world.senders[0])
        # A quarter of eight.
        assert len(receiver.requests) == 2
        assert other.requests[0].headers["X-Webhook-Id"] == "quick.1"


async def test_no_more_are_under_way_than_allowed(world, receiver):
    receiver.hang()
    for number in range(30):
        await world.store.put_webhook(
            world.delivery(f"http://127.0.0.{1 + number % 10}:{receiver.port}/", f"j{number}.1")
        )
    sender = world.sender(timeout_s=600, concurrency=5)
    await world.look(sender)
    assert len(sender._under_way) == 5


async def test_a_new_one_is_sent_when_woken(world, receiver):
    sender = world.sender()
    await world.store.reach(looks=1)
    await world.store.put_webhook(world.delivery(receiver.url))
    sender.wake()
    await receiver.count(1)


async def test_a_store_that_cannot_be_written_to_does_not_repeat_the_sending(world, receiver, monkeypatch):
    """The outcome is kept and written when the store works again."""
    monkeypatch.setattr("pilotlight.loops.webhooks._LOOK_S", 0.01)
    await world.store.put_webhook(world.delivery(receiver.url))
    world.store.refuse_writes = 3
    sender = world.sender()
    await receiver.count(1)
    await world.look(sender)
    await world.store.reach(writes=2)
    assert len(receiver.requests) == 1
    assert await world.store.next_webhook_ms() is None


async def test_a_store_that_cannot_be_read_is_asked_again(world, receiver, monkeypatch):
    failures = [StoreError("gone"), RuntimeError("broken")]
    real = world.store.due_webhooks

    async def due(**arguments):
        if failures:
            raise failures.pop()
        return await real(**arguments)

    monkeypatch.setattr(world.store, "due_webhooks", due)
    await world.store.put_webhook(world.delivery(receiver.url))
    sender = world.sender()
    while failures:
        sender.wake()
        await asyncio.sleep(0)
    sender.wake()
    await receiver.count(1)


async def test_a_try_that_breaks_counts_as_a_try(world, receiver, monkeypatch):
    """A fault of ours must not send the same for ever."""
    sender = world.sender(start=False, retry_delays_s=())
    monkeypatch.setattr(sender, "_secret", lambda endpoint_id: 1 / 0)
    await world.store.put_webhook(world.delivery(receiver.url))
    sender.start()
    await world.store.reach(writes=2)
    (dead,) = await world.store.dead_webhooks()
    assert dead.last_error == "the try failed: ZeroDivisionError"


async def test_a_dead_letter_that_is_revived_is_sent_with_the_same_id(world, receiver):
    receiver.statuses(500, 200)
    await world.store.put_webhook(world.delivery(receiver.url))
    sender = world.sender(retry_delays_s=())
    await world.store.reach(writes=2)
    (dead,) = await world.store.dead_webhooks()
    await world.store.put_webhook(revived(dead, now_ms=world.clock.ms))
    sender.wake()
    await world.store.reach(writes=4)
    assert {request.headers["X-Webhook-Id"] for request in receiver.requests} == {"job1.1"}
    assert await world.store.dead_webhooks() == []


async def test_a_large_body_is_signed_and_sent_whole(world, receiver):
    body = b'{"output":"' + b"x" * (3 << 20) + b'"}'
    await world.store.put_webhook(world.delivery(receiver.url, body=body))
    world.sender()
    await receiver.count(1)
    (request,) = receiver.requests
    assert request.body == body
    stamp = request.headers["X-Webhook-Timestamp"]
    assert request.headers["X-Webhook-Signature"] == signature("whsec_ep1", stamp, body)


async def test_a_restart_in_between_loses_nothing(world, receiver, tmp_path):
    """1. A try is under way when the gateway stops. 2. Another one failed and waits for its retry.
    3. The next gateway sends both, with the same ids and the tries that are left."""
    async with contextlib.AsyncExitStack() as stack:
        store = await open_sqlite_store(tmp_path / "home")
        failing = await stack.enter_async_context(receiving())
        failing.statuses(500)
        receiver.hang()
        await store.put_webhook(world.delivery(receiver.url, "cut.1"))
        await store.put_webhook(world.delivery(f"http://localhost:{failing.port}/", "waits.1"))
        sender = world.sender(store=store)
        await receiver.count(1)
        await failing.count(1)
        while (await store.webhook("waits.1")).tries != 1:
            await asyncio.sleep(0.001)
        await sender.stop()
        await store.close()

        store = await open_sqlite_store(tmp_path / "home")
        stack.push_async_callback(store.close)
        assert (await store.webhook("cut.1")).tries == 0
        receiver.statuses(200)
        sender = world.sender(store=store)
        stack.push_async_callback(sender.stop)
        await receiver.count(2)
        world.clock.ms += 10_000
        sender.wake()
        await failing.count(2)
        assert {request.headers["X-Webhook-Id"] for request in receiver.requests} == {"cut.1"}
        assert {request.headers["X-Webhook-Id"] for request in failing.requests} == {"waits.1"}


async def test_what_is_too_old_is_given_up_without_its_body(world, receiver):
    """Storage is bounded by bytes and age, not only by how many dead letters there are."""
    week_ms = 7 * 86_400_000
    old = replace(world.delivery(receiver.url, "old.1"), created_ms=world.clock.now_ms() - week_ms - 1)
    await world.store.put_webhook(old)
    await world.store.put_webhook(world.delivery(receiver.url, "new.1"))
    await world.sender(start=False)._trim()
    (dead,) = await world.store.dead_webhooks()
    assert (dead.id, dead.size, dead.last_error[:8]) == ("old.1", 0, "given up")
    assert (await world.store.webhook("new.1")).body
