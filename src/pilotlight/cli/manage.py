"""`pilotlight scale` and `pilotlight rm`: change an endpoint in place, and end it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pilotlight.cli.output import EndpointArgument, JsonOption, connect, note, print_fields, print_json
from pilotlight.cli.targets import find_endpoint

Min = Annotated[int | None, typer.Option("--min", min=0, help="Workers kept although idle.")]
Max = Annotated[int | None, typer.Option("--max", min=0, help="Most workers; 0 pauses the endpoint.")]
Idle = Annotated[
    int | None, typer.Option("--idle-timeout", min=1, help="Seconds without work before a worker ends.")
]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Requests that one worker serves at a time.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def scale_command(
    endpoint: EndpointArgument,
    min_: Min = None,
    max_: Max = None,
    idle_timeout: Idle = None,
    concurrency: Concurrency = None,
    as_json: JsonOption = False,
) -> None:
    """Change how many workers an endpoint may have.

    The change counts at once and makes no new revision; running workers stay.

    Examples:
      pilotlight scale qwen --min 1
      pilotlight scale qwen --max 0
    """
    given = {"min": min_, "max": max_, "idle_timeout_s": idle_timeout, "concurrency": concurrency}
    changes = {field: value for field, value in given.items() if value is not None}
    if not changes:
        raise typer.BadParameter(
            "nothing to change", param_hint="--min, --max, --idle-timeout, --concurrency"
        )
    with connect() as client:
        changed = client.revise_endpoint(find_endpoint(client, endpoint)["id"], changes)
    if as_json:
        print_json(changed)
        return
    fields = ("name", "id", "status", "min", "max", "idle_timeout_s", "concurrency")
    print_fields([(field, changed.get(field)) for field in fields])


def remove_command(endpoint: EndpointArgument, yes: Yes = False, as_json: JsonOption = False) -> None:
    """Delete an endpoint with its workers and jobs.

    Requests in flight are ended. Usage that was measured stays.

    Examples:
      pilotlight rm qwen
      pilotlight rm qwen --yes
    """
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("nobody is here to confirm; add --yes", param_hint="--yes")
    with connect() as client:
        found = find_endpoint(client, endpoint)
        workers = sum(found.get("workers", {}).values())
        if not yes:
            question = f"Delete {found['name']} ({found['id']}), {found.get('model')}, {workers} workers?"
            if not typer.confirm(question, err=True):
                note("nothing was deleted")
                raise typer.Exit(1)
        client.delete_endpoint(found["id"])
    if as_json:
        print_json({"id": found["id"], "name": found["name"], "deleted": True})
    else:
        note(f"deleted {found['name']} ({found['id']})")
