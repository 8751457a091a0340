"""The calls of the job API (serverless-api.md §2), blocking and typed; a part of `PilotlightClient`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from pilotlight.client.errors import GatewayError
from pilotlight.client.models import FINAL_STATES, Chunks, Job, JobPage, JobStory, Purged
from pilotlight.client.transport import ANSWER_S, Query, Transport, path_part

JOB_WAIT_MS_MAX = 300_000
JOB_WAIT_MS_MIN = 1_000
"""Range of `wait` on the job API (serverless-api.md §2.5)."""


class JobCalls(Transport):
    """What can be asked about jobs."""

    def run(self, endpoint_id: str, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """A queued job.

        Args:
            endpoint_id: Where it goes.
            body: `input` and what §2.3 allows beside it.
            idempotency_key: Makes a repetition of the same call answer the same job.
        """
        path = f"/v2/{path_part(endpoint_id)}/run"
        return self._job("POST", path, body, headers=_idempotent(idempotency_key))

    def run_sync(
        self, endpoint_id: str, body: Mapping[str, Any], *, wait_ms: int, idempotency_key: str | None = None
    ) -> Job:
        """A job, finished or after `wait_ms` (1 000 to 300 000) still under way; else as `run`."""
        return self._job(
            "POST",
            f"/v2/{path_part(endpoint_id)}/runsync",
            body,
            query={"wait": wait_ms},
            headers=_idempotent(idempotency_key),
            read_s=wait_ms / 1000 + ANSWER_S,
        )

    def job(self, endpoint_id: str, job_id: str) -> Job:
        """A job as it stands."""
        return self._job("GET", f"/v2/{path_part(endpoint_id)}/status/{path_part(job_id)}")

    def job_story(self, endpoint_id: str, job_id: str) -> JobStory:
        """A job as it stands, with what has happened to it and why it waits."""
        path = f"/v2/{path_part(endpoint_id)}/status/{path_part(job_id)}"
        job = self._job("GET", path, query={"timeline": "true"})
        if not isinstance(job.get("timeline"), list):
            raise GatewayError(f"{self.url}{path} answered without a list `timeline`; is the gateway older?")
        return cast("JobStory", job)

    def jobs(
        self, endpoint_id: str, *, status: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> JobPage:
        """A page of an endpoint's jobs, newest first (§2.15).

        Args:
            endpoint_id: Whose.
            status: Only jobs in that state.
            limit: Most jobs on the page, 1 to 100.
            cursor: Where to go on, from the page before.
        """
        query: dict[str, str | int] = {"limit": limit}
        query |= {name: value for name, value in (("status", status), ("cursor", cursor)) if value}
        path = f"/v2/{path_part(endpoint_id)}/requests"
        page = self._json("GET", path, query=query)
        if not isinstance(page.get("requests"), list):
            raise GatewayError(f"{self.url}{path} answered without a list `requests`")
        return cast("JobPage", page)

    def wait_job(
        self,
        endpoint_id: str,
        job_id: str,
        *,
        on_change: Callable[[Job], None] | None = None,
        hold_ms: int = 20_000,
    ) -> Job:
        """A job once it is finished; a job's own time limits bound the wait.

        Args:
            endpoint_id: Where it was submitted.
            job_id: The job.
            on_change: Told of it each time the gateway answers that it is still under way.
            hold_ms: How long the gateway may hold each question.
        """
        path = f"/v2/{path_part(endpoint_id)}/status-sync/{path_part(job_id)}"
        while True:
            asked = time.monotonic()
            job = self._job("GET", path, query={"wait": hold_ms}, read_s=hold_ms / 1000 + ANSWER_S)
            if job["status"] in FINAL_STATES:
                return job
            if on_change is not None:
                on_change(job)
            # A gateway that answers at once must not be asked in a tight loop.
            time.sleep(max(0.0, min(hold_ms / 1000, 0.5) - (time.monotonic() - asked)))

    def stream_job(self, endpoint_id: str, job_id: str) -> Iterator[Chunks]:
        """What a job yields, as it yields it; the last item holds the final state and no chunk (§2.8)."""
        path = f"/v2/{path_part(endpoint_id)}/stream/{path_part(job_id)}"
        while True:
            asked = time.monotonic()
            answer = self._json("GET", path)
            chunks = answer.get("stream")
            if not isinstance(chunks, list) or not isinstance(answer.get("status"), str):
                raise GatewayError(f"{self.url}{path} answered without a list `stream` and a text `status`")
            yield cast("Chunks", answer)
            if answer["status"] in FINAL_STATES and not chunks:
                return
            if not chunks:
                time.sleep(max(0.0, 0.2 - (time.monotonic() - asked)))

    def cancel(self, endpoint_id: str, job_id: str) -> Job:
        """The job after cancelling it; a finished job is not changed."""
        return self._job("POST", f"/v2/{path_part(endpoint_id)}/cancel/{path_part(job_id)}")

    def retry(self, endpoint_id: str, job_id: str) -> Job:
        """A job that failed, queued again.

        Raises:
            InvalidInputError: It did not fail, or cannot run again.
        """
        return self._job("POST", f"/v2/{path_part(endpoint_id)}/retry/{path_part(job_id)}")

    def purge(self, endpoint_id: str) -> Purged:
        """Remove the endpoint's queued jobs; running ones go on (§2.15)."""
        return cast("Purged", self._json("POST", f"/v2/{path_part(endpoint_id)}/purge-queue"))

    def health(self, endpoint_id: str) -> dict[str, Any]:
        """Counters of jobs and workers (§2.15); wakes nothing."""
        return self._json("GET", f"/v2/{path_part(endpoint_id)}/health")

    def _job(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float = ANSWER_S,
    ) -> Job:
        job = self._json(method, path, body, query=query, headers=headers, read_s=read_s)
        if not isinstance(job.get("id"), str) or not isinstance(job.get("status"), str):
            raise GatewayError(f"{self.url}{path} answered without the `id` and `status` of a job")
        return cast("Job", job)


def _idempotent(key: str | None) -> Mapping[str, str] | None:
    return None if key is None else {"idempotency-key": key}
