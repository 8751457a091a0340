"""`pilotlight run`, `status`, `cancel` and `retry`: one job from a shell (serverless-api.md §2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pilotlight.cli.output import (
    EndpointArgument,
    JsonOption,
    connect,
    duration,
    note,
    print_fields,
    print_json,
    print_table,
    read_stdin,
    show_value,
    write,
)
from pilotlight.cli.progress import Waiting, watch_start
from pilotlight.cli.targets import find_id
from pilotlight.cli.timeline import draw_timeline, short_reason
from pilotlight.client import PilotlightClient
from pilotlight.client.jobs import JOB_WAIT_MS_MAX, JOB_WAIT_MS_MIN
from pilotlight.client.models import FINAL_STATES, Job

BODY_BYTES_MAX = 20 * 1024 * 1024
"""The gateway's largest body (serverless-api.md §2.13)."""

BODY_KEYS = frozenset({"input", "webhook", "webhookV2", "policy", "s3Config"})
"""What a whole request body may hold (serverless-api.md §2.3)."""

TTL_MS = (10_000, 604_800_000)
RUN_MS = (5_000, 604_800_000)
"""Ranges of a job's time to live and of its running time (serverless-api.md §2.3)."""

Webhook = Annotated[str | None, typer.Option(metavar="URL", help="Where the gateway posts the finished job.")]
IdempotencyKey = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Repeat a call with the same text to get the same job.")
]
LowPriority = Annotated[
    bool, typer.Option("--low-priority", help="Run it when no other job waits; starts no worker.")
]
Ttl = Annotated[
    int | None,
    typer.Option(metavar="MS", min=TTL_MS[0], max=TTL_MS[1], help="Longest life, queue and run."),
]
ExecutionTimeout = Annotated[
    int | None,
    typer.Option(metavar="MS", min=RUN_MS[0], max=RUN_MS[1], help="Longest run of one attempt."),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="Id of a job, as `pilotlight run` prints it.")
]


def run_command(
    endpoint: EndpointArgument,
    body: Annotated[
        str, typer.Argument(metavar="JSON", help="The job's input as JSON, @FILE, or - for standard input.")
    ],
    sync: Annotated[bool, typer.Option("--sync", help="Wait for the result and print it.")] = False,
    wait: Annotated[
        int,
        typer.Option(
            metavar="MS",
            min=JOB_WAIT_MS_MIN,
            max=JOB_WAIT_MS_MAX,
            help="With --sync: longest wait in milliseconds; the job goes on after it.",
        ),
    ] = 90_000,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print what the job yields while it runs.")
    ] = False,
    webhook: Webhook = None,
    idempotency_key: IdempotencyKey = None,
    low_priority: LowPriority = False,
    ttl: Ttl = None,
    execution_timeout: ExecutionTimeout = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a job to an endpoint.

    Prints the job's id and returns, unless --sync or --stream waits for what it gives. An object that holds
    `input` is taken as the whole request body, so that `policy` and `webhook` can be sent too.

    Examples:
      pilotlight run qwen '{"prompt": "Hello"}' --sync
      pilotlight run qwen @job.json --webhook https://example.com/hook --idempotency-key order-17
      pilotlight run qwen '{"messages": [{"role": "user", "content": "Hi"}], "stream": true}' --stream
    """
    if sync and stream:
        raise typer.BadParameter("choose one of --sync and --stream", param_hint="--stream")
    policy = {"lowPriority": low_priority or None, "ttl": ttl, "executionTimeout": execution_timeout}
    request = with_options(read_body(body), webhook=webhook, policy=policy)
    with connect() as client:
        endpoint_id = find_id(client, endpoint)
        if stream:
            _stream(client, endpoint_id, request, idempotency_key, as_json=as_json)
            return
        if not sync:
            job = client.run(endpoint_id, request, idempotency_key=idempotency_key)
            _print_submitted(endpoint, job, as_json=as_json)
            return
        with watch_start(client, endpoint_id):
            job = client.run_sync(endpoint_id, request, wait_ms=wait, idempotency_key=idempotency_key)
    if as_json:
        print_json(job)
    elif job["status"] in FINAL_STATES:
        _print_output(job)
    else:
        write(f"{job['id']}\n")
        note(f"still {job['status']}; go on with `pilotlight status {endpoint} {job['id']} --wait`")
    _end_with(job, as_json=as_json)


def status_command(
    endpoint: EndpointArgument,
    job_id: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job is finished.")] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Show what has happened to it, and why it waits.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a job.

    Results stay readable for half an hour, those of synchronous jobs for a minute.

    Examples:
      pilotlight status qwen 0b9b…-u1
      pilotlight status qwen 0b9b…-u1 --wait --json
      pilotlight status qwen 0b9b…-u1 --timeline
    """
    with connect() as client:
        endpoint_id = find_id(client, endpoint)
        if wait:
            with Waiting() as waiting:
                job = client.wait_job(endpoint_id, job_id, on_change=lambda now: waiting.say(now["status"]))
        else:
            job = client.job(endpoint_id, job_id)
        story = client.job_story(endpoint_id, job_id) if timeline else None
    if story is not None:
        job = story
    if as_json:
        print_json(job)
    else:
        times = {
            "delay": job.get("delayTime"),
            "execution": job.get("executionTime"),
        }
        fields: list[tuple[str, object]] = [("id", job["id"]), ("status", job["status"])]
        fields += [(name, duration(ms / 1000)) for name, ms in times.items() if ms is not None]
        fields += [(name, job[name]) for name in ("workerId", "retries") if name in job]
        if "error" in job:
            fields.append(("error", short_reason(job["error"])))
        if story is not None and "waiting" in story:
            fields.append(("waits", story["waiting"]["detail"]))
        print_fields(fields)
        if story is not None:
            print_table(["EVENT", ">AT", "|", ">ATTEMPT", "WORKER", "REASON"], draw_timeline(story))
        _print_output(job)
    if wait:
        _end_with(job, as_json=as_json)


def cancel_command(endpoint: EndpointArgument, job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Cancel a job.

    A queued job never starts, a running one is stopped; a finished one stays as it is.

    Examples:
      pilotlight cancel qwen 0b9b…-u1
    """
    with connect() as client:
        job = client.cancel(find_id(client, endpoint), job_id)
    if as_json:
        print_json(job)
    else:
        write(f"{job['id']}  {job['status']}\n")


def retry_command(endpoint: EndpointArgument, job_id: JobArgument, as_json: JsonOption = False) -> None:
    """Queue a failed job again.

    It keeps its id and its input. Its earlier result is gone, and it has a new time to live. Jobs that timed
    out can be queued again, too.

    Examples:
      pilotlight retry qwen 0b9b…-u1
    """
    with connect() as client:
        job = client.retry(find_id(client, endpoint), job_id)
    if as_json:
        print_json(job)
    else:
        write(f"{job['id']}  {job['status']}\n")


def read_body(text: str) -> dict[str, Any]:
    """The request body from what the user typed: JSON, `@FILE` or `-`.

    Raises:
        typer.BadParameter: The file cannot be read, it is too long, or it is not JSON.
    """
    source = "the argument"
    if text == "-":
        source, text = "standard input", read_stdin(BODY_BYTES_MAX, param_hint="JSON")
    elif text.startswith("@"):
        source = text[1:]
        try:
            with Path(source).open(encoding="utf-8") as file:
                text = file.read(BODY_BYTES_MAX + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"cannot read {source}: {error}", param_hint="JSON") from error
    if len(text.encode(errors="replace")) > BODY_BYTES_MAX:
        raise typer.BadParameter(f"{source} holds more than {BODY_BYTES_MAX} bytes", param_hint="JSON")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{source} is not JSON: {error}", param_hint="JSON") from error
    except RecursionError as error:
        raise typer.BadParameter(f"{source} is nested too deeply", param_hint="JSON") from error
    if isinstance(value, dict) and "input" in value and value.keys() <= BODY_KEYS:
        return value
    return {"input": value}


def with_options(
    request: dict[str, Any], *, webhook: str | None, policy: Mapping[str, object]
) -> dict[str, Any]:
    """A request body with what options add to it; an option wins over the body."""
    given = {name: value for name, value in policy.items() if value is not None}
    if webhook is not None:
        request = {**request, "webhook": webhook}
    if given:
        before = request.get("policy") or {}
        if not isinstance(before, dict):
            raise typer.BadParameter("its policy is not an object", param_hint="JSON")
        request = {**request, "policy": {**before, **given}}
    return request


def _stream(
    client: PilotlightClient,
    endpoint_id: str,
    request: dict[str, Any],
    idempotency_key: str | None,
    *,
    as_json: bool,
) -> None:
    job = client.run(endpoint_id, request, idempotency_key=idempotency_key)
    chunks: list[dict[str, Any]] = []
    with watch_start(client, endpoint_id) as stop_watching:
        for answer in client.stream_job(endpoint_id, job["id"]):
            job["status"] = answer["status"]
            if answer["stream"]:
                stop_watching()
            chunks += answer["stream"]
            if not as_json:
                for chunk in answer["stream"]:
                    write(f"{show_value(chunk.get('output'), indent=None)}\n")
    final = cast("Job", {**client.job(endpoint_id, job["id"])})
    if as_json:
        print_json({**final, "stream": chunks})
    _end_with(final, as_json=as_json)


def _print_submitted(endpoint: str, job: Job, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    write(f"{job['id']}\n")
    note(f"{job['status']}; see `pilotlight status {endpoint} {job['id']} --wait`")


def _print_output(job: Job) -> None:
    if "output" in job:
        write(f"{show_value(job['output'])}\n")


def _end_with(job: Job, *, as_json: bool) -> None:
    """End with exit code 1 where the job came to a bad end."""
    if job["status"] in FINAL_STATES - {"COMPLETED"}:
        reason = job.get("error") or "it gave no reason"
        message = f"job {job['id']} is {job['status']}: {reason}"
        note(json.dumps({"error": message}) if as_json else f"error: {message}")
        raise typer.Exit(1)
