"""From the model's name to a healthy, warmed-up engine: the part of a worker's life before it serves.

`EngineStart.run` is the whole story in order. It ends with an engine, with None when the life ended first, or
with `StartFailedError`, whose failure says what went wrong in the engine's own words and what to do about it.
Whatever it waits for, the end of the life cuts it short.

1. Variables become flags; mistakes show here, before anything slow. The model is found, or downloaded, and
   its weights are read ahead.
2. The engine is forked from a launcher, or spawned (`ladder`); its log tells how far it is.
3. Its health is asked until it answers. If it ends for lack of memory with the default share of the GPU, it
   is started once more with a smaller one (`vllm-worker.md` §8 A4). If it ends for no known reason and was
   not started plainly, it is started plainly.
4. One request of one token pays for lazy initialisation. What serves the engine is made meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

import pilotlight
from pilotlight.domain.worker import Failure, Rung, Stage
from pilotlight.engines.flags import (
    FlagPlan,
    clean_value,
    named_files,
    read_ranks,
    translate,
)
from pilotlight.engines.manifest import EngineManifest, installed_version, load_manifest
from pilotlight.errors import EngineEnvironmentError
from pilotlight.memory import available_bytes, proportional_bytes
from pilotlight.worker import timeline
from pilotlight.worker.command import (
    EngineCommand,
    ask_engine,
    plan_command,
    read_texts,
    usable_caches,
    version_problem,
)
from pilotlight.worker.config import WorkerConfig, engine_environment, planned_environment
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError, ModelMissingError
from pilotlight.worker.gpus import ask_gpus
from pilotlight.worker.input_settings import max_logprobs
from pilotlight.worker.ladder import Ladder
from pilotlight.worker.log import LogSink
from pilotlight.worker.making import EngineMaker
from pilotlight.worker.model import ResolvedModel, prepare_model
from pilotlight.worker.read_ahead import read_ahead
from pilotlight.worker.stages import (
    LogTail,
    StageTracker,
    classify_failure,
    logs_its_start,
    read_concurrency,
    read_plain_start,
    says_drained,
    says_started,
    stuck_failure,
    tells_of_question,
    timeout_failure,
)
from pilotlight.worker.timeline import Timeline

HEALTH_POLL_SECONDS: Final = 0.05
"""Pause between questions for health during a start (`vllm-worker.md` §7)."""

EAGER_POLL_SECONDS: Final = 0.005
"""The same once the log says that the server is there."""

STUCK_SECONDS: Final = 60.0
"""How long an engine that was forked may take to begin with the model. All it needs is imported, so it waits
for a lock that was held when it was forked; one that is only slow is started once more in vain."""

DOWNLOAD_REPORT_SECONDS: Final = 1.0
"""Pause between two reports of a download's progress."""

MEMORY_RETRY_UTILIZATION: Final = "0.90"
"""Share of the GPU's memory at the second try of a start that failed for memory (§8 A4)."""

ASK_SECONDS: Final = 60.0
"""How long the engine may take to say what it understands; then the start goes on without its answer."""

EXIT_SECONDS: Final = 2.0
"""How long an engine that broke a connection may take to end, which is what it mostly does then."""

CONCURRENCY_MAX: Final = 1000
"""Most jobs at a time that `MAX_CONCURRENCY=auto` may mean; platforms hand out no more at once."""


_T = TypeVar("_T")


class _LifeEndedError(Exception):
    """The worker's life has ended while something was waited for."""


class StartFailedError(Exception):
    """The start failed for a known reason."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


class EngineStart:
    """One start; `run` once.

    Args:
        config: What the environment said.
        log: Where everything is written.
        folder: For the socket and small files.
        ending: Done when the worker's life ends; the start is then given up.
        on_stage: Called with each new stage of the start and facts about it.
        on_healthy: Makes what serves the engine, while that is warmed up; asked again for another engine
            where a start is repeated.

    Attributes:
        engine: The engine, from before it is spawned; whoever runs the start ends it.
        tail: The last lines of its log.
        registration: What is known of the worker so far, for the platform.
        inputs: Defaults of job inputs, with what the engine's command line says about them.
    """

    def __init__(
        self,
        config: WorkerConfig,
        log: LogSink,
        folder: Path,
        *,
        ending: asyncio.Future[Any],
        on_stage: Callable[..., None],
        on_healthy: Callable[[Engine], Awaitable[None]],
    ) -> None:
        self._config = config
        self._log = log
        self._folder = folder
        self._ending = ending
        self._on_stage = on_stage
        self._on_healthy = on_healthy
        self._clock = asyncio.get_running_loop().time
        self._ladder: Ladder | None = None
        self._stages = StageTracker()
        self._timeline = Timeline()
        self._server_there = asyncio.Event()
        self._memory_bytes: int | None = None
        self._given_up = threading.Event()
        self._concurrency = 0.0
        self._reported = 0.0
        self._memory_by_default = False
        self._deadline = 0.0
        self.engine: Engine | None = None
        self.tail = LogTail()
        self.registration: dict[str, Any] = {}
        self.inputs = config.inputs

    async def run(self) -> Engine | None:
        """The engine, healthy and warm; None if the life ended first.

        Raises:
            StartFailedError: Says why; `engine` may still run and is to be stopped.
        """
        try:
            return await self._run()
        except _LifeEndedError:
            return None
        finally:
            self._given_up.set()

    def told(self) -> dict[str, Any]:
        """How it started, for the report that it is ready or has failed; nothing before it was tried."""
        if self._ladder is None:
            return {}
        rung, note = self._ladder.rung, self._ladder.note
        rows = self._timeline.rows()
        # The platform's clock may differ from ours: with our own moment it can tell by how much.
        return {
            "rung": str(rung), "note": note, "timeline": rows, "memory_bytes": self._memory_bytes,
            "now_ms": _now_ms(),
        }  # fmt: skip

    def note(self, stage: str) -> None:
        """Says that a stage of the start begins that only its caller knows of."""
        self._timeline.note(stage, _now_ms())

    async def _run(self) -> Engine:
        manifest = await self._manifest()
        self._check_version(manifest)
        self.registration = {"versions": _versions(manifest), "max_concurrency": self._config.max_concurrency}
        # A mistake in a variable shows before a download that may take an hour.
        environment = self._config.environment
        self._check(translate(environment, manifest, texts=read_texts(named_files(environment))))
        self._ladder = Ladder(
            replaced=self._config.engine_command is not None,
            known=manifest is not None and self._config.engine_home is not None,
            launcher=self._config.launcher is not None,
            method=clean_value(environment.get("VLLM_WORKER_MULTIPROC_METHOD")) or "",
        )
        counting = asyncio.create_task(self._count_gpus(manifest))
        try:
            model = await self._resolve()
            reading = asyncio.create_task(self._read_ahead(model))
            try:
                return await self._start_engine(model, manifest, counting)
            finally:
                reading.cancel()
        finally:
            counting.cancel()
            await asyncio.gather(counting, return_exceptions=True)

    async def _read_ahead(self, model: ResolvedModel) -> None:
        await asyncio.to_thread(
            read_ahead, Path(model.source), available_bytes=available_bytes(), given_up=self._given_up
        )

    async def _start_engine(
        self, model: ResolvedModel, manifest: EngineManifest | None, counting: asyncio.Task[int | None]
    ) -> Engine:
        """A healthy, warm engine, perhaps at another try: with less memory, plainly, or both."""
        environment, ladder = model.environment, self._ladder
        assert ladder is not None
        gpus = await self._unless_ended(counting)
        less_memory = False
        while True:
            try:
                return await self._attempt(model, manifest, environment, gpus)
            except StartFailedError as error:
                cause = error.failure.cause
                if not less_memory and self._may_retry(error.failure, manifest):
                    less_memory, share = True, MEMORY_RETRY_UTILIZATION
                    environment = {**environment, "GPU_MEMORY_UTILIZATION": share}
                    self._log.event("engine.memory_retry", cause=cause, gpu_memory_utilization=share)
                elif not self._ending.done() and ladder.may_repeat(error.failure, loading=self._loading):
                    self._log.event("engine.plain_retry", rung=str(ladder.rung), cause=cause)
                    ladder.fall(f"the {ladder.rung} start failed: {cause}")
                else:
                    raise
            assert self.engine is not None
            await self.engine.stop(term_seconds=0.0)
            self.tail, self._stages, self._concurrency = LogTail(), StageTracker(), 0.0
            self._timeline, self._memory_bytes = Timeline(), None
            self._server_there.clear()

    @property
    def _loading(self) -> bool:
        """Whether the engine has come as far as the model."""
        return self._stages.reached(Stage.LOADING_WEIGHTS)

    async def _unless_ended(self, work: Coroutine[Any, Any, _T] | asyncio.Task[_T]) -> _T:
        """The result of some work; it is cancelled, and this raises, when the life ends first."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._ending}, return_when=asyncio.FIRST_COMPLETED)
            if self._ending.done():
                raise _LifeEndedError
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _count_gpus(self, manifest: EngineManifest | None) -> int | None:
        """How many there are, where the engine runs on them and their number decides anything (§4.6)."""
        environment = self._config.environment
        if manifest is None or manifest.platform != "cuda":
            return None
        ranks = read_ranks(environment)
        if not ranks.automatic and (ranks.tensor or "auto").lower() in {"auto", "0", "1"}:
            return 1
        return await ask_gpus(environment)

    async def _resolve(self) -> ResolvedModel:
        """The model, downloaded where it is missing."""
        try:
            model = await self._unless_ended(
                prepare_model(
                    self._config.environment,
                    on_progress=self._report_download,
                    on_wait=self._report_wait,
                    engine_home=self._config.engine_home,
                )
            )
        except ModelMissingError as error:
            raise StartFailedError(error.failure) from error
        for note in model.notes:
            self._log.event("model.note", note=note)
        return model

    def _check_version(self, manifest: EngineManifest | None) -> None:
        if (cause := version_problem(self._config.environment, manifest)) is not None:
            advice = "Install that version and name it in the setting engine.homes, or change the variable."
            raise StartFailedError(Failure(kind="engine_missing", cause=cause, advice=advice))

    async def _manifest(self) -> EngineManifest | None:
        """What the engine understands; asked anew where it is not the one that was described (§4.3)."""
        home, config = self._config.engine_home, self._config
        if home is None:
            return None
        try:
            return load_manifest(home)
        except EngineEnvironmentError as error:
            self._log.event("engine.no_manifest", error=str(error))
        if installed_version(home) is None:
            return None
        environment = engine_environment(
            config.environment, worker_id=config.worker_id, engine_key="", offline=True, platform=""
        )
        try:
            async with asyncio.timeout(ASK_SECONDS):
                manifest = await self._unless_ended(ask_engine(home, self._folder, environment))
        except TimeoutError:
            self._log.event("engine.no_manifest", error=f"vLLM gave no answer within {ASK_SECONDS:g} s")
            return None
        except (EngineEnvironmentError, OSError) as error:
            self._log.event("engine.no_manifest", error=str(error))
            return None
        self._log.event("engine.asked", vllm=manifest.version)
        return manifest

    def _report_download(self, done_bytes: int, total_bytes: int | None) -> None:
        """Tells how far the download is, at most once a second; each report is a sign of life."""
        now = self._clock()
        if self._stages.advance(Stage.DOWNLOADING) or now - self._reported >= DOWNLOAD_REPORT_SECONDS:
            self._reported = now
            self._on_stage(Stage.DOWNLOADING, done_bytes=done_bytes, total_bytes=total_bytes)

    def _report_wait(self, holder: str) -> None:
        """Tells that somebody else downloads the same; that, too, is a sign of life."""
        self._stages.advance(Stage.DOWNLOADING)
        self._on_stage(Stage.DOWNLOADING, waits_for=holder)

    def _may_retry(self, failure: Failure, manifest: EngineManifest | None) -> bool:
        on_gpu = manifest is not None and manifest.platform == "cuda"
        lacks_memory = failure.kind == "out_of_memory" and not self._ending.done()
        return on_gpu and lacks_memory and self._memory_by_default

    async def _attempt(
        self,
        model: ResolvedModel,
        manifest: EngineManifest | None,
        environment: Mapping[str, str],
        gpus: int | None,
    ) -> Engine:
        """One engine, healthy and warm."""
        command = await self._unless_ended(self._plan(model, manifest, environment, gpus))
        self._deadline = self._clock() + self._config.startup_seconds
        key = secrets.token_urlsafe(32)
        variables = planned_environment(
            self._config,
            environment,
            engine_key=key,
            offline=model.local,
            platform=manifest.platform if manifest is not None else "",
        )
        engine = self.engine = Engine(
            command=command.argv, socket_path=self._folder / "engine.sock", key=key, on_line=self._on_line
        )
        variables = await asyncio.to_thread(usable_caches, variables)
        # A sign of life, and true also while a launcher is waited for that still imports.
        self._advance(Stage.IMPORTING)
        try:
            await self._unless_ended(
                self._maker(manifest).begin(
                    engine, command, variables, source=model.source, deadline=self._deadline
                )
            )
        except OSError as error:
            cause = f"{engine.command[0]} cannot be started: {error.strerror or error}"
            advice = "Check PILOTLIGHT_ENGINE_HOME, or install the engine with `make setup`."
            raise StartFailedError(Failure(kind="engine_missing", cause=cause, advice=advice)) from error
        # The engine now needs a second at least; what serves it is imported meanwhile.
        await asyncio.to_thread(importlib.import_module, "pilotlight.worker.serving")
        await self._until_healthy(engine)
        self._count_slots()
        await self._warm_up(engine)
        if not engine.alive:
            raise StartFailedError(classify_failure(self.tail.lines(), engine.exit_code))
        if self._ending.done():
            raise _LifeEndedError
        return engine

    def _maker(self, manifest: EngineManifest | None) -> EngineMaker:
        assert self._ladder is not None
        return EngineMaker(self._config, self._log, self._ladder, manifest, self.note)

    @property
    def _rung(self) -> Rung:
        return self._ladder.rung if self._ladder is not None else Rung.PLAIN

    async def _plan(
        self,
        model: ResolvedModel,
        manifest: EngineManifest | None,
        environment: Mapping[str, str],
        gpus: int | None,
    ) -> EngineCommand:
        """The command line that the environment asks for, its files written."""
        # It reads files that may lie on a slow volume.
        command = await asyncio.to_thread(
            plan_command,
            self._config,
            environment,
            manifest,
            source=model.source,
            names=model.names,
            folder=self._folder,
            gpus=gpus,
        )
        plan = command.plan
        self._memory_by_default = plan.is_default("--gpu-memory-utilization")
        for note in plan.notes:
            self._log.event("flags.note", note=note)
        self._check(plan)
        self.inputs = replace(self.inputs, max_logprobs=max_logprobs(plan))
        for name, text in plan.files.items():
            (self._folder / name).write_text(text, encoding="utf-8")
        return command

    def _check(self, plan: FlagPlan) -> None:
        if plan.errors:
            cause = "; ".join(error.message for error in plan.errors)
            advice = "Correct or remove the variable."
            raise StartFailedError(Failure(kind="bad_flag", cause=cause, advice=advice))

    async def _until_healthy(self, engine: Engine) -> None:
        """Returns once the engine is healthy."""
        exited = asyncio.create_task(engine.wait())
        stuck = self._clock() + STUCK_SECONDS if self._rung is Rung.LAUNCHABLE else self._deadline
        try:
            while not await self._unless_ended(engine.healthy()):
                if exited.done():
                    raise StartFailedError(classify_failure(self.tail.lines(), engine.exit_code))
                if self._clock() > self._deadline:
                    raise StartFailedError(timeout_failure(self.tail.lines(), self._config.startup_seconds))
                if self._clock() > stuck and not self._loading and logs_its_start(self._config.environment):
                    raise StartFailedError(stuck_failure(self.tail.lines(), STUCK_SECONDS))
                pause = EAGER_POLL_SECONDS if self._server_there.is_set() else HEALTH_POLL_SECONDS
                await self._pause(exited, pause)
        finally:
            exited.cancel()

    async def _pause(self, exited: asyncio.Task[Any], seconds: float) -> None:
        """Until the engine, or the life, has ended, or the log says that the server is there."""
        waits: set[asyncio.Future[Any]] = {self._ending, exited}
        there = None
        if not self._server_there.is_set():
            there = asyncio.ensure_future(self._server_there.wait())
            waits.add(there)
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if there is not None:
            there.cancel()

    def _count_slots(self) -> None:
        """`MAX_CONCURRENCY=auto`: what the engine's memory holds, once the engine has said it."""
        if self._config.automatic_concurrency:
            # Engines that share the load say it once each; one that has little memory still takes one job.
            found = int(self._concurrency) if self._concurrency else self._config.max_concurrency
            self.registration["max_concurrency"] = max(1, min(CONCURRENCY_MAX, found))
            self._log.event(
                "engine.concurrency",
                reported=self._concurrency or None,
                jobs=self.registration["max_concurrency"],
            )

    async def _warm_up(self, engine: Engine) -> None:
        """One token, in what is left of the time of the start; returns also when the engine has ended."""
        self._advance(Stage.WARMING_UP)
        self.note(timeline.WARMING_UP)
        serving = asyncio.ensure_future(self._on_healthy(engine))
        measuring = asyncio.create_task(asyncio.to_thread(_held_bytes, engine))
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._unless_ended(self._ask_for_a_token(engine))
            self.note(timeline.REGISTERING)
            await self._unless_ended(_both(serving, measuring))
            self._memory_bytes = measuring.result()
        except TimeoutError as error:
            failure = timeout_failure(self.tail.lines(), self._config.startup_seconds)
            raise StartFailedError(failure) from error
        except EngineGoneError:
            # Mostly because it dies, of which its process is the last to know.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_SECONDS):
                    await self._unless_ended(engine.wait())
        finally:
            for task in (serving, measuring):
                task.cancel()
            await asyncio.gather(serving, measuring, return_exceptions=True)

    async def _ask_for_a_token(self, engine: Engine) -> None:
        """Pays for lazy initialisation, and learns what the models are called."""
        from pilotlight.worker.first_token import ask_for_a_token  # noqa: PLC0415 - came meanwhile

        listing = asyncio.create_task(engine.ask("GET", "/v1/models"))
        try:
            await ask_for_a_token(engine)
            _, answer = await listing
        finally:
            listing.cancel()
            await asyncio.gather(listing, return_exceptions=True)
        listed = msgspec.json.decode(answer).get("data", [])
        self.registration["models"] = [entry["id"] for entry in listed]

    def _on_line(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        if tells_of_question(text):
            return
        self._log.line(line)
        self.tail.add(text, self._clock())
        self._timeline.read(text, _now_ms())
        if says_started(text):
            self._server_there.set()
        if self._rung is Rung.COLD and (reason := read_plain_start(text)) and self._ladder is not None:
            self._ladder.step_down(reason)
        if self.engine is not None and says_drained(text):
            self.engine.note_drained()
        self._concurrency += read_concurrency(text) or 0.0
        # Healthy and warmed up is what makes it ready, so the log can lead no further than warming up.
        stage = self._stages.read(text)
        if stage is not None:
            self._on_stage(stage)

    def _advance(self, stage: Stage) -> None:
        """Tell of a stage unless the start has been there before."""
        if self._stages.advance(stage):
            self._on_stage(stage)


def _versions(manifest: EngineManifest | None) -> dict[str, str]:
    versions = {"pilotlight": pilotlight.__version__, "python": sys.version.split()[0]}
    if manifest is not None:
        versions |= {"vllm": manifest.version, "torch": manifest.torch_version}
    return versions


async def _both(one: asyncio.Future[None], other: asyncio.Future[int]) -> None:
    await asyncio.gather(one, other)


def _held_bytes(engine: Engine) -> int:
    """What the worker program and its engine hold."""
    return proportional_bytes((os.getpid(), *engine.processes()))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
