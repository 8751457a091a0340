"""Identifiers and secrets, made from random bytes that the caller brings."""

from __future__ import annotations

import uuid

from pilotlight.domain.key import KEY_PREFIX

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_JOB_SUFFIX = "u1"


def short_id(entropy: bytes, length: int = 14) -> str:
    """A lower-case alphanumeric id of `length` characters (serverless-api.md §1).

    Args:
        entropy: At least `length` random bytes; one is used per character.
        length: Characters wanted.
    """
    assert len(entropy) >= length
    return "".join(_ALPHABET[byte % 36] for byte in entropy[:length])


def job_id(entropy: bytes, *, sync: bool, created_ms: int) -> str:
    """A job id: `{uuid-v4}-u1`, with the significant prefix `sync-` for /runsync (serverless-api.md §1).

    It has the form of a random UUID, but begins with the moment: so the newest ids are neighbours in the
    index of a database, and with a million jobs queued one more touches no page that the last one did not.
    At random, each would dirty a page of its own, at twice the price.

    Args:
        entropy: 16 random bytes, of which 74 bits are used.
        sync: Whether the job is a synchronous one.
        created_ms: When it was submitted.
    """
    number = uuid.UUID(bytes=created_ms.to_bytes(6, "big") + entropy[6:16], version=4)
    text = f"{number}-{_JOB_SUFFIX}"
    return f"sync-{text}" if sync else text


def api_key_secret(entropy: bytes) -> str:
    """A key secret `rpa_` plus 40 characters from 40 random bytes."""
    return KEY_PREFIX + short_id(entropy, 40).upper()


def batch_id(entropy: bytes) -> str:
    """A batch id `batch_…` from 20 random bytes (serverless-api.md §1)."""
    return f"batch_{short_id(entropy, 20)}"


def batch_request_id(entropy: bytes) -> str:
    """The id of a request in a batch, `req_…`, from 24 random bytes."""
    return f"req_{short_id(entropy, 24)}"
