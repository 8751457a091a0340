"""Shapes of items and errors: vllm-worker.md §2.1, §2.2, §3.4 to §3.7."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.inputs import StreamFormat, UpstreamRequest
from pilotlight.worker.outputs import (
    error_text,
    make_shaper,
    native_item,
    pass_through_item,
    upstream_error_text,
)
from pilotlight.worker.sse import SseSplitter


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
    return out + shaper.close()


def text(index: int, piece: str, tokens: int, *, finish: str | None = None) -> dict[str, Any]:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    choice = {"index": index, "text": piece, "finish_reason": finish}
    return {"id": "cmpl-1", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def totals(prompt: int, completion: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"id": "cmpl-1", "choices": [], "usage": usage}


def test_native_completion_is_the_union_of_both_generations() -> None:
    """§3.4."""
    answer = {
        "id": "cmpl-1", "object": "text_completion", "model": "org/name", "extra": 1,
        "choices": [{"index": 0, "text": "full text", "finish_reason": "length", "logprobs": None}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 100, "total_tokens": 103},
    }  # fmt: skip
    item = native_item(answer, chat=False)
    assert item["choices"][0]["tokens"] == ["full text"]
    assert item["choices"][0]["text"] == "full text"
    assert item["usage"] == {
        "input": 3, "output": 100, "prompt_tokens": 3, "completion_tokens": 100, "total_tokens": 103,
    }  # fmt: skip
    assert (item["object"], item["extra"]) == ("text_completion", 1)


def test_native_chat_tokens_are_the_content_or_empty() -> None:
    answer = {"choices": [{"message": {"content": "hi"}}, {"message": {"content": None, "tool_calls": [1]}}]}
    item = native_item(answer, chat=True)
    assert [choice["tokens"] for choice in item["choices"]] == [["hi"], [""]]


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
    ("pieces", "sizes"), [(0, []), (1, [1]), (40, [1, 3, 9, 27]), (41, [1, 3, 9, 27, 1])]
)
def test_no_trailing_empty_item(pieces: int, sizes: list[int]) -> None:
    out = items(request(), *[text(0, "x", count + 1) for count in range(pieces)], totals(5, pieces), "[DONE]")
    assert [len(item["choices"][0]["tokens"]) for item in out] == sizes


def test_role_announcement_is_no_piece_and_empty_text_is() -> None:
    """§2.2."""
    upstream = request(target="/v1/chat/completions", chat=True)
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    empty = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
    out = items(upstream, role, empty)
    assert out[0]["choices"] == [{"index": 0, "tokens": [""], "finish_reason": "stop", "stop_reason": None}]


def test_reasoning_and_tool_calls_stand_beside_tokens() -> None:
    """§3.5, A7: they count as pieces, `tokens` is the answer only."""
    upstream = request(target="/v1/chat/completions", chat=True, batch=BatchSizes(10, 10, 1))
    events = [
        {"choices": [{"index": 0, "delta": {"reasoning": "hm"}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]},
        {"choices": [{"index": 0, "delta": {"content": "yes"}}]},
    ]
    (item,) = items(upstream, *events)
    assert item["choices"] == [
        {"index": 0, "tokens": ["yes"], "reasoning": ["hm"], "tool_calls": [{"index": 0}]}
    ]


def test_error_inside_a_token_stream_flushes_what_is_pending() -> None:
    """§3.7: mid-stream failure."""
    shaper = make_shaper(request(batch=BatchSizes(50, 50, 1)))
    splitter = SseSplitter()
    failure = {"error": {"message": "boom", "type": "InternalServerError", "code": 500}}
    data = f"data: {json.dumps(text(0, 'a', 1))}\n\ndata: {json.dumps(failure)}\n\ndata: [DONE]\n\n"
    out = [item for event in splitter.feed(data.encode()) for item in shaper.feed(event)] + shaper.close()
    assert [item["choices"][0]["tokens"] for item in out] == [["a"]]
    assert json.loads(shaper.error or "")["error"]["message"] == "boom"


def test_sse_items_are_whole_events_and_end_with_done() -> None:
    """§3.6: comments dropped, joining the items gives a valid body."""
    upstream = request(native=False, stream_format=StreamFormat.SSE)
    shaper = make_shaper(upstream)
    events = [f"data: {json.dumps(text(0, str(number), number + 1))}\n\n" for number in range(5)]
    data = ": ping\n\n" + "".join(events) + "data: [DONE]\n\n"
    out = [
        item for event in SseSplitter().feed(data.encode()) for item in shaper.feed(event)
    ] + shaper.close()
    assert [item.count("data: {") for item in out] == [1, 3, 1]
    assert "".join(out) == "".join(events) + "data: [DONE]\n\n"


def test_chunk_lists() -> None:
    """§3.6, RAW_OPENAI_OUTPUT=0: parsed objects, no [DONE]; named events keep their name."""
    upstream = request(native=False, stream_format=StreamFormat.CHUNKS, batch=BatchSizes(10, 10, 1))
    (item,) = items(upstream, text(0, "a", 1), text(0, "b", 2), "[DONE]")
    assert [chunk["choices"][0]["text"] for chunk in item] == ["a", "b"]
    shaper = make_shaper(upstream)
    (event,) = SseSplitter().feed(b'event: message_start\ndata: {"a": 1}\n\n')
    assert shaper.feed(event) + shaper.close() == [[{"event": "message_start", "data": {"a": 1}}]]


def test_error_inside_a_raw_stream_is_forwarded_and_noted() -> None:
    shaper = make_shaper(request(native=False, stream_format=StreamFormat.SSE))
    (event,) = SseSplitter().feed(b'data: {"error": {"message": "boom", "code": 500}}\n\n')
    assert "boom" in "".join(shaper.feed(event) + shaper.close())
    assert shaper.error is not None


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


def test_errors_are_text_of_an_openai_envelope() -> None:
    """§3.7."""
    assert json.loads(error_text(400, "no", param="n")) == {
        "error": {"message": "no", "type": "BadRequestError", "param": "n", "code": 400, "retryable": False}
    }
    assert json.loads(error_text(503, "x", retryable=True))["error"]["retryable"] is True
    assert json.loads(error_text(404, "x", anthropic=True))["type"] == "error"


def test_the_engines_own_envelope_passes_unchanged() -> None:
    envelope = {
        "error": {"message": "max_tokens=5 …", "type": "BadRequestError", "param": "max_tokens", "code": 400}
    }
    text = upstream_error_text(400, json.dumps(envelope).encode())
    assert json.loads(text) == {"error": {**envelope["error"], "retryable": False}}


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
