"""Webhooks: one delivery per terminal state of a job that asked for it (serverless-api.md §2.12)."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookDelivery:
    """What is to be sent, and how it went so far.

    Attributes:
        id: Same for every try, for receivers that want to tell a repetition; `{job id}.{attempt}`.
        job_id: Which job.
        endpoint_id: Whose; decides the secret it is signed with.
        url: Where to.
        body: The job object with input and webhook, JSON.
        created_ms: When the job became terminal.
        tries: How often it was sent.
        next_ms: When to try next; None for a dead letter.
        last_status: HTTP status of the last answer; None when there was none.
        last_error: What went wrong last.
        size: Bytes of the body where a list leaves it out; None where `body` is given.
    """

    id: str
    job_id: str
    endpoint_id: str
    url: str
    body: bytes
    created_ms: int
    tries: int = 0
    next_ms: int | None = None
    last_status: int | None = None
    last_error: str = ""
    size: int | None = None

    @property
    def host(self) -> str:
        """The receiver's host in lower case, without port; a slow one holds up no other."""
        return host_of(self.url)


def host_of(url: str) -> str:
    """The host that a URL names, in lower case; "" when it names none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
