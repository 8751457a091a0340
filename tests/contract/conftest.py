"""The stores under test, one fixture for all implementations, and builders of what goes into them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.job import Job
from pilotlight.ports.store import Store
from pilotlight.stores import MemoryStore, SqliteStore, open_sqlite_store


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    opened: Store = MemoryStore() if request.param == "memory" else await open_sqlite_store(tmp_path / "home")
    yield opened
    await opened.close()


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await open_sqlite_store(tmp_path / "home")
    yield opened
    await opened.close()


@pytest.fixture
def new_job() -> Callable[..., Job]:
    """A job submitted at moment `at`, with distant deadlines unless told otherwise."""

    def build(id: str = "job", at: int = 1_000, **changes: Any) -> Job:
        values: dict[str, Any] = {
            "id": id,
            "endpoint_id": "endpoint1",
            "input": b'{"prompt": "hi"}',
            "created_ms": at,
            "queued_ms": at,
            "expires_ms": at + 86_400_000,
            "execution_timeout_ms": 600_000,
            "retention_ms": 1_800_000,
        }
        return Job(**{**values, **changes})

    return build


@pytest.fixture
def new_endpoint() -> Callable[..., Endpoint]:
    """An endpoint with its first revision, unless told otherwise."""

    def build(id: str = "endpoint1", **changes: Any) -> Endpoint:
        revision = Revision(
            endpoint_id=id,
            version=1,
            model="pilotlight/ember",
            env={"MODEL_NAME": "pilotlight/ember", "ENFORCE_EAGER": "true"},
            gpu_count=2,
            memory_bytes=3 * 2**30,
            created_ms=10,
        )
        values: dict[str, Any] = {"id": id, "name": f"name of {id}", "revision": revision}
        return Endpoint(**{**values, **changes})

    return build
