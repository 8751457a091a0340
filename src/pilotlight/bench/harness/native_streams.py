"""Asks a worker for the same tokens as `tokens` does, but as native streamed jobs, read by `/stream`.

`KEY=… python -m pilotlight.bench.harness.native_streams PORT ENDPOINT JOBS TOKENS`. Every job must end
COMPLETED and its last item must count exactly TOKENS; otherwise the program fails, because then there is
nothing to compare.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import uvloop

from pilotlight.bench.harness.lean import LeanConnection, lean_connect, lean_request
from pilotlight.bench.harness.tokens import question, write_result

_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}


async def _ask(connection: LeanConnection, request: bytes) -> dict[str, Any]:
    status, body = await connection.ask(request)
    if status != 200:
        raise SystemExit(f"status {status}: {body[:300]!r}")
    answer: dict[str, Any] = json.loads(body)
    return answer


async def _one(connection: LeanConnection, endpoint: str, submission: bytes, tokens: int) -> float:
    started, first = time.perf_counter(), 0.0
    job = (await _ask(connection, submission))["id"]
    poll = lean_request("GET", f"/v2/{endpoint}/stream/{job}", os.environ["KEY"])
    counted = 0
    while True:
        answer = await _ask(connection, poll)
        for entry in answer["stream"]:
            first = first or time.perf_counter()
            counted = entry["output"]["usage"]["output"]
        if answer["status"] in _FINAL and not answer["stream"]:
            break
    if answer["status"] != "COMPLETED" or counted != tokens:
        raise SystemExit(f"expected {tokens} tokens, got {counted}: {answer!r:.500}")
    return (first - started) * 1000


async def main(port: int, endpoint: str, jobs: int, tokens: int) -> None:
    """Print tokens per second over the whole, connections already open."""
    connections = [await lean_connect(port) for _ in range(jobs)]
    submissions = []
    for number in range(jobs):
        sampling = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        job_input = {"messages": question(number), "stream": True, "sampling_params": sampling}
        body = json.dumps({"input": job_input}).encode()
        submissions.append(lean_request("POST", f"/v2/{endpoint}/run", os.environ["KEY"], body))
    started = time.perf_counter()
    firsts = await asyncio.gather(
        *[
            _one(connection, endpoint, submission, tokens)
            for connection, submission in zip(connections, submissions, strict=True)
        ]
    )
    seconds = time.perf_counter() - started
    write_result(tokens, seconds, firsts)


if __name__ == "__main__":
    _port, _jobs, _tokens = (int(sys.argv[at]) for at in (1, 3, 4))
    uvloop.run(main(_port, sys.argv[2], _jobs, _tokens))
