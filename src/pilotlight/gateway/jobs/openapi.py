"""The job API as OpenAPI: what `bootstrap` adds to the description that the management API serves.

Written by hand, because these routes are found by path segments and read their bodies as bytes; the fuzzing
test holds it against what is served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pilotlight.domain.batch import BatchStatus
from pilotlight.domain.job import JobStatus

_TAG = "jobs"
_BATCH_TAG = "batches"
_SECURITY: list[dict[str, list[str]]] = [{"HTTPBearer": []}]

_MS_MAX = 604_800_000


def _parameter(name: str, where: str, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": description,
        "schema": dict(schema),
    }


_ID = {"type": "string", "pattern": "^[A-Za-z0-9_-]+$", "maxLength": 100}
_ENDPOINT = _parameter("endpoint_id", "path", "The endpoint.", _ID)
_JOB = _parameter("job_id", "path", "The job, as `/run` answered it.", _ID)
_BATCH = _parameter("batch_id", "path", "The batch.", _ID)
_WAIT = _parameter(
    "wait",
    "query",
    "Milliseconds to wait; values out of range are clamped.",
    {"type": "integer", "minimum": 1_000, "maximum": 300_000},
)
_TTL = _parameter(
    "ttl",
    "query",
    "Let the record live at most this long from now, in milliseconds; it is never prolonged.",
    {"type": "integer", "minimum": 0, "maximum": _MS_MAX},
)
_TIMELINE = _parameter(
    "timeline",
    "query",
    "Add the job's story, and why it waits while it is queued.",
    {"type": "boolean"},
)
_CURSOR = _parameter(
    "cursor",
    "query",
    "Read the chunks from this number on without taking them away; the answer tells the next number.",
    {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
)
_IDEMPOTENCY = _parameter(
    "Idempotency-Key",
    "header",
    "A repetition with the same key and body finds the job of the first call.",
    {"type": "string", "pattern": "^[!-~]{1,255}$"},
)


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": dict(schema)}}


_ERRORS = {
    "400": "The request is malformed, too large, or not possible in this state.",
    "401": "No key, or an unknown one.",
    "403": "The key is for other endpoints.",
    "404": "No such endpoint, or no such thing at it.",
    "409": "In conflict with what is there.",
    "429": "A limit is reached; `Retry-After` says when to try again.",
    "503": "The server cannot store anything at the moment; nothing was done.",
}


def _operation(
    summary: str,
    answer: Mapping[str, Any],
    *,
    parameters: Sequence[Mapping[str, Any]] = (),
    body: Mapping[str, Any] | None = None,
    tag: str = _TAG,
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": _json(answer)}}
    for status, description in _ERRORS.items():
        responses[status] = {"description": description, "content": _json(_ref("JobApiError"))}
    operation = {
        "tags": [tag],
        "summary": summary,
        "security": _SECURITY,
        "parameters": list(parameters),
        "responses": responses,
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _both(operation: dict[str, Any]) -> dict[str, Any]:
    return {"get": operation, "post": operation}


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


_TEXT = {"type": "string"}
_S3_FIELDS = ("accessId", "accessSecret", "bucketName", "endpointUrl", "objectPath", "region")
_COUNT = {"type": "integer", "minimum": 0}
_ANY: dict[str, Any] = {}
_STATUS = {"type": "string", "enum": [str(each) for each in JobStatus]}


def _job_schemas() -> dict[str, Any]:
    policy = _object(
        {
            "executionTimeout": {"type": "integer", "minimum": 5_000, "maximum": _MS_MAX},
            "ttl": {"type": "integer", "minimum": 10_000, "maximum": _MS_MAX},
            "lowPriority": {"type": "boolean"},
        }
    )
    s3 = _object(
        dict.fromkeys(
            ("accessId", "accessSecret", "bucketName", "endpointUrl", "objectPath", "region"), _TEXT
        ),
        "accessId",
        "accessSecret",
        "bucketName",
        "endpointUrl",
    )
    return {
        "JobApiError": _object({"error": _TEXT, "detail": _TEXT, "code": _TEXT}, "error", "detail"),
        "JobSubmission": _object(
            {
                "input": _ANY,
                "webhook": {"type": "string", "format": "uri", "maxLength": 2048},
                "policy": policy,
                "s3Config": s3,
            },
            "input",
        ),
        "JobAccepted": _object({"id": _TEXT, "status": _STATUS}, "id", "status"),
        "Job": _object(
            {
                "id": _TEXT,
                "status": _STATUS,
                "delayTime": _COUNT,
                "executionTime": _COUNT,
                "output": _ANY,
                "error": _TEXT,
                "workerId": _TEXT,
                "retries": _COUNT,
                "timeline": {"type": "array", "items": {"type": "object"}},
                "waiting": {"type": "object"},
            },
            "id",
            "status",
        ),
    }


def _list_schemas() -> dict[str, Any]:
    return {
        "JobStream": _object(
            {
                "status": _STATUS,
                "stream": {"type": "array", "items": _object({"output": _ANY}, "output")},
                "cursor": _COUNT,
            },
            "status",
            "stream",
        ),
        "JobList": _object(
            {
                "requests": {
                    "type": "array",
                    "items": _object({"id": _TEXT, "status": _STATUS}, "id", "status"),
                },
                "cursor": {"type": ["string", "null"]},
            },
            "requests",
            "cursor",
        ),
        "QueueHealth": _object(
            {
                "jobs": _object(
                    dict.fromkeys(("completed", "failed", "inProgress", "inQueue", "retried"), _COUNT)
                ),
                "workers": _object(
                    dict.fromkeys(
                        ("idle", "initializing", "ready", "running", "throttled", "unhealthy"), _COUNT
                    )
                ),
            },
            "jobs",
            "workers",
        ),
    }


def _batch_schemas() -> dict[str, Any]:
    batch_counts = ("requestTotal", "requestInProgress", "requestCompleted", "requestFailed", "createdAt")
    return {
        "BatchRequest": _object({"input": _ANY}, "input"),
        "Batch": _object(
            {
                "id": _TEXT,
                "endpointId": _TEXT,
                "name": _TEXT,
                "status": {"type": "string", "enum": [str(each) for each in BatchStatus]},
                **dict.fromkeys(batch_counts, _COUNT),
            },
            "id",
            "endpointId",
            "status",
            *batch_counts,
        ),
    }


def _job_paths() -> dict[str, Any]:
    submission = _ref("JobSubmission")
    at_job = [_ENDPOINT, _JOB]
    runsync = _operation(
        "Queue a job and wait for its result.",
        _ref("Job"),
        parameters=[_ENDPOINT, _WAIT, _IDEMPOTENCY],
        body=submission,
    )
    return {
        "run": {
            "post": _operation(
                "Queue a job.", _ref("JobAccepted"), parameters=[_ENDPOINT, _IDEMPOTENCY], body=submission
            )
        },
        "runsync": {"post": runsync},
        "status/{job_id}": _both(
            _operation("Read a job.", _ref("Job"), parameters=[*at_job, _TTL, _TIMELINE])
        ),
        "status-sync/{job_id}": _both(
            _operation("Read a job when it has ended.", _ref("Job"), parameters=[*at_job, _WAIT])
        ),
        "stream/{job_id}": _both(
            _operation("Read new stream chunks.", _ref("JobStream"), parameters=[*at_job, _WAIT, _CURSOR])
        ),
        "cancel/{job_id}": {"post": _operation("Cancel a job.", _ref("Job"), parameters=at_job)},
        "retry/{job_id}": {
            "post": _operation("Run a failed job again.", _ref("JobAccepted"), parameters=at_job)
        },
        "purge-queue": {
            "post": _operation(
                "Remove all queued jobs.",
                _object({"removed": _COUNT, "status": _TEXT}, "removed", "status"),
                parameters=[_ENDPOINT],
            )
        },
        "health": {
            "get": _operation("Counters of jobs and workers.", _ref("QueueHealth"), parameters=[_ENDPOINT])
        },
        "requests": {"get": _list_operation()},
    }


def _list_operation() -> dict[str, Any]:
    return _operation(
        "List jobs, newest first.",
        _ref("JobList"),
        parameters=[
            _ENDPOINT,
            _parameter("status", "query", "Only those.", {"enum": [str(each) for each in JobStatus]}),
            _parameter("limit", "query", "Page size.", {"type": "integer", "minimum": 1, "maximum": 100}),
            _parameter("cursor", "query", "From the page before.", {"type": "string", "maxLength": 200}),
        ],
    )


def _batch_paths() -> dict[str, Any]:
    def batch(summary: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return _operation(summary, _ref("Batch"), parameters=[_ENDPOINT, _BATCH], body=body, tag=_BATCH_TAG)

    requests = {"type": "array", "items": _ref("BatchRequest"), "maxItems": 5_000}
    page = [
        _parameter("offset", "query", "Where the page begins.", {"type": "integer", "minimum": 0}),
        _parameter("limit", "query", "Page size.", {"type": "integer", "minimum": 1, "maximum": 100}),
    ]
    request = _parameter("request_id", "path", "A request of the batch.", _ID)
    return {
        "batch": {
            "get": _operation(
                "List batches, newest first.",
                _object({"batches": {"type": "array", "items": _ref("Batch")}}, "batches"),
                parameters=[_ENDPOINT],
                tag=_BATCH_TAG,
            ),
            "post": _operation(
                "Make a draft.",
                _object({"id": _TEXT, "status": _TEXT}, "id", "status"),
                parameters=[_ENDPOINT],
                body=requests,
                tag=_BATCH_TAG,
            ),
        },
        "batch/{batch_id}": {
            "get": batch("Read a batch."),
            "put": batch("Name a draft.", _object({"name": {"type": "string", "maxLength": 191}}, "name")),
        },
        "batch/{batch_id}/requests": {
            "get": _operation(
                "List the requests of a batch.",
                _object({"requests": {"type": "array"}, "total": _COUNT}, "requests", "total"),
                parameters=[_ENDPOINT, _BATCH, *page],
                tag=_BATCH_TAG,
            ),
            "post": batch("Add requests to a draft.", _object({"requests": requests}, "requests")),
        },
        "batch/{batch_id}/requests/{request_id}": {
            "delete": _operation(
                "Take a request out of a draft.",
                {"type": "object"},
                parameters=[_ENDPOINT, _BATCH, request],
                tag=_BATCH_TAG,
            )
        },
        "batch/{batch_id}/finalize": {"post": batch("Queue the requests of a draft.")},
        "batch/{batch_id}/cancel": {"post": batch("Cancel what is queued.")},
    }


def describe(description: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI description with the job API added to it.

    Args:
        description: The management API's own.
    """
    paths = {f"/v2/{{endpoint_id}}/{path}": item for path, item in (_job_paths() | _batch_paths()).items()}
    components = description.get("components", {})
    schemas = {**components.get("schemas", {}), **_job_schemas(), **_list_schemas(), **_batch_schemas()}
    return {
        **description,
        "paths": {**description.get("paths", {}), **paths},
        "components": {**components, "schemas": schemas},
    }
