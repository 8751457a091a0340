"""`best_of` and buffered beam searches: vllm-worker.md §1.7, §8 A15, §10 point 10."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.worker.engine_events import usage

from pilotlight.worker.errors import InputError
from pilotlight.worker.input_settings import ChatMode, InputSettings
from pilotlight.worker.inputs import plan_request
from pilotlight.worker.outputs import whole_items
from pilotlight.worker.selection import plan_selection, select
from pilotlight.worker.upstream import UpstreamRequest

CHAT = [{"role": "user", "content": "hi"}]


def plan(job_input: dict[str, Any], **settings: Any) -> UpstreamRequest:
    return plan_request(job_input, InputSettings(**settings))


def text_answer(*candidates: tuple[str, list[float]], prompt: int = 5) -> dict[str, Any]:
    """A completion whose candidates have these texts and logprobs of their tokens."""
    choices = [
        {
            "index": index, "text": text, "finish_reason": "length", "stop_reason": None,
            "logprobs": {"tokens": ["t"] * len(logprobs), "token_logprobs": logprobs},
        }
        for index, (text, logprobs) in enumerate(candidates)
    ]  # fmt: skip
    tokens = sum(len(logprobs) for _, logprobs in candidates)
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": choices,
        "usage": usage(prompt, tokens),
    }  # fmt: skip


def chat_answer(*candidates: tuple[str, list[float]]) -> dict[str, Any]:
    answer = text_answer(*candidates)
    choices = [
        {
            "index": choice["index"], "finish_reason": "stop", "stop_reason": None,
            "message": {"role": "assistant", "content": choice["text"], "tool_calls": [], "reasoning": None},
            "logprobs": {"content": [{"token": "t", "logprob": one} for one in choice["logprobs"]["token_logprobs"]]},
        }
        for choice in answer["choices"]
    ]  # fmt: skip
    return {**answer, "id": "chatcmpl-1", "object": "chat.completion", "choices": choices}


def item(request: UpstreamRequest, answer: dict[str, Any]) -> Any:
    ((only,), _) = whole_items(request, json.dumps(answer).encode(), "application/json")
    return only


CANDIDATES = [("longest", [-0.1] * 30), ("best", [-1.0]), ("worst", [-9.0]), ("second", [-1.0, -1.0])]


def test_a_native_text_asks_for_all_candidates_and_their_logprobs() -> None:
    body = plan({"prompt": "x", "stream": True, "sampling_params": {"n": 2, "best_of": 4}}).body
    assert body is not None
    assert (body["n"], body["logprobs"], body["stream"]) == (4, 0, False)
    assert "best_of" not in body
    assert "stream_options" not in body


def test_a_native_chat_asks_in_its_own_words() -> None:
    body = plan({"messages": CHAT, "best_of": 4, "logprobs": 2}).body
    assert body is not None
    assert (body["n"], body["logprobs"], body["top_logprobs"]) == (4, True, 2)
    body = plan({"messages": CHAT, "best_of": 4}).body
    assert body is not None
    assert (body["n"], body["logprobs"], body.get("top_logprobs", 0)) == (4, True, 0)


def test_the_callers_larger_logprobs_are_kept() -> None:
    body = plan({"prompt": "x", "best_of": 2, "logprobs": 3}).body
    assert body is not None
    assert body["logprobs"] == 3


def test_the_greatest_sum_wins_and_the_order_is_best_first() -> None:
    """By the sum, not by the mean: the long sequence of likely tokens is third."""
    request = plan({"prompt": "x", "sampling_params": {"n": 3, "best_of": 4}})
    got = item(request, text_answer(*CANDIDATES))
    assert [choice["text"] for choice in got["choices"]] == ["best", "second", "longest"]
    assert [choice["tokens"] for choice in got["choices"]] == [["best"], ["second"], ["longest"]]
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2]
    assert [choice["logprobs"] for choice in got["choices"]] == [None, None, None]
    assert got["usage"] == {"input": 5, "output": 34, "kept_tokens": 33, **usage(5, 34)}


def test_equals_keep_the_order_of_the_engine() -> None:
    request = plan({"prompt": "x", "sampling_params": {"n": 1, "best_of": 2}})
    got = item(request, text_answer(("first", [-1.0]), ("other", [-1.0])))
    assert [choice["text"] for choice in got["choices"]] == ["first"]


def test_logprobs_are_kept_where_the_caller_asked() -> None:
    request = plan({"prompt": "x", "sampling_params": {"best_of": 4, "logprobs": 0}})
    assert item(request, text_answer(*CANDIDATES))["choices"][0]["logprobs"]["token_logprobs"] == [-1.0]


def test_chats_are_scored_by_their_content() -> None:
    request = plan({"messages": CHAT, "sampling_params": {"best_of": 4, "n": 2}})
    got = item(request, chat_answer(*CANDIDATES))
    assert [choice["message"]["content"] for choice in got["choices"]] == ["best", "second"]
    assert [choice["tokens"] for choice in got["choices"]] == [["best"], ["second"]]
    assert [choice["logprobs"] for choice in got["choices"]] == [None, None]


def test_embedded_prompts_keep_their_own_best_too() -> None:
    """They are no list under `prompt`: what belongs together is told by the number of candidates."""
    body = {"prompt_embeds": ["AA", "BB"], "best_of": 2}
    request = plan({"openai_route": "/v1/completions", "openai_input": body})
    got = item(request, text_answer(("a0", [-2.0]), ("a1", [-1.0]), ("b0", [-3.0]), ("b1", [-4.0])))
    assert [choice["text"] for choice in got["choices"]] == ["a1", "b0"]


def test_every_prompt_keeps_its_own_best() -> None:
    """Choices come prompt by prompt, before and after."""
    request = plan({"prompt": ["a", "b"], "sampling_params": {"n": 1, "best_of": 2}})
    assert request.choice_count == 2
    got = item(request, text_answer(("a0", [-2.0]), ("a1", [-1.0]), ("b0", [-3.0]), ("b1", [-4.0])))
    assert [(choice["index"], choice["text"]) for choice in got["choices"]] == [(0, "a1"), (1, "b0")]


def test_tokens_of_an_echoed_prompt_count_neither_for_the_score_nor_as_kept() -> None:
    request = plan({"prompt": "x", "echo": True, "sampling_params": {"best_of": 2}})
    answer = text_answer(("p a", [None, -5.0, -1.0]), ("p b", [None, -5.0, -2.0]), prompt=2)  # type: ignore[list-item]
    got = item(request, answer)
    assert [choice["text"] for choice in got["choices"]] == ["p a"]
    assert got["usage"]["kept_tokens"] == 1


@pytest.mark.parametrize(
    ("asked", "kept"), [({}, False), ({"logprobs": 0}, True), ({"prompt_logprobs": 0}, True)]
)
@pytest.mark.parametrize("chat", [False, True])
def test_the_echoed_prompts_logprobs_are_dropped_unless_asked_for(
    asked: dict[str, Any], kept: bool, chat: bool
) -> None:
    """vLLM gives them with every echo that has logprobs: with each choice, or beside those of a chat."""
    source = {"messages": CHAT} if chat else {"prompt": "x"}
    request = plan({**source, "echo": True, "sampling_params": {"best_of": 2, **asked}})
    prompt = [None, {"5": {"logprob": -5.0}}]
    answer = (chat_answer if chat else text_answer)(("a", [-1.0]), ("b", [-2.0]))
    holders = [answer] if chat else answer["choices"]
    for holder in holders:
        holder["prompt_logprobs"] = prompt
    got = item(request, answer)
    assert (got if chat else got["choices"][0])["prompt_logprobs"] == (prompt if kept else None)


@pytest.mark.parametrize(
    ("given", "by_score"), [("false", True), ("0", True), (False, True), ("true", False)]
)
def test_a_beam_search_may_be_asked_for_in_words(given: Any, by_score: bool) -> None:
    body = {"prompt": "x", "best_of": 3, "use_beam_search": given, "max_tokens": 5}
    selection = plan({"openai_route": "/v1/completions", "openai_input": body}).selection
    assert selection is not None
    assert selection.by_score is by_score


def test_a_native_stream_gets_one_final_item() -> None:
    """§1.7: best_of could not stream in old vLLM either."""
    job_input = {"prompt": "x", "stream": True, "sampling_params": {"n": 2, "best_of": 4}}
    got = item(plan(job_input), text_answer(*CANDIDATES))
    assert [choice["tokens"] for choice in got["choices"]] == [["best"], ["second"]]
    assert [choice["finish_reason"] for choice in got["choices"]] == ["length", "length"]
    text = item(plan({**job_input, "stream_format": "sse"}), text_answer(*CANDIDATES))
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert [choice["text"] for chunk in chunks for choice in chunk["choices"]] == ["best", "second"]
    assert chunks[-1]["usage"]["kept_tokens"] == 3


OPENAI = {"prompt": "x", "best_of": 4, "n": 2}


def test_an_openai_body_keeps_its_shape() -> None:
    """§8 A15."""
    request = plan({"openai_route": "/v1/completions", "openai_input": OPENAI})
    assert request.body == {"prompt": "x", "n": 4, "logprobs": 0, "stream": False}
    got = item(request, text_answer(*CANDIDATES))
    assert [choice["text"] for choice in got["choices"]] == ["best", "second"]
    assert "tokens" not in got["choices"][0]
    assert got["usage"] == {**usage(5, 34), "kept_tokens": 3}


def test_an_openai_chat_stream_is_whole_and_valid() -> None:
    """Roles first, finished choices, usage where asked for, `[DONE]`."""
    body = {"messages": CHAT, "best_of": 4, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    request = plan({"openai_input": body})
    assert request.body == {"messages": CHAT, "n": 4, "logprobs": True, "stream": False}
    text = item(request, chat_answer(*CANDIDATES))
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    finish = {"finish_reason": "stop"}
    opening = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    assert chunks == [
        {**head, "choices": [{"index": 0, **opening}]},
        {**head, "choices": [{"index": 0, "delta": {"content": "best"}, **finish}]},
        {**head, "choices": [{"index": 1, **opening}]},
        {**head, "choices": [{"index": 1, "delta": {"content": "second"}, **finish}]},
        {**head, "choices": [], "usage": {**usage(5, 34), "kept_tokens": 3}},
    ]


def test_an_openai_stream_without_usage_and_as_chunks() -> None:
    """§3.6: `RAW_OPENAI_OUTPUT=0` gives lists of parsed objects."""
    job_input = {"openai_route": "/v1/completions", "openai_input": {**OPENAI, "stream": True}}
    chunks = item(plan(job_input, raw_openai_output=False), text_answer(*CANDIDATES))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["best", "second"]
    assert all("usage" not in chunk for chunk in chunks)


def test_what_an_answer_says_beside_its_choices_is_in_its_stream() -> None:
    """As vLLM itself streams them: the prompt first, the fingerprint last."""
    beside = {
        "prompt_token_ids": [1, 2],
        "prompt_text": "<hi>",
        "system_fingerprint": "f",
        "service_tier": None,
    }
    answer = {**chat_answer(*CANDIDATES), **beside}
    body = {"messages": CHAT, "best_of": 4, "stream": True, "stream_options": {"include_usage": True}}
    chunks = item(plan({"openai_input": body}, raw_openai_output=False), answer)
    assert (chunks[0]["prompt_token_ids"], chunks[0]["prompt_text"]) == ([1, 2], "<hi>")
    assert [chunk.get("system_fingerprint") for chunk in chunks] == [None, None, "f"]
    assert all(not {"prompt_text", "service_tier"} & chunk.keys() for chunk in chunks[1:])


@pytest.mark.parametrize("raw", [True, False])
def test_a_buffered_stream_that_is_too_large_for_one_item_is_several(raw: bool) -> None:
    """§3.1, §3.6: cut at the ends of events."""
    body = {"prompt": "x", "n": 3, "best_of": 4, "stream": True}
    request = plan({"openai_route": "/v1/completions", "openai_input": body}, raw_openai_output=raw)
    data = json.dumps(text_answer(*[(name * 50, logprobs) for name, logprobs in CANDIDATES])).encode()
    (whole,), streamed = whole_items(request, data, "application/json")
    items, _ = whole_items(request, data, "application/json", item_bytes=700)
    assert streamed
    assert len(items) > 1
    assert all(len(json.dumps(one)) <= 700 for one in items)
    if raw:
        assert all(one.endswith("\n\n") for one in items)
        assert "".join(items) == whole
    else:
        assert [chunk for one in items for chunk in one] == whole


def test_tool_calls_of_a_buffered_stream_are_numbered() -> None:
    answer = chat_answer(("", [-1.0]), ("x", [-2.0]))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer["choices"][0]["message"] |= {"tool_calls": [call], "content": None}
    chunks = item(
        plan({"openai_input": {"messages": CHAT, "best_of": 2, "stream": True}}, raw_openai_output=False),
        answer,
    )
    assert chunks[1]["choices"][0]["delta"] == {"tool_calls": [{"index": 0, **call}]}


def test_strict_passthrough_leaves_openai_bodies_alone() -> None:
    """§1.9: `OPENAI_STRICT_PASSTHROUGH=1`; native jobs are not OpenAI bodies."""
    strict = {"strict_passthrough": True}
    body = {**OPENAI, "guided_regex": "a", "guided_json": {}}
    request = plan({"openai_route": "/v1/completions", "openai_input": body}, **strict)
    assert (request.body, request.selection) == (body, None)
    assert plan({"prompt": "x", "best_of": 2}, **strict).selection is not None


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_other_routes_know_no_candidates(route: str) -> None:
    request = plan({"openai_route": route, "openai_input": {"a": 1, "best_of": 3}})
    assert (request.body, request.selection) == ({"a": 1, "best_of": 3}, None)


@pytest.mark.parametrize("best_of", [None, 1, 2])
def test_asking_for_no_more_than_n_is_no_question(best_of: Any) -> None:
    for job_input in (
        {"prompt": "x", "n": 2 if best_of == 2 else 1, "best_of": best_of},
        {"openai_input": {"messages": CHAT, "n": 2 if best_of == 2 else 1, "best_of": best_of}},
    ):
        request = plan(job_input)
        assert request.selection is None
        assert request.body is not None
        assert "best_of" not in request.body
        assert not request.body.get("logprobs")


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1, "n": 2},
        {"best_of": 2, "temperature": 0},
        {"best_of": 2, "temperature": 1e-6},
        {"best_of": "3"},
        {"best_of": True},
        {"best_of": 0},
        {"best_of": -1},
        {"best_of": 2.5},
        {"best_of": [2]},
    ],
)
def test_impossible_requests_are_refused_on_both_roads(fields: dict[str, Any]) -> None:
    for job_input in (
        {"prompt": "x", "sampling_params": fields},
        {"messages": CHAT, **fields},
        {"openai_input": {"messages": CHAT, **fields}},
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "x", **fields}},
    ):
        with pytest.raises(InputError, match="best_of") as caught:
            plan(job_input)
        assert (caught.value.status, caught.value.param) == (400, "best_of")


def test_greedy_with_one_candidate_is_fine() -> None:
    assert plan({"prompt": "x", "best_of": 1, "temperature": 0}).selection is None


def test_an_answer_without_logprobs_cannot_be_chosen_from() -> None:
    """A reasoning model asked to hide its reasoning gives none."""
    request = plan({"messages": CHAT, "best_of": 2, "include_reasoning": False})
    answer = chat_answer(("a", [-1.0]), ("b", [-2.0]))
    answer["choices"][1]["logprobs"] = None
    with pytest.raises(InputError, match="include_reasoning"):
        item(request, answer)


def test_beams_keep_the_first_of_every_prompt() -> None:
    """§1.7: upstream gives them best first."""
    job_input = {"prompt": ["a", "b"], "use_beam_search": True, "best_of": 2, "stream": True}
    got = item(plan(job_input), text_answer(*CANDIDATES))
    assert [choice["text"] for choice in got["choices"]] == ["longest", "worst"]
    assert [choice["index"] for choice in got["choices"]] == [0, 1]
    assert "kept_tokens" not in got["usage"]


def test_a_streamed_beam_search_is_one_item_even_where_all_beams_are_kept() -> None:
    request = plan({"prompt": "x", "use_beam_search": True, "n": 4, "stream": True})
    assert (request.stream, request.body and request.body["stream"]) == (False, False)
    assert len(item(request, text_answer(*CANDIDATES))["choices"]) == 4


def test_an_openai_beam_search_takes_best_of_as_its_width() -> None:
    body = {"prompt": "x", "use_beam_search": True, "n": 1, "best_of": 4, "max_tokens": 5}
    request = plan({"openai_route": "/v1/completions", "openai_input": body})
    assert request.body == {
        "prompt": "x", "use_beam_search": True, "n": 4, "max_tokens": 5, "stream": False,
    }  # fmt: skip
    assert [choice["text"] for choice in item(request, text_answer(*CANDIDATES))["choices"]] == ["longest"]


def test_nothing_is_changed_in_place() -> None:
    body = {"prompt": "x", "best_of": 2}
    changed, selection = plan_selection(body, chat=False, streamed=False)
    assert body == {"prompt": "x", "best_of": 2}
    assert selection is not None
    answer = text_answer(("a", [-1.0]), ("b", [-2.0]))
    before = json.dumps(answer)
    select(answer, selection)
    assert json.dumps(answer) == before
    assert changed is not body


def test_raw_chats_choose_among_completions() -> None:
    """§1.4: the answer is a completion, handed out as a chat."""
    request = plan(
        {"messages": CHAT, "best_of": 4, "stream": True, "stream_format": "sse"},
        native_chat_mode=ChatMode.RAW,
    )
    assert (request.body or {})["logprobs"] == 0
    text = item(request, text_answer(*CANDIDATES))
    assert '"delta":{"content":"best"}' in text
    assert '"object":"chat.completion.chunk"' in text
