"""What the data path must know of a request body, found without building Python objects of it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import cast

import msgspec

from pilotlight.core.continuation import is_greedy, with_tokens
from pilotlight.core.openai_routes import REWRITTEN_FIELDS, STREAM_USAGE_ROUTES, asks_to_stream
from pilotlight.errors import InvalidInputError


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Asked(msgspec.Struct):
    stream: msgspec.Raw = msgspec.Raw(b"")
    stream_options: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: msgspec.Raw = msgspec.Raw(b"")
    max_completion_tokens: msgspec.Raw = msgspec.Raw(b"")
    max_output_tokens: msgspec.Raw = msgspec.Raw(b"")
    priority: msgspec.Raw = msgspec.Raw(b"")
    temperature: msgspec.Raw = msgspec.Raw(b"")
    user: msgspec.Raw = msgspec.Raw(b"")


_Peek = msgspec.defstruct(
    "_Peek",
    [
        (name, msgspec.Raw, msgspec.field(default=msgspec.Raw(b"")))
        for name in ("n", *sorted(REWRITTEN_FIELDS))
    ],
    bases=(_Asked,),
)
_asked = msgspec.json.Decoder(_Asked)
_peek: msgspec.json.Decoder[_Asked] = msgspec.json.Decoder(_Peek)
_options = msgspec.json.Decoder(_StreamOptions)
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULLS = (b"", b"null")
_DIGITS_MAX = 12
_USER_MAX = 512
_FALSES = (*_NULLS, b"false")


@dataclass(slots=True)
class BodyPlan:
    """What to send upstream, and what the body says about the request.

    Attributes:
        body: The body, with usage asked for where the client had not.
        stream: Whether the client asked for a stream.
        hide_usage: Whether the usage event must be taken out of the answer.
        rewrite: Whether the worker program's listener is to rewrite it.
        altered: Whether the answer would be another one without that.
        tokens_out_max: Most tokens of the answer; None where the body does not say.
        priority: Of the request, as vLLM has it: smaller comes first.
        user: The body field `user`; "" for none.
        survives: Whether the stream can go on with another worker (`core.continuation`).
        hide_tokens: Whether ids of tokens were asked for that, and the client must not see them.
    """

    body: bytes
    stream: bool = False
    hide_usage: bool = False
    rewrite: bool = False
    altered: bool = False
    tokens_out_max: int | None = None
    priority: int = 0
    user: str = ""
    survives: bool = False
    hide_tokens: bool = False


def plan_body(route: str, body: bytes, *, survivable: bool = False) -> BodyPlan:
    """Look into a JSON body.

    Args:
        route: Path of the engine's route, such as `/v1/chat/completions`.
        body: The client's bytes.
        survivable: Whether a stream may ask for what it needs to go on with another worker.

    Raises:
        InvalidInputError: Not a JSON object.
    """
    peek = _look(body)
    rewrite = altered = False
    if type(peek) is not _Asked:
        rare = [name for name in REWRITTEN_FIELDS if bytes(getattr(peek, name)) not in _NULLS]
        rewrite, altered = bool(rare), any(_alters(peek, name) for name in rare)
    stream = bytes(peek.stream)
    streamed = stream == b"true"
    if not streamed and stream not in _FALSES and _is_true(stream):
        # How the engine reads it is one thing; from here on there is one spelling.
        streamed, body = True, _with_member(body, "stream", b"true")
    hide_usage = survives = hide_tokens = False
    if streamed and route in STREAM_USAGE_ROUTES:
        options = bytes(peek.stream_options)
        hide_usage = options in _NULLS or _lacks_usage(options)
        if hide_usage:
            body = _with_usage(body, options)
        survives = survivable and not rewrite and is_greedy(bytes(peek.temperature))
        asked = with_tokens(body) if survives else None
        if asked is not None:
            body, hide_tokens = asked, True
    return BodyPlan(
        body,
        streamed,
        hide_usage,
        rewrite,
        altered,
        _whole_number(peek.max_completion_tokens or peek.max_tokens or peek.max_output_tokens),
        _whole_number(peek.priority) or 0,
        _text(peek.user),
        survives,
        hide_tokens,
    )


def _whole_number(value: msgspec.Raw) -> int | None:
    """A number of few digits; None for anything else, which the engine has its own words about."""
    text = bytes(value)
    return int(text) if text.removeprefix(b"-").isdigit() and len(text) <= _DIGITS_MAX else None


def _text(value: msgspec.Raw) -> str:
    """A short text as it is spelt; "" for anything else."""
    text = bytes(value)
    return text[1:-1].decode("utf-8", "replace") if text[:1] == b'"' and len(text) <= _USER_MAX else ""


def _is_true(stream: bytes) -> bool:
    try:
        return asks_to_stream(msgspec.json.decode(stream))
    except msgspec.DecodeError:
        return False


def _lacks_usage(options: bytes) -> bool:
    try:
        return not _options.decode(options).include_usage
    except msgspec.DecodeError:
        # Not what it should be; the engine's own message says it better than ours could.
        return False


def _alters(peek: _Asked, name: str) -> bool:
    """Whether a field that the engine would overlook asks for anything (vllm-worker.md §1.7)."""
    if name == "best_of":
        wanted = bytes(getattr(peek, "n"))  # noqa: B009 - a field that is made at run time
        return bytes(getattr(peek, name)) != (b"1" if wanted in _NULLS else wanted)
    return name != "guided_decoding_backend"


def _look(body: bytes) -> _Asked:
    try:
        # The fields to be rewritten are rare, and looking for each of them is most of the work.
        rare = b"guided_" in body or b"best_of" in body
        return _peek.decode(body) if rare else _asked.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"request body must be a JSON object: {error}") from error
    except RecursionError as error:
        raise InvalidInputError("request body is nested too deeply") from error
    except msgspec.DecodeError as error:
        # Half of a surrogate pair is no text, but clients send it and Python's reader takes it.
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            return cast("_Asked", msgspec.convert(_python_members(body), _Peek))
        raise InvalidInputError(f"request body is not valid JSON: {error}") from error


def _python_members(body: bytes) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in json.loads(body).items()}


def _with_usage(body: bytes, options: bytes) -> bytes:
    if not options:
        brace = body.index(b"{") + 1
        return b"".join((body[:brace], b'"stream_options":{"include_usage":true},', body[brace:]))
    merged = {} if options == b"null" else _objects.decode(options)
    merged["include_usage"] = msgspec.Raw(b"true")
    return _with_member(body, "stream_options", msgspec.json.encode(merged))


def _with_member(body: bytes, name: str, value: bytes) -> bytes:
    """An object with one member set to this JSON, all others as they came."""
    try:
        whole = _objects.decode(body)
    except msgspec.DecodeError:
        whole = _python_members(body)
    whole[name] = msgspec.Raw(value)
    return msgspec.json.encode(whole)
