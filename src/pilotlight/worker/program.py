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
import contextlib
import math
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

import pilotlight
from pilotlight.domain.worker import Failure, Stage
from pilotlight.engines.manifest import EngineManifest, load_manifest
from pilotlight.engines.vllm_flags import FlagPlan, mask_secrets, translate
from pilotlight.errors import EngineEnvironmentError
from pilotlight.worker.config import WorkerConfig, engine_environment
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError
from pilotlight.worker.inputs import CHAT_ROUTE, COMPLETION_ROUTE
from pilotlight.worker.jobs import EndReason, JobLoop, JobRunner
from pilotlight.worker.listener import Listener
from pilotlight.worker.log import LogSink
from pilotlight.worker.model import ModelMissingError, ResolvedModel, resolve_model
from pilotlight.worker.platform import Platform
from pilotlight.worker.stages import LogTail, StageTracker, classify_failure, says_drained, timeout_failure
from pilotlight.worker.state import StateReporter

HEALTH_POLL_SECONDS: Final = 0.05
"""Pause between questions for health during a start (`vllm-worker.md` §7)."""

HEALTH_WATCH_SECONDS: Final = 5.0
"""Pause between questions for health afterwards; three failures in a row count as death (§7)."""

ENGINE_GRACE_SECONDS: Final = 5.0
"""Beyond the drain time, for the engine to end its own processes before it is killed."""

REPORT_GRACE_SECONDS: Final = 3.0
"""How long the last state report may take at the end of a life."""

SOCKET_PATH_CHARS_MAX: Final = 107
"""Longest path of a Unix socket on Linux."""


class Ending(StrEnum):
    """Why a life ends."""

    SIGNAL = "signal"
    UNWANTED = "unwanted"
    PLATFORM_LOST = "platform_lost"
    ENGINE_GONE = "engine_gone"
    DEFECT = "defect"


class StartFailedError(Exception):
    """The start failed for a known reason."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


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
        self._tail = LogTail()
        self._stages = StageTracker()
        self._stage = Stage.STARTING
        self._registration: dict[str, Any] = {}
        self._platform = Platform(config, log, self._on_recovered)
        reporting = self._platform if config.state_url is not None else None
        self._reporter = StateReporter(reporting, log, lambda: self._end_with(Ending.UNWANTED))
        self._engine: Engine | None = None
        self._listener: Listener | None = None
        self._jobs: JobLoop | None = None
        self._defect = ""
        self._watchers: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """The exit code: 0 after a drain, 1 after a failure."""
        self._catch_signals()
        self._reporter.start()
        folder, temporary = _run_folder(self._config)
        try:
            return await self._live(folder)
        finally:
            for watcher in self._watchers:
                watcher.cancel()
            await asyncio.gather(*self._watchers, return_exceptions=True)
            if self._jobs is not None:
                await self._jobs.close()
            if self._listener is not None:
                await self._listener.stop()
            await self._stop_engine(0.0)
            await self._reporter.flush(REPORT_GRACE_SECONDS)
            await self._platform.close()
            if temporary:
                shutil.rmtree(folder, ignore_errors=True)

    async def _live(self, folder: Path) -> int:
        if self._config.state_url is not None:
            self._watch(self._watch_platform())
        self._report(Stage.STARTING)
        try:
            engine = await self._start_engine(folder)
            started = await self._until_healthy(engine)
            if started:
                await self._warm_up(engine)
        except StartFailedError as error:
            return await self._fail(error.failure)
        if not started or self._ending.done():
            # Told to go before it was ready: there is nothing to drain.
            if self._ending.result() is Ending.ENGINE_GONE:
                return await self._fail(classify_failure(self._tail.lines(), engine.exit_code))
            self._report(Stage.DRAINING, reason=str(self._ending.result()))
            await self._stop_engine(0.0)
            return 0
        await self._serve(engine, folder)
        ending = await self._ending
        self._log.event("worker.ending", reason=str(ending))
        if ending in {Ending.ENGINE_GONE, Ending.DEFECT}:
            return await self._give_up(engine, ending)
        await self._drain(ending)
        return 1 if ending is Ending.PLATFORM_LOST else 0

    # Start

    async def _start_engine(self, folder: Path) -> Engine:
        config = self._config
        try:
            model = resolve_model(config.model_name)
        except ModelMissingError as error:
            raise StartFailedError(error.failure) from error
        manifest = self._manifest()
        plan = translate(config.environment, manifest, served_names=model.names, run_folder=str(folder))
        for note in plan.notes:
            self._log.event("flags.note", note=note)
        if plan.errors:
            cause = "; ".join(error.message for error in plan.errors)
            raise StartFailedError(
                Failure(kind="bad_flag", cause=cause, advice="Correct or remove the variable.")
            )
        for name, text in plan.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        platform = manifest.platform if manifest is not None else ""
        engine = Engine(
            command=_engine_command(config, model, plan, manifest),
            environment=engine_environment(
                config.environment,
                worker_id=config.worker_id,
                engine_key=(key := secrets.token_urlsafe(32)),
                offline=model.local,
                platform=platform,
            ),
            socket_path=folder / "engine.sock",
            key=key,
            on_line=self._on_engine_line,
        )
        self._engine = engine
        self._registration = {"versions": _versions(manifest), "max_concurrency": config.max_concurrency}
        self._log.event("engine.spawning", argv=mask_secrets(engine.command))
        try:
            await engine.start()
        except OSError as error:
            cause = f"{engine.command[0]} cannot be started: {error.strerror or error}"
            advice = "Check PILOTLIGHT_ENGINE_HOME, or install the engine with `make setup`."
            raise StartFailedError(Failure(kind="engine_missing", cause=cause, advice=advice)) from error
        self._watch(self._watch_exit(engine))
        self._advance(Stage.IMPORTING)
        return engine

    def _manifest(self) -> EngineManifest | None:
        if self._config.engine_home is None:
            return None
        try:
            return load_manifest(self._config.engine_home)
        except EngineEnvironmentError as error:
            self._log.event("engine.no_manifest", error=str(error))
            return None

    async def _until_healthy(self, engine: Engine) -> bool:
        """True once the engine is healthy, False if the life ended first."""
        deadline = self._clock() + self._config.startup_seconds
        while not self._ending.done():
            if await engine.healthy():
                return True
            if self._clock() > deadline:
                raise StartFailedError(timeout_failure(self._tail.lines(), self._config.startup_seconds))
            await asyncio.wait({self._ending}, timeout=HEALTH_POLL_SECONDS)
        return False

    async def _warm_up(self, engine: Engine) -> None:
        """One token by chat, or by completion where there is no chat template; may fail."""
        self._advance(Stage.WARMING_UP)
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
        text = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
        with contextlib.suppress(EngineGoneError, aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(self._config.startup_seconds):
                for target, body in ((CHAT_ROUTE, chat), (COMPLETION_ROUTE, text)):
                    response = await engine.request("POST", target, body=msgspec.json.encode(body))
                    async with response:
                        await response.read()
                    if response.status == 200:
                        break
                response = await engine.request("GET", "/v1/models")
                async with response:
                    answer = msgspec.json.decode(await response.read())
                self._registration["models"] = [entry["id"] for entry in answer.get("data", [])]

    # Life

    async def _serve(self, engine: Engine, folder: Path) -> None:
        config = self._config
        key = secrets.token_urlsafe(32)
        path = folder / "worker.sock"
        self._listener = Listener(
            engine=engine,
            socket_path=path,
            key=key,
            allow_admin=config.inputs.allow_admin_routes,
            info=self._info,
        )
        await self._listener.start()
        runner = JobRunner(config, engine, self._log, lambda: self._end_with(Ending.ENGINE_GONE))
        self._jobs = JobLoop(config, self._platform, runner, self._log, self._on_defect)
        self._registration |= {
            "engine": {"address": f"unix:{engine.socket_path}", "key": engine.key},
            "listener": {"address": f"unix:{path}", "key": key},
        }
        self._watch(self._watch_health(engine))
        self._advance(Stage.READY)
        self._jobs.start()

    async def _drain(self, ending: Ending) -> None:
        """Lets running work finish, for at most the drain time; a second signal cuts it short."""
        assert self._jobs is not None
        assert self._listener is not None
        self._report(Stage.DRAINING, reason=str(ending))
        deadline = self._clock() + self._config.drain_seconds
        if ending is not Ending.PLATFORM_LOST:
            await self._unless_hurried(self._finish_work(), self._config.drain_seconds)
        # What is left asks for another worker, while there is still somebody to tell.
        self._jobs.end_all(EndReason.SHUTDOWN)
        await self._unless_hurried(self._jobs.drain(), 2.0)
        # The engine's own direct requests get the rest of the time: it waits for them by --shutdown-timeout.
        rest = max(0.0, deadline - self._clock()) + ENGINE_GRACE_SECONDS
        await self._stop_engine(0.0 if self._hurry.is_set() else rest)

    async def _finish_work(self) -> None:
        assert self._jobs is not None
        assert self._listener is not None
        await self._jobs.drain()
        await self._listener.wait_idle()

    async def _give_up(self, engine: Engine, ending: Ending) -> int:
        """Ends jobs with an error that asks for another worker, and says why there is none here any more."""
        assert self._jobs is not None
        self._jobs.end_all(EndReason.ENGINE_GONE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._jobs.drain(), self._config.drain_seconds)
        if ending is Ending.DEFECT:
            advice = "This is a defect of Pilotlight; its log says more. A new worker starts."
            return await self._fail(Failure(kind="worker_defect", cause=self._defect, advice=advice))
        failure = classify_failure(self._tail.lines(), engine.exit_code)
        if failure.kind not in {"out_of_memory", "killed"}:
            failure = Failure(
                kind="engine_died", cause=failure.cause, advice="A new worker starts with a new engine."
            )
        return await self._fail(failure)

    async def _fail(self, failure: Failure) -> int:
        self._report(Stage.FAILED, kind=failure.kind, cause=failure.cause, advice=failure.advice)
        await self._stop_engine(1.0)
        return 1

    async def _stop_engine(self, term_seconds: float) -> None:
        if self._engine is None:
            return
        engine = self._engine
        stopping = asyncio.create_task(engine.stop(term_seconds=term_seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            engine.kill()
        strays = await stopping
        if strays:
            self._log.event("engine.strays_killed", pids=list(strays))
        if self._engine is engine:
            self._engine = None
            self._log.event("engine.ended", exit_code=engine.exit_code)

    # What is watched

    async def _watch_exit(self, engine: Engine) -> None:
        await engine.wait()
        self._end_with(Ending.ENGINE_GONE)

    async def _watch_health(self, engine: Engine) -> None:
        failures = 0
        while failures < 3:
            await asyncio.sleep(HEALTH_WATCH_SECONDS)
            failures = 0 if await engine.healthy() else failures + 1
        self._log.event("engine.unhealthy")
        self._end_with(Ending.ENGINE_GONE)

    async def _watch_platform(self) -> None:
        while self._platform.outage_seconds < self._config.platform_lost_seconds:  # noqa: ASYNC110 - no event
            await asyncio.sleep(1.0)
        self._end_with(Ending.PLATFORM_LOST)

    def _watch(self, watcher: Coroutine[Any, Any, None]) -> None:
        self._watchers.append(asyncio.create_task(watcher))

    def _on_engine_line(self, line: bytes) -> None:
        self._log.line(line)
        text = line.decode("utf-8", "replace")
        self._tail.add(text)
        if self._engine is not None and says_drained(text):
            self._engine.note_drained()
        stage = self._stages.read(text)
        # Healthy and warmed up is what makes it ready, so the log can lead no further than warming up.
        if stage is not None and self._stage is not Stage.READY:
            self._report(stage)

    def _advance(self, stage: Stage) -> None:
        if self._stages.advance(stage):
            self._report(stage)

    def _report(self, stage: Stage, **detail: Any) -> None:
        self._stage = stage
        elapsed_ms = round((self._clock() - self._born) * 1000)
        self._reporter.report(stage, {"elapsed_ms": elapsed_ms, **detail}, dict(self._registration))

    def _on_recovered(self) -> None:
        if self._stage in {Stage.READY, Stage.DRAINING}:
            self._reporter.repeat()

    def _on_defect(self, error: BaseException) -> None:
        self._defect = repr(error)
        self._end_with(Ending.DEFECT)

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

    def _info(self) -> dict[str, Any]:
        """What `GET /worker/info` tells: no keys, no secrets."""
        return {
            "worker_id": self._config.worker_id,
            "stage": str(self._stage),
            "argv": mask_secrets(self._engine.command) if self._engine is not None else [],
            "models": self._registration.get("models", []),
            "versions": self._registration.get("versions", {}),
            "max_concurrency": self._config.max_concurrency,
            "jobs": self._jobs.running if self._jobs is not None else 0,
            "requests": self._listener.in_flight if self._listener is not None else 0,
        }


def _engine_command(
    config: WorkerConfig, model: ResolvedModel, plan: FlagPlan, manifest: EngineManifest | None
) -> tuple[str, ...]:
    """The engine's command line without its address, worker-owned arguments last (`vllm-worker.md` §4.1)."""
    program = config.engine_command or (config.engine_python, "-m", "vllm.entrypoints.openai.api_server")
    # This entry point has no positional model; `--model` is its form.
    arguments = ["--model", model.source, *plan.argv]
    if "--shutdown-timeout" not in plan.argv:
        arguments += ["--shutdown-timeout", str(math.ceil(config.drain_seconds))]
    quiet = "--disable-uvicorn-access-log"
    known = manifest is not None and any(flag.flag == quiet for flag in manifest.flags.values())
    if known and not {quiet, f"--no-{quiet[2:]}"} & set(plan.argv):
        # One log line per request costs CPU and tells nothing that the platform does not record.
        arguments.append(quiet)
    return (*program, *arguments)


def _run_folder(config: WorkerConfig) -> tuple[Path, bool]:
    """The folder for sockets and small files, 0700, and whether it is ours to remove: we made it."""
    if config.run_folder is None:
        return Path(tempfile.mkdtemp(prefix="pilotlight-worker-")), True
    folder = config.run_folder
    found = folder.exists()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder, not found


def _versions(manifest: EngineManifest | None) -> dict[str, str]:
    versions = {"pilotlight": pilotlight.__version__, "python": sys.version.split()[0]}
    if manifest is not None:
        versions |= {"vllm": manifest.version, "torch": manifest.torch_version}
    return versions
