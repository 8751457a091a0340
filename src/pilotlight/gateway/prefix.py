"""The hashes by which a prompt is recognised, from the bytes of a request body.

Nothing is decoded: prompts that begin alike are written alike by the same client, and another spelling of
the same text costs a hit, no more. `core.prefix_index` says what the hashes mean.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from pilotlight.core.prefix_index import BOUNDARIES

_FIELDS = {
    "/v1/chat/completions": ("tools", "messages"),
    "/v1/completions": ("prompt",),
    "/v1/messages": ("tools", "system", "messages"),
    "/v1/responses": ("tools", "instructions", "input"),
}
"""What the prompt is made of, in the order in which chat templates have it."""

PROMPT_ROUTES = frozenset(_FIELDS)
"""Routes whose requests have a prompt to recognise."""

_NONE = msgspec.Raw(b"")


class _Body(msgspec.Struct, gc=False):
    model: msgspec.Raw = _NONE
    cache_salt: msgspec.Raw = _NONE
    tools: msgspec.Raw = _NONE
    system: msgspec.Raw = _NONE
    instructions: msgspec.Raw = _NONE
    messages: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE


_body = msgspec.json.Decoder(_Body)
_STEPS = tuple(pairwise(BOUNDARIES))


def prompt_blocks(route: str, body: bytes) -> Sequence[int]:
    """Hashes of the beginnings of a prompt, as long as it has boundaries; the first is of its model alone.

    The same on every machine and in every process. Prompts for different models, LoRA adapters included, or
    with a different `cache_salt` have no hash in common.

    Args:
        route: Path of the engine's route, such as `/v1/chat/completions`.
        body: The request's body.

    Returns:
        Nothing for a route without prompts, and for a body that is not a JSON object.
    """
    fields = _FIELDS.get(route)
    if fields is None:
        return ()
    try:
        parts = _body.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return ()
    values = [memoryview(getattr(parts, name))[: BOUNDARIES[-1]] for name in fields]
    text = values[0] if len(values) == 1 else memoryview(b"".join(values))
    crc = zlib.crc32(parts.cache_salt, zlib.crc32(parts.model))
    blocks = [crc]
    for start, end in _STEPS[: bisect_right(BOUNDARIES, len(text)) - 1]:
        crc = zlib.crc32(text[start:end], crc)
        blocks.append(crc)
    return blocks
