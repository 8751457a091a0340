"""`pilotlight keys`: who may call what."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pilotlight.cli.output import JsonOption, connect, note, print_json, print_table, write
from pilotlight.cli.root import help_text, new_app
from pilotlight.cli.targets import match_endpoint
from pilotlight.client.models import Key
from pilotlight.errors import ConflictError, NotFoundError

app = new_app()


class Priority(StrEnum):
    """How much of a crowded endpoint a key gets beside others."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Scope(StrEnum):
    """What a key may do."""

    RUN = "run"
    ADMIN = "admin"


PriorityOption = Annotated[
    Priority | None, typer.Option(help="Its part of a crowded endpoint, relative to other keys.")
]
RequestsOption = Annotated[int | None, typer.Option(min=0, help="Most requests in a minute; 0 for no limit.")]
TokensOption = Annotated[
    int | None,
    typer.Option(min=0, help="Most tokens in a minute, of prompts and completions; 0 for no limit."),
]
ConcurrentOption = Annotated[
    int | None, typer.Option(min=0, help="Most requests under way at once; 0 for no limit.")
]


@app.callback(no_args_is_help=True, help="Create, list, change and revoke API keys.")
def group() -> None:
    """Create, list, change and revoke API keys."""


def create_command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Label of the key.", show_default=False)
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="run: named endpoints only; admin: everything.  [default: run with --endpoint, else admin]"
        ),
    ] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="Id or name of an endpoint it may call. Repeatable.")
    ] = None,
    heartbeat: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=60,
            help="Seconds between comments on a stream that waits for a worker.  [default: none]",
            show_default=False,
        ),
    ] = None,
    priority: PriorityOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrent_max: ConcurrentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key and print it, this one time.

    The key alone goes to standard output, so that it can be piped to where it is needed.
    With --heartbeat, a stream that has to wait begins at once and says in comments, which clients
    pass over, how far the start is; what fails then fails by an event in the stream and not by a status.

    Examples:
      pilotlight keys create website --endpoint qwen
      pilotlight keys create ops --scope admin --json
      pilotlight keys create chat --endpoint qwen --heartbeat 2
      pilotlight keys create batch --endpoint qwen --priority low --tokens-per-minute 100000
    """
    named = endpoint or []
    chosen = scope or (Scope.RUN if named else Scope.ADMIN)
    if chosen is Scope.RUN and not named:
        raise typer.BadParameter("a run key needs the endpoints it may call", param_hint="--endpoint")
    if chosen is Scope.ADMIN and named:
        raise typer.BadParameter(
            "an admin key may call every endpoint; leave --endpoint out", param_hint="--endpoint"
        )
    with connect() as client:
        endpoints = client.endpoints() if named else []
        ids = [match_endpoint(endpoints, reference)["id"] for reference in named]
        key = client.create_key(
            name=name,
            scope=chosen.value,
            endpoint_ids=list(dict.fromkeys(ids)),
            terms=_named(
                heartbeat_s=heartbeat,
                priority=priority,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                concurrent_max=concurrent_max,
            ),
        )
    if as_json:
        print_json(key)
        return
    may = "may do everything" if chosen is Scope.ADMIN else f"may call {', '.join(named)}"
    note(f"key {key['id']} {may}; it is shown only now:")
    write(f"{key.get('key', '')}\n")


def list_command(as_json: JsonOption = False) -> None:
    """List keys, without their secrets.

    Examples:
      pilotlight keys ls
    """
    with connect() as client:
        keys = client.keys()
        names = {} if as_json else {one["id"]: one["name"] for one in client.endpoints()}
    if as_json:
        print_json(keys)
        return
    print_table(
        ["NAME", "ID", "STATUS", "SCOPE", "ENDPOINTS", "HEARTBEAT", "PRIORITY", "LIMITS", "CREATED"],
        [
            [
                key.get("name"),
                key.get("id"),
                key.get("status"),
                key.get("scope"),
                ", ".join(names.get(one, one) for one in key.get("endpoints") or []) or "all",
                _heartbeat(key),
                key.get("priority"),
                _limits(key),
                key.get("created_at"),
            ]
            for key in keys
        ],
    )


def update_command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id or name of a key (`pilotlight keys ls`).")],
    name: Annotated[str | None, typer.Option(help="Another label.", show_default=False)] = None,
    heartbeat: Annotated[
        float | None,
        typer.Option(min=0, max=60, help="Seconds between comments on a stream that waits; 0 for none."),
    ] = None,
    priority: PriorityOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrent_max: ConcurrentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change a key's name, priority or limits; what is not named stays as it is.

    The changes count for the next request. The key itself, and what it may call, stay.

    Examples:
      pilotlight keys update batch --priority low
      pilotlight keys update batch --requests-per-minute 600 --tokens-per-minute 0
    """
    changes = _named(
        name=name,
        heartbeat_s=heartbeat,
        priority=priority,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_max=concurrent_max,
    )
    if not changes:
        raise typer.BadParameter("name at least one thing to change", param_hint="--priority and others")
    with connect() as client:
        found = _match(client.keys(), key)
        changed = client.update_key(found["id"], changes)
    if as_json:
        print_json(changed)
    else:
        note(f"changed {changed['name']} ({changed['id']})")


def remove_command(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id or name of a key (`pilotlight keys ls`).")],
    as_json: JsonOption = False,
) -> None:
    """Revoke a key at once.

    Examples:
      pilotlight keys rm website
    """
    with connect() as client:
        found = _match(client.keys(), key)
        client.delete_key(found["id"])
    if as_json:
        print_json({"id": found["id"], "name": found["name"], "deleted": True})
    else:
        note(f"revoked {found['name']} ({found['id']})")


def _heartbeat(key: Key) -> str:
    seconds = key.get("heartbeat_s")
    return "off" if seconds is None else f"{seconds:g} s"


def _limits(key: Key) -> str:
    limits = (
        (key.get("requests_per_minute"), "requests/min"),
        (key.get("tokens_per_minute"), "tokens/min"),
        (key.get("concurrent_max"), "at once"),
    )
    return ", ".join(f"{limit} {unit}" for limit, unit in limits if limit is not None) or "none"


def _named(**values: str | float | None) -> dict[str, str | float | None]:
    """Those that were named; nothing instead of a limit of nothing."""
    return {name: value or None for name, value in values.items() if value is not None}


def _match(keys: list[Key], reference: str) -> Key:
    found = [key for key in keys if key["id"] == reference] or [
        key for key in keys if key["name"] == reference
    ]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{key['name']} ({key['id']})" for key in (found or keys)[:8])
    if found:
        raise ConflictError(f"{len(found)} keys are named {reference!r}: {listed}; use the id")
    raise NotFoundError(f"no key {reference!r}; there are: {listed or 'none'}")


for _name, _function in (
    ("create", create_command),
    ("ls", list_command),
    ("update", update_command),
    ("rm", remove_command),
):
    app.command(_name, help=help_text(_function))(_function)
