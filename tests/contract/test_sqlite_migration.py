"""A database of an earlier release, with work in it, is opened by this one: nothing of it is lost."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import PlatformInterrupted, ResultPosted
from pilotlight.domain.endpoint import EndpointKind, Routing
from pilotlight.domain.job import JobCounts, JobStatus, QueueDemand
from pilotlight.domain.key import Priority
from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.stores import SqliteStore, open_sqlite_store
from pilotlight.stores.folder import DATABASE_FILE
from pilotlight.stores.sqlite import migrations
from pilotlight.stores.sqlite.sql import statements

E1 = "endpoint1"

JOB = {
    "endpoint_id": E1,
    "key_id": "key",
    "status": "IN_QUEUE",
    "sync": 0,
    "low_priority": 0,
    "created_ms": 1_000,
    "queued_ms": 1_000,
    "expires_ms": 90_000_000,
    "execution_timeout_ms": 600_000,
    "retention_ms": 60_000,
    "attempt": 0,
    "retries": 0,
    "worker_id": None,
    "started_ms": None,
    "confirmed": 0,
    "chunk_read": 0,
    "finished_ms": None,
    "output": None,
    "error": None,
    "chunks": 0,
}
"""A row of the first schema."""


def insert(connection: sqlite3.Connection, table: str, **values: Any) -> int:
    names, places = ", ".join(values), ", ".join("?" * len(values))
    cursor = connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", list(values.values()))
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def insert_job(connection: sqlite3.Connection, id: str, **changes: Any) -> int:
    seq = insert(connection, "jobs", **{**JOB, "id": id, **changes})
    insert(connection, "job_inputs", job_seq=seq, body=f'{{"id": "{id}"}}'.encode())
    return seq


@pytest.fixture
def first_release(tmp_path: Path) -> Path:
    """A data folder as the first release left it: an endpoint, and a job of every kind."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    connection = sqlite3.connect(folder / DATABASE_FILE)
    script = importlib.resources.files(migrations) / "0001_initial.sql"
    for statement in statements(script.read_text()):
        connection.execute(statement)
    connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
    connection.execute("INSERT INTO alembic_version VALUES ('0001')")
    insert(
        connection, "endpoints", id=E1, name="one", version=1, workers_min=0, workers_max=3,
        idle_timeout_ms=1, scaler="QUEUE_DELAY", scaler_value=4.0, execution_timeout_ms=1, concurrency=2,
        flashboot=1, created_ms=1, updated_ms=1,
    )  # fmt: skip
    insert(
        connection, "revisions", endpoint_id=E1, version=1, model="m", env=json.dumps({"A": "b"}),
        gpu_count=0, memory_bytes=0, created_ms=1,
    )  # fmt: skip
    insert_job(connection, "waiting")
    insert_job(connection, "low", low_priority=1)
    running = {"status": "IN_PROGRESS", "attempt": 1, "worker_id": "w1", "started_ms": 2_000, "confirmed": 1}
    seq = insert_job(connection, "running", chunks=3, **running)
    for sequence in (1, 2):
        insert(connection, "job_chunks", job_seq=seq, sequence=sequence, body=b"chunk %d" % sequence)
    insert_job(connection, "done", **{**running, "status": "COMPLETED"}, finished_ms=3_000, output=b'"yes"')
    insert_job(connection, "retried", attempt=1, retries=1, queued_ms=5_000)
    insert(
        connection, "job_counters", endpoint_id=E1, queued=2, queued_low=1, in_progress=1, completed=1,
        failed=0, retried=1,
    )  # fmt: skip
    insert(
        connection, "workers", id="w0", endpoint_id=E1, version=1, state="failed", stage="failed",
        key_hash="", devices="[]", memory_bytes=0, created_ms=1, state_ms=9, ended_ms=9,
        failure=json.dumps({"kind": "disk_full", "cause": "no space"}),
    )  # fmt: skip
    for worker_id, outcome in (("w0", "failed"), ("gone", "failed"), ("w1", "ready")):
        insert(
            connection, "starts", worker_id=worker_id, endpoint_id=E1, version=1, rung="cold",
            stages=json.dumps([["decision", 5]]), outcome=outcome, decided_ms=5,
        )  # fmt: skip
    for number in range(1_200):
        insert(
            connection, "requests", id=f"r{number}", road="data", endpoint_id=E1 if number % 3 else "gone",
            key_id="k", worker_id="w1", route="/v1/chat/completions", status=200, outcome="ok",
            arrival_ms=number, wait_ms=1, first_token_ms=None, duration_ms=3, tokens_in=4, tokens_out=None,
            estimated=number % 2,
        )  # fmt: skip
    insert(connection, "api_keys", id="k", name="k", scope="admin", endpoint_ids="[]", hash="h", created_ms=1)
    connection.commit()
    connection.close()
    return folder


async def take(store: SqliteStore) -> list[str]:
    return [job.id for job in await store.take(E1, "w2", count=9, now_ms=6_000)]


async def test_everything_of_the_first_release_is_there(first_release: Path) -> None:
    store = await open_sqlite_store(first_release)
    jobs = {job.id: job for job in await store.jobs(E1)}
    assert set(jobs) == {"waiting", "low", "running", "done", "retried"}
    running = await store.job("running")
    assert (running.status, running.confirmed_ms, running.retries_max) == (JobStatus.IN_PROGRESS, 2_000, 1)
    assert (running.input_bytes, running.attempts, running.webhook) == (17, (), None)
    assert (await store.job("done")).output == b'"yes"'
    assert await store.counts(E1) == JobCounts(queued=3, in_progress=1, completed=1, retried=1)
    demand = await store.demand(E1, overdue_before_ms=2_000)
    assert demand == QueueDemand(
        queued=2, queued_low=1, queued_bytes=47, oldest_ms=1_000, overdue=1, in_progress=1
    )
    [endpoint] = await store.endpoints()
    assert (endpoint.kind, endpoint.revision.command) == (EndpointKind.VLLM, ())
    assert endpoint.routing is Routing.AUTO
    ready, gone, failed = await store.starts()
    assert (ready.worker_id, ready.rung, ready.stages) == ("w1", "plain", (("decision", 5),))
    assert [start.failure for start in (ready, gone)] == [None, None]
    assert failed.failure is not None
    assert failed.failure.kind == "disk_full"
    [key] = await store.keys()
    assert (key.heartbeat_s, key.priority, key.limited) == (None, Priority.NORMAL, False)
    await store.close()


async def test_the_queue_goes_on_where_it_was(first_release: Path) -> None:
    store = await open_sqlite_store(first_release)
    assert [chunk.sequence for chunk in (await store.drain_chunks("running", limit_bytes=99))[1]] == [1, 2]
    assert not await store.has_chunks("running")
    await store.append_chunk("running", "w1", b"x", attempt=1, now_ms=5_500, limit_bytes=9)
    assert [chunk.sequence for chunk in (await store.drain_chunks("running", limit_bytes=99))[1]] == [3]
    assert await take(store) == ["retried", "waiting", "low"]
    assert (await store.apply("running", ResultPosted(worker_id="w1", now_ms=6_000, output=b"1"))).finished
    assert (await store.apply("low", PlatformInterrupted(now_ms=6_100))).requeued
    assert await store.purge(E1, now_ms=7_000) == 1
    assert await store.delete_purged(now_ms=7_000) == 1
    assert await store.prune_jobs(now_ms=10_000_000) == 2
    assert {job.id for job in await store.jobs(E1)} == {"retried", "waiting"}
    check = await store._writer.call(lambda t: t._connection.execute("PRAGMA foreign_key_check").fetchall())
    assert check == []
    await store.close()


async def test_the_request_log_is_there_in_segments_and_as_a_view(first_release: Path) -> None:
    store = await open_sqlite_store(first_release)
    newest = await store.requests(limit=2_000)
    assert [record.id for record in newest] == [f"r{number}" for number in reversed(range(1_200))]
    assert newest[0] == RequestRecord(
        id="r1199", road=Road.DATA, endpoint_id=E1, key_id="k", worker_id="w1", route="/v1/chat/completions",
        status=200, outcome=Outcome.OK, arrival_ms=1_199, wait_ms=1, duration_ms=3, tokens_in=4,
        estimated=True,
    )  # fmt: skip
    assert len(await store.requests(endpoint_id="gone", limit=2_000)) == 400
    await store.add_requests([replace(newest[0], id="new", arrival_ms=5_000, tokens_out=7)])
    with contextlib.closing(sqlite3.connect(first_release / DATABASE_FILE)) as connection:
        view = "SELECT id, endpoint_id, status, tokens_in, tokens_out, estimated FROM requests"
        assert connection.execute(f"{view} WHERE arrival_ms > 1198 ORDER BY arrival_ms").fetchall() == [
            ("r1199", E1, 200, 4, None, 1),
            ("new", E1, 200, 4, 7, 1),
        ]
        segments = connection.execute("SELECT count(*), max(records) FROM request_segments").fetchone()
        assert segments == (4, 500)
    await store.close()
