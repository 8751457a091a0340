"""From what a user types, an id or a name, to an endpoint."""

from __future__ import annotations

import difflib
import re

from pilotlight.client import AccessError, PilotlightClient
from pilotlight.client.models import Endpoint
from pilotlight.errors import ConflictError, NotFoundError

CANDIDATES_MAX = 8
"""Endpoints that an error lists."""


def match_endpoint(endpoints: list[Endpoint], reference: str) -> Endpoint:
    """The endpoint with this id, or the only one with this name.

    Raises:
        NotFoundError: There is none; the message lists near ones.
        ConflictError: Several have this name, or it is one's name and another's id.
    """
    found = [one for one in endpoints if reference in {one["id"], one["name"]}]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConflictError(f"{reference!r} is ambiguous: {_list(found)}; use the id")
    if not endpoints:
        raise NotFoundError(
            f"no endpoint {reference!r}: there are none; make one with `pilotlight deploy MODEL`"
        )
    near = set(difflib.get_close_matches(reference, [one["name"] for one in endpoints], n=CANDIDATES_MAX))
    candidates = sorted(endpoints, key=lambda one: (one["name"] not in near, one["name"]))
    raise NotFoundError(f"no endpoint {reference!r}; there are: {_list(candidates)}")


def find_endpoint(client: PilotlightClient, reference: str) -> Endpoint:
    """The endpoint that the user means; asks the gateway for all of them."""
    return match_endpoint(client.endpoints(), reference)


def find_id(client: PilotlightClient, reference: str) -> str:
    """The id of the endpoint that the user means.

    A run-only key may not list endpoints; with one, an id is taken as it is.

    Raises:
        AccessError: The key may not list endpoints, and what the user typed does not look like an id.
    """
    try:
        return find_endpoint(client, reference)["id"]
    except AccessError:
        if re.fullmatch(r"[a-z0-9]{14}", reference):
            return reference
        raise


def _list(endpoints: list[Endpoint]) -> str:
    shown = [f"{one['name']} ({one['id']})" for one in endpoints[:CANDIDATES_MAX]]
    more = len(endpoints) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
