"""Dispatch, routes and native fields: vllm-worker.md §1.1 to §1.4, §1.9 to §1.11, §10 point 1."""

from __future__ import annotations

from typing import Any

import pytest

from pilotlight.worker.batching import EVERY_EVENT, BatchSizes
from pilotlight.worker.errors import InputError
from pilotlight.worker.input_settings import ChatMode, InputSettings, StreamFormat
from pilotlight.worker.inputs import is_anthropic, plan_request

SETTINGS = InputSettings()
CHAT = [{"role": "user", "content": "hi"}]


def plan(job_input: Any, **settings: Any):
    return plan_request(job_input, InputSettings(**settings) if settings else SETTINGS)


def refusal(job_input: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        plan_request(job_input, SETTINGS)
    return caught.value


@pytest.mark.parametrize(
    ("job_input", "method", "target", "body"),
    [
        ({"openai_input": {"a": 1}}, "POST", "/v1/chat/completions", {"a": 1}),
        ({"openai_route": "/v1/completions", "openai_input": {"a": 1}}, "POST", "/v1/completions", {"a": 1}),
        ({"openai_route": "/v1/models"}, "GET", "/v1/models", None),
        ({"openai_route": "/v1/models", "openai_input": {}}, "GET", "/v1/models", None),
        ({"openai_route": "/health", "openai_input": None}, "GET", "/health", None),
        ({"openai_route": "/v1/chat/completions", "openai_input": {}}, "POST", "/v1/chat/completions", {}),
        ({"openai_route": "/v1/chat/completions"}, "POST", "/v1/chat/completions", {}),
        ({"openai_route": "/v1/models/org/m"}, "GET", "/v1/models/org/m", None),
        ({"openai_route": "/v1/responses/r_1?stream=true"}, "GET", "/v1/responses/r_1?stream=true", None),
        ({"openai_route": "/v1/models", "openai_input": ""}, "GET", "/v1/models", None),
        ({"openai_input": "", "route": "/version"}, "GET", "/version", None),
        ({"openai_route": "", "openai_input": {"a": 1}}, "POST", "/v1/chat/completions", {"a": 1}),
        ({"openai_route": "/metrics"}, "GET", "/metrics", None),
        ({"openai_route": "/load", "openai_input": {}}, "GET", "/load", None),
        ({"openai_route": "/ping", "openai_input": None}, "GET", "/ping", None),
        (
            {"openai_route": "/v1/completions", "openai_input": {"a": 1}, "prompt": "x"},
            "POST",
            "/v1/completions",
            {"a": 1},
        ),
        ({"route": "/v1/models", "body": {}}, "GET", "/v1/models", None),
        ({"route": "/tokenize", "body": {}}, "POST", "/tokenize", {}),
        (
            {"route": "/v1/completions", "method": "post", "body": {"a": 1}},
            "POST",
            "/v1/completions",
            {"a": 1},
        ),
        ({"route": "/tokenize", "body": {"prompt": "x"}}, "POST", "/tokenize", {"prompt": "x"}),
        ({"route": "/version"}, "GET", "/version", None),
        ({"route": "/v1/responses/r1", "method": "get"}, "GET", "/v1/responses/r1", None),
        ({"route": "/version", "prompt": "x"}, "GET", "/version", None),
        ({"openai_route": "/v1/models", "route": "/version"}, "GET", "/v1/models", None),
    ],
)
def test_pass_through_families(job_input: Any, method: str, target: str, body: Any) -> None:
    request = plan(job_input)
    assert (request.method, request.target, request.body, request.native) == (method, target, body, False)


def test_native_families() -> None:
    chat = plan({"messages": CHAT})
    assert (chat.target, chat.chat, chat.body["messages"]) == ("/v1/chat/completions", True, CHAT)
    text = plan({"prompt": "hi"})
    assert (text.target, text.chat, text.body["prompt"]) == ("/v1/completions", False, "hi")


def test_messages_win_over_prompt_and_null_does_not() -> None:
    assert plan({"messages": CHAT, "prompt": "x"}).chat
    assert not plan({"messages": None, "prompt": "x"}).chat
    assert "prompt" not in plan({"messages": CHAT, "prompt": "x"}).body


def test_extra_keys_are_ignored() -> None:
    """§1.1, last row; `use_openai_format` was read by every older release and used by none (§1.2)."""
    job_input = {
        "prompt": "x",
        "use_openai_format": True,
        "streaming": True,
        "anything": [1],
        "openai_route": "",
        "openai_input": "",
    }
    assert plan(job_input).body == plan({"prompt": "x"}).body


@pytest.mark.parametrize(
    "job_input", [{}, {"text": "x"}, {"prompt": None}, {"messages": None, "openai_input": {}}]
)
def test_without_a_known_key_the_error_names_them(job_input: Any) -> None:
    error = refusal(job_input)
    assert error.status == 400
    assert "prompt" in error.message
    assert "messages" in error.message


@pytest.mark.parametrize("job_input", [None, "hi", 3, [], [{"prompt": "x"}]])
def test_input_must_be_an_object(job_input: Any) -> None:
    assert "JSON object" in refusal(job_input).message


@pytest.mark.parametrize(
    "job_input",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": 3},
        {"prompt": {"a": 1}},
        {"prompt": ["a", 1]},
        {"prompt": [[]]},
        {"prompt": ["a"], "apply_chat_template": True},
        {"messages": []},
        {"messages": [1]},
        {"messages": ["a"]},
        {"prompt": "x", "sampling_params": [1]},
        {"prompt": "x", "stream": "yes"},
        {"prompt": "x", "stream": 2},
        {"prompt": "x", "apply_chat_template": "maybe"},
        {"prompt": "x", "stream_format": "xml"},
        {"prompt": "x", "stream_format": ["sse"]},
        {"prompt": "x", "stream": {}},
        {"prompt": "x", "max_batch_size": -1},
        {"prompt": "x", "max_batch_size": "many"},
        {"prompt": "x", "batch_size_growth_factor": True},
        {"prompt": "x", "batch_size_growth_factor": "nan"},
        {"prompt": "x", "use_beam_search": "perhaps"},
        {"prompt": "x", "apply_chat_template": []},
        {"openai_input": "x"},
        {"openai_input": [1]},
        {"openai_route": 3, "openai_input": {"a": 1}},
        {"route": ["/x"]},
        {"route": "/tokenize", "body": "x"},
        {"route": "/tokenize", "method": 3},
    ],
)
def test_bad_fields_are_refused_by_name(job_input: dict[str, Any]) -> None:
    error = refusal(job_input)
    assert (error.status, error.error_type) == (400, "BadRequestError")
    assert any(key in error.message for key in job_input)


@pytest.mark.parametrize(
    ("job_input", "status"),
    [
        ({"route": "@host/x"}, 400),
        ({"openai_route": "@host/x"}, 400),
        ({"openai_route": "//h/v1/models"}, 400),
        ({"route": "/%2f%2fh"}, 400),
        ({"route": "http://h/"}, 400),
        ({"route": "/v1/models%0d%0ax"}, 400),
        ({"route": "/v1\\models"}, 400),
        ({"openai_route": "/" + "y" * 3072}, 400),
        ({"route": "/v1/load_lora_adapter", "body": {"a": 1}}, 403),
        ({"openai_route": "/reset_prefix_cache", "openai_input": {"a": 1}}, 403),
        ({"route": "/openapi.json"}, 403),
        ({"route": "//h"}, 400),
        ({"openai_route": "/a/../b"}, 400),
        ({"openai_route": "/%2e%2e/sleep"}, 400),
        ({"route": "/v1/models\r\nx: y"}, 400),
        ({"route": "/" + "x" * 3000}, 400),
        ({"route": "/sleep", "method": "POST"}, 403),
        ({"openai_route": "/collective_rpc", "openai_input": {"a": 1}}, 403),
        ({"route": "/invocations", "body": {}}, 404),
        ({"route": "/v1/models", "method": "PATCH"}, 405),
        ({"route": "/v1/realtime"}, 400),
    ],
)
def test_the_route_guard_applies_to_both_route_keys(job_input: dict[str, Any], status: int) -> None:
    assert refusal(job_input).status == status


def test_admin_routes_open_by_setting() -> None:
    """§1.10 rule 3."""
    request = plan({"route": "/reset_prefix_cache", "method": "POST"}, allow_admin_routes=True)
    assert (request.method, request.target) == ("POST", "/reset_prefix_cache")


def test_stream_options_only_with_a_stream() -> None:
    """§1.6 rule 5."""
    body = plan({"prompt": "x", "stream": True}).body
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    body = plan({"prompt": "x", "sampling_params": {"stream_options": {}, "stream": True}}).body
    assert body["stream"] is False
    assert "stream_options" not in body


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), (1, True), ("0", False), ("False", False), (0, False)]
)
def test_boolean_spellings(value: Any, expected: bool) -> None:
    assert plan({"prompt": "x", "stream": value}).stream is expected


@pytest.mark.parametrize(
    ("job_input", "choices"),
    [
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]], "sampling_params": {"n": 2}}, 4),
    ],
)
def test_lists_of_prompts_and_tokens(job_input: dict[str, Any], choices: int) -> None:
    """§1.3: passed through; choices are counted prompt by prompt."""
    request = plan(job_input)
    assert (request.target, request.body["prompt"]) == ("/v1/completions", job_input["prompt"])
    assert request.choice_count == choices


def test_a_prompt_that_is_a_list_of_messages_is_a_chat() -> None:
    assert plan({"prompt": CHAT}).body["messages"] == CHAT
    assert plan({"prompt": CHAT, "apply_chat_template": True}).body["messages"] == CHAT


def test_messages_that_are_a_string_are_a_prompt() -> None:
    request = plan({"messages": "hi"})
    assert (request.target, request.body["prompt"]) == ("/v1/completions", "hi")


def test_content_parts_pass_untouched() -> None:
    """§1.2: text, pictures, whatever the engine's model takes."""
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}, "uuid": "x"},
    ]
    messages = [{"role": "user", "content": parts, "name": "n", "extra": {"deep": [1]}}]
    assert plan({"messages": messages}).body["messages"] == messages


def test_template_switches_ride_in_sampling_params() -> None:
    """§1.4."""
    sampling = {"continue_final_message": True, "chat_template": "{{ x }}"}
    body = plan({"messages": CHAT, "sampling_params": sampling}).body
    assert sampling.items() <= body.items()
    # Adding a prompt is the engine's default, and it refuses both at once.
    assert body["add_generation_prompt"] is False
    assert "add_generation_prompt" not in plan({"messages": CHAT}).body


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}], None])
def test_raw_chats_are_templates_and_then_completions(content: Any) -> None:
    """§1.4, §8 A7: `NATIVE_CHAT_MODE=raw` gives the text as the model wrote it, past all parsers."""
    messages = [{"role": "user", "content": content}]
    sampling = {
        "temperature": 0.5, "add_generation_prompt": False, "chat_template_kwargs": {"a": 1}, "logprobs": True,
        "top_logprobs": 2, "tools": [{"x": 1}], "tool_choice": "auto", "reasoning_effort": "low", "model": "m",
    }  # fmt: skip
    request = plan(
        {"messages": messages, "stream": True, "sampling_params": sampling},
        native_chat_mode=ChatMode.RAW,
        max_tokens=None,
    )
    assert request.template == {
        "messages": messages, "add_generation_prompt": False, "tools": [{"x": 1}], "model": "m",
        "chat_template_kwargs": {"a": 1, "reasoning_effort": "low", "enable_thinking": True},
    }  # fmt: skip
    assert (request.target, request.as_chat, request.chat) == ("/v1/completions", True, False)
    body = request.body
    assert body is not None
    assert (body["temperature"], body["logprobs"], body["model"], body["stream"]) == (0.5, 2, "m", True)
    assert not {"messages", "tools", "tool_choice", "reasoning_effort", "top_logprobs"} & body.keys()
    assert request.whole_context


def test_raw_mode_leaves_pictures_and_plain_prompts_alone() -> None:
    """A completion of tokens would lose the picture; it goes the way of a chat."""
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for job_input in ({"messages": picture}, {"prompt": "hi"}):
        assert plan(job_input, native_chat_mode=ChatMode.RAW) == plan(job_input)


def test_forms_for_routes_that_take_a_file() -> None:
    """§1.10 rule 5."""
    body = {"file": {"filename": "a.wav", "content_base64": "AAAA"}, "stream": True}
    request = plan({"route": "/v1/audio/transcriptions", "body": body})
    assert (request.form, request.stream, request.body) == (True, True, body)
    assert not plan({"route": "/tokenize", "body": {"a": 1}}).form


@pytest.mark.parametrize(
    ("given", "sent", "streams"),
    [(True, True, True), (1, True, True), ("yes", True, True), ("false", "false", False), (0, 0, False)],
)
def test_truthy_streams_become_true(given: Any, sent: Any, streams: bool) -> None:
    """§1.9: only JSON true streams."""
    for settings in ({}, {"strict_passthrough": True}):
        request = plan({"openai_input": {"messages": CHAT, "stream": given}}, **settings)
        assert (request.body["stream"], request.stream) == (sent, streams)


def test_openai_bodies_get_no_defaults() -> None:
    """§1.9, §8 A6: they follow the model's generation config."""
    body = {"messages": CHAT, "logprobs": 3, "made_up": 1, "n": None}
    assert plan({"openai_input": body}).body == body


def test_chat_template_on_a_prompt() -> None:
    request = plan({"prompt": "hi", "apply_chat_template": True})
    assert request.chat
    assert request.body["messages"] == [{"role": "user", "content": "hi"}]
    assert not plan({"messages": "hi", "apply_chat_template": True}).chat


@pytest.mark.parametrize(
    ("prompt", "prompts", "chat"),
    [(["a", "b"], 2, False), ([1, 2, 3], 1, False), ([[1], [2, 3]], 2, False), (CHAT, 1, True)],
)
def test_prompt_lists(prompt: Any, prompts: int, chat: bool) -> None:
    """§1.3."""
    request = plan({"prompt": prompt, "sampling_params": {"n": 2}})
    assert (request.choice_count, request.sequences_per_prompt, request.chat) == (2 * prompts, 2, chat)


def test_guided_fields_are_rewritten_in_both_families() -> None:
    expected = {"choice": ["a"]}
    assert (
        plan({"prompt": "x", "sampling_params": {"guided_choice": ["a"]}}).body["structured_outputs"]
        == expected
    )
    assert plan({"prompt": "x", "guided_choice": ["a"]}).body["structured_outputs"] == expected
    assert plan({"openai_input": {"guided_choice": ["a"]}}).body == {"structured_outputs": expected}


def test_batch_sizes_request_over_environment() -> None:
    """§1.2, §2.3: zero, null and missing mean the default; numeric strings count; batch_size is an old alias."""
    default = BatchSizes(40, 2, 2.5)
    sizes = {"max_batch_size": "20", "min_batch_size": 0, "batch_size_growth_factor": None}
    assert plan({"prompt": "x", **sizes}, batch=default).batch == BatchSizes(20, 2, 2.5)
    assert plan({"prompt": "x", "batch_size": 7}, batch=default).batch == BatchSizes(7, 2, 2.5)
    assert plan({"prompt": "x", "batch_size": 7, "max_batch_size": 9}, batch=default).batch.maximum == 9


def test_named_event_routes_are_not_batched_unless_asked() -> None:
    """§3.6."""
    job_input = {"openai_route": "/v1/responses", "openai_input": {"input": "x", "stream": True}}
    assert plan(job_input).batch == EVERY_EVENT
    assert plan({**job_input, "max_batch_size": 5}).batch.maximum == 5


def test_stream_formats() -> None:
    assert plan({"prompt": "x"}).stream_format is StreamFormat.TOKENS
    assert plan({"prompt": "x", "stream_format": "sse"}).stream_format is StreamFormat.SSE
    assert plan({"prompt": "x"}, native_stream_format=StreamFormat.SSE).stream_format is StreamFormat.SSE
    assert plan({"openai_input": {"a": 1}}, raw_openai_output=False).stream_format is StreamFormat.CHUNKS


def test_the_job_id_becomes_the_request_id() -> None:
    """§1.6 rule 7."""
    assert plan_request({"prompt": "x"}, SETTINGS, job_id="j1").body["request_id"] == "j1"
    given = plan_request({"prompt": "x", "sampling_params": {"request_id": "mine"}}, SETTINGS, job_id="j1")
    assert given.body["request_id"] == "mine"
    assert plan_request({"openai_input": {"a": 1}}, SETTINGS, job_id="j1").body == {"a": 1}


@pytest.mark.parametrize(
    ("job_input", "expected"),
    [
        ({"openai_route": "/v1/messages"}, True),
        ({"route": "/v1/messages?beta=true"}, True),
        ({"route": "/v1%2fmessages", "openai_input": ""}, True),
        ({"openai_input": {"messages": []}, "route": "/v1/messages"}, False),
        ({"openai_route": "/v1/models", "route": "/v1/messages"}, False),
        ({"openai_route": "", "route": "/v1/messages"}, True),
        ({"prompt": "/v1/messages"}, False),
        ({"route": 3}, False),
        ("/v1/messages", False),
    ],
)
def test_errors_take_the_form_of_the_route_that_was_planned(job_input: Any, expected: bool) -> None:
    """§3.7; the order of §1.1."""
    assert is_anthropic(job_input) is expected


@pytest.mark.parametrize(
    ("chosen", "sent"),
    [
        ({"reasoning_effort": "high", "a": 1}, {"reasoning_effort": "low", "enable_thinking": True, "a": 1}),
        ({"enable_thinking": False}, {"reasoning_effort": "low", "enable_thinking": False}),
    ],
)
def test_raw_chats_settle_the_templates_arguments_as_the_engine_does(chosen: Any, sent: Any) -> None:
    """The named fields win over `chat_template_kwargs`, except over a caller's own `enable_thinking`."""
    sampling = {"reasoning_effort": "low", "chat_template_kwargs": chosen}
    request = plan({"messages": CHAT, "sampling_params": sampling}, native_chat_mode=ChatMode.RAW)
    assert (request.template or {})["chat_template_kwargs"] == sent
