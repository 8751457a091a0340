"""`pilotlight ls` and `pilotlight ps`: endpoints and their workers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from pilotlight.cli.output import JsonOption, connect, duration, note, print_json, print_table, size
from pilotlight.cli.progress import describe_failure, describe_stage
from pilotlight.cli.targets import match_endpoint
from pilotlight.client.models import Endpoint, Worker
from pilotlight.errors import NotFoundError


def list_command(as_json: JsonOption = False) -> None:
    """List endpoints.

    Examples:
      pilotlight ls
      pilotlight ls --json
    """
    with connect() as client:
        endpoints = client.endpoints()
    if as_json:
        print_json(endpoints)
        return
    if not endpoints:
        note("no endpoints; make one with `pilotlight deploy MODEL`")
        return
    print_table(
        ["NAME", "ID", "STATUS", "KIND", "MODEL OR COMMAND", "WORKERS", ">MAX", ">IDLE", ">REV"],
        [
            [
                one["name"],
                one["id"],
                one.get("status"),
                one.get("kind", "").replace("_", " "),
                shlex.join(one.get("command") or []) or one.get("model") or one.get("engine_url"),
                ", ".join(f"{count} {state}" for state, count in one.get("workers", {}).items()) or "0",
                one.get("max"),
                f"{one.get('idle_timeout_s')} s",
                one.get("version"),
            ]
            for one in endpoints
        ],
    )
    _note_failures(endpoints)


def _note_failures(endpoints: Sequence[Endpoint]) -> None:
    """Say which endpoints cannot start, why, and what to do."""
    for one in endpoints:
        if failure := one.get("failure"):
            again = f" Next attempt: {one['retry_at']}." if one.get("retry_at") else ""
            note(f"{one['name']} cannot start: {describe_failure(failure)}{again}")


def workers_command(
    endpoint: Annotated[
        str | None,
        typer.Argument(metavar="ENDPOINT", help="Only this endpoint's, by id or name.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List workers.

    Examples:
      pilotlight ps
      pilotlight ps qwen --json
    """
    found: list[tuple[Endpoint, Worker]] = []
    with connect() as client:
        endpoints = client.endpoints()
        endpoints = endpoints if endpoint is None else [match_endpoint(endpoints, endpoint)]
        for one in endpoints:
            try:
                found += [(one, worker) for worker in client.workers(one["id"])]
            except NotFoundError:
                # Deleted between the two questions.
                if endpoint is not None:
                    raise
    if as_json:
        print_json([describe_worker(one, worker) for one, worker in found])
        return
    if not found:
        note("no workers; they start when somebody asks")
        _note_failures(endpoints)
        return
    print_table(
        ["WORKER", "ENDPOINT", "KIND", "STATUS", "STAGE", ">REV", ">UP", ">BUSY", ">MEMORY", ">PID"],
        [
            [
                worker["id"],
                one["name"],
                one.get("kind", "").replace("_", " "),
                worker.get("state") or worker.get("status"),
                describe_stage(worker),
                f"{worker.get('version')}{' (old)' if worker.get('isStale') else ''}",
                duration(worker.get("uptimeSeconds") or 0),
                f"{worker.get('occupied', 0)}/{worker.get('capacity') or '?'}",
                size(worker.get("memory_bytes") or 0),
                worker.get("pid"),
            ]
            for one, worker in found
        ],
    )


def describe_worker(endpoint: Endpoint, worker: Worker) -> dict[str, Any]:
    """A worker for `--json`: `status` is our own word for its state, RunPod's is `runpod_status`."""
    return {
        **worker,
        "status": worker.get("state") or str(worker.get("status") or "").lower(),
        "runpod_status": worker.get("status"),
        "endpoint_id": endpoint["id"],
        "endpoint_name": endpoint["name"],
    }
