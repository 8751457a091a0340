"""`pilotlight starts` and `pilotlight usage`: what was, in times."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from pilotlight.cli.output import (
    EndpointArgument,
    JsonOption,
    connect,
    duration,
    note,
    print_json,
    print_lines,
    print_table,
)
from pilotlight.cli.targets import find_id, match_endpoint
from pilotlight.cli.waterfall import draw_starts

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def starts_command(
    endpoint: EndpointArgument,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many starts, latest first.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show the latest starts of an endpoint's workers.

    The first line says from where on the warm ladder the worker came, what became of the start, how long it
    took and what memory the worker holds. Each step has a bar that begins when the step was reached and ends
    with the next; all bars have one scale.

    Examples:
      pilotlight starts qwen
    """
    with connect() as client:
        starts = client.starts(find_id(client, endpoint), limit=limit)
    if as_json:
        print_json(starts)
        return
    if not starts:
        note("no worker of this endpoint has started yet")
        return
    print_lines(lambda width: draw_starts(starts, width))


def usage_command(
    endpoint: Annotated[
        str | None,
        typer.Argument(metavar="ENDPOINT", help="Only this endpoint's, by id or name.", show_default=False),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only the last 90s, 30m, 24h or 7d.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the time that workers have used.

    Times are sums of closed intervals; what a worker is doing now counts when its state changes. Time in
    which workers were frozen is shown, and not counted in the sum.

    Examples:
      pilotlight usage
      pilotlight usage qwen --since 24h --json
    """
    since_ms = None if since is None else round(time.time() * 1000) - parse_span_ms(since)
    with connect() as client:
        endpoints = client.endpoints()
        wanted = None if endpoint is None else match_endpoint(endpoints, endpoint)["id"]
        usage = client.usage(endpoint_id=wanted, since_ms=since_ms)
    if as_json:
        print_json(usage)
        return
    totals = usage.get("totals", [])
    if not totals:
        note("no usage yet")
        return
    names = {one["id"]: one["name"] for one in endpoints}
    rows: list[list[object]] = [
        [
            names.get(one["endpoint_id"], "(deleted)"),
            one["endpoint_id"],
            one["state"],
            duration(one["duration_ms"] / 1000),
        ]
        for one in totals
    ]
    # A frozen worker computes nothing, and its time is not billed as running.
    counted = [one for one in totals if one["state"] != "frozen"]
    name = "all" if len(counted) == len(totals) else "all but frozen"
    rows.append([name, " ", " ", duration(sum(one["duration_ms"] for one in counted) / 1000)])
    print_table(["ENDPOINT", "ID", "STATE", ">TIME"], rows)


def parse_span_ms(text: str) -> int:
    """A span such as `24h` in milliseconds.

    Raises:
        typer.BadParameter: It is not a positive number with one of the units s, m, h, d.
    """
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if not match or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a span like 90s, 30m, 24h or 7d", param_hint="--since")
    return int(match[1]) * _SECONDS[match[2]] * 1000
