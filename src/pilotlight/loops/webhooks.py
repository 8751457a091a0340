"""Sends webhooks (serverless-api.md §2.12) until they have arrived or their tries are used up.

What is to be sent is in the store: a job's terminal state and its delivery were written together, so a
restart loses none, and one that was sent but not yet crossed off is sent again with the same id. The loop
wakes when a job with a webhook finishes and when a try is due. A receiver that is slow holds up neither the
queue nor, since a host gets a share of what is sent at once, other receivers.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections import Counter
from collections.abc import Callable

import structlog

import pilotlight
from pilotlight.core.webhooks import Try, after_try, signature
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.errors import StoreError
from pilotlight.net import GuardedHttp, RefusedAddressError, UnreachableError
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import WebhookStore
from pilotlight.settings import WebhookSettings

_log = structlog.get_logger()

_LOOK_S = 5.0
"""Pause after which the store is asked whatever is known: other gateways may have added something."""

_ANSWER_BYTES = 64 * 1024
"""An answer is read up to here and dropped, so that a receiver sees its connection end properly."""

_STOP_GRACE_S = 1.0
"""How long tries under way may go on when the gateway stops; later ones are made again after its start."""

_SIGN_HERE_BYTES = 1024 * 1024
"""Larger bodies are signed in a thread: everybody waits for what the event loop computes."""

_ALARMS_MAX = 10_000

_TRIM_MS = 60_000
"""How often what is kept is brought back into the bounds below."""

_HOST_BYTES = 256 * 1024 * 1024
_ALL_BYTES = 4 * _HOST_BYTES
"""Bodies kept for one host and in all: of deliveries that wait, and as much again of dead letters."""

_KEPT_MS = 7 * 86_400_000
"""Age at which a dead letter loses its body and cannot be sent again."""


class WebhookSender:
    """A loop with bounded tries under way, in all and for one host.

    Args:
        store: Deliveries.
        http: Sends to allowed addresses.
        clock: Time.
        settings: Bounds and pauses.
        secret: The webhook secret of an endpoint.
    """

    def __init__(
        self,
        *,
        store: WebhookStore,
        http: GuardedHttp,
        clock: Clock,
        settings: WebhookSettings,
        secret: Callable[[str], str],
    ) -> None:
        self._store = store
        self._http = http
        self._clock = clock
        self._settings = settings
        self._secret = secret
        self._per_host = max(1, settings.concurrency // 4)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._hosts: Counter[str] = Counter()
        self._alarms: list[int] = []
        self._woken = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._trim_ms = 0

    def start(self) -> None:
        """Begin to send; idempotent."""
        if self._task is None:
            self._stopping.clear()
            self._task = asyncio.create_task(self._run(), name="webhooks")

    async def stop(self) -> None:
        """End; tries that do not finish at once are made again after the next start; idempotent."""
        if self._task is None:
            return
        self._stopping.set()
        self._woken.set()
        await asyncio.wait({self._task})
        self._task = None
        tasks = [*self._under_way.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_STOP_GRACE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._http.close()

    def wake(self) -> None:
        """Look at once: a delivery was added or is due."""
        self._woken.set()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            pause_s = _LOOK_S
            try:
                await self._trim()
                await self._fill()
                pause_s = await self._pause_s()
            except StoreError as error:
                _log.warning("webhooks_not_read", error=str(error))
            except Exception:  # noqa: BLE001 - one broken record must not end all webhooks
                _log.exception("webhooks_broken")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), pause_s)

    async def _trim(self) -> None:
        """Give up what is kept beyond the bounds, now and then."""
        now_ms = self._clock.now_ms()
        if now_ms < self._trim_ms:
            return
        self._trim_ms = now_ms + _TRIM_MS
        count = await self._store.trim_webhooks(
            host_bytes=_HOST_BYTES, all_bytes=_ALL_BYTES, before_ms=now_ms - _KEPT_MS
        )
        if count:
            _log.warning("webhooks_given_up", count=count)

    async def _fill(self) -> None:
        """Begin tries until nothing more is due or no more may be under way."""
        while (free := self._settings.concurrency - len(self._under_way)) > 0:
            due = await self._store.due_webhooks(
                now_ms=self._clock.now_ms(),
                limit=free,
                skip_ids=[*self._under_way],
                skip_hosts=[host for host, count in self._hosts.items() if count >= self._per_host],
            )
            if not due or self._stopping.is_set():
                return
            for delivery in due:
                if self._hosts[delivery.host] < self._per_host:
                    self._begin(delivery)

    async def _pause_s(self) -> float:
        """How long there is nothing to do, unless somebody wakes us."""
        now_ms = self._clock.now_ms()
        while self._alarms and self._alarms[0] <= now_ms:
            heapq.heappop(self._alarms)
        known = [self._alarms[0]] if self._alarms else []
        if not self._under_way:
            # With tries under way the store names theirs; what follows them is among the alarms.
            next_ms = await self._store.next_webhook_ms()
            known += [] if next_ms is None else [next_ms]
        return min([_LOOK_S, *(max(0.05, (moment - now_ms) / 1000) for moment in known)])

    def _begin(self, delivery: WebhookDelivery) -> None:
        self._hosts[delivery.host] += 1
        task = asyncio.create_task(self._deliver(delivery), name=f"webhook-{delivery.id}")
        self._under_way[delivery.id] = task
        task.add_done_callback(lambda done: self._ended(delivery, done))

    def _ended(self, delivery: WebhookDelivery, task: asyncio.Task[None]) -> None:
        del self._under_way[delivery.id]
        self._hosts[delivery.host] -= 1
        if not self._hosts[delivery.host]:
            del self._hosts[delivery.host]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("webhook_broken", webhook_id=delivery.id, exc_info=error)
        self._woken.set()

    async def _deliver(self, delivery: WebhookDelivery) -> None:
        """One try, and what follows from it."""
        tried = await self._try(delivery)
        after = after_try(
            delivery, tried, now_ms=self._clock.now_ms(), retry_delays_s=self._settings.retry_delays_s
        )
        _report(delivery, tried, after)
        while not await self._remember(delivery.id, after):
            # The outcome must not be forgotten while the store is out of order: the receiver would be sent
            # the same again and again.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_S)
            if self._stopping.is_set():
                return
        if after is not None and after.next_ms is not None and len(self._alarms) < _ALARMS_MAX:
            heapq.heappush(self._alarms, after.next_ms)

    async def _remember(self, delivery_id: str, after: WebhookDelivery | None) -> bool:
        try:
            if after is None:
                await self._store.delete_webhook(delivery_id)
            else:
                await self._store.put_webhook(after)
        except StoreError as error:
            _log.warning("webhook_outcome_not_stored", webhook_id=delivery_id, error=str(error))
            return False
        return True

    async def _try(self, delivery: WebhookDelivery) -> Try:
        started_ms = self._clock.now_ms()
        try:
            answer = await self._http.send(
                "POST",
                delivery.url,
                headers=await self._headers(delivery, started_ms // 1000),
                body=delivery.body,
                timeout_s=self._settings.timeout_s,
                read_bytes=_ANSWER_BYTES,
            )
        except RefusedAddressError as error:
            return Try(started_ms=started_ms, error=f"not sent: {error}", hopeless=True)
        except UnreachableError as error:
            return Try(started_ms=started_ms, error=str(error))
        except Exception as error:  # noqa: BLE001 - a try that is not counted would be made for ever
            _log.exception("webhook_try_broken", webhook_id=delivery.id)
            return Try(started_ms=started_ms, error=f"the try failed: {type(error).__name__}")
        return Try(started_ms=started_ms, status=answer.status)

    async def _headers(self, delivery: WebhookDelivery, now_s: int) -> dict[str, str]:
        timestamp, secret = str(now_s), self._secret(delivery.endpoint_id)
        if len(delivery.body) > _SIGN_HERE_BYTES:
            signed = await asyncio.to_thread(signature, secret, timestamp, delivery.body)
        else:
            signed = signature(secret, timestamp, delivery.body)
        return {
            "Content-Type": "application/json",
            "User-Agent": f"Pilotlight/{pilotlight.__version__}",
            "Accept-Encoding": "identity",
            "X-Webhook-Id": delivery.id,
            "X-Webhook-Timestamp": timestamp,
            "X-Webhook-Signature": signed,
        }


def _report(delivery: WebhookDelivery, tried: Try, after: WebhookDelivery | None) -> None:
    """One line per try; the URL stays out, since it may carry a secret of the receiver."""
    fields = {
        "webhook_id": delivery.id,
        "endpoint_id": delivery.endpoint_id,
        "host": delivery.host,
        "tries": delivery.tries + 1,
        "status": tried.status,
    }
    if after is None:
        _log.info("webhook_delivered", **fields)
    elif after.next_ms is None:
        _log.warning("webhook_dead", **fields, error=after.last_error)
    else:
        _log.info("webhook_failed", **fields, error=after.last_error)
