"""Whom a request is for, as far as the process that reads it first must know. Pure.

Asked by `gateway.app` and, where several processes share the port, by `gateway.fronts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import httptools

from pilotlight.domain.endpoint import Endpoint, EndpointKind

_SLASHES = re.compile(rb"/{2,}")


def single_slashes(path: bytes) -> bytes:
    """The path with each run of slashes made one."""
    return _SLASHES.sub(b"/", path)


def openai_call(
    target: bytes, headers: Sequence[tuple[bytes, bytes]], named_by_host: Callable[[bytes], str | None]
) -> tuple[str, bytes, bytes] | None:
    """Endpoint, path and query of a request below `/v2/{endpoint}/openai`; None for any other.

    Args:
        target: Of the request.
        headers: Names in lower case.
        named_by_host: The endpoint that a Host header names; such a request is for it, whatever its path.

    Raises:
        httptools.HttpParserError: The target is no URL.
    """
    if b"/openai" not in target:
        return None
    path, _, query = target.partition(b"?")
    if not path.startswith(b"/v2/") or b"//" in path or path.endswith(b"/"):
        path = single_slashes(httptools.parse_url(target).path or b"").rstrip(b"/")
    parts = path.split(b"/", 4)
    if len(parts) < 4 or parts[1] != b"v2" or parts[3] != b"openai":
        return None
    if any(name == b"host" and named_by_host(value) is not None for name, value in headers):
        return None
    return parts[2].decode("latin-1"), path, query


def endpoint_of_host(host: bytes, endpoint: Callable[[str], Endpoint | None]) -> str | None:
    """The endpoint that a Host header names by its first label, whatever its kind; None for any other.

    Args:
        host: The header's value.
        endpoint: Looks one up.
    """
    label, dot, _ = host.partition(b".")
    if not dot or len(label) != 14:
        return None
    found = endpoint(label.decode("latin-1").lower())
    return None if found is None else found.id


def is_served_directly(endpoint: Endpoint | None, *, leads: bool) -> bool:
    """Whether the engines of an endpoint are reached from this gateway, or would be if there were it.

    Args:
        endpoint: None for an unknown one.
        leads: Whether the workers are this gateway's.
    """
    if endpoint is not None and endpoint.kind is not EndpointKind.VLLM:
        return False
    # A fixed engine is reached from everywhere, other engines only from where the workers are.
    return endpoint is None or endpoint.revision.engine_url is not None or leads
