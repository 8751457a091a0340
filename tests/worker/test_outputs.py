"""What the golden shapes in test_golden leave open: vllm-worker.md §1.10, §2.1, §3.5 to §3.7."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.input_settings import InputSettings, StreamFormat
from pilotlight.worker.inputs import plan_request
from pilotlight.worker.outputs import (
    make_shaper,
    pass_through_item,
    upstream_error_text,
)
from pilotlight.worker.sse import SseSplitter
from pilotlight.worker.upstream import UpstreamRequest


def request(**changes: Any) -> UpstreamRequest:
    given = {
        "method": "POST", "target": "/v1/completions", "native": True, "stream": True,
        "stream_format": StreamFormat.TOKENS, "batch": BatchSizes(50, 1, 3),
    }  # fmt: skip
    return UpstreamRequest(**(given | changes))


def items(upstream: UpstreamRequest, *events: dict[str, Any] | str) -> list[Any]:
    shaper = make_shaper(upstream)
    data = "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)
    out = [item for event in SseSplitter().feed(data.encode()) for item in shaper.feed(event)]
    return out + shaper.flush()


def text(index: int, piece: str, tokens: int, *, finish: str | None = None) -> dict[str, Any]:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    choice = {"index": index, "text": piece, "finish_reason": finish}
    return {"id": "cmpl-1", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def totals(prompt: int, completion: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"id": "cmpl-1", "choices": [], "usage": usage}


def test_token_stream_of_two_sequences_shares_one_schedule() -> None:
    """§3.2 with n = 2, §3.5: first flush after one piece; arrays of length n; cumulative usage."""
    upstream = request(choice_count=2, sequences_per_prompt=2)
    out = items(
        upstream,
        text(0, " Paris", 1), text(0, ",", 2), text(1, " Paris", 1), text(0, " the", 3, finish="stop"),
        text(1, "!", 2, finish="length"), totals(5, 5), "[DONE]",
    )  # fmt: skip
    assert [[choice["tokens"] for choice in item["choices"]] for item in out] == [
        [[" Paris"], []],
        [[",", " the"], [" Paris"]],
        [[], ["!"]],
    ]
    assert [item["usage"]["output"] for item in out] == [1, 4, 5]
    assert all(item["usage"]["input"] == 5 for item in out)
    assert out[1]["choices"][0]["finish_reason"] == "stop"
    assert "finish_reason" not in out[1]["choices"][1]
    assert out[2]["choices"][1]["finish_reason"] == "length"
    assert (out[0]["object"], out[0]["id"], out[0]["model"], out[0]["created"]) == (
        "tokens.chunk",
        "cmpl-1",
        "m",
        1,
    )
    assert "object" not in out[1]


def test_several_prompts_sum_their_prompt_tokens() -> None:
    upstream = request(choice_count=2, sequences_per_prompt=1)
    out = items(upstream, text(0, "a", 1), text(1, "b", 1))
    assert [item["usage"]["input"] for item in out] == [5, 10]


@pytest.mark.parametrize(
    ("body", "content_type", "item"),
    [
        (b'{"a": 1}', "application/json", {"a": 1}),
        (b"", "", {}),
        (b"# HELP x", "text/plain; version=0.0.4", "# HELP x"),
        (b"\x00\xff", "audio/wav", {"content_type": "audio/wav", "content_base64": "AP8="}),
        (
            b'{"status": "failed", "error": {"message": "x"}}',
            "application/json",
            {"response": {"status": "failed", "error": {"message": "x"}}, "openai_passthrough": True},
        ),
        (b'{"error": null}', "application/json", {"error": None}),
    ],
)
def test_pass_through_items(body: bytes, content_type: str, item: Any) -> None:
    """§3.6 and §1.10 rule 6."""
    assert pass_through_item(body, content_type) == item


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error": "Unauthorized"}', "Unauthorized"),
        (404, b'{"detail": "Not Found"}', "Not Found"),
        (500, b"Internal Server Error", "Internal Server Error"),
        (502, b"", "the engine answered 502"),
    ],
)
def test_other_error_bodies_get_an_envelope(status: int, body: bytes, message: str) -> None:
    error = json.loads(upstream_error_text(status, body))["error"]
    assert (error["message"], error["code"]) == (message, status)


def test_a_stream_of_several_sequences_to_several_prompts() -> None:
    """§1.3: prompt by prompt; usage comes per sequence, and its prompt counts once for each prompt."""
    job_input = {"prompt": ["a", "b"], "stream": True, "max_batch_size": 4, "min_batch_size": 4}
    request = plan_request({**job_input, "sampling_params": {"n": 2}}, InputSettings())
    pieces = [text(index, f"{index}.{number}", number + 1) for number in range(2) for index in range(4)]
    out = items(request, *pieces, totals(10, 8), "[DONE]")
    assert [[choice["tokens"] for choice in item["choices"]] for item in out] == [
        [[f"{index}.{number}"] for index in range(4)] for number in range(2)
    ]
    assert [choice["index"] for choice in out[0]["choices"]] == [0, 1, 2, 3]
    assert [(item["usage"]["input"], item["usage"]["output"]) for item in out] == [(10, 4), (10, 8)]


def test_token_ids_stand_beside_the_tokens() -> None:
    """`return_token_ids`: on a text with each choice, of a chat's prompt beside them."""
    first, second = text(0, "a", 1), text(0, "b", 2)
    first["choices"][0] |= {"token_ids": [5], "prompt_token_ids": [1, 2]}
    second["choices"][0] |= {"token_ids": [6, 7]}
    (item,) = items(request(batch=BatchSizes(9, 9, 1)), first, second)
    assert item["choices"] == [
        {"index": 0, "tokens": ["a", "b"], "token_ids": [5, 6, 7], "prompt_token_ids": [1, 2]}
    ]
    opening = {"index": 0, "delta": {"role": "assistant", "content": ""}}
    said = {"index": 0, "delta": {"content": "a"}, "token_ids": [5]}
    out = items(
        request(chat=True), {"id": "c", "prompt_token_ids": [1], "choices": [opening]}, {"choices": [said]}
    )
    assert (out[0]["prompt_token_ids"], out[0]["choices"][0]["token_ids"]) == ([1], [5])


def logged(piece: str, tokens: int) -> dict[str, Any]:
    event = text(0, piece, tokens)
    event["choices"][0]["logprobs"] = {"tokens": [piece], "token_logprobs": [-0.5]}
    return event


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"native": False, "stream_format": StreamFormat.SSE},
        {"native": False, "stream_format": StreamFormat.CHUNKS},
    ],
)
def test_items_are_cut_before_they_become_too_large(changes: dict[str, Any]) -> None:
    """§3.1: whatever number of pieces was asked for. Nothing is lost, and usage counts what was said."""
    upstream = request(batch=BatchSizes(10**9, 10**9, 1), **changes)
    events = [logged(f'"{number}ü\n', number + 1) for number in range(200)]
    shaper = make_shaper(upstream, item_bytes=2000)
    data = "".join(f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in events)
    early = [item for event in SseSplitter().feed(data.encode()) for item in shaper.feed(event)]
    out = early + shaper.flush()
    assert len(early) > 3
    assert max(len(msgspec.json.encode(item)) for item in out) <= 2000
    assert min(len(msgspec.json.encode(item)) for item in early) > 1000
    if upstream.native:
        assert [text for item in out for text in item["choices"][0]["tokens"]] == [
            one["choices"][0]["text"] for one in events
        ]
        said = 0
        for item in out:
            said += len(item["choices"][0]["tokens"])
            assert item["usage"]["output"] == said
    elif upstream.stream_format is StreamFormat.SSE:
        assert "".join(out) == data
        assert all(item.endswith("\n\n") for item in out)
    else:
        assert [chunk for item in out for chunk in item] == events


def test_an_early_cut_leaves_the_schedule_as_it_was() -> None:
    """As with a pause (§2.4): the next item has the size it was to have."""
    shaper = make_shaper(request(batch=BatchSizes(50, 3, 2)), item_bytes=700)
    events = [text(0, piece, at + 1) for at, piece in enumerate(["x" * 300, "y" * 300, "a", "b", "c", "d"])]
    data = "".join(f"data: {json.dumps(one)}\n\n" for one in events).encode()
    out = [item for event in SseSplitter().feed(data) for item in shaper.feed(event)]
    assert [len(item["choices"][0]["tokens"]) for item in out] == [1, 3]
