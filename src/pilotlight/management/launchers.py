"""The route below `/pilotlight/v1` that shows launchers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from pilotlight.clusters.launchers import LauncherInfo
from pilotlight.management.routes import BEARER, PREFIX, PROBLEMS

ReadLaunchers = Callable[[], Awaitable[Sequence[LauncherInfo]]]
"""Gives all launchers of this gateway."""


class LauncherView(BaseModel):
    """A process that has imported the engine, of which engines are forked."""

    fingerprint: str
    engine_version: str
    state: str
    """`importing`, `ready`, or `failed`; then `problem` says why."""
    problem: str
    pid: int | None
    memory_bytes: int | None
    """What it holds now; pages that its engines share with it count in equal parts (PSS)."""
    ready_s: float | None
    launches: int
    engines: int
    """Of the engines forked from it, those that live."""
    endpoints: list[str]
    log: str


class LauncherList(BaseModel):
    """Launchers, those wanted most recently first."""

    launchers: list[LauncherView]


def launcher_routes(read: ReadLaunchers) -> APIRouter:
    """The route that lists launchers."""
    router = APIRouter(prefix=PREFIX, tags=["records"], dependencies=[Depends(BEARER)], responses=PROBLEMS)

    @router.get("/launchers")
    async def list_launchers() -> LauncherList:
        """The launchers of this gateway; one that follows another gateway has none."""
        return LauncherList(launchers=[_view(info) for info in await read()])

    return router


def _view(info: LauncherInfo) -> LauncherView:
    facts = asdict(info)
    return LauncherView(**facts | {"engine_version": facts.pop("version"), "state": info.state.value})
