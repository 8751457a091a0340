"""What becomes of a webhook after a try, and how it is signed (serverless-api.md §2.12).

Asked by `loops.webhooks`, which sends, and by the management API, which sends dead letters again.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pilotlight.domain.webhook import WebhookDelivery

_ERROR_CHARACTERS_MAX = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """How one try went.

    Attributes:
        started_ms: When it began.
        status: HTTP status of the answer; None when there was none.
        error: Why there was none, or what was wrong with the address; "" with an answer.
        hopeless: Whether another try cannot end otherwise: the address is refused.
    """

    started_ms: int
    status: int | None = None
    error: str = ""
    hopeless: bool = False

    @property
    def delivered(self) -> bool:
        """Whether the receiver has it: any 2xx (serverless-api.md §12 item 25)."""
        return self.status is not None and 200 <= self.status < 300


def after_try(
    delivery: WebhookDelivery, tried: Try, *, now_ms: int, retry_delays_s: Sequence[int]
) -> WebhookDelivery | None:
    """The delivery as it is to be stored after a try; None when it is done and can be forgotten.

    The pause before the next try counts from the beginning of this one, so that tries lie at 0, +10 and
    +20 s (serverless-api.md §12 item 24) also when a receiver lets each of them time out.

    Args:
        delivery: As it was before the try.
        tried: How the try went.
        now_ms: The moment; a next try is never before it.
        retry_delays_s: Pauses before the second and each further try, in seconds.
    """
    if tried.delivered:
        return None
    tries = delivery.tries + 1
    next_ms = None
    if not tried.hopeless and tries <= len(retry_delays_s):
        next_ms = max(now_ms, tried.started_ms + retry_delays_s[tries - 1] * 1000)
    error = tried.error or f"the receiver answered {tried.status}"
    return replace(
        delivery,
        tries=tries,
        next_ms=next_ms,
        last_status=tried.status,
        last_error=error[:_ERROR_CHARACTERS_MAX],
    )


def revived(delivery: WebhookDelivery, *, now_ms: int) -> WebhookDelivery:
    """A dead letter as a delivery that is due at once and has all its tries again."""
    return replace(delivery, tries=0, next_ms=now_ms)


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """The value of `X-Webhook-Signature`: `v1=` and the HMAC-SHA256 of `timestamp.body` in hex.

    Args:
        secret: The endpoint's webhook secret, as it is shown to its owner.
        timestamp: The value of `X-Webhook-Timestamp`, Unix seconds.
        body: The request's body.
    """
    mac = hmac.new(secret.encode(), timestamp.encode() + b".", "sha256")
    mac.update(body)
    return f"v1={mac.hexdigest()}"
