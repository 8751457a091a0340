"""The webhook deliveries of the in-memory twin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.stores import common
from pilotlight.stores.memory.records import MemoryRecords


class MemoryWebhooks(MemoryRecords):
    """The port `WebhookStore`."""

    def __init__(self) -> None:
        super().__init__()
        self._webhooks: dict[str, WebhookDelivery] = {}

    async def due_webhooks(
        self,
        *,
        now_ms: int,
        limit: int = 100,
        skip_ids: Collection[str] = (),
        skip_hosts: Collection[str] = (),
    ) -> Sequence[WebhookDelivery]:
        """See `WebhookStore.due_webhooks`."""
        self._check_open()
        due = [
            (delivery.next_ms, delivery)
            for delivery in self._webhooks.values()
            if delivery.next_ms is not None
            and delivery.next_ms <= now_ms
            and delivery.id not in skip_ids
            and delivery.host not in skip_hosts
        ]
        due.sort(key=lambda entry: entry[0])
        return [delivery for _, delivery in due[: max(0, limit)]]

    async def next_webhook_ms(self) -> int | None:
        """See `WebhookStore.next_webhook_ms`."""
        self._check_open()
        waiting = (delivery.next_ms for delivery in self._webhooks.values())
        return min((moment for moment in waiting if moment is not None), default=None)

    async def put_webhook(self, delivery: WebhookDelivery) -> None:
        """See `WebhookStore.put_webhook`."""
        self._check_open()
        self._webhooks[delivery.id] = delivery
        for old in self._dead()[common.DEAD_WEBHOOKS_KEPT :]:
            del self._webhooks[old.id]

    async def delete_webhook(self, delivery_id: str) -> None:
        """See `WebhookStore.delete_webhook`."""
        self._check_open()
        self._webhooks.pop(delivery_id, None)

    async def webhook(self, delivery_id: str) -> WebhookDelivery:
        """See `WebhookStore.webhook`."""
        self._check_open()
        delivery = self._webhooks.get(delivery_id)
        if delivery is None:
            raise common.webhook_not_found(delivery_id)
        return delivery

    async def dead_webhooks(
        self, *, endpoint_id: str | None = None, limit: int = 100
    ) -> Sequence[WebhookDelivery]:
        """See `WebhookStore.dead_webhooks`."""
        self._check_open()
        found = [delivery for delivery in self._dead() if endpoint_id in {None, delivery.endpoint_id}]
        return [replace(each, body=b"", size=len(each.body)) for each in found[: max(0, limit)]]

    async def trim_webhooks(self, *, host_bytes: int, all_bytes: int, before_ms: int) -> int:
        """See `WebhookStore.trim_webhooks`."""
        self._check_open()
        kept: Counter[tuple[bool, str | None]] = Counter()
        count = 0
        latest = reversed([each for each in self._webhooks.values() if each.body])
        for each in sorted(latest, key=lambda delivery: -delivery.created_ms):
            dead = each.next_ms is None
            kept[dead, each.host] += len(each.body)
            kept[dead, None] += len(each.body)
            too_many = kept[dead, each.host] > host_bytes or kept[dead, None] > all_bytes
            if too_many or each.created_ms < before_ms:
                error = each.last_error if dead else common.WEBHOOK_GIVEN_UP
                await self.put_webhook(replace(each, body=b"", next_ms=None, last_error=error))
                count += 1
        return count

    def _dead(self) -> list[WebhookDelivery]:
        latest = reversed(self._webhooks.values())
        dead = [delivery for delivery in latest if delivery.next_ms is None]
        return sorted(dead, key=lambda delivery: -delivery.created_ms)
