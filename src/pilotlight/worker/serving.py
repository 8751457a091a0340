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
from typing import Any, Final

from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.direct import DirectServer
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError
from pilotlight.worker.freezing import Freezer
from pilotlight.worker.inputs import is_anthropic
from pilotlight.worker.jobs import EndReason, JobLoop, Runner
from pilotlight.worker.listener import Listener
from pilotlight.worker.log import LogSink
from pilotlight.worker.notices import Notices
from pilotlight.worker.outputs import Item, gone_text
from pilotlight.worker.platform import Platform, TakenJob
from pilotlight.worker.runner import JobFailedError, JobRunner, PostChunk

_SLEEP_OPTION: Final = "--enable-sleep-mode"


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
        on_thaw_failed: Called with the reason when the engine does not work any more after it was frozen.
        on_woken: Called when work that nobody had announced thawed the engine, with what it was.

    Attributes:
        freezer: Stops the engine in place and lets it go on.
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
        on_thaw_failed: Callable[[str], None],
        on_woken: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._direct = direct
        self._key = secrets.token_urlsafe(32)
        self._path = folder / "worker.sock"
        notices = Notices(log)
        sleeps = config.flashboot and _SLEEP_OPTION in engine.command
        self.freezer = Freezer(
            engine,
            log,
            sleep_level=config.sleep_level if sleeps else None,
            in_hand=self._in_hand,
            on_failed=on_thaw_failed,
            on_woken=on_woken,
        )
        self._listener = Listener(
            engine=engine,
            freezer=self.freezer,
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
            runner = _ThawingRunner(JobRunner(config, engine, notices, on_fatal), self.freezer)
            self._jobs = JobLoop(config, platform, runner, log, on_defect)

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
        self.freezer.open()

    async def finish(self) -> None:
        """Takes nothing new; returns when nothing is in hand any more. Safe to cancel."""
        self.freezer.close()
        if self._jobs is not None:
            await self._jobs.drain()
        await self._listener.wait_idle()

    async def end_jobs(self, *, engine_gone: bool, seconds: float) -> None:
        """Ends the jobs in hand with an error that asks for another worker.

        Args:
            engine_gone: Whether that is the reason, and not that the worker was told to end.
            seconds: How long the platform may take to receive it.
        """
        self.freezer.close()
        if self._jobs is not None:
            self._jobs.end_all(EndReason.ENGINE_GONE if engine_gone else EndReason.SHUTDOWN)
            with contextlib.suppress(TimeoutError):
                await wait_for(self._jobs.drain(), seconds)

    async def close(self) -> None:
        """Ends everything."""
        if self._jobs is not None:
            await self._jobs.close()
        await self._listener.stop()

    def _in_hand(self) -> str:
        counts = {"job": self.jobs, "request": self.requests}
        return " and ".join(
            f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items() if count
        )


class _ThawingRunner:
    """Answers jobs; one that is handed out to a frozen worker all the same thaws it."""

    def __init__(self, runner: Runner, freezer: Freezer) -> None:
        self._runner = runner
        self._freezer = freezer

    async def run(self, job: TakenJob, post_chunk: PostChunk) -> list[Item]:
        """As `Runner`."""
        try:
            await self._freezer.awake("job")
        except EngineGoneError as error:
            anthropic = is_anthropic(job.payload.get("input"))
            raise JobFailedError(gone_text(anthropic=anthropic)) from error
        return await self._runner.run(job, post_chunk)
