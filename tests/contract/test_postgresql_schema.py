"""PostgreSQL's schema comes from its migrations, whoever opens first; queries are used and served by indices."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pilotlight.errors import DataFolderError, SettingsError, StoreError
from pilotlight.stores import open_postgresql_store
from pilotlight.stores.postgresql import migrations
from pilotlight.stores.postgresql.connections import decode_text, encode_text, public_url
from pilotlight.stores.postgresql.migrations.script import scripts
from pilotlight.stores.postgresql.sql import QUERIES

from ..postgresql import PASSWORD, PostgresqlServer  # noqa: TID252

PACKAGE = Path(str(importlib.resources.files("pilotlight.stores.postgresql")))

RELEASED = {
    "0001_initial.sql": "e1d119f2b45253474122afbec1a9bc7c95e84de80a5391c56e3a622067762974",
    "versions/0001_initial.py": "2cd71fb4cd4430e080b570e11f1ea3c4ad37473fb92563c4b69c51e539443958",
    "0002_order.sql": "b1c2f99610516d2181ca468d093bfd6ac45991d4dfdefe559a414fd26cf1beb6",
    "versions/0002_order.py": "e27f11b4cae007f8bde974c9476f0f99b353041aab624d742e0afab67ce19517",
    "0003_containers.sql": "b2ddbc199a3dc0b98f8589151f4547a95ec088a72e51b86ddea6f0504c3492b0",
    "versions/0003_containers.py": "3ee52d465068d841c7cf0f42c04bf02d5fe2eaf8095e017251af47f78e9a9e04",
    "0004_starts.sql": "323462f503fabab4b53e16c9bcc59c764996afd7f1790d970cd1a16e339ca233",
    "versions/0004_starts.py": "bd6a050e10be8aeac898cb92bcc5a04a5036d6200776de6fe1a70960fdaf88cb",
    "0005_key_limits.sql": "1ec5fcdaffd93942a81a7058572de4c5d2755ea1fadd2c7aeae464d7e85f02a9",
    "versions/0005_key_limits.py": "20eb2d6e8a250ee49cef65dbf1d6f2c9d7337aa07f0f894b7f0aae4e57893a84",
    "0006_routing.sql": "27337d6920ed75bfb784d6562f426975adc1a941281d7ce5451ce5ace4414550",
    "versions/0006_routing.py": "24759b698b0e10c81eb7a724f199e9340a1cdee043aae2dc569cf0aace72ef0f",
}
"""SHA-256 of every migration that users may have run. Add to it, never change it: a database that has
run a migration will not run it again."""


async def fetch(url: str, query: str, *values: Any) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(query, *values)
    finally:
        await connection.close()


async def run_script(url: str, script: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(script)
    finally:
        await connection.close()


@pytest.fixture
def empty_url(postgresql: PostgresqlServer):
    url = postgresql.new_database(migrated=False)
    yield url
    postgresql.drop_database(url)


def test_released_migrations_do_not_change() -> None:
    folder = PACKAGE / "migrations"
    files = [*folder.glob("[0-9]*.sql"), *folder.glob("versions/[0-9]*.py")]
    assert {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    } == RELEASED


def test_the_known_revisions_are_the_scripts() -> None:
    directory = scripts()
    assert [script.revision for script in directory.walk_revisions()][::-1] == list(migrations.REVISIONS)
    assert directory.get_current_head() == migrations.REVISIONS[-1]


async def test_gateways_that_start_at_once_migrate_once(empty_url: str) -> None:
    opened = await asyncio.gather(*(open_postgresql_store(empty_url) for _ in range(4)))
    assert [await store.endpoints() for store in opened] == [[]] * 4
    for store in opened:
        await store.close()
    rows = await fetch(empty_url, "SELECT version_num FROM alembic_version")
    assert [row[0] for row in rows] == [migrations.REVISIONS[-1]]


async def test_a_migration_that_fails_changes_nothing(empty_url: str) -> None:
    """1. A table of somebody's is in the way half-way through. 2. Nothing of the migration stays."""
    await fetch(empty_url, "CREATE TABLE requests (id INTEGER)")
    with pytest.raises(StoreError, match='relation "requests" already exists'):
        await open_postgresql_store(empty_url)
    rows = await fetch(empty_url, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
    assert [row[0] for row in rows] == ["requests"]


async def test_starts_of_an_earlier_release_are_kept(empty_url: str) -> None:
    """They were plain starts by today's names, and why they failed was only told by the worker's record."""
    for file in sorted((PACKAGE / "migrations").glob("000[1-3]_*.sql")):
        await run_script(empty_url, file.read_text())
    await run_script(
        empty_url,
        """
        CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY);
        INSERT INTO alembic_version VALUES ('0003');
        INSERT INTO workers (id, endpoint_id, version, state, stage, key_hash, devices, memory_bytes, failure,
            created_ms, state_ms)
        VALUES ('w0', 'e', 1, 'failed', 'failed', '', '[]', 0, '{"kind": "disk_full", "cause": "no space"}', 1, 1);
        INSERT INTO starts (worker_id, endpoint_id, version, rung, stages, outcome, decided_ms)
        VALUES ('w0', 'e', 1, 'cold', '[["decision", 5]]', 'failed', 5), ('w1', 'e', 1, 'cold', '[]', 'ready', 0);
        """,
    )
    store = await open_postgresql_store(empty_url)
    failed, ready = await store.starts()
    await store.close()
    assert (failed.rung, ready.rung) == ("plain", "plain")
    assert failed.failure is not None
    assert (failed.failure.kind, ready.failure) == ("disk_full", None)


async def test_a_database_of_a_newer_version_is_refused(postgresql_url: str) -> None:
    await fetch(postgresql_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DataFolderError, match=r"newer version of pilotlight \(schema 9999") as caught:
        await open_postgresql_store(postgresql_url)
    assert PASSWORD not in str(caught.value)


async def test_a_database_with_another_encoding_is_refused(postgresql: PostgresqlServer) -> None:
    name = "latin"
    postgresql.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0")
    try:
        with pytest.raises(StoreError, match="encoding LATIN1"):
            await open_postgresql_store(postgresql.url(name))
    finally:
        postgresql.drop_database(postgresql.url(name))


async def test_alembic_is_imported_only_when_there_is_something_to_do(postgresql_url: str) -> None:
    program = f"""
import asyncio, sys
from pilotlight.stores import open_postgresql_store

async def main():
    await (await open_postgresql_store({postgresql_url!r})).close()

asyncio.run(main())
assert not {{"alembic", "sqlalchemy"}} & set(sys.modules)
"""
    await asyncio.to_thread(subprocess.run, [sys.executable, "-W", "error", "-c", program], check=True)


def test_the_driver_is_imported_only_when_it_is_needed() -> None:
    program = "import sys, pilotlight.stores; assert 'asyncpg' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://user:open-sesame@host/db", "begins with mysql://"),
        ("host/db", "begins with no scheme"),
        ("postgresql://user:open-sesame@host:port/db", "is not a URL"),
        ("postgresql://user:open-sesame@127.0.0.1:1/db?nonsense[]=1", "cannot be opened"),
    ],
)
async def test_a_bad_url_is_refused_without_repeating_its_password(url: str, message: str) -> None:
    with pytest.raises((SettingsError, StoreError), match=message) as caught:
        await open_postgresql_store(url)
    assert PASSWORD not in str(caught.value)


def test_only_host_and_database_of_a_url_are_shown() -> None:
    assert (
        public_url("postgresql://me:open-sesame@host:5432/db?sslmode=require") == "postgresql://host:5432/db"
    )


@pytest.mark.parametrize("password", ["open/sesame", "op?en@sesame", "open#sesame", "op@en/sesame"])
def test_nothing_of_a_url_is_shown_whose_password_ends_early(password: str) -> None:
    assert "sesame" not in public_url(f"postgresql://me:{password}@host:5432/db")


@pytest.mark.parametrize("text", ["", "plain", "\x00", "a\x00b\ud800", "\ufdd0", "\ufdd00000", "ü€😀"])
def test_every_text_survives(text: str) -> None:
    """PostgreSQL keeps neither NUL nor lone surrogates."""
    stored = encode_text(text)
    assert "\x00" not in stored
    stored.encode()
    assert decode_text(stored) == text


def test_every_query_is_used() -> None:
    source = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    assert [name for name in QUERIES if f'"{name}"' not in source] == []


@pytest.mark.parametrize(
    "query",
    [
        "next_jobs",
        "due_jobs",
        "prune_jobs",
        "count_ahead",
        "demand",
        "job",
        "jobs_newest",
        "living_jobs",
        "jobs_newest_by_status",
    ],
)
async def test_the_queue_is_served_by_its_indices(postgresql_url: str, query: str) -> None:
    """No scan of all jobs, however many there are."""
    connection = await asyncpg.connect(postgresql_url)
    try:
        await connection.execute("SET enable_seqscan = off")
        statement = await connection.prepare(QUERIES[query])
        examples = {"text": "x", "text[]": ["x"]}
        values = [examples.get(parameter.name, 1) for parameter in statement.get_parameters()]
        plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {QUERIES[query]}", *values))
    finally:
        await connection.close()
    assert "Seq Scan on jobs" not in plan
    assert "Index" in plan
