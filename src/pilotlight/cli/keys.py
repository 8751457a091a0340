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


class Scope(StrEnum):
    """What a key may do."""

    RUN = "run"
    ADMIN = "admin"


@app.callback(no_args_is_help=True, help="Create, list and revoke API keys.")
def group() -> None:
    """Create, list and revoke API keys."""


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
            heartbeat_s=heartbeat,
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
        ["NAME", "ID", "STATUS", "SCOPE", "ENDPOINTS", "HEARTBEAT", "CREATED"],
        [
            [
                key.get("name"),
                key.get("id"),
                key.get("status"),
                key.get("scope"),
                ", ".join(names.get(one, one) for one in key.get("endpoints") or []) or "all",
                _heartbeat(key),
                key.get("created_at"),
            ]
            for key in keys
        ],
    )


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


for _name, _function in (("create", create_command), ("ls", list_command), ("rm", remove_command)):
    app.command(_name, help=help_text(_function))(_function)
