"""The gateway's view of endpoints and keys: read from the store once, kept current by those who change them.

Every request needs both, so they are looked up in dictionaries and not in the store. On SQLite one
process owns the store, and whoever changes an endpoint or key calls `refresh` before it answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey, hash_secret


class Source(Protocol):
    """What the directory reads: a store."""

    async def endpoints(self) -> Sequence[Endpoint]:
        """All living endpoints, oldest first."""
        ...

    async def keys(self) -> Sequence[ApiKey]:
        """All keys."""
        ...


async def _by_nobody() -> None:
    """Where nobody has copies."""


class Directory:
    """Living endpoints by id, keys by hash and by id.

    Attributes:
        epoch: Another number after each change.
        on_change: Called after each change.
        followed: Waits until everybody who has a copy has what was read last; called by `refresh`.
    """

    def __init__(self, store: Source) -> None:
        self._store = store
        self._endpoints: Mapping[str, Endpoint] = {}
        self._keys: Mapping[str, ApiKey] = {}
        self._keys_by_id: Mapping[str, ApiKey] = {}
        self.epoch = 0
        self.on_change: Callable[[], None] = lambda: None
        self.followed: Callable[[], Awaitable[None]] = _by_nobody
        self._refreshing = asyncio.Lock()

    async def refresh(self) -> None:
        """Read everything anew; the change is visible to the next request."""
        # One after the other: an older answer must not replace a newer one.
        async with self._refreshing:
            endpoints = await self._store.endpoints()
            self.replace(endpoints, await self._store.keys())
        await self.followed()

    def replace(self, endpoints: Sequence[Endpoint], keys: Sequence[ApiKey]) -> None:
        """Know these and no others from now on."""
        self._endpoints = {endpoint.id: endpoint for endpoint in endpoints}
        self._keys = {key.hash: key for key in keys}
        self._keys_by_id = {key.id: key for key in keys}
        self.touch()

    def touch(self) -> None:
        """Let everybody who remembers something by `epoch` ask again."""
        self.epoch += 1
        self.on_change()

    def endpoint(self, endpoint_id: str) -> Endpoint | None:
        """A living endpoint; None when unknown or deleted."""
        return self._endpoints.get(endpoint_id)

    def endpoints(self) -> Sequence[Endpoint]:
        """All living endpoints, oldest first."""
        return list(self._endpoints.values())

    def keys(self) -> Sequence[ApiKey]:
        """All keys."""
        return list(self._keys.values())

    def key_of_id(self, key_id: str) -> ApiKey | None:
        """The key with this public identifier; None when unknown."""
        return self._keys_by_id.get(key_id)

    def key(self, secret: str) -> ApiKey | None:
        """The key with this secret; None when unknown.

        The lookup is by SHA-256, so its time says nothing about stored secrets.
        """
        return self._keys.get(hash_secret(secret)) if secret else None

    def key_of_hash(self, secret_hash: str) -> ApiKey | None:
        """The key whose secret has this hash (`secret_hash_of`); None when unknown."""
        return self._keys.get(secret_hash)


class HeaderValues(Protocol):
    """Header lookup by lower-case name."""

    def get(self, name: bytes, default: bytes, /) -> bytes:
        """One value."""
        ...


def secret_of(headers: HeaderValues) -> str:
    """The secret a client sent, "" when none (serverless-api.md §10).

    Accepted are `Authorization: Bearer KEY`, the bare `Authorization: KEY`, and `x-api-key: KEY` as
    Anthropic's clients send it.

    Args:
        headers: Lower-case header names to values.
    """
    value = headers.get(b"authorization", b"").strip()
    if value:
        scheme, _, rest = value.partition(b" ")
        secret = rest.strip() if rest and scheme.lower() == b"bearer" else value
    else:
        secret = headers.get(b"x-api-key", b"").strip()
    return secret.decode("latin-1")


def secret_hash_of(headers: HeaderValues) -> str:
    """The hash of the secret a client sent, as it is stored with a key; "" when there is none."""
    secret = secret_of(headers)
    return hash_secret(secret) if secret else ""
