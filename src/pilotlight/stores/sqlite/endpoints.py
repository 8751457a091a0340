"""Operations on endpoints, revisions, keys and workers: functions of a transaction, called by `store`."""

from __future__ import annotations

from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey
from pilotlight.domain.worker import Worker
from pilotlight.stores import common, rows
from pilotlight.stores.sqlite.threads import Transaction


def add_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """Store a new endpoint and its first revision."""
    if transaction.execute("endpoint_id_used", (endpoint.id,)).fetchone()[0]:
        raise common.id_taken("endpoint", endpoint.id)
    _check_name(transaction, endpoint)
    transaction.execute("insert_endpoint", (endpoint.id, *rows.settings_row(endpoint)))
    transaction.execute("insert_revision", rows.revision_row(endpoint.revision))


def update_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """Replace the settings of an endpoint, with a new revision or with the current one."""
    row = transaction.execute("current_revision", (endpoint.id,)).fetchone()
    if row is None:
        raise common.endpoint_not_found(endpoint.id)
    _check_name(transaction, endpoint)
    current, revision = rows.revision_of(row), endpoint.revision
    if revision.version == current.version + 1:
        transaction.execute("insert_revision", rows.revision_row(revision))
    elif revision != current:
        raise common.wrong_version(endpoint.id, revision.version, current.version)
    transaction.execute("update_endpoint", (*rows.settings_row(endpoint), endpoint.id))


def delete_endpoint(transaction: Transaction, endpoint_id: str, now_ms: int) -> None:
    """Mark an endpoint as deleted."""
    if transaction.execute("delete_endpoint", (now_ms, endpoint_id)).rowcount == 0:
        raise common.endpoint_not_found(endpoint_id)


def endpoints(transaction: Transaction) -> list[Endpoint]:
    """All living endpoints."""
    return [rows.endpoint_of(row) for row in transaction.execute("endpoints")]


def revisions(transaction: Transaction, endpoint_id: str) -> list[Revision]:
    """All revisions of an endpoint."""
    return [rows.revision_of(row) for row in transaction.execute("revisions", (endpoint_id,))]


def add_key(transaction: Transaction, key: ApiKey) -> None:
    """Store a new key."""
    if transaction.execute("insert_key", rows.key_row(key)).rowcount == 0:
        raise common.id_taken("API key", key.id)


def update_key(transaction: Transaction, key: ApiKey) -> None:
    """Change what may change of a key."""
    if transaction.execute("update_key", (key.name, *rows.key_terms(key), key.id)).rowcount == 0:
        raise common.key_not_found(key.id)


def delete_key(transaction: Transaction, key_id: str) -> None:
    """Forget a key."""
    if transaction.execute("delete_key", (key_id,)).rowcount == 0:
        raise common.key_not_found(key_id)


def keys(transaction: Transaction) -> list[ApiKey]:
    """All keys."""
    return [rows.key_of(row) for row in transaction.execute("keys")]


def put_worker(transaction: Transaction, worker: Worker) -> None:
    """Insert or replace one worker's record."""
    transaction.execute("put_worker", rows.worker_row(worker))


def worker(transaction: Transaction, worker_id: str) -> Worker | None:
    """One worker; None when unknown."""
    row = transaction.execute("worker", (worker_id,)).fetchone()
    return None if row is None else rows.worker_of(row)


def workers(transaction: Transaction, endpoint_id: str | None, living: bool) -> list[Worker]:
    """Workers of one endpoint or of all."""
    return [rows.worker_of(row) for row in transaction.execute("workers", (endpoint_id, living))]


def prune_workers(transaction: Transaction, ended_before_ms: int) -> int:
    """Forget workers that ended before a moment."""
    return transaction.execute("prune_workers", (ended_before_ms,)).rowcount


def _check_name(transaction: Transaction, endpoint: Endpoint) -> None:
    if transaction.execute("endpoint_name_used", (endpoint.name, endpoint.id)).fetchone()[0]:
        raise common.name_taken(endpoint.name)
