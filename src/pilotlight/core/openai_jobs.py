"""OpenAI calls carried as jobs: what the worker is given, and what its words mean to the caller.

For endpoints whose workers only take jobs (serverless-api.md §2.15, `/openai/{path…}`). The gateway's
`jobs.openai` is the shell around it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pilotlight.core.openai_routes import asks_to_stream

_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items = msgspec.json.Decoder(list[msgspec.Raw])

_VALUE_BYTES_MAX = 1024 * 1024
"""Larger values are no error objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the caller gets.

    Attributes:
        status: HTTP status.
        body: JSON.
    """

    status: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a worker said went wrong.

    Attributes:
        status: The HTTP status it named, else 500.
        message: In words.
    """

    status: int
    message: str


def job_input(route: str, body: bytes, *, single_pieces: bool = False) -> bytes:
    """The input of the job that carries a call.

    Args:
        route: Path behind `/openai`, such as `/v1/chat/completions`.
        body: The request's JSON, passed on as it is; empty for none.
        single_pieces: Ask the worker for a stream in items of one piece each, as somebody reads it live; for
            our own worker program (vllm-worker.md §1.9), as other programs may refuse what they do not know.
    """
    fields: dict[str, object] = {"openai_route": route}
    if body:
        fields["openai_input"] = msgspec.Raw(body)
    if single_pieces:
        fields["max_batch_size"] = 1
    return msgspec.json.encode(fields)


def wants_stream(body: bytes) -> bool:
    """Whether a JSON body asks for a stream, in whatever words (`openai_routes.asks_to_stream`).

    Raises:
        ValueError: Not a JSON object.
    """
    try:
        value = _objects.decode(body).get("stream")
        return value is not None and asks_to_stream(msgspec.json.decode(value))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError("request body must be a JSON object") from error


def stream_text(chunk: bytes) -> bytes:
    """The bytes to write for one stream chunk `{"output": …}`.

    Text is server-sent events already, whole ones or parts, and is written verbatim; anything else becomes
    the data of one event, out of the wrapper in which our worker program sends a success that owns an error.
    """
    value = _output_of(chunk)
    if value.startswith(b'"'):
        text: str = json.loads(value)
        return text.encode("utf-8", "replace")
    return b"data: " + (_passed_through(value) or value) + b"\n\n"


def whole_answer(output: bytes | None, chunks: Sequence[bytes]) -> Answer:
    """The answer for a completed job that was not streamed: the one value that the worker gave.

    Args:
        output: The job's output: the value, or a list of all it yielded; None or `[]` without aggregation.
        chunks: Its stream chunks, read when the output says nothing.
    """
    value = output or b"null"
    if value.startswith(b"["):
        items = _elements(value)
        value = items[0] if len(items) == 1 else value if items else b"null"
    if value == b"null" and chunks:
        values = [_output_of(chunk) for chunk in chunks]
        value = values[0] if len(values) == 1 else b"[" + b",".join(values) + b"]"
    wrapped = _passed_through(value)
    if wrapped is not None:
        return Answer(status=200, body=wrapped)
    return Answer(status=_status_of(value) or 200, body=value)


def failure_of(error: str) -> Failure:
    """What an error text of a job means: OpenAI's envelope, the worker library's, or just words."""
    try:
        envelope: Any = json.loads(error) if len(error) <= _VALUE_BYTES_MAX else None
    except (ValueError, RecursionError):
        envelope = None
    match envelope:
        case {"error": {"message": str(message)} as inner}:
            return Failure(status=_http_status(inner.get("code")) or 500, message=message)
        case {"error": str(message)} | {"error_message": str(message)} | {"message": str(message)}:
            return Failure(status=_http_status(envelope.get("code")) or 500, message=message)
        case _:
            return Failure(status=500, message=error)


def _passed_through(value: bytes) -> bytes | None:
    """The engine's own body out of our worker program's wrapper; None for all other values.

    A success that owns an error, such as a failed Responses object, travels wrapped (vllm-worker.md §3.6).
    """
    if not value.startswith(b"{") or b'"openai_passthrough"' not in value:
        return None
    try:
        fields = _objects.decode(value)
    except msgspec.DecodeError:
        return None
    if fields.keys() != {"response", "openai_passthrough"} or bytes(fields["openai_passthrough"]) != b"true":
        return None
    return bytes(fields["response"])


def _elements(array: bytes) -> list[bytes]:
    try:
        return [bytes(item) for item in _items.decode(array)]
    except msgspec.DecodeError:
        return [json.dumps(item).encode() for item in json.loads(array)]


def _output_of(chunk: bytes) -> bytes:
    try:
        return bytes(_objects.decode(chunk)["output"])
    except msgspec.DecodeError:
        # Halves of surrogate pairs are JSON to Python only; workers cut texts between them.
        return json.dumps(json.loads(chunk)["output"]).encode()


def _status_of(value: bytes) -> int | None:
    """The status that a value names when it is an error object, as vLLM's are."""
    if not value.startswith(b"{") or b'"error"' not in value or len(value) > _VALUE_BYTES_MAX:
        return None
    try:
        fields = json.loads(value)
    except (ValueError, RecursionError):
        return None
    match fields:
        case {"object": "error", "code": code} | {"error": {"code": code}}:
            return _http_status(code) or 500
        case {"error": {"message": _}} | {"type": "error", "error": _}:
            return 500
        case _:
            return None


def _http_status(code: object) -> int | None:
    if isinstance(code, str) and code.isascii() and code.isdigit():
        code = int(code)
    return code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code <= 599 else None
