"""What the data path must know of a request body, found without building Python objects of it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import cast

import msgspec

from pilotlight.core.openai_routes import REWRITTEN_FIELDS, STREAM_USAGE_ROUTES
from pilotlight.errors import InvalidInputError


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Asked(msgspec.Struct):
    stream: msgspec.Raw = msgspec.Raw(b"")
    stream_options: msgspec.Raw = msgspec.Raw(b"")


_Peek = msgspec.defstruct(
    "_Peek",
    [(name, msgspec.Raw, msgspec.field(default=msgspec.Raw(b""))) for name in sorted(REWRITTEN_FIELDS)],
    bases=(_Asked,),
)
_asked = msgspec.json.Decoder(_Asked)
_peek: msgspec.json.Decoder[_Asked] = msgspec.json.Decoder(_Peek)
_options = msgspec.json.Decoder(_StreamOptions)
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULLS = (b"", b"null")


@dataclass(frozen=True, slots=True)
class BodyPlan:
    """What to send upstream.

    Attributes:
        body: The body, with usage asked for where the client had not.
        stream: Whether the client asked for a stream.
        hide_usage: Whether the usage event must be taken out of the answer.
        rewrite: Whether the worker program's listener must rewrite it.
    """

    body: bytes
    stream: bool
    hide_usage: bool
    rewrite: bool


def plan_body(route: str, body: bytes) -> BodyPlan:
    """Look into a JSON body.

    Args:
        route: Path of the engine's route, such as `/v1/chat/completions`.
        body: The client's bytes.

    Raises:
        InvalidInputError: Not a JSON object.
    """
    peek = _look(body)
    stream = bytes(peek.stream) == b"true"
    rewrite = type(peek) is not _Asked and any(
        bytes(getattr(peek, name)) not in _NULLS for name in REWRITTEN_FIELDS
    )
    if not stream or route not in STREAM_USAGE_ROUTES:
        return BodyPlan(body=body, stream=stream, hide_usage=False, rewrite=rewrite)
    options = bytes(peek.stream_options)
    if options in _NULLS:
        return BodyPlan(body=_with_usage(body, options), stream=True, hide_usage=True, rewrite=rewrite)
    try:
        asked = _options.decode(options).include_usage
    except msgspec.DecodeError:
        # Not what it should be; the engine's own message says it better than ours could.
        return BodyPlan(body=body, stream=True, hide_usage=False, rewrite=rewrite)
    if asked:
        return BodyPlan(body=body, stream=True, hide_usage=False, rewrite=rewrite)
    return BodyPlan(body=_with_usage(body, options), stream=True, hide_usage=True, rewrite=rewrite)


def _look(body: bytes) -> _Asked:
    try:
        # The fields to be rewritten are rare, and looking for each of them is most of the work.
        return _peek.decode(body) if b"guided_" in body else _asked.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"request body must be a JSON object: {error}") from error
    except RecursionError as error:
        raise InvalidInputError("request body is nested too deeply") from error
    except msgspec.DecodeError as error:
        # Half of a surrogate pair is no text, but clients send it and Python's reader takes it.
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            values = {
                name: msgspec.Raw(json.dumps(value).encode()) for name, value in json.loads(body).items()
            }
            return cast("_Asked", msgspec.convert(values, _Peek))
        raise InvalidInputError(f"request body is not valid JSON: {error}") from error


def _with_usage(body: bytes, options: bytes) -> bytes:
    if not options:
        brace = body.index(b"{") + 1
        return b"".join((body[:brace], b'"stream_options":{"include_usage":true},', body[brace:]))
    whole = _objects.decode(body)
    merged = {} if options == b"null" else _objects.decode(options)
    merged["include_usage"] = msgspec.Raw(b"true")
    whole["stream_options"] = msgspec.Raw(msgspec.json.encode(merged))
    return msgspec.json.encode(whole)
