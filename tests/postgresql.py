"""A PostgreSQL server of the tests' own: real, durable, on a free port, gone with the session.

`tests/conftest.py` makes one per session (that is, one per xdist worker) and offers `postgresql_url`, a fresh
database per test, copied from one that has been migrated once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

START_TIMEOUT_S = 60
"""Crash recovery on a busy two-core machine; the tests wait for the start and not for this."""

PASSWORD = "open-sesame"
"""Goes into every url; the server trusts whoever comes over loopback, the tests look for it in messages."""

_TEMPLATE = "pilotlight_template"


def find_program(name: str) -> str | None:
    """A program of PostgreSQL; Debian keeps them outside everybody's path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    for folder in reversed(folders):
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name)


def run_apart(work: Callable[[], Awaitable[Any]]) -> Any:
    """The result of a coroutine, run on an event loop of its own in a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(work())))
    thread.start()
    thread.join()
    assert results, "it failed, see the thread's traceback"
    return results[0]


class PostgresqlServer:
    """One server with its data in a temporary folder. It refuses to run as root, so root steps down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._names = 0
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next((name for name in ("postgres", "nobody") if self._known(name)), None)
            assert user is not None, "PostgreSQL does not run as root, and there is no other user"
            account = pwd.getpwnam(user)
            os.chown(folder, account.pw_uid, account.pw_gid)
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._run(
            "initdb", "-D", str(self.data), "-U", "pilotlight", "-A", "trust", "-E", "UTF8", "--locale=C"
        )

    @staticmethod
    def _known(name: str) -> bool:
        with contextlib.suppress(KeyError):
            return bool(pwd.getpwnam(name))
        return False

    def _run(self, name: str, *arguments: str) -> None:
        program = find_program(name)
        assert program is not None, f"{name} not found"
        done = subprocess.run(
            [program, *arguments], cwd=self.folder, capture_output=True, check=False, **self._as
        )
        assert done.returncode == 0, done.stderr.decode()

    def url(self, database: str = "postgres") -> str:
        """Where a database of this server is reached."""
        return f"postgresql://pilotlight:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start, with crash recovery where that is needed, and return when connections are accepted."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if not self.port:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    self.port = probe.getsockname()[1]
            self._spawn()
            if self._accepts(deadline):
                return
            # Its port was taken meanwhile, or the last of an earlier life still holds its memory.
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _spawn(self) -> None:
        program = find_program("postgres")
        assert program is not None
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    program, "-D", str(self.data), "-h", "127.0.0.1", "-p", str(self.port),
                    "-k", str(self.folder), "-c", "max_connections=200", "-c", "fsync=on",
                    "-c", "shared_buffers=64MB",
                ],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._as,
            )  # fmt: skip

    def _accepts(self, deadline: float) -> bool:
        async def connect() -> bool:
            try:
                connection = await asyncpg.connect(self.url(), timeout=5)
            except (OSError, asyncpg.PostgresError, TimeoutError):
                return False
            await connection.close()
            return True

        assert self.process is not None
        while self.process.poll() is None and time.monotonic() < deadline:
            if run_apart(connect):
                return True
            time.sleep(0.05)
        return False

    def kill(self) -> None:
        """End the server and every process of it with SIGKILL, as a power failure would."""
        assert self.process is not None
        main = psutil.Process(self.process.pid)
        main.suspend()
        everyone = [main, *main.children(recursive=True)]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(everyone[1:], timeout=10)

    def stop(self) -> None:
        """End the server, telling it to let go of its clients."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.kill()

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        """Run a statement."""

        async def run() -> bool:
            connection = await asyncpg.connect(self.url(database))
            try:
                await connection.execute(statement)
            finally:
                await connection.close()
            return True

        run_apart(run)

    def new_database(self, *, migrated: bool = True) -> str:
        """The url of a fresh database."""
        self._names += 1
        name = f"test_{self._names}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE if migrated else 'template0'}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Delete a database with everything that still speaks to it."""
        self.execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def empty_database(self, url: str) -> None:
        """Delete every row of a migrated database, which is a hundred times faster than making a fresh one."""

        async def delete() -> bool:
            connection = await asyncpg.connect(url)
            try:
                tables = await connection.fetch(
                    "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
                )
                deletions = "".join(f"DELETE FROM {table['tablename']};" for table in tables)
                # Without this the order would have to be that of the references between tables.
                await connection.execute(f"SET session_replication_role = replica; {deletions}")
            finally:
                await connection.close()
            return True

        run_apart(delete)

    def make_template(self) -> None:
        """Migrate the database that fresh ones are copied from."""
        from pilotlight.stores.postgresql import open_postgresql_store

        self.execute(f"CREATE DATABASE {_TEMPLATE}")

        async def migrate() -> bool:
            await (await open_postgresql_store(self.url(_TEMPLATE))).close()
            return True

        run_apart(migrate)


@contextlib.contextmanager
def postgresql_server() -> Iterator[PostgresqlServer]:
    """A server, ended with the block. Skips where PostgreSQL is not installed, but fails in CI."""
    if find_program("initdb") is None or find_program("postgres") is None:
        message = "PostgreSQL is not installed (Debian package postgresql)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with tempfile.TemporaryDirectory(prefix="pl-pg-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        server = PostgresqlServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()
