"""A typed client of the gateway's HTTP API, for the command line and for programs.

`PilotlightClient` speaks the management API, the job API and the streaming part of the OpenAI route;
`find_access` finds the gateway of this machine and the key for it. Nothing here imports a store, a loop or
the gateway. Names are loaded when they are used: the gateway reads `discovery` and needs no HTTP client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilotlight.client.api import PilotlightClient
    from pilotlight.client.discovery import Access, find_access
    from pilotlight.client.errors import (
        AccessError,
        BusyError,
        GatewayError,
        GatewayUnreachableError,
        StreamError,
    )

__all__ = [
    "Access",
    "AccessError",
    "BusyError",
    "GatewayError",
    "GatewayUnreachableError",
    "PilotlightClient",
    "StreamError",
    "find_access",
]

_MODULES = {"PilotlightClient": "api", "Access": "discovery", "find_access": "discovery"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
