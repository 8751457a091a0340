"""What workers post: results, progress and stream chunks (worker-protocol.md §4), read leniently.

Bodies are untrusted and may be what only Python calls JSON. The strict reader copies nothing and is
tried first; the lenient one maps NaN and Infinity to null and mends broken characters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import msgspec

from pilotlight.errors import InvalidInputError

_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items = msgspec.json.Decoder(list[msgspec.Raw])
_USAGE_BYTES_MAX = 4 * 1024 * 1024
"""Usage is looked for in items up to this size; reading a larger one would hold up everybody else."""

_TOKENS_MAX = 2**63 - 1
"""What a store can keep; anything near it is nonsense."""

_FALSY = frozenset({b"null", b"false", b"0", b"0.0", b'""', b"[]", b"{}"})


class PostedResult(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a `job-done` post.

    Attributes:
        output: Raw JSON, None when absent.
        error: The handler's error text, untouched; None for a success.
        progress: Whether the body says that it is not final.
        replace_worker: Whether the worker asks to be replaced (`stopPod`).
        retryable: Whether the error says that another attempt may succeed (vllm-worker.md §3.7).
    """

    output: bytes | None = None
    error: str | None = None
    progress: bool = False
    replace_worker: bool = False
    retryable: bool = False


class ChunkTooLargeError(InvalidInputError):
    """A stream chunk over the limit that cannot be split."""


def parse_result(body: bytes) -> PostedResult:
    """Read the body of a `job-done` post.

    Raises:
        InvalidInputError: Not a JSON object, even leniently read.
    """
    fields = _fields(body)
    error = _error_text(fields.get("error", b"null"))
    return PostedResult(
        output=fields.get("output"),
        error=error,
        progress=fields.get("status") == b'"IN_PROGRESS"',
        replace_worker=fields.get("stopPod", b"null") not in _FALSY,
        retryable=error is not None and _retryable(error),
    )


def parse_chunk(body: bytes, *, limit: int) -> list[bytes]:
    """The chunks to store for one `job-stream` post: one, or several when a long string was split.

    Args:
        body: The post.
        limit: Bytes of JSON that one chunk may have (serverless-api.md §2.13).

    Raises:
        ChunkTooLargeError: Over the limit and not a string.
        InvalidInputError: Not a JSON object with the key `output`.
    """
    fields = _fields(body)
    output = fields.get("output")
    if output is None:
        raise InvalidInputError("a stream chunk must be a JSON object with the key output", field="output")
    # Sibling keys travel with the chunk; they get as much room again.
    if len(output) <= limit and sum(map(len, fields.values())) <= 2 * limit:
        return [_encode(fields)]
    if not output.startswith(b'"') or len(output) <= limit:
        raise ChunkTooLargeError(f"stream chunk exceeds {_megabytes(limit)} limit (got {len(body)} bytes)")
    pieces = [_encode({"output": piece}) for piece in _split(_text(output), limit)]
    if len(fields) > 1:
        last = {**fields, "output": bytes(_objects.decode(pieces[-1])["output"])}
        pieces[-1] = _encode(last)
    return pieces


def oversize(size: int, limit: int) -> str:
    """The error of a job whose result is too large (serverless-api.md §2.13)."""
    return f"output exceeds {_megabytes(limit)} limit (got {size} bytes)"


def usage_of(raw: bytes) -> tuple[int | None, int | None] | None:
    """Prompt and completion tokens that an output or a stream chunk reports; None when it says nothing.

    Looks into the last item of a list, into `output` of a chunk, and into the events of a chunk that is
    server-sent event text. The names are ours (`input`, `output`), OpenAI's and Anthropic's.
    """
    if b"usage" not in raw:
        return None
    try:
        last = bytes(_items.decode(raw)[-1]) if raw.startswith(b"[") else raw
        return _usage(json.loads(last)) if len(last) <= _USAGE_BYTES_MAX else None
    except (ValueError, IndexError, RecursionError):
        return None


def _usage(value: object) -> tuple[int | None, int | None] | None:
    match value:
        case [*_, last]:
            return _usage(last)
        case str():
            return _usage_of_events(value)
        case {"usage": dict() as usage}:
            return _tokens(usage, "input", "prompt_tokens", "input_tokens"), _tokens(
                usage, "output", "completion_tokens", "output_tokens"
            )
        case {"output": inner} | {"response": inner} | {"message": inner}:
            return _usage(inner)
        case _:
            return None


def _usage_of_events(text: str) -> tuple[int | None, int | None] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("data:") and '"usage"' in line:
            try:
                found = _usage(json.loads(line.removeprefix("data:")))
            except ValueError:
                continue
            if found is not None:
                return found
    return None


def _tokens(usage: Mapping[str, object], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _TOKENS_MAX:
            return value
    return None


def _fields(body: bytes) -> dict[str, bytes]:
    try:
        if not body.isascii():
            body.decode()
        return {name: bytes(value) for name, value in _objects.decode(body).items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _lenient_fields(body)


def _lenient_fields(body: bytes) -> dict[str, bytes]:
    try:
        value = json.loads(
            body.decode("utf-8", errors="replace"), parse_constant=lambda _: None, parse_float=_finite
        )
        if not isinstance(value, dict):
            raise InvalidInputError("the worker posted JSON that is not an object")
        return {name: json.dumps(item).encode() for name, item in value.items()}
    except (ValueError, RecursionError) as error:
        raise InvalidInputError("the worker posted a body that is not valid JSON") from error


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _error_text(raw: bytes) -> str | None:
    if raw in _FALSY:
        return None
    return _text(raw) if raw.startswith(b'"') else raw.decode()


def _text(raw: bytes) -> str:
    # Half characters cannot be stored or sent as UTF-8; pairs that were escaped apart are joined.
    text: str = json.loads(raw)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _retryable(error: str) -> bool:
    if not error.startswith("{") or "retryable" not in error:
        return False
    try:
        envelope = json.loads(error)
    except (ValueError, RecursionError):
        return False
    match envelope:
        case {"error": {"retryable": True}} | {"retryable": True}:
            return True
        case _:
            return False


def _split(text: str, limit: int) -> list[bytes]:
    encoded = msgspec.json.encode(text)
    if len(encoded) <= limit:
        return [encoded]
    half = len(text) // 2
    return [*_split(text[:half], limit), *_split(text[half:], limit)]


def _encode(fields: Mapping[str, bytes]) -> bytes:
    return msgspec.json.encode({name: msgspec.Raw(value) for name, value in fields.items()})


def _megabytes(limit: int) -> str:
    return f"{limit / 1_048_576:g} MB"
