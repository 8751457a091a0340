"""Identifiers and secrets, made from random bytes that the caller brings."""

from __future__ import annotations

from pilotlight.domain.key import KEY_PREFIX

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_JOB_SUFFIX = "u1"

_UUID_FREE = ~(0xF << 76 | 0x3 << 62)
_UUID_FIXED = 0x4 << 76 | 0x2 << 62
"""Bits of a UUID that say nothing of its form, and those that say: version 4, of the usual variant."""


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
    # By hand, as `uuid.UUID` takes five times as long. The 4 is the version; the variant is 8, 9, a or b.
    digits = (created_ms << 80 | int.from_bytes(entropy[6:16], "big")) & _UUID_FREE | _UUID_FIXED
    text = f"{digits:032x}"
    form = f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}-{_JOB_SUFFIX}"
    return f"sync-{form}" if sync else form


def api_key_secret(entropy: bytes) -> str:
    """A key secret `rpa_` plus 40 characters from 40 random bytes."""
    return KEY_PREFIX + short_id(entropy, 40).upper()


def batch_id(entropy: bytes) -> str:
    """A batch id `batch_…` from 20 random bytes (serverless-api.md §1)."""
    return f"batch_{short_id(entropy, 20)}"


def batch_request_id(entropy: bytes) -> str:
    """The id of a request in a batch, `req_…`, from 24 random bytes."""
    return f"req_{short_id(entropy, 24)}"
