"""`pilotlight jobs` and `purge`: all jobs of an endpoint (serverless-api.md §2.15)."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from pilotlight.cli.output import (
    EndpointArgument,
    JsonOption,
    connect,
    duration,
    note,
    print_json,
    print_table,
)
from pilotlight.cli.targets import find_id
from pilotlight.client.models import JobRow

PAGE_MAX = 100
"""Jobs that the gateway puts on one page."""

LIMIT_MAX = 10_000


class State(StrEnum):
    """States a job can be in (serverless-api.md §2.10)."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


def jobs_command(
    endpoint: EndpointArgument,
    status: Annotated[
        State | None, typer.Option(case_sensitive=False, help="Only jobs in this state.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=LIMIT_MAX, help="How many jobs, newest first.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List an endpoint's jobs.

    The newest come first. Finished jobs are listed for as long as their results are kept.

    Examples:
      pilotlight jobs qwen
      pilotlight jobs qwen --status FAILED --limit 100 --json
    """
    rows: list[JobRow] = []
    cursor: str | None = None
    with connect() as client:
        endpoint_id = find_id(client, endpoint)
        while len(rows) < limit:
            wanted = min(PAGE_MAX, limit - len(rows))
            page = client.jobs(endpoint_id, status=status, limit=wanted, cursor=cursor)
            rows += page["requests"]
            cursor = page.get("cursor")
            if cursor is None:
                break
    if as_json:
        print_json(rows)
        return
    if not rows:
        note("this endpoint has no such jobs" if status else "this endpoint has no jobs")
        return
    table = [
        [
            row["id"],
            row["status"],
            row["createdAt"],
            _time(row.get("delayTime")),
            _time(row.get("executionTime")),
            row.get("workerId"),
            row.get("retries") or None,
        ]
        for row in rows
    ]
    print_table(["JOB", "STATUS", "CREATED", ">DELAY", ">EXECUTION", "WORKER", ">RETRIES"], table)


def purge_command(
    endpoint: EndpointArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove all queued jobs of an endpoint.

    Running jobs go on. Removed jobs are gone: they cannot be read or retried. Their webhooks say CANCELLED.

    Examples:
      pilotlight purge qwen
      pilotlight purge qwen --yes
    """
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("nobody is here to confirm; add --yes", param_hint="--yes")
    with connect() as client:
        endpoint_id = find_id(client, endpoint)
        if not yes:
            queued = client.health(endpoint_id).get("jobs", {}).get("inQueue", 0)
            if not typer.confirm(f"Remove {queued} queued jobs of {endpoint}?", err=True):
                note("nothing was removed")
                raise typer.Exit(1)
        purged = client.purge(endpoint_id)
    if as_json:
        print_json(purged)
    else:
        note(f"removed {purged['removed']} queued jobs of {endpoint}")


def _time(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else duration(milliseconds / 1000)
