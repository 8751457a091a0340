"""Translates body fields that vLLM dropped and would now silently ignore (`vllm-worker.md` §1.7).

Pure. `translate_body` is shared by the job path and the HTTP listener, so both roads send the engine the same
body. The gateway looks at `core.openai_routes.REWRITTEN_FIELDS` to know which bodies need this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pilotlight.core.openai_routes import asks_to_stream
from pilotlight.worker.errors import InputError
from pilotlight.worker.parameters import GUIDED, Ignored
from pilotlight.worker.selection import Selection, plan_selection
from pilotlight.worker.upstream import CHAT_ROUTE, COMPLETION_ROUTE

_MEMBERS: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
}
_CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "structural_tag", "json_object")
_BACKEND: Final = "guided_decoding_backend"
_BACKEND_MEMBERS: Final = ("backend", "disable_fallback")
_CONSTRAINED_ROUTES: Final = (CHAT_ROUTE, COMPLETION_ROUTE, "/v1/responses")
"""Routes whose bodies have `structured_outputs`; others would overlook it."""


@dataclass(frozen=True, slots=True)
class Translation:
    """An OpenAI body as the engine should see it.

    Attributes:
        body: The body; the very same object when nothing had to be changed.
        selection: What to keep of the answer; None = all of it.
        ignored: Fields without effect.
    """

    body: dict[str, Any]
    selection: Selection | None = None
    ignored: tuple[Ignored, ...] = ()


def translate_body(path: str, body: dict[str, Any], *, strict: bool) -> Translation:
    """What to send the engine for an OpenAI body (§1.9).

    Args:
        path: Route without query.
        body: The caller's body. Not changed.
        strict: Leave alone what vLLM dropped (`OPENAI_STRICT_PASSTHROUGH`).

    Raises:
        InputError: The dropped fields contradict each other, or ask for what cannot be done on this route.
    """
    stream = body.get("stream")
    if stream is not True and asks_to_stream(stream):
        body = {**body, "stream": True}
    if strict:
        return Translation(body)
    ignored = ignored_guided(body)
    if path not in _CONSTRAINED_ROUTES and (members := _guided_members(body)):
        name = next(name for name in sorted(GUIDED - {_BACKEND}) if body.get(name) is not None)
        raise InputError(
            f"{name} has no effect on {path}, which knows no guided decoding; leave out {', '.join(members)}",
            param=name,
        )
    body = rewrite_guided(body)
    chat = path == CHAT_ROUTE
    if "best_of" not in body or not (chat or path == COMPLETION_ROUTE):
        return Translation(body, None, ignored)
    body, selection = plan_selection(body, chat=chat, streamed=body.get("stream") is True)
    return Translation(body, selection, ignored)


def rewrite_guided(body: dict[str, Any]) -> dict[str, Any]:
    """The body with `guided_*` and `guided_decoding` as `structured_outputs`; the given one without them.

    Args:
        body: A request body in OpenAI's form. Not changed.

    Raises:
        InputError: Two constraints at once, old and new spelling together, or a member of the wrong type.
    """
    if GUIDED.isdisjoint(body):
        return body
    rest = {key: value for key, value in body.items() if key not in GUIDED}
    members = _guided_members(body)
    if not members:
        return rest
    _check_members(members, rest)
    return {**rest, "structured_outputs": members}


def ignored_guided(body: dict[str, Any]) -> tuple[Ignored, ...]:
    """The choice of a backend, which is accepted and has no effect."""
    guided = body.get("guided_decoding")
    nested = isinstance(guided, dict) and guided.get("backend") is not None
    if body.get(_BACKEND) is None and not nested:
        return ()
    return (Ignored(_BACKEND, "is a start option of the engine now (GUIDED_DECODING_BACKEND)"),)


def _guided_members(body: dict[str, Any]) -> dict[str, Any]:
    """What the old fields ask for, under the names of `structured_outputs`; null counts as absent."""
    nested = body.get("guided_decoding")
    if nested is not None and not isinstance(nested, dict):
        raise InputError(
            f"guided_decoding must be an object, not {type(nested).__name__}", param="guided_decoding"
        )
    members = {
        key: value
        for key, value in (nested or {}).items()
        if value is not None and not key.startswith(_BACKEND_MEMBERS)
    }
    for old, new in _MEMBERS.items():
        value = body.get(old)
        if value is None:
            continue
        if new in members:
            raise InputError(f"{old} and guided_decoding.{new} are the same constraint; send one", param=old)
        members[new] = value
    return members


def _check_members(members: dict[str, Any], rest: dict[str, Any]) -> None:
    constraints = [name for name in _CONSTRAINTS if name in members and members[name] is not False]
    if len(constraints) > 1:
        raise InputError(
            f"only one guided decoding constraint can be given, got {', '.join(constraints)}",
            param=f"guided_{constraints[1]}",
        )
    if not constraints:
        raise InputError(
            f"guided decoding needs one of {', '.join(_CONSTRAINTS)}; got only {', '.join(sorted(members))}",
            param="guided_decoding",
        )
    if rest.get("structured_outputs") is not None:
        raise InputError("send either guided_* or structured_outputs, not both", param="structured_outputs")
    response_format = rest.get("response_format")
    if isinstance(response_format, dict) and response_format.get("type", "text") != "text":
        raise InputError("send either guided_* or response_format, not both", param="response_format")
