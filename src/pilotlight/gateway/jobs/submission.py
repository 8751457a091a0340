"""What a client may submit to `/run` and `/runsync` (serverless-api.md §2.3).

It is checked without building Python objects of the input, which is passed on as the bytes it came in.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

import msgspec

from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.errors import InvalidInputError

EXECUTION_TIMEOUT_MS = (5_000, 604_800_000)
TTL_MS = (10_000, 604_800_000)
WAIT_MS = (1_000, 300_000)
"""Ranges of policy values (§2.3) and of `wait` (§2.5, §2.7, §2.8)."""

KNOWN_FIELDS = frozenset({"input", "webhook", "webhookV2", "policy", "s3Config"})

URL_CHARS_MAX = 2_048
S3_CONFIG_BYTES_MAX = 16 * 1024

IDEMPOTENCY_KEY_CHARS_MAX = 255

ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
"""What ids of ours look like (§1); anything else is nobody's id, and need not trouble a store."""

_DIGITS_MAX = 4300
"""Digits of a whole number that Python's reader of JSON accepts (`sys.set_int_max_str_digits`)."""

_DECIMAL = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", re.ASCII)

_DIGITS = b"0123456789"
_LONG_NUMBER = re.compile(rb"[0-9]{4301}")

_LEVELS_MAX = 500
"""Levels of arrays and objects; arbitrary, far beyond what anybody means, and far below the thousand, less
the depth of its own calls, at which Python's reader of JSON gives up."""

_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
"""What a bracket adds to the depth, as a signed byte; and what is no bracket."""

_NULL = b"null"
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
        webhook: Whom to tell of the end.
        s3_config: Raw JSON for the worker; it holds secrets, so it is sealed before it is stored.
    """

    input: bytes
    execution_timeout_ms: int | None = None
    ttl_ms: int | None = None
    low_priority: bool = False
    webhook: str | None = None
    s3_config: bytes | None = field(default=None, repr=False)


def parse_submission(body: bytes) -> Submission:
    """Check a body.

    Raises:
        InvalidInputError: Names the field, its value and what is legal.
    """
    fields = _fields(body)
    job_input = fields.get("input")
    if job_input is None:
        if not fields.keys() <= KNOWN_FIELDS:
            raise InvalidInputError(_NO_INPUT, field="input")
        # The Go client drops an empty input map while it serialises.
        job_input = b"{}"
    check_readable(job_input)
    if len(fields) == 1 and "input" in fields:
        # As most are; to look for what is not there would take longer than the rest.
        return Submission(input=job_input)
    policy = _policy(fields.get("policy", _NULL))
    return Submission(
        input=job_input,
        execution_timeout_ms=_bounded(policy, "executionTimeout", EXECUTION_TIMEOUT_MS),
        ttl_ms=_bounded(policy, "ttl", TTL_MS),
        low_priority=_flag(policy, "lowPriority"),
        webhook=_webhook(fields),
        s3_config=_s3_config(fields.get("s3Config", _NULL)),
    )


NOT_FOR_QUEUES = "not allowed for QB API"
"""What a queue route of a load-balancing endpoint answers, with 400 (serverless-api.md §2.14)."""


def check_takes_jobs(endpoint: Endpoint) -> None:
    """Return when an endpoint has a queue. InvalidInputError when it has none."""
    if endpoint.kind is EndpointKind.LOAD_BALANCER:
        raise InvalidInputError(NOT_FOR_QUEUES)
    if endpoint.revision.engine_url is not None:
        raise InvalidInputError(
            f"endpoint {endpoint.id} has a fixed engine and no workers that take jobs; use its /openai routes"
        )


def parse_milliseconds(name: str, text: str | None, *, default: int, lowest: int, highest: int) -> int:
    """A query parameter in milliseconds; values outside the range are clamped silently (§2.5).

    Raises:
        InvalidInputError: Not a number.
    """
    if text is None or not text:
        return default
    if not _DECIMAL.fullmatch(text):
        raise InvalidInputError(
            f"{name} must be a number of milliseconds between {lowest} and {highest}, got {text[:40]!r}",
            field=name,
        )
    # JavaScript's client sends fractions when it was given seconds.
    return int(max(lowest, min(highest, float(text))))


def parse_number(name: str, text: str | None, *, default: int, lowest: int, highest: int) -> int:
    """A query parameter that is a whole number.

    Raises:
        InvalidInputError: Not an integer, or outside the range.
    """
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and lowest <= int(text) <= highest):
        raise InvalidInputError(
            f"{name} must be an integer between {lowest} and {highest}, got {text[:40]!r}", field=name
        )
    return int(text)


def parse_flag(name: str, text: str | None) -> bool:
    """A query parameter that is true or false; false when it is missing."""
    if text is None:
        return False
    if text not in {"true", "1", "false", "0"}:
        raise InvalidInputError(f"{name} must be true or false, got {text[:40]!r}", field=name)
    return text in {"true", "1"}


def parse_idempotency_key(raw: bytes | None) -> str | None:
    """The header `Idempotency-Key`; None when it was not sent.

    Raises:
        InvalidInputError: Empty, too long, or not visible ASCII.
    """
    if raw is None:
        return None
    if not 0 < len(raw) <= IDEMPOTENCY_KEY_CHARS_MAX or not all(0x21 <= byte <= 0x7E for byte in raw):
        raise InvalidInputError(
            f"Idempotency-Key must be 1 to {IDEMPOTENCY_KEY_CHARS_MAX} visible ASCII characters, "
            f"got {len(raw)} bytes",
            field="Idempotency-Key",
        )
    return raw.decode("ascii")


def fingerprint_of(route: str, body: bytes) -> bytes:
    """What tells a repeated submission from another one under the same idempotency key."""
    return hashlib.sha256(route.encode() + b"\0" + body).digest()


def parse_url(name: str, value: str) -> SplitResult:
    """A URL that we may call.

    Args:
        name: The field, for the message; the value is left out of it, since it may hold secrets.
        value: What the client sent.

    Raises:
        InvalidInputError: Not an http or https URL with a host, too long, or with a password in it.
    """
    legal = f"{name} must be an http or https URL with a host, of at most {URL_CHARS_MAX} ASCII characters"
    if not value or len(value) > URL_CHARS_MAX or not all(0x21 <= ord(mark) <= 0x7E for mark in value):
        raise InvalidInputError(legal, field=name)
    try:
        url = urlsplit(value)
        usable = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError as error:
        raise InvalidInputError(legal, field=name) from error
    if not usable:
        raise InvalidInputError(legal, field=name)
    if "@" in url.netloc:
        raise InvalidInputError(f"{name} must not hold a user name or password", field=name)
    return url


def _webhook(fields: Mapping[str, bytes]) -> str | None:
    # The second name exists only in the types of two clients; it means the same (§12 item 27).
    name = "webhook" if fields.get("webhook", _NULL) != _NULL else "webhookV2"
    raw = fields.get(name, _NULL)
    if raw == _NULL:
        return None
    value = _load(raw, name)
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} must be a string", field=name)
    parse_url(name, value)
    return value


def _s3_config(raw: bytes) -> bytes | None:
    """Checked without a word of what is in it: messages name fields only."""
    if raw == _NULL:
        return None
    if len(raw) > S3_CONFIG_BYTES_MAX:
        raise InvalidInputError(f"s3Config must be at most {S3_CONFIG_BYTES_MAX} bytes", field="s3Config")
    value = _load(raw, "s3Config")
    if not isinstance(value, dict):
        raise InvalidInputError("s3Config must be an object", field="s3Config")
    # What is in it is the worker's affair; an upload of ours says what it misses.
    return raw


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
        value = json.loads(body.decode(), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(_NOT_JSON) from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"request body must be a JSON object; {_NO_INPUT}")
    return {str(name): json.dumps(item).encode() for name, item in value.items()}


def check_readable(body: bytes) -> None:
    """Return when workers can read a body: no whole number is too long, nothing is nested too deeply.

    Python's reader of JSON, which is that of all worker libraries, refuses both, and with the one job all
    that it was handed together with.

    Args:
        body: Valid JSON.

    Raises:
        InvalidInputError: Says which.
    """
    check_levels(body)
    # Whoever has that many digits in a row has one of them at a multiple of that distance.
    marks = body[_DIGITS_MAX::_DIGITS_MAX]
    if not any(mark in _DIGITS for mark in marks):
        return
    for place in range(_DIGITS_MAX, len(body), _DIGITS_MAX):
        if body[place] in _DIGITS and _LONG_NUMBER.search(body, place - _DIGITS_MAX, place + _DIGITS_MAX + 1):
            break
    else:
        return
    # It may be text, which is not limited.
    try:
        json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"a whole number may have at most {_DIGITS_MAX} digits") from error


def check_levels(body: bytes) -> None:
    """Return when a JSON text is nested no deeper than workers can read. InvalidInputError when it is."""
    if len(body) <= 2 * _LEVELS_MAX or body.count(b"[") + body.count(b"{") <= _LEVELS_MAX:
        return
    # As many as that may stand side by side, or in texts.
    steps = array("b", _TEXT.sub(b"", body).translate(_STEPS, _NO_BRACKETS))
    if max(itertools.accumulate(steps), default=0) > _LEVELS_MAX:
        raise InvalidInputError(f"request body is nested too deeply; {_LEVELS_MAX} levels are legal")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is beyond what a number can be")
    return value


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _load(raw: bytes, name: str) -> object:
    """JSON that was checked already, as Python objects."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        # Digits without end, or levels: legal JSON that nothing here means.
        raise InvalidInputError(f"{name} cannot be read", field=name) from error


def _policy(raw: bytes) -> Mapping[str, object]:
    value = None if raw == _NULL else _load(raw, "policy")
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
