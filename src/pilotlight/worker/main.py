"""`pilotlight worker` and `python -m pilotlight.worker`: one worker, told what to do by its environment."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import uvloop

from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.errors import ConfigError
from pilotlight.worker.log import LogSink
from pilotlight.worker.program import SOCKET_PATH_CHARS_MAX, Program

USAGE = """usage: pilotlight worker

Runs one vLLM worker. It takes no arguments; everything comes from the environment: MODEL_NAME, the RUNPOD_*
variables of the worker protocol, PILOTLIGHT_WORKER_STATE_URL, PILOTLIGHT_ENGINE_HOME,
PILOTLIGHT_WORKER_RUN_DIR, MAX_CONCURRENCY, DRAIN_TIMEOUT, and one variable for each option of vLLM.
"""


def main(argv: Sequence[str] = ()) -> int:
    """The exit code of one worker's life: 0 ended on request, 1 failed, 2 wrong usage.

    Args:
        argv: Command-line arguments after the program's name; only `--help` is understood.
    """
    if argv:
        wants_help = argv[0] in {"-h", "--help"}
        (sys.stdout if wants_help else sys.stderr).write(USAGE)
        return 0 if wants_help else 2
    try:
        config = WorkerConfig.from_environment(os.environ, python=sys.executable)
        _check_run_folder(config)
    except ConfigError as error:
        sys.stderr.write(f"pilotlight worker: {error}\n")
        return 2
    # Sockets, templates and everything else written from here on is for the owner only.
    os.umask(0o077)
    log = LogSink()
    try:
        return uvloop.run(_run(config, log))
    finally:
        log.close()


async def _run(config: WorkerConfig, log: LogSink) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: log.event("worker.defect", message=context.get("message")))
    return await Program(config, log).run()


def _check_run_folder(config: WorkerConfig) -> None:
    if config.run_folder is None:
        return
    longest = str(config.run_folder / "engine.sock")
    if len(longest.encode()) > SOCKET_PATH_CHARS_MAX:
        raise ConfigError(
            f"PILOTLIGHT_WORKER_RUN_DIR is too long: {longest} exceeds {SOCKET_PATH_CHARS_MAX} bytes"
        )
