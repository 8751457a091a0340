"""A worker program for crash campaigns: speaks the worker protocol with the standard library only, so it starts fast.

Takes up to eight jobs at a time, streams a chunk for some, and answers each with its input and a token that no other
execution has, by which a result that was replaced is found out. Goes on when its gateway is gone, as workers do.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

WORKER = os.environ["RUNPOD_POD_ID"]
KEY = os.environ["RUNPOD_AI_API_KEY"]
TAKE = os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", WORKER).replace("/job-take/", "/job-take-batch/")
DONE = os.environ["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", WORKER)
STREAM = os.environ["RUNPOD_WEBHOOK_POST_STREAM"].replace("$RUNPOD_POD_ID", WORKER)
PING = os.environ["RUNPOD_WEBHOOK_PING"].replace("$RUNPOD_POD_ID", WORKER)

held: set[str] = set()


class Platform:
    """One connection that is made again when it breaks."""

    def __init__(self) -> None:
        self.connection: http.client.HTTPConnection | None = None

    def call(self, method: str, url: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of an answer; OSError or HTTPException when there is none."""
        parts = urlsplit(url)
        if self.connection is None:
            self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=90)
        try:
            self.connection.request(
                method,
                f"{parts.path}?{parts.query}",
                body=None if body is None else json.dumps(body),
                headers={"Authorization": KEY, "Content-Type": "application/json"},
            )
            answer = self.connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = None
            raise


def post(platform: Platform, url: str, body: Any) -> None:
    """Post with the tries of the reference worker (worker-protocol.md §3.4), only faster."""
    for pause in (0.1, 0.3, 0.0):
        try:
            status, _ = platform.call("POST", url, body)
        except (OSError, http.client.HTTPException):
            return
        if status < 500:
            return
        time.sleep(pause)


def ping() -> None:
    """Heartbeats for ever."""
    platform = Platform()
    while True:
        jobs = "%2C".join(sorted(held))
        named = f"&job_id={jobs}" if jobs else ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            platform.call("GET", f"{PING}{named}&runpod_version=0")
        time.sleep(1)


def work(platform: Platform, job: dict[str, Any]) -> None:
    """Run one job and post what comes of it."""
    job_id = job["id"]
    streamed = random.random() < 0.2
    if streamed:
        post(platform, STREAM.replace("$ID", job_id) + "&isStream=false", {"output": job["input"]})
    time.sleep(random.choice((0, 0, 0, 0.001, 0.01)))
    result = {"output": {"input": job["input"], "execution": uuid.uuid4().hex}}
    post(platform, f"{DONE.replace('$ID', job_id)}&isStream={str(streamed).lower()}", result)
    held.discard(job_id)


def main() -> None:
    """Take and work until told to end."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.Thread(target=ping, daemon=True).start()
    platform = Platform()
    while True:
        try:
            status, body = platform.call("GET", f"{TAKE}&batch_size=8&job_in_progress=0")
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
            continue
        if status != 200:
            # Not at once, as the reference worker does it (worker-protocol.md §1 rule 5): the machine is shared.
            time.sleep(0.05 if status == 204 else 0.2)
            continue
        jobs = json.loads(body)
        jobs = jobs if isinstance(jobs, list) else [jobs]
        held.update(job["id"] for job in jobs)
        for job in jobs:
            work(platform, job)


if __name__ == "__main__":
    sys.exit(main())
