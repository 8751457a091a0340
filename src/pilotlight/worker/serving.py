"""What serves once there is an engine: the listener, and jobs or, in direct HTTP mode, requests on a port.

`program` loads this module, and with it the HTTP libraries, while the engine imports its own (`EngineStart`):
a start lasts as long as the engine's plus what happens before it is spawned.
"""

from __future__ import annotations

import contextlib
import secrets
from asyncio import wait_for
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.direct import DirectServer
from pilotlight.worker.engine import Engine
from pilotlight.worker.jobs import EndReason, JobLoop
from pilotlight.worker.listener import Listener
from pilotlight.worker.log import LogSink
from pilotlight.worker.notices import Notices
from pilotlight.worker.platform import Platform
from pilotlight.worker.runner import JobRunner


class Serving:
    """One engine's work; `open`, then `begin`, then one of the two ends, then `close`.

    Args:
        config: What the environment said, with the number of jobs that is meant now.
        log: Where everything is written.
        platform: Where jobs come from.
        engine: Healthy.
        folder: For the listener's socket.
        direct: The server of direct HTTP mode; None = jobs are taken.
        info: What `GET /worker/info` tells.
        on_fatal: Called when an answer shows that the engine will not recover.
        on_defect: Called when the job loop broke for a reason nobody foresaw.
    """

    def __init__(
        self,
        config: WorkerConfig,
        log: LogSink,
        *,
        platform: Platform,
        engine: Engine,
        folder: Path,
        direct: DirectServer | None,
        info: Callable[[], dict[str, Any]],
        on_fatal: Callable[[], None],
        on_defect: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._direct = direct
        self._key = secrets.token_urlsafe(32)
        self._path = folder / "worker.sock"
        notices = Notices(log)
        self._listener = Listener(
            engine=engine,
            socket_path=self._path,
            key=self._key,
            settings=config.inputs,
            seconds=config.request_seconds,
            notices=notices,
            info=info,
            on_fatal=on_fatal,
        )
        self._jobs: JobLoop | None = None
        if direct is None:
            self._jobs = JobLoop(
                config, platform, JobRunner(config, engine, notices, on_fatal), log, on_defect
            )

    @property
    def jobs(self) -> int:
        """Jobs in hand."""
        return self._jobs.running if self._jobs is not None else 0

    @property
    def requests(self) -> int:
        """Requests being answered by the listener."""
        return self._listener.in_flight

    @property
    def doors(self) -> dict[str, dict[str, str]]:
        """Addresses and keys, as the platform is told them."""
        return {
            "engine": {"address": f"unix:{self._engine.socket_path}", "key": self._engine.key},
            "listener": {"address": f"unix:{self._path}", "key": self._key},
        }

    async def open(self) -> None:
        """Listens."""
        await self._listener.start()

    def begin(self) -> None:
        """Takes jobs, or lets requests in."""
        if self._direct is not None:
            self._direct.open(self._listener)
        if self._jobs is not None:
            self._jobs.start()

    async def finish(self) -> None:
        """Takes nothing new; returns when nothing is in hand any more. Safe to cancel."""
        if self._jobs is not None:
            await self._jobs.drain()
        await self._listener.wait_idle()

    async def end_jobs(self, *, engine_gone: bool, seconds: float) -> None:
        """Ends the jobs in hand with an error that asks for another worker.

        Args:
            engine_gone: Whether that is the reason, and not that the worker was told to end.
            seconds: How long the platform may take to receive it.
        """
        if self._jobs is not None:
            self._jobs.end_all(EndReason.ENGINE_GONE if engine_gone else EndReason.SHUTDOWN)
            with contextlib.suppress(TimeoutError):
                await wait_for(self._jobs.drain(), seconds)

    async def close(self) -> None:
        """Ends everything."""
        if self._jobs is not None:
            await self._jobs.close()
        await self._listener.stop()
