"""Random lives of random jobs, on every store, against the model in `conftest.py`.

After every step: no job is lost, none has ended twice without a retry by the client, none was handed out after its
cancellation, no chunk that came too late is visible, there is one webhook for each end, and the counters of
`/health` and of the batches are the truth. Restarts close and reopen the store, or kill it: SQLite goes on with a
copy of its files as they were while it was open, PostgreSQL loses its connections. Afterwards running jobs are
interrupted by the platform, as a gateway does when it starts.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from pilotlight.ports.store import Store
from pilotlight.stores import MemoryStore, open_postgresql_store, open_sqlite_store
from pilotlight.stores.sqlite import jobs

# On a developer's machine every run tries something new; in CI a run is repeatable.
PROFILE = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_memory(store_machine) -> None:
    class Machine(store_machine):
        """The in-memory twin; a restart keeps it, for it has nothing to come back from."""

        async def open(self) -> Store:
            return MemoryStore()

        async def reopen(self) -> Store:
            return self.store

    run_state_machine_as_test(Machine, settings=PROFILE)


def test_sqlite(store_machine, tmp_path: Path) -> None:
    class Machine(store_machine):
        """Closed and opened again by a restart, continued from a copy of its files by a kill."""

        lives = 0

        async def open(self) -> Store:
            Machine.lives += 1
            self.home = tmp_path / str(Machine.lives)
            return await open_sqlite_store(self.home)

        @invariant()
        def what_the_writer_knows_is_true(self) -> None:
            if not hasattr(self, "store"):
                return
            for job_id, (known, _) in self.store._known._jobs.items():
                read = self.store._reader.call(
                    lambda transaction, job_id=job_id: jobs.job(transaction, job_id)
                )
                assert known == self.run(read)

        async def reopen(self) -> Store:
            await self.store.close()
            return await open_sqlite_store(self.home)

        async def kill(self) -> Store:
            Machine.lives += 1
            before, self.home = self.home, tmp_path / str(Machine.lives)
            # The shared-memory file is left behind: after a crash it means nothing, and is made anew.
            shutil.copytree(before, self.home, ignore=shutil.ignore_patterns("*-shm"))
            await self.store.close()
            shutil.rmtree(before)
            return await open_sqlite_store(self.home)

        def teardown(self) -> None:
            super().teardown()
            if hasattr(self, "home"):
                shutil.rmtree(self.home)

    run_state_machine_as_test(Machine, settings=settings(PROFILE, max_examples=20))


def test_postgresql(store_machine, postgresql, postgresql_url: str) -> None:
    class Machine(store_machine):
        """Closed and opened again by a restart; a kill breaks its connections under its feet first."""

        async def open(self) -> Store:
            postgresql.empty_database(postgresql_url)
            return await open_postgresql_store(postgresql_url)

        async def reopen(self) -> Store:
            await self.store.close()
            return await open_postgresql_store(postgresql_url)

        async def kill(self) -> Store:
            postgresql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                f" WHERE datname = '{postgresql_url.rpartition('/')[2]}'"
            )
            return await self.reopen()

    run_state_machine_as_test(Machine, settings=settings(PROFILE, max_examples=8))
