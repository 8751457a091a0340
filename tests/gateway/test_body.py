"""What the data path finds in a body, and how it asks for usage."""

from __future__ import annotations

import json

import pytest

from pilotlight.errors import InvalidInputError
from pilotlight.gateway.body import plan_body

CHAT = "/v1/chat/completions"


def test_a_body_that_does_not_stream_is_untouched():
    body = b'{ "model": "m", "messages": [] }'
    plan = plan_body(CHAT, body)
    assert (plan.body, plan.stream, plan.hide_usage, plan.rewrite) == (body, False, False, False)


@pytest.mark.parametrize(
    "options",
    ["", ',"stream_options":null', ',"stream_options":{}', ',"stream_options":{"include_usage":false,"x":1}'],
)
@pytest.mark.parametrize("route", [CHAT, "/v1/completions"])
def test_usage_is_asked_for_and_hidden_where_the_client_did_not_ask(route, options):
    plan = plan_body(route, b' \n{"stream":true,"prompt":"a{b"' + options.encode() + b"}")
    sent = json.loads(plan.body)
    assert sent["stream_options"]["include_usage"] is True
    assert sent["prompt"] == "a{b"
    assert sent["stream_options"].get("x") == (1 if "x" in options else None)
    assert plan.hide_usage


def test_usage_the_client_asked_for_is_passed_on():
    body = b'{"stream":true,"stream_options":{"include_usage":true}}'
    plan = plan_body(CHAT, body)
    assert (plan.body, plan.hide_usage) == (body, False)


def test_other_routes_carry_usage_of_their_own():
    body = b'{"stream":true,"input":"x"}'
    assert plan_body("/v1/responses", body).body == body


def test_malformed_stream_options_are_left_to_the_engine():
    body = b'{"stream":true,"stream_options":"yes"}'
    assert plan_body(CHAT, body).body == body


@pytest.mark.parametrize("field", ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])
def test_removed_fields_go_through_the_worker_program(field):
    assert plan_body(CHAT, json.dumps({field: ["a"]}).encode()).rewrite
    assert not plan_body(CHAT, json.dumps({field: None}).encode()).rewrite


def test_best_of_goes_through_the_worker_program():
    assert plan_body(CHAT, b'{"messages":[],"best_of":3}').rewrite
    assert not plan_body(CHAT, b'{"messages":[],"best_of":null}').rewrite
    assert not plan_body(CHAT, b'{"messages":[{"content":"the best_of all"}]}').rewrite
    streamed = plan_body(CHAT, b'{"best_of":3,"stream":true}')
    assert (streamed.rewrite, streamed.stream, streamed.hide_usage) == (True, True, True)


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"nul", b'{"a":}', b"\xff\xfe"])
def test_what_is_not_a_json_object_is_refused(body):
    with pytest.raises(InvalidInputError, match="JSON"):
        plan_body(CHAT, body)


def test_half_a_surrogate_pair_passes_as_it_came():
    body = b'{"prompt":"\\ud83d"}'
    assert plan_body("/v1/completions", body).body == body


def test_a_body_nested_too_deeply_is_refused():
    with pytest.raises(InvalidInputError):
        plan_body(CHAT, b'{"a":' * 50_000)


@pytest.mark.parametrize("spelling", ["1", '"true"', '"yes"', "2.5"])
@pytest.mark.parametrize("route", [CHAT, "/v1/responses"])
def test_every_spelling_of_a_stream_becomes_true(route, spelling):
    """vllm-worker.md §1.9: the engine reads them as true, so they are counted and passed on as that."""
    plan = plan_body(route, b'{"x": 1.50, "stream":' + spelling.encode() + b"}")
    sent = json.loads(plan.body)
    assert (plan.stream, sent["stream"]) == (True, True)
    assert plan.hide_usage is ("stream_options" in sent) is (route == CHAT)
    assert b"1.50" in plan.body


@pytest.mark.parametrize("spelling", ["0", '"false"', '"No"', "null", '""', "1e999"])
def test_other_spellings_are_left_to_the_engine(spelling):
    body = b'{"stream":' + spelling.encode() + b"}"
    plan = plan_body(CHAT, body)
    assert (plan.body, plan.stream) == (body, False)


@pytest.mark.parametrize("options", ["", ',"stream_options":null', ',"stream_options":{"x":1}'])
@pytest.mark.parametrize("stream", ["true", "1"])
def test_half_a_surrogate_pair_does_not_stand_in_the_way_of_usage(options, stream):
    body = f'{{"prompt":"\\ud83d","stream":{stream}{options}}}'.encode()
    sent = json.loads(plan_body(CHAT, body).body)
    assert (sent["stream"], sent["stream_options"]["include_usage"]) == (True, True)
    assert sent["prompt"] == "\ud83d"


@pytest.mark.parametrize(
    ("fields", "altered"),
    [
        ({"best_of": 1}, False),
        ({"best_of": 1, "n": None}, False),
        ({"best_of": 2, "n": 2}, False),
        ({"guided_decoding_backend": "outlines"}, False),
        ({"best_of": 2}, True),
        ({"best_of": 1, "n": 2}, True),
        ({"best_of": 1, "guided_regex": "a"}, True),
    ],
)
def test_fields_that_ask_for_nothing_alter_nothing(fields, altered):
    """vllm-worker.md §1.7: as many candidates as sequences is no question."""
    plan = plan_body(CHAT, json.dumps(fields).encode())
    assert (plan.rewrite, plan.altered) == (True, altered)
