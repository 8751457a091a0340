"""Answers of the job routes as JSON; outputs are copied as bytes and never parsed again."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from pilotlight.core.explain import TimelineEvent, Wait, timeline
from pilotlight.core.job_object import job_object
from pilotlight.domain.job import Job, JobCounts, JobStatus
from pilotlight.errors import InvalidInputError
from pilotlight.gateway.jobs.submission import ID


def submitted_view(job: Job) -> bytes:
    """The answer of `/run` (serverless-api.md §2.4)."""
    return msgspec.json.encode({"id": job.id, "status": job.status})


def job_view(job: Job) -> bytes:
    """The job object; keys that do not apply are left out (serverless-api.md §2.9)."""
    return msgspec.json.encode(job_object(job))


def timeline_view(job: Job, waiting: Wait | None) -> bytes:
    """The job object with its story, and with why it waits while it does (`?timeline=true`)."""
    view = job_object(job)
    view["timeline"] = [_event(event) for event in timeline(job)]
    if waiting is not None:
        view["waiting"] = {"reason": waiting.reason, "detail": waiting.detail, "ahead": waiting.ahead}
    return msgspec.json.encode(view)


def _event(event: TimelineEvent) -> dict[str, object]:
    view: dict[str, object] = {"event": event.event, "at": moment(event.at_ms)}
    optional = (("attempt", event.attempt), ("workerId", event.worker_id), ("reason", event.reason))
    view |= {name: value for name, value in optional if value is not None}
    return view


def moment(at_ms: int) -> str:
    """A moment as RFC 3339 in UTC, with milliseconds."""
    text = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def requests_view(jobs: Sequence[Job], position: tuple[int, str] | None) -> bytes:
    """The answer of `/requests` (serverless-api.md §2.15)."""
    requests = [_request(job) for job in jobs]
    cursor = None if position is None else encode_cursor(position)
    return msgspec.json.encode({"requests": requests, "cursor": cursor})


def _request(job: Job) -> dict[str, object]:
    view: dict[str, object] = {"id": job.id, "status": job.status, "createdAt": moment(job.created_ms)}
    if job.finished_ms is not None:
        view["completedAt"] = moment(job.finished_ms)
    if job.delay_ms is not None:
        view["delayTime"] = job.delay_ms
        view["workerId"] = job.worker_id
    if job.execution_ms is not None:
        view["executionTime"] = job.execution_ms
    view["retries"] = job.retries
    return view


def encode_cursor(position: tuple[int, str]) -> str:
    """A position in the list of jobs as a text that clients pass back unread."""
    return base64.urlsafe_b64encode(f"{position[0]}:{position[1]}".encode()).decode().rstrip("=")


def decode_cursor(text: str | None) -> tuple[int, str] | None:
    """The position that `encode_cursor` made a text of; None when there is none.

    Raises:
        InvalidInputError: It was not made by us.
    """
    if text is None or text == "":
        return None
    try:
        plain = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")
        created, _, job_id = plain.partition(":")
        if not (ID.fullmatch(job_id) and created.isdigit() and len(created) <= 15):
            raise ValueError(plain)
    except ValueError as error:
        raise InvalidInputError(
            f"cursor must be one that an earlier answer gave, got {text[:40]!r}", field="cursor"
        ) from error
    return int(created), job_id


def purged_view(removed: int) -> bytes:
    """The answer of `/purge-queue` (serverless-api.md §2.15)."""
    return msgspec.json.encode({"removed": removed, "status": "completed"})


def cancelled_view(job: Job) -> bytes:
    """The answer of `/cancel` (serverless-api.md §2.15)."""
    view: dict[str, object] = {"id": job.id, "status": job.status}
    if job.delay_ms is not None:
        view["delayTime"] = job.delay_ms
    if job.status.terminal and job.execution_ms is not None:
        view["executionTime"] = job.execution_ms
    return msgspec.json.encode(view)


def stream_view(status: JobStatus, chunks: Sequence[bytes]) -> bytes:
    """The answer of `/stream`: always exactly `status` and a list (serverless-api.md §2.8)."""
    return msgspec.json.encode({"status": status, "stream": [msgspec.Raw(chunk) for chunk in chunks]})


def replay_view(status: JobStatus, chunks: Sequence[bytes], cursor: int) -> bytes:
    """The answer of `/stream?cursor=N`: where to go on comes with it (serverless-api.md §12 item 13)."""
    stream = [msgspec.Raw(chunk) for chunk in chunks]
    return msgspec.json.encode({"status": status, "stream": stream, "cursor": cursor})


def taken_view(jobs: Sequence[Job], *, single: bool) -> bytes:
    """Jobs as a worker expects them (worker-protocol.md §3.1, §3.2); their `s3Config` is readable."""
    items = [_taken(job) for job in jobs]
    return msgspec.json.encode(items[0] if single and len(items) == 1 else items)


def _taken(job: Job) -> dict[str, object]:
    item: dict[str, object] = {"id": job.id, "input": msgspec.Raw(job.input)}
    if job.s3_config:
        item["s3Config"] = msgspec.Raw(job.s3_config)
    if job.batch_id is not None:
        item["batchId"] = job.batch_id
    return item


def health_view(
    counts: JobCounts,
    *,
    held: int,
    in_flight: int,
    workers: Mapping[str, int],
    ready: int,
) -> bytes:
    """The eleven counters of `/health` (serverless-api.md §2.15).

    Args:
        counts: The queue's counters.
        held: Requests on the data path that wait for a worker; they are in the queue, too.
        in_flight: Requests on the data path being served.
        workers: From `core.worker_counts`.
        ready: Workers that can take more.
    """
    return msgspec.json.encode(
        {
            "jobs": {
                "completed": counts.completed,
                "failed": counts.failed,
                "inProgress": counts.in_progress + in_flight,
                "inQueue": counts.queued + held,
                "retried": counts.retried,
            },
            "workers": {**workers, "ready": ready},
        }
    )
