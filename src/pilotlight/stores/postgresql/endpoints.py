"""Operations on endpoints, revisions, keys and workers: functions of a transaction, called by `store`.

Whoever changes endpoints or keys has the configuration lock, so what is checked first still holds when it
is written.
"""

from __future__ import annotations

from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey
from pilotlight.domain.worker import Worker
from pilotlight.stores import common, rows
from pilotlight.stores.postgresql.database import Transaction


async def add_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """Store a new endpoint and its first revision."""
    if await transaction.value("endpoint_id_used", endpoint.id):
        raise common.id_taken("endpoint", endpoint.id)
    await _check_name(transaction, endpoint)
    await transaction.run("insert_endpoint", endpoint.id, *rows.settings_row(endpoint))
    await transaction.run("insert_revision", *rows.revision_row(endpoint.revision))


async def update_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """Replace the settings of an endpoint, with a new revision or with the current one."""
    row = await transaction.row("current_revision", endpoint.id)
    if row is None:
        raise common.endpoint_not_found(endpoint.id)
    await _check_name(transaction, endpoint)
    current, revision = rows.revision_of(row), endpoint.revision
    if revision.version == current.version + 1:
        await transaction.run("insert_revision", *rows.revision_row(revision))
    elif revision != current:
        raise common.wrong_version(endpoint.id, revision.version, current.version)
    await transaction.run("update_endpoint", *rows.settings_row(endpoint), endpoint.id)


async def delete_endpoint(transaction: Transaction, endpoint_id: str, now_ms: int) -> None:
    """Mark an endpoint as deleted."""
    if not await transaction.run("delete_endpoint", now_ms, endpoint_id):
        raise common.endpoint_not_found(endpoint_id)


async def endpoints(transaction: Transaction) -> list[Endpoint]:
    """All living endpoints."""
    return [rows.endpoint_of(tuple(row)) for row in await transaction.rows("endpoints")]


async def revisions(transaction: Transaction, endpoint_id: str) -> list[Revision]:
    """All revisions of an endpoint."""
    return [rows.revision_of(row) for row in await transaction.rows("revisions", endpoint_id)]


async def add_key(transaction: Transaction, key: ApiKey) -> None:
    """Store a new key."""
    if not await transaction.run("insert_key", *rows.key_row(key)):
        raise common.id_taken("API key", key.id)


async def update_key(transaction: Transaction, key: ApiKey) -> None:
    """Change what may change of a key."""
    if not await transaction.run("update_key", key.name, *rows.key_terms(key), key.id):
        raise common.key_not_found(key.id)


async def delete_key(transaction: Transaction, key_id: str) -> None:
    """Forget a key."""
    if not await transaction.run("delete_key", key_id):
        raise common.key_not_found(key_id)


async def keys(transaction: Transaction) -> list[ApiKey]:
    """All keys."""
    return [rows.key_of(row) for row in await transaction.rows("keys")]


async def put_worker(transaction: Transaction, worker: Worker) -> None:
    """Insert or replace one worker's record."""
    await transaction.run("put_worker", *rows.worker_row(worker))


async def worker(transaction: Transaction, worker_id: str) -> Worker | None:
    """One worker; None when unknown."""
    found = await transaction.rows("worker", worker_id)
    return rows.worker_of(found[0]) if found else None


async def workers(transaction: Transaction, endpoint_id: str | None, living: bool) -> list[Worker]:
    """Workers of one endpoint or of all."""
    return [rows.worker_of(row) for row in await transaction.rows("workers", endpoint_id, living)]


async def prune_workers(transaction: Transaction, ended_before_ms: int) -> int:
    """Forget workers that ended before a moment."""
    return await transaction.run("prune_workers", ended_before_ms)


async def _check_name(transaction: Transaction, endpoint: Endpoint) -> None:
    if await transaction.value("endpoint_name_used", endpoint.name, endpoint.id):
        raise common.name_taken(endpoint.name)
