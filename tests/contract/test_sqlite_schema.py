"""The schema equals the sum of its migrations, released migrations never change, queries are used."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pilotlight.stores import open_sqlite_store
from pilotlight.stores.sqlite import migrations
from pilotlight.stores.sqlite.migrations.script import scripts, upgrade
from pilotlight.stores.sqlite.sql import QUERIES, parse_queries, statements

PACKAGE = Path(str(importlib.resources.files("pilotlight.stores.sqlite")))
SNAPSHOT = Path(__file__).with_name("sqlite_schema.sql")

RELEASED = {
    "0001_initial.sql": "f17500eecc92027c61801257928f75d56fe02c165e5d71d6bd3a30bfe9d624c2",
    "versions/0001_initial.py": "e9030c217cf4989a7a8b8f24f98bd8dc1dbc1ff916db47ac27701f0775b1563d",
    "0002_queue.sql": "946ce4b607cd3ba5018a940978c1be3a03d8c554c1a6c47e514970e41437e480",
    "versions/0002_queue.py": "310db59a2069a016fab9b678ccf35a6546134e3a2f06d5bff1a1fd545278bbd0",
    "0003_order.sql": "f3bbaaeae5e9b23a1040798f079eecd90279aebad56326d1b00f959b4a47a789",
    "versions/0003_order.py": "559cd31fa4b4e06e9c806f4250a4d1e6b070715140a3ac1fc0d5283be1ce8772",
    "0004_containers.sql": "b2ddbc199a3dc0b98f8589151f4547a95ec088a72e51b86ddea6f0504c3492b0",
    "versions/0004_containers.py": "bea34e768cb288bb078a2131dcbc98e4c782c60dee6675ff26c3d030c0457a27",
    "0005_starts.sql": "4d81518345afe5337b94e6e7142b3390ed9b75661e6443a54e77f332401a8d35",
    "versions/0005_starts.py": "96feede7c9f76e3a931462e2989f0328b65419113642a872320123f8ece3b357",
    "0006_key_limits.sql": "38a1f0e451d4f73a73cf68bfedf38debcae4fab3d7a0b577b772958a139699d7",
    "versions/0006_key_limits.py": "56de6d408dc4f1b8b02b0bcbf95cf51781d570026a80185cc1cd284b6f4a5445",
    "0007_routing.sql": "27337d6920ed75bfb784d6562f426975adc1a941281d7ce5451ce5ace4414550",
    "versions/0007_routing.py": "a98d2b2921fb45c48eddc658675bf4401e696099a00f24173fce426185728b46",
    "0008_request_segments.sql": "f8abed1c609e7ae87d48c5feaca5abfacf8687fe7f04d903de86ce885caa8aa9",
    "versions/0008_request_segments.py": "cd8a268423b4ed31d0000c6e0da89f40ccacb2329576854bc9c963c5a26f926d",
}
"""SHA-256 of every migration that users may have run. Add to it, never change it: a database that has
run a migration will not run it again."""


def schema(path: Path) -> str:
    """Everything a database defines, sorted, except what Alembic keeps for itself."""
    connection = sqlite3.connect(path)
    rows = connection.execute(
        "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name <> 'alembic_version' ORDER BY type, name"
    ).fetchall()
    connection.close()
    return "\n".join(f"{sql};\n" for (sql,) in rows)


def test_the_schema_equals_the_sum_of_migrations(tmp_path: Path) -> None:
    """A difference is wanted when a migration was added: then write the new text into the snapshot."""
    path = tmp_path / "new.db"
    upgrade(path)
    assert schema(path) == SNAPSHOT.read_text()


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


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    """1. A table of ours is in the way half-way through. 2. Nothing of the migration stays."""
    path = tmp_path / "taken.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE requests (id INTEGER)")
    connection.close()
    before = schema(path)
    with pytest.raises(Exception, match="table requests already exists"):
        upgrade(path)
    assert schema(path) == before
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("requests",)]
    connection.close()


def test_alembic_is_imported_only_when_there_is_something_to_do(tmp_path: Path) -> None:
    asyncio.run(_open_and_close(tmp_path))
    program = f"""
import asyncio, sys
from pathlib import Path
from pilotlight.stores import open_sqlite_store

async def main():
    await (await open_sqlite_store(Path({str(tmp_path)!r}))).close()

asyncio.run(main())
assert not {{"alembic", "sqlalchemy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


async def _open_and_close(folder: Path) -> None:
    await (await open_sqlite_store(folder)).close()


def test_every_query_is_used() -> None:
    source = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    assert [name for name in QUERIES if f'"{name}"' not in source] == []


class TestLoader:
    def test_queries_come_without_their_headings(self) -> None:
        text = "-- name: one\n-- Says one.\nSELECT 1;\n\n-- name: two\n-- Says\n-- two.\nSELECT\n 2;\n"
        assert parse_queries(text, source="x.sql") == {"one": "SELECT 1", "two": "SELECT\n 2"}

    @pytest.mark.parametrize(
        "text",
        [
            "SELECT 1;",
            "-- name: no_sentence\nSELECT 1;",
            "-- name: empty\n-- Says nothing.\n",
            "-- name: one\n-- Says one.\nSELECT 1;\n-- name: one\n-- Says one.\nSELECT 1;",
        ],
    )
    def test_bad_files_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"x\.sql"):
            parse_queries(text, source="x.sql")

    def test_scripts_are_cut_into_statements(self) -> None:
        text = "-- A comment; with a semicolon.\nCREATE TABLE a (\n    b -- c\n);\n\nCREATE TABLE d (e);\n"
        assert list(statements(text)) == ["CREATE TABLE a (\n    b -- c\n);", "CREATE TABLE d (e);"]
        with pytest.raises(ValueError, match="inside a statement"):
            list(statements("SELECT 1"))
