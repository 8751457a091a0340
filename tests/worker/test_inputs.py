"""Dispatch and native bodies: vllm-worker.md §1.1 to §1.10, §10 item 1."""

from __future__ import annotations

from typing import Any

import pytest

from pilotlight.worker.batching import EVERY_EVENT, BatchSizes
from pilotlight.worker.errors import InputError
from pilotlight.worker.inputs import InputSettings, StreamFormat, plan_request

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
        {"openai_input": "x"},
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
        ({"route": "/v1/audio/transcriptions", "body": {"file": "x"}}, 400),
    ],
)
def test_the_route_guard_applies_to_both_route_keys(job_input: dict[str, Any], status: int) -> None:
    assert refusal(job_input).status == status


def test_native_defaults_are_sent_explicitly() -> None:
    """§1.6 rule 1: vLLM would otherwise take the model's generation config."""
    body = plan({"prompt": "x"}).body
    assert body == {
        "prompt": "x", "stream": False, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 16, "n": 1,
    }  # fmt: skip
    assert plan({"prompt": "x"}, documented_defaults=False, max_tokens=None).body == {
        "prompt": "x", "stream": False, "max_tokens": None, "n": 1,
    }  # fmt: skip


def test_overlay_order_and_nulls() -> None:
    """§1.6 rules 2 and 3, §1.8: top-level keys count, `sampling_params` wins."""
    job_input = {
        "prompt": "x", "temperature": 0.5, "top_p": 0.5, "unknown_key": 1,
        "sampling_params": {"temperature": 0.2, "top_k": None, "max_tokens": None, "stop": None, "made_up": 7, "n": None},
    }  # fmt: skip
    body = plan(job_input).body
    assert (body["temperature"], body["top_p"], body["top_k"], body["n"]) == (0.2, 0.5, -1, 1)
    assert body["max_tokens"] is None
    assert body["stop"] is None
    assert body["made_up"] == 7
    assert "unknown_key" not in body


def test_null_sampling_params_and_null_stream_mean_nothing() -> None:
    assert plan({"prompt": "x", "sampling_params": None, "stream": None}).stream is False


@pytest.mark.parametrize("name", ["logits_processors", "detokenize", "output_kind", "extra_args"])
def test_parameters_without_a_form_over_http_are_refused(name: str) -> None:
    error = refusal({"prompt": "x", "sampling_params": {name: 1}})
    assert (error.status, error.param) == (400, name)


def test_best_of_is_refused_unless_it_asks_for_nothing() -> None:
    assert "best_of" not in plan({"prompt": "x", "sampling_params": {"best_of": 1}}).body
    assert "best_of" not in plan({"prompt": "x", "sampling_params": {"best_of": None}}).body
    assert refusal({"prompt": "x", "sampling_params": {"best_of": 3}}).param == "best_of"


def test_integer_logprobs_on_chat_are_translated() -> None:
    body = plan({"messages": CHAT, "sampling_params": {"logprobs": 3}}).body
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    body = plan({"prompt": "x", "sampling_params": {"logprobs": 3}}).body
    assert body["logprobs"] == 3
    assert "top_logprobs" not in body


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
