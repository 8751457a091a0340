"""Reports of the worker's stage to the platform, in order, without ever holding up the start.

`PILOTLIGHT_WORKER_STATE_URL` receives `{stage, detail, engine, listener, models, max_concurrency, versions}`;
without that variable nothing is sent. A report is tried again until the platform has it or says 4xx.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from pilotlight.domain.worker import Failure, Stage
from pilotlight.worker.http import AnswerTimeoutError, HttpClient
from pilotlight.worker.log import LogSink
from pilotlight.worker.platform import Backoff, Platform

REPORT_SECONDS: Final = 5.0
"""How long a platform may take to receive the failure of a worker that ends at once."""

LOG_AGAIN_SECONDS: Final = 10.0
"""A stage that is reported again and again, with its progress, becomes a line of the log no more often."""


async def report_failure(url: str, key: str, failure: Failure) -> None:
    """Tells the platform once of a failure before a life had begun; it may not be there.

    Args:
        url: The state URL.
        key: The worker's key.
        failure: What to tell.
    """
    detail = {"kind": failure.kind, "cause": failure.cause, "advice": failure.advice}
    body = msgspec.json.encode({"stage": str(Stage.FAILED), "detail": detail})
    try:
        client = HttpClient({"Authorization": key})
        try:
            await client.request(
                "POST", url, body=body, content_type="application/json", seconds=REPORT_SECONDS
            )
        finally:
            await client.close()
    except (AnswerTimeoutError, OSError, ValueError):
        # What is wrong stands on standard error, too.
        return


class StateReporter:
    """A queue of reports and the one task that sends them.

    Args:
        platform: Sends them; None where there is nobody to report to.
        log: Every stage is also one line of the log.
        on_unwanted: Called when the platform answers 410.
    """

    def __init__(self, platform: Platform | None, log: LogSink, on_unwanted: Callable[[], None]) -> None:
        self._platform = platform
        self._log = log
        self._on_unwanted = on_unwanted
        self._queue: deque[dict[str, Any]] = deque()
        self._last: dict[str, Any] | None = None
        self._logged = 0.0
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to send."""
        if self._platform is not None:
            self._task = asyncio.create_task(self._send_loop(self._platform), name="state-reports")

    def report(
        self,
        stage: Stage,
        detail: dict[str, Any],
        registration: dict[str, Any] | None = None,
        *,
        news: Mapping[str, Any] | None = None,
    ) -> None:
        """Queues one report.

        Args:
            stage: Stage reached.
            detail: Facts about it, such as `elapsed_ms`, or a failure's kind, cause and advice.
            registration: Addresses, models and limits, once they are known.
            news: Facts about this very moment, which `repeat` leaves out.
        """
        told = {**detail, **(news or {})}
        now = asyncio.get_running_loop().time()
        if self._last is None or self._last["stage"] != stage or now - self._logged >= LOG_AGAIN_SECONDS:
            self._logged = now
            self._log.event("worker.stage", stage=str(stage), **told)
        self._last = {"stage": str(stage), "detail": detail, **(registration or {})}
        self._put({**self._last, "detail": told})

    def repeat(self) -> None:
        """Sends the last report again: a platform that was away may have forgotten it."""
        if self._last is not None and not self._queue:
            self._put(self._last)

    async def flush(self, seconds: float) -> None:
        """Waits until everything was sent, for at most so long, and ends the task."""
        if self._task is None:
            return
        waiting = asyncio.create_task(self._empty.wait())
        await asyncio.wait({waiting}, timeout=seconds)
        for task in (waiting, self._task):
            task.cancel()
        await asyncio.gather(waiting, self._task, return_exceptions=True)

    def _put(self, report: dict[str, Any]) -> None:
        if self._platform is None:
            return
        # The first one may be on its way; of those that wait, the last of a stage says it all.
        if len(self._queue) > 1 and self._queue[-1]["stage"] == report["stage"]:
            self._queue.pop()
        self._queue.append(report)
        self._empty.clear()
        self._wake.set()

    async def _send_loop(self, platform: Platform) -> None:
        backoff = Backoff(0.1, 5.0)
        while True:
            while self._queue:
                status = await platform.report_state(msgspec.json.encode(self._queue[0]))
                if status is None or status >= 500 or status in {408, 429}:
                    await asyncio.sleep(backoff.next_delay())
                    continue
                backoff.reset()
                report = self._queue.popleft()
                if status == 410:
                    self._on_unwanted()
                elif status >= 400:
                    self._log.event("platform.state_refused", stage=report["stage"], status=status)
            self._empty.set()
            self._wake.clear()
            await self._wake.wait()
