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


class Priority(StrEnum):
    """How much of a crowded endpoint a key gets beside others."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


NORMAL_SHARE = 4
"""Of keys that say nothing."""

_SHARES = {Priority.LOW: 1, Priority.NORMAL: NORMAL_SHARE, Priority.HIGH: 16}


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
        priority: Its part of a crowded endpoint.
        requests_per_minute: Most requests in a minute; None for no limit, as of the next two.
        tokens_per_minute: Most tokens, of prompts and completions together.
        concurrent_max: Most requests under way at once.
    """

    id: str
    name: str
    scope: Scope
    endpoint_ids: frozenset[str] = frozenset()
    hash: str
    created_ms: int = 0
    heartbeat_s: float | None = None
    priority: Priority = Priority.NORMAL
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_max: int | None = None

    @property
    def share(self) -> int:
        """Its part of a crowded endpoint, relative to other keys."""
        return _SHARES[self.priority]

    @property
    def limited(self) -> bool:
        """Whether it has a limit of its own."""
        return (
            self.requests_per_minute is not None
            or self.tokens_per_minute is not None
            or self.concurrent_max is not None
        )

    def may_call(self, endpoint_id: str) -> bool:
        """Whether requests to that endpoint are allowed."""
        return self.scope is Scope.ADMIN or endpoint_id in self.endpoint_ids


def hash_secret(secret: str) -> str:
    """SHA-256 of a random secret, hex. Keys carry 190 bits of randomness, so no slow hash is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()
