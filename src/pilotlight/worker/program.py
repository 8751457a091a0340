"""One life of a worker: resolve the model, start the engine, serve, drain, end everything.

`Program.run` is the whole story in order; each step is a method. What ends a life is decided once, by whoever
is first to call `_end_with`: a signal, a 410, the engine's death, or a platform that stays away.

1. `starting`: the model is found, variables become flags.
2. `importing`, `loading_weights`: the engine runs; its log tells how far it is.
3. `warming_up`: it is healthy; one request of one token pays for lazy initialisation.
4. `ready`: the listener is open, jobs are taken. Ready for jobs = first take; for the data path = the report.
5. `draining`: nothing new is taken, what runs may finish for `DRAIN_TIMEOUT`, then the engine is ended.
6. `failed`: the cause is reported, and the exit code is 1.
"""

from __future__ import annotations

import asyncio
import importlib
import shutil
import signal
import socket
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pilotlight.domain.worker import Failure, Stage
from pilotlight.engines.flags import clean_value, mask_secrets
from pilotlight.worker import timeline
from pilotlight.worker.config import SOCKET_PATH_BYTES_MAX, WorkerConfig
from pilotlight.worker.engine import Engine
from pilotlight.worker.log import LogSink
from pilotlight.worker.platform import Platform
from pilotlight.worker.ports import bind_ports
from pilotlight.worker.stages import STAGE_ORDER, classify_death
from pilotlight.worker.starting import EngineStart, StartFailedError
from pilotlight.worker.state import StateReporter

if TYPE_CHECKING:
    from pilotlight.worker.direct import DirectServer
    from pilotlight.worker.freezing import Freezer
    from pilotlight.worker.serving import Serving

HEALTH_WATCH_SECONDS: Final = 5.0
"""Pause between questions for health afterwards; three failures in a row count as death (§7)."""

ENGINE_GRACE_SECONDS: Final = 5.0
"""Beyond the drain time, for the engine to end its own processes before it is killed."""

REPORT_GRACE_SECONDS: Final = 3.0
"""How long the last state report may take at the end of a life."""

END_JOBS_SECONDS: Final = 2.0
"""How long the platform may take to receive that jobs in hand need another worker."""

HURRIED_END_JOBS_SECONDS: Final = 0.5
"""The same after a second signal."""

UNTOLD_END: Final = "the engine ended; its launcher, which alone learns how, had ended before"

THAW_ADVICE: Final = "A new worker starts with a new engine."

DEFECT_ADVICE: Final = "This is a defect of Pilotlight; its log says more. A new worker starts."


class Ending(StrEnum):
    """Why a life ends."""

    SIGNAL = "signal"
    UNWANTED = "unwanted"
    PLATFORM_LOST = "platform_lost"
    ENGINE_GONE = "engine_gone"
    DEFECT = "defect"


class Program:
    """One worker; `run` once.

    Args:
        config: What the environment said.
        log: Where everything is written.
    """

    def __init__(self, config: WorkerConfig, log: LogSink) -> None:
        self._config = config
        self._log = log
        self._clock = asyncio.get_running_loop().time
        self._born = self._clock()
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._hurry = asyncio.Event()
        self._stage = Stage.STARTING
        self._start: EngineStart | None = None
        self._platform = Platform(config, log, self._on_recovered)
        reporting = self._platform if config.state_url is not None else None
        self._reporter = StateReporter(reporting, log, lambda: self._end_with(Ending.UNWANTED))
        self._direct: DirectServer | None = None
        self._opening: asyncio.Task[DirectServer] | None = None
        self._serving: Serving | None = None
        self._folder: Path | None = None
        self._own_folder = False
        self._death = "the engine does not answer any more"
        self._defect = ""
        self._failure: Failure | None = None
        self._thaw_failure: Failure | None = None
        self._watchers: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """The exit code: 0 after a drain, 1 after a failure."""
        self._catch_signals()
        self._reporter.start()
        try:
            return await self._live()
        except StartFailedError as error:
            return await self._fail(error.failure, **(self._start.told() if self._start is not None else {}))
        except Exception as error:  # noqa: BLE001 - the border: the platform learns of it, the log has it whole
            self._log.event("worker.defect", error=repr(error), trace=traceback.format_exc())
            return await self._fail(Failure(kind="worker_defect", cause=repr(error), advice=DEFECT_ADVICE))
        finally:
            await self._close()

    async def _close(self) -> None:
        """Ends everything, the engine first; what goes wrong keeps nothing else from being ended."""
        steps: tuple[tuple[str, Callable[[], Awaitable[object]]], ...] = (
            ("engine", lambda: self._stop_engine(0.0)),
            ("watchers", self._end_watchers),
            ("serving", self._end_serving),
            ("reports", lambda: self._reporter.flush(REPORT_GRACE_SECONDS)),
            ("platform", self._platform.close),
        )
        for name, step in steps:
            try:
                await step()
            except Exception as error:  # noqa: BLE001 - the rest has to be ended as well
                self._log.event("worker.not_ended", part=name, error=repr(error))
        if self._failure is not None:
            # The last line, for platforms that show no more than that.
            self._log.line(f"worker failed: {self._failure.sentence}".encode())
        if self._own_folder and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _end_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    async def _end_serving(self) -> None:
        if self._opening is not None:
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._serving is not None:
            await self._serving.close()
        if self._direct is not None:
            await self._direct.stop()

    async def _live(self) -> int:
        self._folder, self._own_folder = _run_folder(self._config)
        if self._config.state_url is not None:
            self._watch(self._watch_platform())
        self._report(Stage.STARTING)
        start = self._start = EngineStart(
            self._config,
            self._log,
            self._folder,
            ending=self._ending,
            on_stage=self._on_start_stage,
            on_healthy=self._open_serving,
        )
        self._open_direct()
        engine = await start.run()
        if engine is None:
            # Told to go before it was ready: there is nothing to drain.
            self._report(Stage.DRAINING, reason=str(self._ending.result()))
            await self._stop_engine(0.0)
            return 0
        serving = self._serve(engine, start)
        ending = await self._ending
        self._log.event("worker.ending", reason=str(ending))
        if self._direct is not None:
            self._direct.leave()
        if ending in {Ending.ENGINE_GONE, Ending.DEFECT}:
            await serving.end_jobs(engine_gone=True, seconds=self._config.drain_seconds)
            return await self._fail(self._cause_of_death(start, engine, ending))
        await self._drain(serving, ending)
        return 1 if ending is Ending.PLATFORM_LOST else 0

    # Life

    def _open_direct(self) -> None:
        """Listens in direct HTTP mode, before anything else, so that health checks see the start (§7.1)."""
        settings = self._config.direct
        if settings is None:
            return
        try:
            sockets = bind_ports(settings)
        except OSError as error:
            cause = (
                f"cannot listen on {settings.host}, port {settings.port} or {settings.health_port}: {error}"
            )
            advice = "Choose free ports by PORT and PORT_HEALTH; those below 1024 may need privileges."
            failure = Failure(kind="address_in_use", cause=cause, advice=advice)
            raise StartFailedError(failure) from error
        if clean_value(self._config.environment.get("VLLM_API_KEY")) is not None:
            self._log.event("direct.note", note="VLLM_API_KEY is ignored: the platform lets callers in")
        if self._config.inputs.allow_admin_routes:
            note = "ALLOW_ADMIN_ROUTES is set: whoever reaches this port may change the engine's state"
            self._log.event("direct.note", note=note)
        self._opening = asyncio.create_task(self._start_direct(sockets))

    async def _start_direct(self, sockets: tuple[socket.socket, ...]) -> DirectServer:
        # What it imports takes longer than all else that happens before the engine is spawned.
        await asyncio.to_thread(importlib.import_module, "pilotlight.worker.direct")
        from pilotlight.worker.direct import DirectServer  # noqa: PLC0415

        assert self._config.direct is not None
        self._direct = DirectServer(self._config.direct, sockets, self._status)
        await self._direct.start()
        return self._direct

    async def _open_serving(self, engine: Engine) -> None:
        """Makes what serves an engine that is being warmed up; what served one that failed is closed."""
        from pilotlight.worker.serving import Serving  # noqa: PLC0415 - see there

        start, folder = self._start, self._folder
        assert start is not None
        assert folder is not None
        if self._serving is not None:
            await self._serving.close()
        serving = self._serving = Serving(
            # MAX_CONCURRENCY=auto, and the engine's command line, are known only now.
            replace(self._config, max_concurrency=start.registration["max_concurrency"], inputs=start.inputs),
            self._log,
            platform=self._platform,
            engine=engine,
            folder=folder,
            direct=await self._opening if self._opening is not None else None,
            info=self._info,
            on_fatal=lambda: self._die("the engine answered that it does not recover"),
            on_defect=self._on_defect,
            on_thaw_failed=self._on_thaw_failed,
            on_woken=self._on_woken,
        )
        await serving.open()

    def _serve(self, engine: Engine, start: EngineStart) -> Serving:
        """Tells the platform, and begins to work."""
        serving = self._serving
        assert serving is not None
        start.registration |= serving.doors
        self._watch(self._watch_exit(engine))
        self._watch(self._watch_health(engine, serving.freezer))
        start.note(timeline.READY)
        self._report(Stage.READY, **start.told())
        serving.begin()
        return serving

    async def _drain(self, serving: Serving, ending: Ending) -> None:
        """Lets running work finish, for at most the drain time; a second signal cuts it short."""
        self._report(Stage.DRAINING, reason=str(ending))
        deadline = self._clock() + self._config.drain_seconds
        if ending is not Ending.PLATFORM_LOST:
            await self._unless_hurried(serving.finish(), self._config.drain_seconds)
        # What is left asks for another worker, while there is still somebody to tell.
        seconds = HURRIED_END_JOBS_SECONDS if self._hurry.is_set() else END_JOBS_SECONDS
        await serving.end_jobs(engine_gone=False, seconds=seconds)
        # The engine's own direct requests get the rest of the time: it waits for them by --shutdown-timeout.
        rest = max(0.0, deadline - self._clock()) + ENGINE_GRACE_SECONDS
        await self._stop_engine(0.0 if self._hurry.is_set() else rest)

    def _cause_of_death(self, start: EngineStart, engine: Engine, ending: Ending) -> Failure:
        if ending is Ending.DEFECT:
            return Failure(kind="worker_defect", cause=self._defect, advice=DEFECT_ADVICE)
        if self._thaw_failure is not None and engine.alive:
            return self._thaw_failure
        return classify_death(start.tail.recent(self._clock()), engine.exit_code, silent=self._death)

    async def _fail(self, failure: Failure, **detail: Any) -> int:
        self._failure = failure
        told: dict[str, Any] = {"kind": failure.kind, "cause": failure.cause, "advice": failure.advice}
        self._report(Stage.FAILED, **told, **detail)
        await self._stop_engine(1.0)
        return 1

    async def _stop_engine(self, term_seconds: float) -> None:
        start = self._start
        if start is None or start.engine is None:
            return
        engine = start.engine
        if self._serving is not None and not await self._serving.freezer.leave():
            # A stopped engine cannot end by itself; to wake it up for that would help nobody.
            term_seconds = 0.0
        stopping = asyncio.create_task(engine.stop(term_seconds=term_seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            engine.kill()
        strays = await stopping
        if strays:
            self._log.event("engine.strays_killed", pids=list(strays))
        if start.engine is engine:
            start.engine = None
            self._log.event("engine.ended", exit_code=engine.exit_code)

    # What is watched

    async def _watch_exit(self, engine: Engine) -> None:
        code = await engine.wait()
        self._die(UNTOLD_END if code is None else self._death)

    async def _watch_health(self, engine: Engine, freezer: Freezer) -> None:
        """Asks for its health as long as it is hot; after a thaw the count begins anew."""
        failures, freezes = 0, 0
        while failures < 3:
            await asyncio.sleep(HEALTH_WATCH_SECONDS)
            await freezer.until_hot()
            healthy = await engine.healthy()
            # An engine that was stopped meanwhile could not answer.
            stopped, freezes = freezer.freezes != freezes, freezer.freezes
            failures = 0 if healthy or stopped else failures + 1
        self._log.event("engine.unhealthy")
        self._die("the engine did not answer three questions for its health in a row")

    async def _watch_platform(self) -> None:
        while self._platform.outage_seconds < self._config.platform_lost_seconds:  # noqa: ASYNC110 - no event
            await asyncio.sleep(1.0)
        self._end_with(Ending.PLATFORM_LOST)

    def _watch(self, watcher: Coroutine[Any, Any, None]) -> None:
        self._watchers.append(asyncio.create_task(watcher))

    def _on_start_stage(self, stage: Stage, **detail: Any) -> None:
        if self._stage in STAGE_ORDER:
            self._report(stage, **detail)

    def _report(self, stage: Stage, *, news: Mapping[str, Any] | None = None, **detail: Any) -> None:
        self._stage = stage
        elapsed_ms = round((self._clock() - self._born) * 1000)
        self._reporter.report(stage, {"elapsed_ms": elapsed_ms, **detail}, self._registration(), news=news)

    def _registration(self) -> dict[str, Any]:
        return dict(self._start.registration) if self._start is not None else {}

    def _on_recovered(self) -> None:
        # Also while frozen: whoever has forgotten this worker says that it is not wanted, and it ends. To
        # whoever made it frozen the repetition says nothing new (`_on_woken`).
        if self._stage in {Stage.READY, Stage.DRAINING}:
            self._reporter.repeat()

    @property
    def _frozen(self) -> bool:
        return self._serving is not None and self._serving.freezer.frozen

    def _on_woken(self, work: str) -> None:
        """Work came to a frozen worker; the platform, which sent it, shall know that the worker is hot."""
        if self._stage is Stage.READY:
            self._report(Stage.READY, news={"thawed_by": work})

    def _on_thaw_failed(self, cause: str) -> None:
        if not self._ending.done():
            self._thaw_failure = Failure(kind="thaw_failed", cause=cause, advice=THAW_ADVICE)
        self._end_with(Ending.ENGINE_GONE)

    def _on_defect(self, error: BaseException) -> None:
        self._defect = repr(error)
        self._end_with(Ending.DEFECT)

    def _die(self, cause: str) -> None:
        if not self._ending.done():
            self._death = cause
        self._end_with(Ending.ENGINE_GONE)

    def _end_with(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._ending.done():
            self._hurry.set()
        self._end_with(Ending.SIGNAL)

    async def _unless_hurried(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        working = asyncio.create_task(work)
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({working, hurry}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, hurry):
            task.cancel()
        await asyncio.gather(working, hurry, return_exceptions=True)

    def _status(self) -> dict[str, Any]:
        """What `GET /` tells in direct HTTP mode, to anybody who is let in."""
        registration = self._registration()
        return {
            "status": str(self._stage),
            "worker_id": self._config.worker_id,
            "models": registration.get("models", []),
            "versions": registration.get("versions", {}),
        }

    def _info(self) -> dict[str, Any]:
        """What `GET /worker/info` tells: no keys, no secrets."""
        engine = self._start.engine if self._start is not None else None
        registration = self._registration()
        return {
            "worker_id": self._config.worker_id,
            "stage": str(self._stage),
            "frozen": self._frozen,
            "argv": mask_secrets(engine.command) if engine is not None else [],
            "models": registration.get("models", []),
            "versions": registration.get("versions", {}),
            "max_concurrency": registration.get("max_concurrency"),
            "jobs": self._serving.jobs if self._serving is not None else 0,
            "requests": self._serving.requests if self._serving is not None else 0,
        }


def _run_folder(config: WorkerConfig) -> tuple[Path, bool]:
    """The folder for sockets and small files, 0700, and whether it is ours to remove: we made it."""
    try:
        if config.run_folder is None:
            folder = Path(tempfile.mkdtemp(prefix="pilotlight-worker-"))
            if len(str(folder / "engine.sock").encode()) > SOCKET_PATH_BYTES_MAX:
                folder.rmdir()
                folder = Path(tempfile.mkdtemp(prefix="pilotlight-worker-", dir="/tmp"))
            return folder, True
        folder = config.run_folder
        found = folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        cause = f"there is no folder for the worker's sockets: {error}"
        advice = "Set PILOTLIGHT_WORKER_RUN_DIR to a folder that the worker may write to, or free disk space."
        raise StartFailedError(Failure(kind="run_folder", cause=cause, advice=advice)) from error
    return folder, not found
