"""`pilotlight bench worker`: what our worker program adds to vLLM, in time, throughput and memory.

Two measurements:
1. With the stand-in engine: starts, single jobs and memory of the worker program alone, on a platform of
   this benchmark's own. The same request sent straight to a second stand-in, in turn, is what is taken off.
   Stand-in because the differences are milliseconds, and a real engine's answers vary by more.
2. With the real engine: many streams at once, in pairs, as OpenAI requests through the data path and as
   native streamed jobs read by `/stream`; same gateway, same worker, same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from pilotlight.bench.engine import MODEL, first_token
from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Report, quantile
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, Child, environment, free_port, python_module, rss_mb
from pilotlight.bench.throughput import PILOTLIGHT, RUN_S, report_pairs
from pilotlight.cli.output import note

ENGINE = "stand-in-engine"
DATA_PATH = "data-path"
ROUTE = "/v1/chat/completions"
KEY = "bench"

_MESSAGES = [{"role": "user", "content": "count to 8"}]
_POLL_S = 0.001
_START_S = 30.0
_ANSWER_S = 30.0


def run(*, starts: int, jobs: int, pairs: int, streams: int, tokens: int, report: Report) -> None:
    """Measure and print.

    Args:
        starts: Starts of each kind with the stand-in engine.
        jobs: Single jobs, and single requests to the engine.
        pairs: Runs of each kind with the real engine; 0 leaves that part out.
        streams: Streams at the same time.
        tokens: Tokens per stream.
        report: Takes the figures.

    Raises:
        BenchError: Something that was started failed, or an answer was not whole.
        EngineEnvironmentError: No engine is installed.
    """
    with contextlib.closing(report):
        with Bench() as bench:
            asyncio.run(measure_program(bench, starts, jobs, report))
        if pairs:
            with Bench() as bench:
                measure_streams(bench, Installation(bench), pairs, streams, tokens, report)


@dataclass(slots=True)
class _Platform:
    """The platform's side for one worker: hands out one job at a time and notes the moments."""

    jobs: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    taken: float = 0.0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    result: asyncio.Future[tuple[float, Any]] | None = None
    base: str = ""

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Listen on a free port until the stack is left."""
        app = web.Application()
        app.router.add_get("/v2/ep/job-take/{worker}", self._take)
        app.router.add_get("/v2/ep/job-take-batch/{worker}", self._take)
        app.router.add_post("/v2/ep/job-done/{worker}/{job}", self._done)
        app.router.add_get("/v2/ep/job-stop/{worker}", self._stop)
        app.router.add_get("/v2/ep/ping/{worker}", self._ping)
        # A poll of a worker that has ended must not swallow a job.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.base = f"http://127.0.0.1:{runner.addresses[0][1]}/v2/ep"

    def environment(self) -> dict[str, str]:
        """What a worker needs to find this platform (`worker-protocol.md` §2.1)."""
        return environment(
            RUNPOD_WEBHOOK_GET_JOB=f"{self.base}/job-take/$ID?gpu=none",
            RUNPOD_WEBHOOK_POST_OUTPUT=f"{self.base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            RUNPOD_WEBHOOK_PING=f"{self.base}/ping/$RUNPOD_POD_ID?gpu=none",
            RUNPOD_AI_API_KEY=KEY,
            RUNPOD_POD_ID="bench",
            MODEL_NAME=MODEL,
            PILOTLIGHT_ENGINE_COMMAND=json.dumps(_stand_in()),
        )

    async def run(self, job: dict[str, Any]) -> float:
        """Seconds from the answered take to the arrival of the job's result.

        Raises:
            BenchError: The job failed or did not end.
        """
        self.result = asyncio.get_running_loop().create_future()
        self.jobs.put_nowait(job)
        try:
            arrived, body = await asyncio.wait_for(self.result, _ANSWER_S)
        except TimeoutError as error:
            raise BenchError(f"the worker gave no result within {_ANSWER_S:g} s") from error
        if "output" not in body:
            raise BenchError(f"the worker answered {body!r:.500}")
        return arrived - self.taken

    async def _take(self, request: web.Request) -> web.Response:
        self.asked.set()
        try:
            job = await asyncio.wait_for(self.jobs.get(), 10.0)
        except TimeoutError:
            return web.Response(status=204)
        answer = [job] if "batch_size" in request.query else job
        self.taken = time.perf_counter()
        return web.json_response(answer)

    async def _done(self, request: web.Request) -> web.Response:
        body = await request.read()
        arrived = time.perf_counter()
        if self.result is not None and not self.result.done():
            self.result.set_result((arrived, json.loads(body)))
        return web.Response()

    async def _stop(self, _: web.Request) -> web.Response:
        await asyncio.sleep(30.0)
        return web.json_response({"jobsToStop": ["-"]})

    async def _ping(self, _: web.Request) -> web.Response:
        return web.Response()


async def measure_program(bench: Bench, starts: int, jobs: int, report: Report) -> None:
    """The first measurement."""
    async with contextlib.AsyncExitStack() as stack:
        platform = _Platform()
        await platform.start(stack)
        session = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))
        engine_s, ours_s = [], []
        for number in range(starts):
            note(f"worker: start {number + 1} of {starts}")
            # What is started last stays for the jobs.
            engine, port, took = await _start_stand_in(bench, session)
            engine_s.append(took * 1000)
            worker, took = await _start_worker(bench, platform)
            ours_s.append(took * 1000)
            if number < starts - 1:
                await asyncio.to_thread(bench.end, worker)
                await asyncio.to_thread(bench.end, engine)
        reference = report.add(ENGINE, "start_ms", "ms", engine_s)
        report.add(PILOTLIGHT, "start_ms", "ms", ours_s, reference=reference)
        added = [ours - plain for ours, plain in zip(ours_s, engine_s, strict=True)]
        report.add(PILOTLIGHT, "start_added_ms", "ms", added)
        note(f"worker: {jobs} jobs, one at a time")
        await _measure_jobs(platform, session, port, jobs, report)
        report.add(PILOTLIGHT, "rss_mb", "MB", [rss_mb(worker.pid)])


async def _measure_jobs(
    platform: _Platform, session: aiohttp.ClientSession, port: int, jobs: int, report: Report
) -> None:
    native = {"messages": _MESSAGES, "sampling_params": {"max_tokens": 16}}
    direct_ms, ours_ms = [], []
    for number in range(-jobs // 10, jobs):
        took = await platform.run({"id": f"job-{number}", "input": native})
        started = time.perf_counter()
        await _answer(session, port, {"messages": _MESSAGES, "max_tokens": 16})
        if number >= 0:
            ours_ms.append(took * 1000)
            direct_ms.append((time.perf_counter() - started) * 1000)
    added = [ours - direct for ours, direct in zip(ours_ms, direct_ms, strict=True)]
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        reference = report.add(ENGINE, f"job_ms_{name}", "ms", direct_ms, value=quantile(direct_ms, share))
        ours = quantile(ours_ms, share)
        report.add(PILOTLIGHT, f"job_ms_{name}", "ms", ours_ms, value=ours, reference=reference)
    report.add(PILOTLIGHT, "job_added_ms_paired_p50", "ms", added, value=quantile(added, 0.5))


async def _start_stand_in(bench: Bench, session: aiohttp.ClientSession) -> tuple[Child, int, float]:
    """A stand-in engine, its port, and the seconds until it had answered one request."""
    port = free_port()
    started = time.perf_counter()
    child = bench.start(ENGINE, [*_stand_in(), "--port", str(port)], env=environment(VLLM_API_KEY=KEY))
    while True:
        try:
            await _answer(session, port, {"messages": _MESSAGES, "max_tokens": 1})
        except aiohttp.ClientConnectorError:
            if not child.running or time.perf_counter() - started > _START_S:
                raise child.error("did not answer") from None
            await asyncio.sleep(_POLL_S)
        else:
            return child, port, time.perf_counter() - started


async def _start_worker(bench: Bench, platform: _Platform) -> tuple[Child, float]:
    """A worker program, and the seconds until it asked for its first job."""
    platform.asked.clear()
    started = time.perf_counter()
    child = bench.start("worker", python_module("pilotlight.worker"), env=platform.environment())
    while not platform.asked.is_set():
        if not child.running or time.perf_counter() - started > _START_S:
            raise child.error("asked for no job")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(platform.asked.wait(), 1.0)
    return child, time.perf_counter() - started


async def _answer(session: aiohttp.ClientSession, port: int, body: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{port}{ROUTE}"
    async with session.post(url, json={"temperature": 1.0, **body}, headers=headers) as response:
        content = await response.read()
        if response.status != 200:
            raise BenchError(f"the stand-in engine answered {response.status}: {content[:300]!r}")


def _stand_in() -> list[str]:
    return [sys.executable, "-m", "pilotlight.testing.fake_engine"]


def measure_streams(
    bench: Bench, installation: Installation, pairs: int, streams: int, tokens: int, report: Report
) -> None:
    """The second measurement, on this installation."""
    endpoint = installation.deploy(
        model=MODEL, name="bench", min=1, max=1, concurrency=max(streams, 30), env={"MAX_MODEL_LEN": "1024"}
    )
    key = installation.run_key(endpoint)
    note("worker: starting vLLM")
    first_token(installation.port, f"/v2/{endpoint}/openai{ROUTE}", key)
    harness = "pilotlight.bench.harness"
    path = f"/v2/{endpoint}/openai{ROUTE}"
    roads = {
        DATA_PATH: python_module(f"{harness}.tokens", installation.port, path, MODEL, streams, tokens),
        PILOTLIGHT: python_module(f"{harness}.native_streams", installation.port, endpoint, streams, tokens),
    }
    seen: dict[str, list[dict[str, Any]]] = {case: [] for case in roads}
    for number in range(-1, pairs):
        for case in list(roads)[:: -1 if number % 2 else 1]:
            out = bench.run("streams", roads[case], env=environment(KEY=key), timeout_s=RUN_S)
            result: dict[str, Any] = json.loads(out)
            told = "not counted" if number < 0 else f"pair {number + 1} of {pairs}"
            note(f"worker: {told}: {case}: {result['tokens_per_s']:.0f} tokens/s")
            if number >= 0:
                seen[case].append(result)
    report_pairs(report, seen, reference=DATA_PATH, prefix="stream_")
