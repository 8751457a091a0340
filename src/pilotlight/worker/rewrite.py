"""Translates body fields that vLLM dropped and would now silently ignore (`vllm-worker.md` §1.7).

Pure. Shared by the job path and the HTTP listener, so both roads send the engine the same body. The gateway
looks at `core.openai_routes.REWRITTEN_FIELDS` to know which bodies need this.
"""

from __future__ import annotations

from typing import Any, Final

from pilotlight.core.openai_routes import REWRITTEN_FIELDS
from pilotlight.worker.errors import InputError

_MEMBERS: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
}
_CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "structural_tag", "json_object")
_BACKEND: Final = "guided_decoding_backend"


def rewrite_body(body: dict[str, Any]) -> dict[str, Any]:
    """The body to send to the engine; the given one when nothing needs translating.

    `guided_*` and `guided_decoding` become `structured_outputs`; a truthy `stream` becomes JSON `true`.

    Args:
        body: A request body in OpenAI's form. Not changed.

    Raises:
        InputError: Two constraints at once, old and new spelling together, or a member of the wrong type.
    """
    stream = body.get("stream")
    if stream and stream is not True:
        body = {**body, "stream": True}
    if REWRITTEN_FIELDS.isdisjoint(body):
        return body
    rest = {key: value for key, value in body.items() if key not in REWRITTEN_FIELDS}
    members = _guided_members(body)
    if not members:
        return rest
    _check_members(members, rest)
    return {**rest, "structured_outputs": members}


def ignored_fields(body: dict[str, Any]) -> tuple[str, ...]:
    """Fields of a body that are accepted and have no effect, so that the worker can say so once."""
    guided = body.get("guided_decoding")
    nested = isinstance(guided, dict) and guided.get("backend") is not None
    return (_BACKEND,) if body.get(_BACKEND) is not None or nested else ()


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
        if value is not None and not key.startswith("backend")
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
