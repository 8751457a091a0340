"""Has an engine's process made, from the best rung of the ladder that does it.

A rung that refuses costs milliseconds and is followed by the next. One whose engine fails later is the
business of `starting`, which comes here again with a lower ladder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from pilotlight.domain.worker import Rung
from pilotlight.engines.flags import mask_secrets
from pilotlight.engines.launching import serve_command, serve_environment
from pilotlight.engines.manifest import EngineManifest
from pilotlight.worker import timeline
from pilotlight.worker.command import EngineCommand, architectures_of
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.engine import Engine, spawn
from pilotlight.worker.ladder import Ladder
from pilotlight.worker.launching import LaunchRefusedError, LaunchRequest, launch
from pilotlight.worker.log import LogSink


class EngineMaker:
    """Makes engines of one worker.

    Args:
        config: What the environment said.
        log: Where everything is written.
        ladder: Which rung is tried; stepped down here when one refuses.
        manifest: What the engine is; None if unknown.
        note: Told when a stage of the timeline begins.
    """

    def __init__(
        self,
        config: WorkerConfig,
        log: LogSink,
        ladder: Ladder,
        manifest: EngineManifest | None,
        note: Callable[[str], None],
    ) -> None:
        self._config = config
        self._log = log
        self._ladder = ladder
        self._manifest = manifest
        self._note = note

    async def begin(
        self,
        engine: Engine,
        command: EngineCommand,
        environment: Mapping[str, str],
        *,
        source: str,
        deadline: float,
    ) -> None:
        """Starts the engine. Whoever cancels this ends it by `engine.stop`.

        Args:
            engine: Not started yet.
            command: How vLLM itself is started.
            environment: The engine's, complete.
            source: The model's folder.
            deadline: Moment of the loop's clock by which the start has failed.

        Raises:
            OSError: The program cannot be started.
        """
        home = self._config.engine_home
        arguments = (*command.arguments, "--uds", str(engine.socket_path))
        engine.command = (*command.program, *arguments)
        if self._ladder.rung is Rung.LAUNCHABLE:
            assert home is not None
            assert self._manifest is not None
            request = LaunchRequest(
                home=home,
                version=self._manifest.version,
                arguments=arguments,
                environment=environment,
                key=engine.key,
                folder=str(Path.cwd()),
                architectures=await asyncio.to_thread(architectures_of, Path(source)),
                worker_id=self._config.worker_id,
            )
            if await self._launch(engine, request, deadline):
                return
        if self._ladder.rung is Rung.COLD:
            assert home is not None
            engine.command = (*serve_command(home), *arguments)
            environment = serve_environment(environment)
        self._log.event("engine.spawning", argv=mask_secrets(engine.command), rung=str(self._ladder.rung))
        self._note(timeline.IMPORTING)
        await engine.start(partial(spawn, engine.command, environment))

    async def _launch(self, engine: Engine, request: LaunchRequest, deadline: float) -> bool:
        """Whether the launcher has forked the engine; if not, the ladder is one rung lower."""
        path = self._config.launcher
        assert path is not None
        self._log.event("engine.launching", argv=mask_secrets(engine.command), launcher=path)
        late = partial(self._note, timeline.IMPORTING)
        try:
            await engine.start(partial(launch, path, request, deadline=deadline, on_late=late))
        except LaunchRefusedError as error:
            self._ladder.step_down(str(error))
            self._log.event("engine.not_launched", reason=str(error))
            return False
        self._note(timeline.LAUNCHED)
        return True
