"""Prompts are recognised by the bytes of their request, as far as they agree."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.prefix_index import BOUNDARIES
from pilotlight.gateway.prefix import PROMPT_ROUTES, prompt_blocks

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "You answer briefly. " * 60}


def chat(*turns: str, model: str = "m", **fields: Any) -> bytes:
    messages = [SYSTEM, *({"role": "user", "content": turn} for turn in turns)]
    return json.dumps({"messages": messages, "model": model, **fields}).encode()


def shared(first: bytes, second: bytes, route: str = CHAT) -> int:
    """How many blocks two bodies have in common; they agree on none after the first on which they do not."""
    pairs = list(zip(prompt_blocks(route, first), prompt_blocks(route, second), strict=False))
    agreed = [one == other for one, other in pairs]
    count = sum(agreed)
    assert all(agreed[:count])
    return count


def test_a_conversation_that_goes_on_begins_as_before() -> None:
    before = chat("x" * 700)
    after = chat("x" * 700, "y" * 3000)
    assert shared(before, after) == len(prompt_blocks(CHAT, before)) >= 7


def test_other_questions_share_the_system_prompt() -> None:
    assert shared(chat("x" * 2000), chat("y" * 2000)) == 1 + len(json.dumps(SYSTEM)) // 256


def test_what_is_not_the_prompt_changes_nothing() -> None:
    plain = prompt_blocks(CHAT, chat("hello"))
    assert prompt_blocks(CHAT, chat("hello", temperature=0.1, stream=True, user="me", n=2)) == plain


@pytest.mark.parametrize("other", [{"model": "adapter"}, {"cache_salt": "mine"}])
def test_another_model_or_salt_shares_nothing(other: dict[str, str]) -> None:
    """A LoRA adapter is a model, and its blocks in the engine's cache are its own."""
    assert shared(chat("hello"), chat("hello", **other)) == 0


def test_other_tools_share_the_model_only() -> None:
    """Templates put them in front of everything."""
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 500}}]
    assert shared(chat("hello"), chat("hello", tools=tools)) == 1


@pytest.mark.parametrize(
    ("route", "first", "second"),
    [
        ("/v1/completions", {"prompt": "a" * 600}, {"prompt": "a" * 600 + "b"}),
        ("/v1/completions", {"prompt": list(range(300))}, {"prompt": [*range(300), 7]}),
        (
            "/v1/responses",
            {"instructions": "a" * 500, "input": "b"},
            {"instructions": "a" * 500, "input": "c"},
        ),
        (
            "/v1/messages",
            {"system": "a" * 500, "messages": [{"content": "b"}]},
            {"system": "a" * 500, "messages": [{"content": "c"}]},
        ),
    ],
)
def test_every_route_with_a_prompt(route: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    assert route in PROMPT_ROUTES
    assert shared(json.dumps(first).encode(), json.dumps(second).encode(), route) >= 2


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/embeddings", chat("hello")),
        (CHAT, b""),
        (CHAT, b"[1]"),
        (CHAT, b'{"messages": ['),
        (CHAT, b'{"messages":' + b"[" * 100_000),
        (CHAT, b"\xff\xfe"),
    ],
)
def test_no_prompt_no_blocks(route: str, body: bytes) -> None:
    assert list(prompt_blocks(route, body)) == []


def test_a_short_prompt_is_its_model_and_a_long_one_has_an_end() -> None:
    assert len(prompt_blocks("/v1/completions", b'{"model":"m","prompt":"hi"}')) == 1
    assert prompt_blocks("/v1/completions", b"{}") == [0]
    endless = json.dumps({"prompt": "a" * 1_000_000}).encode()
    assert len(prompt_blocks("/v1/completions", endless)) == len(BOUNDARIES)


def test_the_same_in_every_process() -> None:
    """A block's hash is that of everything before its end, whoever makes it."""
    body = b'{"model":"m","prompt":"%s"}' % (b"a" * 300)
    assert prompt_blocks("/v1/completions", body) == [
        zlib.crc32(b'"m"'),
        zlib.crc32(b'"m"' + b'"' + b"a" * 255),
    ]


@given(st.text(max_size=900), st.text(max_size=900), st.text(max_size=900))
def test_prompts_share_what_their_texts_share(start: str, one: str, other: str) -> None:
    texts = [json.dumps(start + end).encode() for end in (one, other)]
    common = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    bodies = [b'{"prompt":' + text + b"}" for text in texts]
    assert shared(*bodies, "/v1/completions") == 1 + sum(0 < end <= common for end in BOUNDARIES)
