"""Whether a stream can go on with another worker: what is refused, where it is cut, what is asked next."""

from __future__ import annotations

import json

import pytest

from pilotlight.core.continuation import (
    CHAT,
    COMPLETIONS,
    Continuation,
    Ending,
    Impossible,
    Reason,
    is_greedy,
    limit_question,
    plan_continuation,
    read_limit,
    with_tokens,
)

CHAT_BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "temperature": 0}
BODY = {"model": "m", "prompt": "Hi", "stream": True, "temperature": 0}


def sse(*events: object) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)


def completion(text: str, tokens: list[int] | None, prompt: list[int] | None = None, **more: object) -> dict:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    choice |= {"prompt_token_ids": prompt, "token_ids": tokens} | more
    return {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m", "choices": [choice]}


def chat(delta: dict, tokens: list[int] | None, prompt: list[int] | None = None, **more: object) -> dict:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": tokens} | more
    event = {"id": "c-1", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [choice]}
    return event if prompt is None else event | {"prompt_token_ids": prompt, "prompt_text": None}


OPENING = chat({"role": "assistant", "content": ""}, None, [1, 2, 3])
HELLO = [completion("Hel", [10], [1, 2]), completion("lo wor", [11, 12]), completion("ld", [13])]


def plan(body: dict = BODY, events: list[dict] | None = None) -> Continuation | Ending | Impossible:
    route = CHAT if "messages" in body else COMPLETIONS
    if events is None:
        events = [OPENING, chat({"content": "A"}, [4])] if route == CHAT else HELLO
    return plan_continuation(route, json.dumps(body).encode(), sse(*events))


def refused(body: dict = BODY, events: list[dict] | None = None) -> Reason:
    found = plan(body, events)
    assert isinstance(found, Impossible), found
    return found.reason


def request(found: object, limit: int) -> dict:
    assert isinstance(found, Continuation), found
    body = found.request(limit)
    assert isinstance(body, bytes), body
    return json.loads(body)


def test_the_next_worker_is_given_all_tokens_so_far():
    found = plan({**BODY, "max_tokens": 50, "min_tokens": 6, "ignore_eos": True, "user": "u", "top_k": None})
    assert request(found, 50) == {
        "model": "m", "prompt": [1, 2, 10, 11, 12, 13], "max_tokens": 46, "min_tokens": 2, "temperature": 0,
        "ignore_eos": True, "top_k": None, "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }  # fmt: skip
    assert (found.replayed, found.text) == ([], "")


def test_a_chat_goes_on_as_a_completion():
    body = {**CHAT_BODY, "max_completion_tokens": 9, "add_generation_prompt": True, "tool_choice": "none"}
    asked = request(plan(body), 9)
    assert asked["prompt"] == [1, 2, 3, 4]
    assert asked["max_tokens"] == 8
    assert asked.keys().isdisjoint({"messages", "max_completion_tokens", "add_generation_prompt"})
    assert request(plan(CHAT_BODY, [OPENING]), 5)["prompt"] == [1, 2, 3], "nothing but the role has come"


def test_half_a_character_is_made_anew():
    """Tokens without text may be the first bytes of a character, which the next detokeniser would not see."""
    found = plan(events=[*HELLO, completion("", [200]), completion("", [201])])
    assert (found.kept, found.replayed, found.text) == ([10, 11, 12, 13], [200, 201], "")


def test_of_several_tokens_in_one_event_the_last_may_be_half_a_character():
    found = plan(events=HELLO[:2])
    assert (found.kept, found.replayed, found.text) == ([10], [11, 12], "lo wor")


def test_what_may_be_a_stop_string_is_made_anew():
    """With `stop` the text lags three characters here: `Hel` is what is delivered of `Hello `."""
    events = [
        completion("", [10], [1]),
        completion("Hel", [11]),
        completion("lo W", [12]),
        completion("or", [13]),
    ]
    found = plan({**BODY, "stop": ["xyz", "stop"]}, events)
    assert (found.kept, found.replayed) == ([10, 11], [12, 13])
    assert found.text == "Wor", "the text of the kept tokens is `Hello `"
    found = plan({**BODY, "stop": "stop"}, events[:2])
    assert (found.kept, found.replayed, found.text) == ([], [10, 11], "Hel")


def test_a_stop_string_that_is_shown_is_looked_for_in_what_was_delivered():
    found = plan({**BODY, "stop": "stop", "include_stop_str_in_output": True})
    assert (found.kept, found.replayed, found.text) == ([10], [11, 12, 13], "lo world")


def test_an_answer_that_was_complete_gets_only_its_last_events():
    events = [*HELLO, completion("!", [14], finish_reason="stop")]
    found = plan(events=events)
    assert isinstance(found, Ending)
    usage, end = found.data.removesuffix(b"\n\n").split(b"\n\n")
    assert end == b"data: [DONE]"
    assert json.loads(usage.removeprefix(b"data: ")) == {
        "id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m", "choices": [],
        "usage": {"prompt_tokens": 2, "total_tokens": 7, "completion_tokens": 5},
    }  # fmt: skip
    counted = {**completion("", []), "choices": [], "usage": {"prompt_tokens": 2}}
    assert plan(events=[*events, counted]) == Ending(b"data: [DONE]\n\n")


def test_no_token_is_left():
    found = plan()
    assert isinstance(found, Continuation)
    assert found.request(5)
    assert found.request(4) == Impossible(Reason.LIMIT, "limit of 4 tokens, all delivered")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 2),
        ("logprobs", 0),
        ("echo", True),
        ("use_beam_search", True),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("bad_words", ["a b"]),
        ("suffix", "x"),
        ("response_format", {"type": "json_object"}),
        ("structured_outputs", {"choice": ["a", "b"]}),
        ("guided_choice", ["a", "b"]),
        ("stream_options", {"include_usage": True, "continuous_usage_stats": True}),
        ("truncate_prompt_tokens", 5),
        ("prompt_logprobs", 0),
        ("prompt_embeds", "x"),
        ("kv_transfer_params", {}),
        ("unheard_of", 1),
        ("prompt", ["a", "b"]),
        ("prompt", [[1], [2]]),
    ],
)
def test_fields_that_make_more_of_a_stream_than_its_tokens(field, value):
    assert plan({**BODY, field: value}) == Impossible(Reason.FIELD, field)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"logprobs": True},
        {"modalities": ["audio"]},
        {"include_reasoning": False},
    ],
)
def test_chats_that_are_more_than_text(fields):
    assert refused({**CHAT_BODY, **fields}) is Reason.FIELD


def test_pictures_have_no_tokens_that_could_go_along():
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    parts = [{"type": "text", "text": "what is it?"}, picture]
    assert refused({**CHAT_BODY, "messages": [{"role": "user", "content": parts}]}) is Reason.CONTENT
    assert isinstance(plan({**CHAT_BODY, "messages": [{"role": "user", "content": parts[:1]}]}), Continuation)


@pytest.mark.parametrize("temperature", [None, 0.1, "0", True, 1e-9])
def test_only_what_is_not_drawn_by_lot(temperature):
    """A seed does not help: vLLM draws by the state of a generator, not by position, unless it is configured to."""
    assert refused({**BODY, "temperature": temperature, "seed": 1}) is Reason.SAMPLED


@pytest.mark.parametrize("temperature", [b"0", b"0.0", b"-0.0", b"0e1"])
def test_greedy(temperature):
    assert is_greedy(temperature)


@pytest.mark.parametrize("temperature", [b"", b"null", b"0.1", b"false", b'"0"'])
def test_not_greedy(temperature):
    assert not is_greedy(temperature)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], Reason.NOTHING_DELIVERED),
        ([completion("a", None, [1])], Reason.NO_TOKENS),
        ([completion("a", [1])], Reason.NO_TOKENS),
        ([OPENING, chat({"content": "a"}, None)], Reason.NO_TOKENS),
        ([OPENING, chat({"reasoning": "a"}, [1])], Reason.EVENT),
        ([OPENING, chat({}, [1])], Reason.EVENT),
        ([OPENING, chat({"tool_calls": []}, [1])], Reason.EVENT),
        ([completion("a", [1], [1], index=1)], Reason.EVENT),
        ([completion("a", [1], [1], logprobs={})], Reason.EVENT),
        ([completion("a", [1], [1]) | {"usage": {"prompt_tokens": 1}}], Reason.EVENT),
        ([completion("a", [1], [1], finish_reason="stop"), completion("b", [2])], Reason.EVENT),
        ([{"error": {"message": "no", "code": 500}}], Reason.EVENT),
    ],
)
def test_events_that_are_not_those_of_a_plain_text(events, reason):
    body = CHAT_BODY if OPENING in events else BODY
    assert refused(body, events) is reason


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"[" * 100_000, b'{"temperature":0,"n":01}'])
def test_a_body_that_cannot_be_read(body):
    found = plan_continuation(CHAT, body, sse(OPENING))
    assert isinstance(found, Impossible)
    assert found.reason is Reason.BODY


def test_other_routes_do_not_go_on():
    assert plan_continuation("/v1/responses", b"{}", b"") == Impossible(Reason.ROUTE)


def test_tokens_are_asked_for_once():
    body = b' { "prompt" : "\\"return_token_ids\\"" }'
    asked = with_tokens(body)
    assert asked is not None
    assert json.loads(asked) == {"return_token_ids": True, "prompt": '"return_token_ids"'}
    assert with_tokens(asked) is None


def test_the_limit_is_asked_by_what_must_be_refused():
    """vLLM 0.32's words; its own configuration may set limits that no request names."""
    asked = json.loads(limit_question(json.dumps({**CHAT_BODY, "stream_options": {}}).encode()))
    assert asked == {
        "model": "m",
        "messages": CHAT_BODY["messages"],
        "temperature": 0,
        "min_tokens": 2**31 - 1,
    }
    message = "min_tokens must be less than or equal to max_tokens=2035, got 2147483647."
    assert read_limit(json.dumps({"error": {"message": message, "code": 400}}).encode()) == 2035
    assert isinstance(read_limit(b'{"error":{"message":"The model does not exist"}}'), Impossible)
