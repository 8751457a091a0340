"""The errors of load-balancing endpoints, to the letter of serverless-api.md §3."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pilotlight.core.affinity import HEADER
from pilotlight.domain.usage import Outcome
from pilotlight.gateway.errors import RateLimitedError
from pilotlight.gateway.jobs.submission import NOT_FOR_QUEUES


class Refusal(Exception):  # noqa: N818 - an answer to a client, not a fault of ours
    """A request that is answered by us and not by a worker.

    Attributes:
        status: HTTP status.
        body: JSON, as the contract has it.
        outcome: For the request log.
    """

    def __init__(
        self,
        status: int,
        error: str,
        *,
        outcome: Outcome = Outcome.REJECTED,
        reason: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(error)
        self.status = status
        self.outcome = outcome
        self.body = msgspec.json.encode({"error": error} | ({"reason": reason} if reason else {}))
        self._retry_after_s = retry_after_s

    def headers(self, worker_id: str) -> list[tuple[bytes, bytes]]:
        """Headers of the answer.

        Args:
            worker_id: Whom the request had reached; "" for nobody.
        """
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body))]
        headers += _optional(b"retry-after", self._retry_after_s)
        headers += _optional(b"www-authenticate", "Bearer" if self.status == 401 else None)
        headers += _optional(HEADER.encode(), worker_id or None)
        return headers

    @classmethod
    def unauthorized(cls) -> Refusal:
        """No key, or one that nobody knows."""
        return cls(401, "unauthorized")

    @classmethod
    def access_denied(cls) -> Refusal:
        """A key that may not call this endpoint (§10)."""
        return cls(403, "access denied")

    @classmethod
    def unknown_endpoint(cls) -> Refusal:
        """No endpoint of this id."""
        return cls(404, "endpoint not found")

    @classmethod
    def wrong_kind(cls) -> Refusal:
        """An endpoint whose workers take jobs."""
        return cls(400, NOT_FOR_QUEUES)

    @classmethod
    def no_workers(cls, outcome: Outcome, *, retry_after_s: int | None = None) -> Refusal:
        """No worker became routable in time, or none is going to."""
        return cls(400, "no workers available", outcome=outcome, retry_after_s=retry_after_s)

    @classmethod
    def worker_timeout(cls) -> Refusal:
        """The worker that a request is pinned to had no room in time."""
        return cls(400, "timed out waiting for worker", outcome=Outcome.EXPIRED, reason="worker_timeout")

    @classmethod
    def worker_gone(cls) -> Refusal:
        """The worker that a request is pinned to does not exist any more."""
        return cls(404, "affinity_worker_gone")

    @classmethod
    def rate_limited(cls, error: RateLimitedError) -> Refusal:
        """A key that asks for more than it may have at this moment."""
        return cls(429, str(error), retry_after_s=error.retry_after_s)

    @classmethod
    def too_large(cls) -> Refusal:
        """A body over the limit."""
        return cls(413, "payload too large")

    @classmethod
    def bad_gateway(cls) -> Refusal:
        """The worker could not be reached, or broke off."""
        return cls(502, "bad gateway", outcome=Outcome.FAILED)

    @classmethod
    def timed_out(cls) -> Refusal:
        """The request took too long."""
        return cls(504, "request timeout", outcome=Outcome.TIMED_OUT)

    @classmethod
    def broken(cls) -> Refusal:
        """A fault of ours."""
        return cls(500, "internal server error", outcome=Outcome.FAILED)


def _optional(name: bytes, value: object | None) -> Iterable[tuple[bytes, bytes]]:
    return [] if value is None else [(name, str(value).encode())]
