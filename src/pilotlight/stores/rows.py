"""How the SQL stores turn endpoints, keys, workers, jobs, usage, requests and starts into rows, and back.

The order of the values is that of the columns in the stores' queries of the same things.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from pilotlight.domain.endpoint import Container, Endpoint, EndpointKind, Revision, Routing, ScalerType
from pilotlight.domain.job import Attempt, Job, JobStatus
from pilotlight.domain.key import ApiKey, Priority, Scope
from pilotlight.domain.usage import Outcome, RequestRecord, Road, StartRecord, UsageInterval
from pilotlight.domain.worker import Failure, ProcessIdentity, Stage, Worker, WorkerState

Row = Sequence[Any]

_attempts = msgspec.json.Decoder(tuple[Attempt, ...])
_STATUS = {status.value: status for status in JobStatus}


def settings_row(endpoint: Endpoint) -> tuple[Any, ...]:
    """What of an endpoint changes in place."""
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
        endpoint.kind.value,
        endpoint.routing.value,
    )


def endpoint_of(row: Row) -> Endpoint:
    """An endpoint, from a row that ends with its revision."""
    return Endpoint(
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
        kind=EndpointKind(row[12]),
        routing=Routing(row[13]),
        revision=revision_of(row[14:]),
    )


def revision_row(revision: Revision) -> tuple[Any, ...]:
    """All of a revision."""
    return (
        revision.endpoint_id,
        revision.version,
        revision.model,
        _json(dict(revision.env)),
        revision.engine_url,
        revision.gpu_count,
        revision.memory_bytes,
        revision.created_ms,
        _json(revision.command),
        None if revision.container is None else _json(revision.container),
    )


def revision_of(row: Row) -> Revision:
    """A revision."""
    return Revision(
        endpoint_id=row[0],
        version=row[1],
        model=row[2],
        env=MappingProxyType(msgspec.json.decode(row[3], type=dict[str, str])),
        engine_url=row[4],
        gpu_count=row[5],
        memory_bytes=row[6],
        created_ms=row[7],
        command=msgspec.json.decode(row[8], type=tuple[str, ...]),
        container=None if row[9] is None else msgspec.json.decode(row[9], type=Container),
    )


def key_row(key: ApiKey) -> tuple[Any, ...]:
    """All of a key."""
    return (
        key.id,
        key.name,
        key.scope.value,
        _json(sorted(key.endpoint_ids)),
        key.hash,
        key.created_ms,
        *key_terms(key),
    )


def key_terms(key: ApiKey) -> tuple[Any, ...]:
    """What may change of a key, after its name."""
    return (
        key.heartbeat_s,
        key.priority.value,
        key.requests_per_minute,
        key.tokens_per_minute,
        key.concurrent_max,
    )


def key_of(row: Row) -> ApiKey:
    """A key."""
    return ApiKey(
        id=row[0],
        name=row[1],
        scope=Scope(row[2]),
        endpoint_ids=msgspec.json.decode(row[3], type=frozenset[str]),
        hash=row[4],
        created_ms=row[5],
        heartbeat_s=row[6],
        priority=Priority(row[7]),
        requests_per_minute=row[8],
        tokens_per_minute=row[9],
        concurrent_max=row[10],
    )


def worker_row(worker: Worker) -> tuple[Any, ...]:
    """All of a worker."""
    return (
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
    )


def worker_of(row: Row) -> Worker:
    """A worker."""
    return Worker(
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


def usage_row(interval: UsageInterval) -> tuple[Any, ...]:
    """All of a usage interval."""
    return (
        interval.worker_id,
        interval.sequence,
        interval.endpoint_id,
        interval.version,
        interval.state.value,
        interval.devices,
        interval.start_ms,
        interval.end_ms,
    )


def usage_of(row: Row) -> UsageInterval:
    """A usage interval."""
    return UsageInterval(
        worker_id=row[0],
        sequence=row[1],
        endpoint_id=row[2],
        version=row[3],
        state=WorkerState(row[4]),
        devices=row[5],
        start_ms=row[6],
        end_ms=row[7],
    )


def request_row(record: RequestRecord) -> tuple[Any, ...]:
    """All of a row of the request log."""
    return (
        record.id,
        record.road.value,
        record.endpoint_id,
        record.key_id,
        record.worker_id,
        record.route,
        record.status,
        record.outcome.value,
        record.arrival_ms,
        record.wait_ms,
        record.first_token_ms,
        record.duration_ms,
        record.tokens_in,
        record.tokens_out,
        record.estimated,
    )


def request_of(row: Row) -> RequestRecord:
    """A row of the request log."""
    return RequestRecord(
        id=row[0],
        road=Road(row[1]),
        endpoint_id=row[2],
        key_id=row[3],
        worker_id=row[4],
        route=row[5],
        status=row[6],
        outcome=Outcome(row[7]),
        arrival_ms=row[8],
        wait_ms=row[9],
        first_token_ms=row[10],
        duration_ms=row[11],
        tokens_in=row[12],
        tokens_out=row[13],
        estimated=bool(row[14]),
    )


def start_row(record: StartRecord) -> tuple[Any, ...]:
    """All of a start, and the moment it is sorted by."""
    return (
        record.worker_id,
        record.endpoint_id,
        record.version,
        record.rung,
        _json(record.stages),
        record.outcome,
        record.memory_bytes,
        record.note,
        None if record.failure is None else _json(record.failure),
        record.decided_ms,
    )


def start_of(row: Row) -> StartRecord:
    """A start."""
    return StartRecord(
        worker_id=row[0],
        endpoint_id=row[1],
        version=row[2],
        rung=row[3],
        stages=msgspec.json.decode(row[4], type=tuple[tuple[str, int], ...]),
        outcome=row[5],
        memory_bytes=row[6],
        note=row[7],
        failure=None if row[8] is None else msgspec.json.decode(row[8], type=Failure),
    )


def job_of(row: Row, job_input: bytes = b"") -> Job:
    """A job, from a row that begins like the view `job_records`; with the input where that was read, too."""
    return Job(
        id=row[0],
        endpoint_id=row[1],
        key_id=row[2],
        input=job_input,
        input_bytes=row[3],
        status=_STATUS[row[4]],
        sync=row[5] != 0,
        low_priority=row[6] != 0,
        created_ms=row[7],
        queued_ms=row[8],
        expires_ms=row[9],
        execution_timeout_ms=row[10],
        retention_ms=row[11],
        attempt=row[12],
        retries=row[13],
        retries_max=row[14],
        worker_id=row[15],
        started_ms=row[16],
        confirmed_ms=row[17],
        first_output_ms=row[18],
        chunk_read=row[19] != 0,
        finished_ms=row[20],
        output=row[21],
        error=row[22],
        webhook=row[23],
        s3_config=row[24],
        batch_id=row[25],
        attempts=_attempts.decode(row[26]) if row[26] else (),
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
