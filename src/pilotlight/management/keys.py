"""API keys: made, listed, changed, forgotten. For the management API and, for the first keys, `bootstrap`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pilotlight.domain.ids import api_key_secret, short_id
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.errors import ConflictError, InvalidInputError, NotFoundError
from pilotlight.management.directory import EndpointDirectory
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import KeyStore

_DEFAULT_NAMES = {Scope.ADMIN: "admin key", Scope.RUN: "run-only key"}


async def add_admin_key(store: KeyStore, name: str, *, clock: Clock, entropy: Callable[[int], bytes]) -> str:
    """Make an admin key where there is nobody yet who could ask for one; its secret."""
    secret = api_key_secret(entropy(40))
    key = ApiKey(
        id=short_id(entropy(10), 10),
        name=name,
        scope=Scope.ADMIN,
        hash=hash_secret(secret),
        created_ms=clock.now_ms(),
    )
    await store.add_key(key)
    return secret


class KeyService:
    """Keeps the keys in the store and the directory current.

    Args:
        store: Where keys are kept.
        directory: Where the gateway looks them up.
        clock: Time.
        entropy: Gives that many random bytes, such as `os.urandom`.
    """

    def __init__(
        self,
        *,
        store: KeyStore,
        directory: EndpointDirectory,
        clock: Clock,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._directory = directory
        self._clock = clock
        self._entropy = entropy
        self._changing = asyncio.Lock()

    async def keys(self) -> Sequence[ApiKey]:
        """All keys, oldest first."""
        return await self._store.keys()

    async def create(
        self,
        *,
        name: str | None = None,
        scope: Scope = Scope.RUN,
        endpoint_ids: Sequence[str] = (),
        terms: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is stored nowhere.

        Args:
            name: A label; None for a general one.
            scope: What it may do.
            endpoint_ids: Endpoints a run-only key may call.
            terms: Fields of `ApiKey` that are not as usual: heartbeats, priority, limits.

        Raises:
            InvalidInputError: An endpoint id that does not exist.
        """
        unknown = [name for name in endpoint_ids if self._directory.endpoint(name) is None]
        if unknown:
            known = ", ".join(endpoint.id for endpoint in self._directory.endpoints()[:10]) or "none"
            msg = f"endpoints names {', '.join(unknown)}, which does not exist; the ids are: {known}"
            raise InvalidInputError(msg, field="endpoints")
        secret = api_key_secret(self._entropy(40))
        key = ApiKey(
            id=short_id(self._entropy(14)),
            name=name or _DEFAULT_NAMES[scope],
            scope=scope,
            endpoint_ids=frozenset(endpoint_ids),
            hash=hash_secret(secret),
            created_ms=self._clock.now_ms(),
            **terms,
        )
        async with self._changing:
            await self._store.add_key(key)
            await self._directory.refresh()
        return key, secret

    async def update(self, key_id: str, changes: Mapping[str, Any]) -> ApiKey:
        """A key after some changes, which count for the next request.

        Args:
            key_id: Which.
            changes: Fields of `ApiKey`: name, heartbeats, priority, limits.

        Raises:
            NotFoundError: No such key.
        """
        async with self._changing:
            key = next((key for key in await self._store.keys() if key.id == key_id), None)
            if key is None:
                raise NotFoundError(f"key {key_id} does not exist")
            key = replace(key, **changes)
            await self._store.update_key(key)
            await self._directory.refresh()
        return key

    async def delete(self, key_id: str) -> None:
        """Forget a key; requests with it are refused from now on.

        Raises:
            NotFoundError: No such key.
            ConflictError: It is the last admin key, without which nobody could make another.
        """
        async with self._changing:
            keys = {key.id: key for key in await self._store.keys()}
            key = keys.get(key_id)
            if key is None:
                raise NotFoundError(f"key {key_id} does not exist")
            admins = [other for other in keys.values() if other.scope is Scope.ADMIN]
            if key.scope is Scope.ADMIN and len(admins) == 1:
                raise ConflictError(f"key {key_id} is the last admin key; make another one first")
            await self._store.delete_key(key_id)
            await self._directory.refresh()
