"""Our worker program's own protocol client and job loop around a handler that does nothing.

`python -m pilotlight.bench.harness.loop_worker` in the environment of a worker; `MAX_CONCURRENCY` says how
many jobs it runs at a time; without it, one. Everything but the engine is what `pilotlight worker` runs.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop

from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.jobs import JobLoop
from pilotlight.worker.log import LogSink
from pilotlight.worker.outputs import Item
from pilotlight.worker.platform import Platform, TakenJob
from pilotlight.worker.runner import PostChunk


class _Noop:
    async def run(self, job: TakenJob, post_chunk: PostChunk) -> list[Item]:  # noqa: ARG002 - see `Runner`
        return []


async def main() -> None:
    """Work until the process is ended."""
    variables = {"MAX_CONCURRENCY": "1", **os.environ, "MODEL_NAME": "noop"}
    config = WorkerConfig.from_environment(variables, python=sys.executable)
    log = LogSink()
    broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    platform = Platform(config, log, lambda: None)
    JobLoop(config, platform, _Noop(), log, broken.set_exception).start()
    await broken


if __name__ == "__main__":
    uvloop.run(main())
