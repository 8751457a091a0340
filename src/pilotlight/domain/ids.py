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


def job_id(entropy: bytes, *, sync: bool) -> str:
    """A job id: `{uuid-v4}-u1`, with the significant prefix `sync-` for /runsync (serverless-api.md §1).

    Args:
        entropy: 16 random bytes.
        sync: Whether the job is a synchronous one.
    """
    text = f"{uuid.UUID(bytes=entropy[:16], version=4)}-{_JOB_SUFFIX}"
    return f"sync-{text}" if sync else text


def api_key_secret(entropy: bytes) -> str:
    """A key secret `rpa_` plus 40 characters from 40 random bytes."""
    return KEY_PREFIX + short_id(entropy, 40).upper()
