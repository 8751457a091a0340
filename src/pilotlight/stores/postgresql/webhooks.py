"""Operations on webhook deliveries: functions of a transaction, called by `store`."""

from __future__ import annotations

from collections.abc import Collection

from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.stores import common
from pilotlight.stores.postgresql.changes import put_webhooks
from pilotlight.stores.postgresql.database import Transaction


async def due(
    transaction: Transaction,
    now_ms: int,
    limit: int,
    skip_ids: Collection[str],
    skip_hosts: Collection[str],
) -> list[WebhookDelivery]:
    """Deliveries whose next try is due."""
    rows = await transaction.rows("due_webhooks", now_ms, max(0, limit), list(skip_ids), list(skip_hosts))
    return [WebhookDelivery(**dict(row)) for row in rows]


async def next_ms(transaction: Transaction) -> int | None:
    """When the next try is due."""
    moment: int | None = await transaction.value("next_webhook")
    return moment


async def put(transaction: Transaction, delivery: WebhookDelivery) -> None:
    """Replace a delivery, and drop the oldest dead letters when it is one."""
    await put_webhooks(transaction, [delivery])
    if delivery.next_ms is None:
        await transaction.run("drop_dead_webhooks", common.DEAD_WEBHOOKS_KEPT)


async def delete(transaction: Transaction, delivery_id: str) -> None:
    """Forget a delivery."""
    await transaction.run("delete_webhook", delivery_id)


async def find(transaction: Transaction, delivery_id: str) -> WebhookDelivery:
    """One delivery."""
    row = await transaction.row("webhook", delivery_id)
    if row is None:
        raise common.webhook_not_found(delivery_id)
    return WebhookDelivery(**dict(row))


async def trim(transaction: Transaction, host_bytes: int, all_bytes: int, before_ms: int) -> int:
    """Take their bodies from deliveries that are too old or too many, and give them up."""
    count = await transaction.run("trim_webhooks", common.WEBHOOK_GIVEN_UP, host_bytes, all_bytes, before_ms)
    if count:
        await transaction.run("drop_dead_webhooks", common.DEAD_WEBHOOKS_KEPT)
    return count


async def dead(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[WebhookDelivery]:
    """Dead letters without their bodies, newest first."""
    rows = await transaction.rows("dead_webhooks", endpoint_id, max(0, limit))
    return [WebhookDelivery(**dict(row)) for row in rows]
