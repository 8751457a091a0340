"""API keys: only a hash is stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

KEY_PREFIX = "rpa_"
"""Every key begins with it (serverless-api.md §10)."""


class Scope(StrEnum):
    """What a key may do: everything, or call named endpoints."""

    ADMIN = "admin"
    RUN = "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A stored key.

    Attributes:
        id: Public identifier, shown in lists and logs.
        name: Label chosen by its owner.
        scope: What it may do.
        endpoint_ids: Endpoints a run-only key may call; empty for admin keys.
        hash: SHA-256 of the secret, hex.
        created_ms: When it was made.
        heartbeat_s: Seconds between the comments that a stream gets while it waits for a worker; None for
            silence.
    """

    id: str
    name: str
    scope: Scope
    endpoint_ids: frozenset[str] = frozenset()
    hash: str
    created_ms: int = 0
    heartbeat_s: float | None = None

    def may_call(self, endpoint_id: str) -> bool:
        """Whether requests to that endpoint are allowed."""
        return self.scope is Scope.ADMIN or endpoint_id in self.endpoint_ids


def hash_secret(secret: str) -> str:
    """SHA-256 of a random secret, hex. Keys carry 190 bits of randomness, so no slow hash is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()
