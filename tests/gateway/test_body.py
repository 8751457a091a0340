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
