"""Golden shapes of vllm-worker.md §3.2 to §3.7, and what readers written for both generations make of them.

The contract's checklist, §10 point 3. Every expected value is the literal JSON of the contract, filled in where
that shows an ellipsis. Readers named G1 and G2 do what clients of that generation of the older worker do.
"""

from __future__ import annotations

import json
from typing import Any

from tests.worker.engine_events import chat_events, completion_events, event, usage

from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.errors import InputError
from pilotlight.worker.input_settings import ChatMode, InputSettings
from pilotlight.worker.inputs import plan_request
from pilotlight.worker.outputs import (
    error_text,
    gone_text,
    input_error_text,
    make_shaper,
    upstream_error_text,
    whole_items,
)
from pilotlight.worker.sse import SseSplitter

CHAT = [{"role": "user", "content": "hi"}]


def whole(job_input: dict[str, Any], answer: Any, **settings: Any) -> Any:
    """The job's output: a list, also for a single item (§3.1, §8 A20)."""
    request = plan_request(job_input, InputSettings(**settings))
    return whole_items(request, json.dumps(answer).encode(), "application/json")[0]


def streamed(job_input: dict[str, Any], events: str, **settings: Any) -> tuple[list[Any], str | None]:
    """The items of a streamed job and the error it ends with."""
    shaper = make_shaper(plan_request(job_input, InputSettings(**settings)))
    items = [item for one in SseSplitter().feed(events.encode()) for item in shaper.feed(one)]
    items += shaper.flush()
    failure = shaper.failure
    return items, upstream_error_text(failure.status, failure.body) if failure is not None else None


# Readers


def g1_text(output: list[Any]) -> str:
    return output[0]["choices"][0]["tokens"][0]


def g1_usage(output: list[Any]) -> tuple[int, int]:
    return output[-1]["usage"]["input"], output[-1]["usage"]["output"]


def g1_stream_text(items: list[Any], index: int = 0) -> str:
    """As documented: `/stream` answers a list of items, each with the tokens of each choice."""
    return "".join("".join(item["choices"][index]["tokens"]) for item in items)


def g1_openai_chunks(items: list[str]) -> list[Any]:
    """What the older gateway did: the strings one after the other are the body of an OpenAI stream."""
    lines = "".join(items).split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def g2_text(output: list[Any]) -> str:
    choice = output[0]["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def g2_stream_text(items: list[str]) -> str:
    """Strings in any cut, so readers join first and then look for events."""
    pieces = []
    for line in "".join(items).splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            choices = json.loads(line[6:])["choices"]
            pieces += [
                choice["text"] if "text" in choice else choice["delta"].get("content", "")
                for choice in choices
            ]
    return "".join(pieces)


# §3.4: native, not streamed


def test_native_text() -> None:
    upstream = {
        "id": "cmpl-1", "object": "text_completion", "created": 1790000000, "model": "org/name",
        "choices": [{"index": 0, "text": "full text", "finish_reason": "length", "stop_reason": None, "logprobs": None}],
        "usage": usage(3, 100), "service_tier": None,
    }  # fmt: skip
    output = whole({"prompt": "x"}, upstream)
    assert output == [
        {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1790000000,
            "model": "org/name",
            "choices": [
                {"index": 0, "tokens": ["full text"], "text": "full text",
                 "finish_reason": "length", "stop_reason": None, "logprobs": None}
            ],
            "usage": {"input": 3, "output": 100,
                      "prompt_tokens": 3, "completion_tokens": 100, "total_tokens": 103},
            "service_tier": None,
        }
    ]  # fmt: skip
    assert g1_text(output) == g2_text(output) == "full text"
    assert g1_usage(output) == (3, 100)
    assert output[0]["usage"]["prompt_tokens"] == 3


def test_native_chat() -> None:
    message = {"role": "assistant", "content": "hello", "reasoning": "hm", "tool_calls": [{"id": "c"}]}
    upstream = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1790000000, "model": "org/name",
        "choices": [
            {"index": 0, "message": message, "finish_reason": "stop", "stop_reason": None, "logprobs": None},
            {"index": 1, "message": {**message, "content": None}, "finish_reason": "tool_calls", "logprobs": None},
        ],
        "usage": usage(4, 6),
    }  # fmt: skip
    output = whole({"messages": CHAT, "n": 2}, upstream)
    assert [choice["tokens"] for choice in output[0]["choices"]] == [["hello"], [""]]
    assert output[0]["choices"][0]["message"] == message
    assert output[0]["object"] == "chat.completion"
    assert "text" not in output[0]["choices"][0]
    assert g1_text(output) == g2_text(output) == "hello"


def test_native_chat_in_raw_mode_has_the_same_shape_with_the_models_own_text() -> None:
    """§1.4, §8 A7: thinking is part of the text, as G1 had it."""
    upstream = {
        "id": "cmpl-1", "object": "text_completion", "model": "org/name",
        "choices": [{"index": 0, "text": "<think>hm</think>hello", "finish_reason": "stop"}],
        "usage": usage(4, 6),
    }  # fmt: skip
    output = whole({"messages": CHAT}, upstream, native_chat_mode=ChatMode.RAW)
    assert output[0]["object"] == "chat.completion"
    assert output[0]["choices"] == [
        {
            "index": 0,
            "tokens": ["<think>hm</think>hello"],
            "message": {"role": "assistant", "content": "<think>hm</think>hello"},
            "finish_reason": "stop",
        }
    ]
    assert g1_text(output) == g2_text(output)


# §3.2 and §3.5: native, streamed


def test_native_stream_in_the_documented_format() -> None:
    """The items of §3.2 with the additive keys of §3.5, for two sequences, first flush after one piece."""
    pieces = [(0, " Paris", 1), (0, ",", 2), (0, " the", 3), (1, " Paris", 1)]
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1790000000, "model": "org/name"}
    events = "".join(
        event({**head, "choices": [{"index": index, "text": text}], "usage": usage(5, tokens)})
        for index, text, tokens in pieces
    )
    items, error = streamed({"prompt": "x", "stream": True, "n": 2}, events)
    assert error is None
    assert items == [
        {
            "id": "cmpl-1", "created": 1790000000, "model": "org/name", "object": "tokens.chunk",
            "choices": [{"index": 0, "tokens": [" Paris"]}, {"index": 1, "tokens": []}],
            "usage": {"input": 5, "output": 1, "prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
        },
        {
            "choices": [{"index": 0, "tokens": [",", " the"]}, {"index": 1, "tokens": [" Paris"]}],
            "usage": {"input": 5, "output": 4, "prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9},
        },
    ]  # fmt: skip
    older = [
        {"choices": [{"tokens": [" Paris"]}, {"tokens": []}], "usage": {"input": 5, "output": 1}},
        {"choices": [{"tokens": [",", " the"]}, {"tokens": [" Paris"]}], "usage": {"input": 5, "output": 4}},
    ]
    assert [_only(item, reference) for item, reference in zip(items, older, strict=True)] == older
    assert (g1_stream_text(items), g1_stream_text(items, 1)) == (" Paris, the", " Paris")


def _only(value: Any, reference: Any) -> Any:
    """A value reduced to the keys that a reference has."""
    if isinstance(reference, dict):
        return {key: _only(value[key], part) for key, part in reference.items()}
    if isinstance(reference, list):
        return [_only(one, part) for one, part in zip(value, reference, strict=True)]
    return value


def test_the_end_of_a_sequence_is_told_with_its_last_piece_and_nothing_trails() -> None:
    items, _ = streamed({"prompt": "x", "stream": True, "min_batch_size": 4}, "".join(completion_events(4)))
    (item,) = items
    assert item["choices"] == [
        {"index": 0, "tokens": ["0.0", "0.1", "0.2", "0.3"], "finish_reason": "length", "stop_reason": None}
    ]
    assert g1_usage(items) == (5, 4)


def test_native_chat_stream() -> None:
    """The role announcement is no piece (§2.2)."""
    job_input = {"messages": CHAT, "stream": True}
    items, _ = streamed(job_input, "".join(chat_events(["a", "b", "c", "d"])))
    assert [item["choices"][0]["tokens"] for item in items] == [["a"], ["b", "c", "d"]]
    assert items[0]["object"] == "tokens.chunk"


def test_reasoning_and_tool_calls_stand_beside_the_tokens() -> None:
    """§3.5, §8 A7: in order of arrival, and each counts as a piece."""
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning": "hm"},
        {"reasoning": "so"},
        {"content": "yes"},
        {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
    ]
    events = "".join(event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas)
    job_input = {"messages": CHAT, "stream": True, "max_batch_size": 2, "min_batch_size": 2}
    items, _ = streamed(job_input, events)
    assert [item["choices"] for item in items] == [
        [{"index": 0, "tokens": [], "reasoning": ["hm", "so"]}],
        [{"index": 0, "tokens": ["yes"], "tool_calls": [{"index": 0, "function": {"name": "f"}}]}],
    ]


def test_empty_pieces_count_and_stay() -> None:
    """§2.2: bytes of an incomplete character, special tokens, the end."""
    items, _ = streamed({"messages": CHAT, "stream": True}, "".join(chat_events(["a", "", "b", ""])))
    assert [item["choices"][0]["tokens"] for item in items] == [["a"], ["", "b", ""]]


def test_native_stream_as_events() -> None:
    """§3.5, `sse`: cut at event boundaries, batched, closed by `[DONE]`."""
    events = "".join(completion_events(10))
    job_input = {"prompt": "x", "stream": True, "stream_format": "sse"}
    items, _ = streamed(job_input, events)
    assert [item.count("data: {") for item in items] == [1, 3, 7]
    assert "".join(items) == events
    assert items[-1].endswith("data: [DONE]\n\n")
    assert g2_stream_text(items) == "".join(f"0.{number}" for number in range(10))
    by_environment, _ = streamed(
        {"prompt": "x", "stream": True},
        events,
        native_stream_format=InputSettings.from_environment(
            {"NATIVE_STREAM_FORMAT": "SSE"}
        ).native_stream_format,
    )
    assert by_environment == items


def test_raw_chats_stream_as_chats() -> None:
    """`NATIVE_CHAT_MODE=raw`: the engine sends completions, readers of `messages` find deltas."""
    events = "".join(completion_events(4))
    raw = {"native_chat_mode": ChatMode.RAW}
    tokens, _ = streamed({"messages": CHAT, "stream": True}, events, **raw)
    assert g1_stream_text(tokens) == "0.00.10.20.3"
    items, _ = streamed({"messages": CHAT, "stream": True, "stream_format": "sse"}, events, **raw)
    assert g2_stream_text(items) == "0.00.10.20.3"
    chunk = json.loads(items[0].removeprefix("data: "))
    assert (chunk["object"], chunk["choices"][0]["delta"]) == ("chat.completion.chunk", {"content": "0.0"})


# §3.6: OpenAI and generic routes

OPENAI_CHAT = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": CHAT, "stream": True}}


def test_openai_answers_pass_unchanged() -> None:
    answer = {"id": "x", "choices": [{"message": {"content": "hi"}}], "usage": usage(1, 1), "new": {"a": [1]}}
    assert whole({"openai_input": {"messages": CHAT}}, answer) == [answer]
    assert whole({"route": "/v1/chat/completions", "body": {"messages": CHAT}}, answer) == [answer]
    assert whole({"openai_route": "/v1/models"}, {"object": "list", "data": []}) == [
        {"object": "list", "data": []}
    ]
    assert whole(OPENAI_CHAT, answer) == [answer], "upstream ignored stream"


def test_openai_streams_are_strings_of_whole_events() -> None:
    events = "".join(chat_events(["a", "b", "c", "d"]))
    items, _ = streamed(OPENAI_CHAT, ": keep-alive\n\n" + events)
    assert "".join(items) == events
    assert all(item.endswith("\n\n") for item in items)
    # The announcement goes with the first piece; usage and [DONE] come last.
    assert [item.count("data: ") for item in items] == [2, 3, 2]
    chunks = g1_openai_chunks(items)
    assert "".join(choice["delta"].get("content", "") for c in chunks for choice in c["choices"]) == "abcd"
    live, _ = streamed({**OPENAI_CHAT, "max_batch_size": 1}, events)
    assert [item.count("data: ") for item in live] == [2, 1, 1, 1, 2]


def test_openai_streams_as_lists_of_chunks() -> None:
    """`RAW_OPENAI_OUTPUT=0`, which G2 lost."""
    items, _ = streamed(OPENAI_CHAT, "".join(chat_events(["a", "b", "c", "d"])), raw_openai_output=False)
    assert all(isinstance(item, list) for item in items)
    chunks = [chunk for item in items for chunk in item]
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:-1]] == ["", "a", "b", "c", "d"]
    assert chunks[-1]["choices"] == []


def test_named_events_come_one_by_one() -> None:
    """`/v1/responses` and `/v1/messages`; batched only if asked."""
    events = [event({"type": "a", "n": number}, "delta") for number in range(3)]
    for route in ("/v1/responses", "/v1/messages"):
        job_input = {"openai_route": route, "openai_input": {"input": "x", "stream": True}}
        assert streamed(job_input, "".join(events))[0] == events
        batched, _ = streamed({**job_input, "max_batch_size": 3, "min_batch_size": 3}, "".join(events))
        assert batched == ["".join(events)]
        chunks, _ = streamed(job_input, "".join(events), raw_openai_output=False)
        assert chunks[0] == [{"event": "delta", "data": {"type": "a", "n": 0}}]


def test_a_success_that_owns_an_error_travels_wrapped() -> None:
    """§3.1 (b): such as a failed Responses object."""
    failed = {"status": "failed", "error": {"message": "x"}}
    assert whole({"openai_route": "/v1/responses", "openai_input": {"input": "x"}}, failed) == [
        {"response": failed, "openai_passthrough": True}
    ]
    assert whole({"openai_route": "/v1/responses", "openai_input": {"a": 1}}, {"error": None}) == [
        {"error": None}
    ]


# §3.7: errors


def test_errors_are_text_of_an_envelope() -> None:
    error = InputError("no", param="n")
    assert input_error_text(error) == (
        '{"error":{"message":"no","type":"BadRequestError","param":"n","code":400,"retryable":false}}'
    )
    assert json.loads(error_text(404, "x", anthropic=True)) == {
        "type": "error",
        "error": {"type": "NotFoundError", "message": "x", "code": 404, "retryable": False},
    }


def test_the_engines_own_envelope_is_not_rewritten() -> None:
    """Only `retryable` comes to it; no prose around it, as G2 had."""
    envelope = {
        "error": {"message": "too long", "type": "BadRequestError", "param": "max_tokens", "code": 400}
    }
    assert json.loads(upstream_error_text(400, json.dumps(envelope).encode())) == {
        "error": {**envelope["error"], "retryable": False}
    }
    busy = {"error": {"message": "queue is full", "type": "ServiceUnavailable", "param": None, "code": 503}}
    assert json.loads(upstream_error_text(503, json.dumps(busy).encode()))["error"]["code"] == 503


def test_a_model_without_a_template_says_what_to_send() -> None:
    """§1.4."""
    message = (
        "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
        "template if the tokenizer does not define one."
    )
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "code": 400}}).encode()
    told = json.loads(upstream_error_text(400, body, native=True))["error"]["message"]
    assert told.startswith(message)
    assert "prompt" in told
    assert "CUSTOM_CHAT_TEMPLATE" in told
    assert json.loads(upstream_error_text(400, body))["error"]["message"] == message


def test_errors_of_the_messages_route_take_its_form() -> None:
    own = {"type": "error", "error": {"type": "BadRequestError", "message": "no"}}
    for body in (own, {"error": own["error"]}):
        text = upstream_error_text(400, json.dumps(body).encode(), anthropic=True)
        assert json.loads(text) == {
            "type": "error",
            "error": {"type": "BadRequestError", "message": "no", "retryable": False, "code": 400},
        }


def test_status_and_type_of_the_workers_own_errors() -> None:
    """§1.11."""
    statuses = {
        status: json.loads(error_text(status, "x"))["error"] for status in (400, 404, 413, 500, 503, 504)
    }
    assert {status: (error["code"], error["type"]) for status, error in statuses.items()} == {
        400: (400, "BadRequestError"),
        404: (404, "NotFoundError"),
        413: (413, "PayloadTooLarge"),
        500: (500, "InternalServerError"),
        503: (503, "ServiceUnavailable"),
        504: (504, "TimeoutError"),
    }
    assert json.loads(gone_text())["error"] == {
        "message": "the engine ended before the job finished",
        "type": "ServiceUnavailable", "param": None, "code": 503, "retryable": True,
    }  # fmt: skip


FAILURE = {"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}}


def failing(events: list[str]) -> str:
    return "".join([*events[:2], event(FAILURE), "data: [DONE]\n\n"])


def test_a_failure_inside_a_stream_in_tokens_format() -> None:
    """What is pending is flushed, then the job fails."""
    job_input = {"prompt": "x", "stream": True, "min_batch_size": 9}
    items, error = streamed(job_input, failing(list(completion_events(9))))
    assert [item["choices"][0]["tokens"] for item in items] == [["0.0", "0.1"]]
    assert json.loads(error or "") == {"error": {**FAILURE["error"], "retryable": False}}


def test_a_failure_inside_a_stream_of_events_is_forwarded_and_fails_the_job() -> None:
    text = failing(list(chat_events(["a"] * 9)))
    for job_input in (
        OPENAI_CHAT,
        {"messages": CHAT, "stream": True, "stream_format": "sse"},
        {"route": "/v1/chat/completions", "body": {"stream": True}},
    ):
        items, error = streamed(job_input, text)
        assert "".join(items) == text
        assert json.loads(error or "")["error"]["message"] == "boom"
    chunks, error = streamed(OPENAI_CHAT, text, raw_openai_output=False, batch=BatchSizes(9, 9, 1))
    assert chunks[0][-1] == FAILURE
    assert error is not None


def test_a_failure_inside_a_messages_stream() -> None:
    own = {"type": "error", "error": {"type": "api_error", "message": "boom"}}
    job_input = {"openai_route": "/v1/messages", "openai_input": {"stream": True}}
    items, error = streamed(job_input, event(own, "error"))
    assert items == [event(own, "error")]
    assert json.loads(error or "")["error"]["message"] == "boom"
    assert json.loads(error or "")["type"] == "error"
