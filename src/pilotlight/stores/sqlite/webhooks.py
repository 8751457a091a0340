"""Operations on webhook deliveries: functions of a transaction, called by `store` and with a job's end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import msgspec

from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.stores import common
from pilotlight.stores.sqlite.threads import Transaction


def put(transaction: Transaction, delivery: WebhookDelivery) -> None:
    """Store or replace a delivery, and drop dead letters that are too many."""
    transaction.execute(
        "put_webhook",
        (
            delivery.id,
            delivery.job_id,
            delivery.endpoint_id,
            delivery.url,
            delivery.body,
            delivery.created_ms,
            delivery.tries,
            delivery.next_ms,
            delivery.last_status,
            delivery.last_error,
            delivery.host,
        ),
    )
    if delivery.next_ms is None:
        transaction.execute("drop_dead_webhooks", (common.DEAD_WEBHOOKS_KEPT,))


def delete(transaction: Transaction, delivery_id: str) -> None:
    """Forget a delivery, if it is there."""
    transaction.execute("delete_webhook", (delivery_id,))


def due(
    transaction: Transaction,
    now_ms: int,
    limit: int,
    skip_ids: Collection[str],
    skip_hosts: Collection[str],
) -> list[WebhookDelivery]:
    """Deliveries whose next try is due."""
    place = (now_ms, _json_array(skip_ids), _json_array(skip_hosts), max(0, limit))
    return [_delivery(row) for row in transaction.execute("due_webhooks", place)]


def next_ms(transaction: Transaction) -> int | None:
    """When the next try of any is due."""
    moment: int | None = transaction.execute("next_webhook").fetchone()[0]
    return moment


def get(transaction: Transaction, delivery_id: str) -> WebhookDelivery:
    """One delivery."""
    row = transaction.execute("webhook", (delivery_id,)).fetchone()
    if row is None:
        raise common.webhook_not_found(delivery_id)
    return _delivery(row)


def dead(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[WebhookDelivery]:
    """Dead letters without their bodies, newest first."""
    found = transaction.execute("dead_webhooks", (endpoint_id, max(0, limit)))
    return [replace(_delivery(row), size=row[10]) for row in found]


def trim(transaction: Transaction, host_bytes: int, all_bytes: int, before_ms: int) -> int:
    """Take their bodies from deliveries that are too old or too many, and give them up."""
    place = (common.WEBHOOK_GIVEN_UP, host_bytes, all_bytes, before_ms)
    count = transaction.execute("trim_webhooks", place).rowcount
    if count:
        transaction.execute("drop_dead_webhooks", (common.DEAD_WEBHOOKS_KEPT,))
    return count


def _json_array(texts: Collection[str]) -> str:
    return msgspec.json.encode(list(texts)).decode()


def _delivery(row: tuple[Any, ...]) -> WebhookDelivery:
    return WebhookDelivery(
        id=row[0],
        job_id=row[1],
        endpoint_id=row[2],
        url=row[3],
        body=row[4],
        created_ms=row[5],
        tries=row[6],
        next_ms=row[7],
        last_status=row[8],
        last_error=row[9],
    )
