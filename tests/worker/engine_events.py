"""Streams as the engine sends them, for tests of what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def event(data: dict[str, Any], name: str = "") -> str:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion_events(pieces: int, n: int = 1, *, prompt: int = 5) -> Iterator[str]:
    """A stream of `/v1/completions` with so many pieces in all, over n sequences in turn, one token each.

    The text of a piece is `sequence.number`. Usage is as vLLM gives it: per sequence, and totals at the end.
    """
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": "org/name"}
    counts = [pieces // n + (index < pieces % n) for index in range(n)]
    for number in range(max(counts)):
        for index in range(n):
            if number < counts[index]:
                last = number == counts[index] - 1
                choice = {"index": index, "text": f"{index}.{number}", "finish_reason": None}
                if last:
                    choice |= {"finish_reason": "length", "stop_reason": None}
                yield event({**head, "choices": [choice], "usage": usage(prompt, number + 1)})
    yield event({**head, "choices": [], "usage": usage(prompt, pieces)})
    yield "data: [DONE]\n\n"


def chat_events(texts: list[str], *, prompt: int = 5) -> Iterator[str]:
    """A stream of `/v1/chat/completions` with one sequence: the role, a piece per text, the totals."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "org/name"}
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    yield event({**head, "choices": [opening], "usage": usage(prompt, 0)})
    for number, text in enumerate(texts):
        last = number == len(texts) - 1
        choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        if last:
            choice |= {"finish_reason": "stop", "stop_reason": None}
        yield event({**head, "choices": [choice], "usage": usage(prompt, number + 1)})
    yield event({**head, "choices": [], "usage": usage(prompt, len(texts))})
    yield "data: [DONE]\n\n"
