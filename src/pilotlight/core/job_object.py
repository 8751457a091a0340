"""The job object that clients and webhooks get (serverless-api.md §2.9), from a job's record."""

from __future__ import annotations

import msgspec

from pilotlight.domain.job import Job


def job_object(job: Job) -> dict[str, object]:
    """The fields of a job object; keys that do not apply are left out. Raw JSON is passed on unread."""
    fields: dict[str, object] = {"id": job.id, "status": job.status}
    if job.delay_ms is not None:
        fields["delayTime"] = job.delay_ms
        fields["workerId"] = job.worker_id
    if job.status.terminal and job.execution_ms is not None:
        fields["executionTime"] = job.execution_ms
    if job.output is not None:
        fields["output"] = msgspec.Raw(job.output)
    if job.error is not None:
        fields["error"] = job.error
    if job.retries:
        fields["retries"] = job.retries
    return fields


def webhook_body(job: Job, job_input: bytes) -> bytes:
    """What a webhook is sent: the job object, the input and the URL (serverless-api.md §2.12)."""
    return msgspec.json.encode(
        {**job_object(job), "input": msgspec.Raw(job_input), "webhook": job.webhook or ""}
    )
