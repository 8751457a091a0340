"""What a client may submit to `/run` and `/runsync` (serverless-api.md §2.3).

It is checked without building Python objects of the input, which is passed on as the bytes it came in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from pilotlight.errors import InvalidInputError

EXECUTION_TIMEOUT_MS = (5_000, 604_800_000)
TTL_MS = (10_000, 604_800_000)
WAIT_MS = (1_000, 300_000)
"""Ranges of policy values (§2.3) and of `wait` (§2.5, §2.7, §2.8)."""

_KNOWN = frozenset({"input", "webhook", "webhookV2", "policy", "s3Config"})
_NOT_YET = ("webhook", "webhookV2", "s3Config")

_NOT_JSON = "request body is not valid JSON"
_NO_INPUT = 'input is required; wrap the payload in {"input": …}'

_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A valid submission; None stands for "not given".

    Attributes:
        input: Raw JSON for the worker, byte for byte what the client sent.
        execution_timeout_ms: Running time allowed to one attempt.
        ttl_ms: Life from submission.
        low_priority: Served only when no normal job waits.
    """

    input: bytes
    execution_timeout_ms: int | None = None
    ttl_ms: int | None = None
    low_priority: bool = False


def parse_submission(body: bytes) -> Submission:
    """Check a body.

    Raises:
        InvalidInputError: Names the field, its value and what is legal.
    """
    fields = _fields(body)
    for name in _NOT_YET:
        if name in fields and fields[name] != b"null":
            raise InvalidInputError(f"{name} is not supported by this server yet; leave it out", field=name)
    job_input = fields.get("input")
    if job_input is None:
        if not fields.keys() <= _KNOWN:
            raise InvalidInputError(_NO_INPUT, field="input")
        # The Go client drops an empty input map while it serialises.
        job_input = b"{}"
    policy = _policy(fields.get("policy", b"null"))
    return Submission(
        input=job_input,
        execution_timeout_ms=_bounded(policy, "executionTimeout", EXECUTION_TIMEOUT_MS),
        ttl_ms=_bounded(policy, "ttl", TTL_MS),
        low_priority=_flag(policy, "lowPriority"),
    )


def parse_milliseconds(name: str, text: str | None, *, default: int, lowest: int, highest: int) -> int:
    """A query parameter in milliseconds; values outside the range are clamped silently (§2.5).

    Raises:
        InvalidInputError: Not an integer.
    """
    if text is None or not text:
        return default
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise InvalidInputError(
            f"{name} must be an integer number of milliseconds between {lowest} and {highest}, "
            f"got {text[:40]!r}",
            field=name,
        )
    return max(lowest, min(highest, int(text)))


def _fields(body: bytes) -> Mapping[str, bytes]:
    try:
        if not body.isascii():
            body.decode()
        return {name: bytes(value) for name, value in _objects.decode(body).items()}
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"request body must be a JSON object; {_NO_INPUT}") from error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _half_characters(body)
    except RecursionError as error:
        raise InvalidInputError("request body is nested too deeply") from error


def _half_characters(body: bytes) -> Mapping[str, bytes]:
    # The grammar of JSON allows an escaped half of a surrogate pair, such as a cut emoji, and clients send
    # them; msgspec refuses those, so what it refuses is read once more.
    try:
        value = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(_NOT_JSON) from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"request body must be a JSON object; {_NO_INPUT}")
    return {str(name): json.dumps(item).encode() for name, item in value.items()}


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _policy(raw: bytes) -> Mapping[str, object]:
    value = json.loads(raw)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidInputError("policy must be an object", field="policy")
    return value


def _bounded(policy: Mapping[str, object], name: str, limits: tuple[int, int]) -> int | None:
    value = policy.get(name)
    if value is None:
        return None
    lowest, highest = limits
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise InvalidInputError(
            f"policy.{name} must be between {lowest} and {highest}", field=f"policy.{name}"
        )
    return value


def _flag(policy: Mapping[str, object], name: str) -> bool:
    value = policy.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidInputError(f"policy.{name} must be true or false", field=f"policy.{name}")
    return value
