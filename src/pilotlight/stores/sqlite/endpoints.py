"""Operations on endpoints, revisions, keys and workers: functions of a transaction, called by `store`."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec

from pilotlight.domain.endpoint import Endpoint, Revision, ScalerType
from pilotlight.domain.key import ApiKey, Scope
from pilotlight.domain.worker import Failure, ProcessIdentity, Stage, Worker, WorkerState
from pilotlight.stores import common
from pilotlight.stores.sqlite.threads import Transaction


def add_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """Store a new endpoint and its first revision."""
    if transaction.execute("endpoint_id_used", (endpoint.id,)).fetchone()[0]:
        raise common.id_taken("endpoint", endpoint.id)
    _check_name(transaction, endpoint)
    transaction.execute("insert_endpoint", (endpoint.id, *_settings(endpoint)))
    _insert_revision(transaction, endpoint.revision)


def update_endpoint(transaction: Transaction, endpoint: Endpoint) -> None:
    """Replace the settings of an endpoint, with a new revision or with the current one."""
    row = transaction.execute("current_revision", (endpoint.id,)).fetchone()
    if row is None:
        raise common.endpoint_not_found(endpoint.id)
    _check_name(transaction, endpoint)
    current, revision = _revision(row), endpoint.revision
    if revision.version == current.version + 1:
        _insert_revision(transaction, revision)
    elif revision != current:
        raise common.wrong_version(endpoint.id, revision.version, current.version)
    transaction.execute("update_endpoint", (*_settings(endpoint), endpoint.id))


def delete_endpoint(transaction: Transaction, endpoint_id: str, now_ms: int) -> None:
    """Mark an endpoint as deleted."""
    if transaction.execute("delete_endpoint", (now_ms, endpoint_id)).rowcount == 0:
        raise common.endpoint_not_found(endpoint_id)


def endpoints(transaction: Transaction) -> list[Endpoint]:
    """All living endpoints."""
    return [
        Endpoint(
            id=row[0],
            name=row[1],
            workers_min=row[2],
            workers_max=row[3],
            idle_timeout_ms=row[4],
            scaler=ScalerType(row[5]),
            scaler_value=row[6],
            execution_timeout_ms=row[7],
            concurrency=row[8],
            flashboot=bool(row[9]),
            created_ms=row[10],
            updated_ms=row[11],
            revision=_revision(row[12:]),
        )
        for row in transaction.execute("endpoints")
    ]


def revisions(transaction: Transaction, endpoint_id: str) -> list[Revision]:
    """All revisions of an endpoint."""
    return [_revision(row) for row in transaction.execute("revisions", (endpoint_id,))]


def add_key(transaction: Transaction, key: ApiKey) -> None:
    """Store a new key."""
    row = (key.id, key.name, key.scope.value, _json(sorted(key.endpoint_ids)), key.hash, key.created_ms)
    if transaction.execute("insert_key", row).rowcount == 0:
        raise common.id_taken("API key", key.id)


def delete_key(transaction: Transaction, key_id: str) -> None:
    """Forget a key."""
    if transaction.execute("delete_key", (key_id,)).rowcount == 0:
        raise common.key_not_found(key_id)


def keys(transaction: Transaction) -> list[ApiKey]:
    """All keys."""
    return [
        ApiKey(
            id=row[0],
            name=row[1],
            scope=Scope(row[2]),
            endpoint_ids=msgspec.json.decode(row[3], type=frozenset[str]),
            hash=row[4],
            created_ms=row[5],
        )
        for row in transaction.execute("keys")
    ]


def put_worker(transaction: Transaction, worker: Worker) -> None:
    """Insert or replace one worker's record."""
    transaction.execute(
        "put_worker",
        (
            worker.id,
            worker.endpoint_id,
            worker.version,
            worker.state.value,
            worker.stage.value,
            worker.key_hash,
            _json(worker.devices),
            worker.memory_bytes,
            None if worker.process is None else _json(worker.process),
            None if worker.failure is None else _json(worker.failure),
            worker.created_ms,
            worker.ready_ms,
            worker.state_ms,
            worker.ended_ms,
        ),
    )


def workers(transaction: Transaction, endpoint_id: str | None, living: bool) -> list[Worker]:
    """Workers of one endpoint or of all."""
    return [
        Worker(
            id=row[0],
            endpoint_id=row[1],
            version=row[2],
            state=WorkerState(row[3]),
            stage=Stage(row[4]),
            key_hash=row[5],
            devices=msgspec.json.decode(row[6], type=tuple[int, ...]),
            memory_bytes=row[7],
            process=None if row[8] is None else msgspec.json.decode(row[8], type=ProcessIdentity),
            failure=None if row[9] is None else msgspec.json.decode(row[9], type=Failure),
            created_ms=row[10],
            ready_ms=row[11],
            state_ms=row[12],
            ended_ms=row[13],
        )
        for row in transaction.execute("workers", (endpoint_id, living))
    ]


def prune_workers(transaction: Transaction, ended_before_ms: int) -> int:
    """Forget workers that ended before a moment."""
    return transaction.execute("prune_workers", (ended_before_ms,)).rowcount


def _check_name(transaction: Transaction, endpoint: Endpoint) -> None:
    if transaction.execute("endpoint_name_used", (endpoint.name, endpoint.id)).fetchone()[0]:
        raise common.name_taken(endpoint.name)


def _settings(endpoint: Endpoint) -> tuple[Any, ...]:
    return (
        endpoint.name,
        endpoint.revision.version,
        endpoint.workers_min,
        endpoint.workers_max,
        endpoint.idle_timeout_ms,
        endpoint.scaler.value,
        float(endpoint.scaler_value),
        endpoint.execution_timeout_ms,
        endpoint.concurrency,
        endpoint.flashboot,
        endpoint.created_ms,
        endpoint.updated_ms,
    )


def _insert_revision(transaction: Transaction, revision: Revision) -> None:
    transaction.execute(
        "insert_revision",
        (
            revision.endpoint_id,
            revision.version,
            revision.model,
            _json(dict(revision.env)),
            revision.engine_url,
            revision.gpu_count,
            revision.memory_bytes,
            revision.created_ms,
        ),
    )


def _revision(row: tuple[Any, ...]) -> Revision:
    return Revision(
        endpoint_id=row[0],
        version=row[1],
        model=row[2],
        env=MappingProxyType(msgspec.json.decode(row[3], type=dict[str, str])),
        engine_url=row[4],
        gpu_count=row[5],
        memory_bytes=row[6],
        created_ms=row[7],
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
