"""The gateway's view of endpoints and keys, as the management API needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey


class EndpointDirectory(Protocol):
    """Answers from memory; whoever changes the store calls `refresh` before it answers its caller."""

    async def refresh(self) -> None:
        """Read everything anew; the change is visible to the next request."""
        ...

    def endpoint(self, endpoint_id: str) -> Endpoint | None:
        """A living endpoint; None when unknown or deleted."""
        ...

    def endpoints(self) -> Sequence[Endpoint]:
        """All living endpoints, oldest first."""
        ...

    def key(self, secret: str) -> ApiKey | None:
        """The key with this secret; None when unknown."""
        ...
