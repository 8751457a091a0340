"""`guided_*` to `structured_outputs`: vllm-worker.md §1.7."""

from __future__ import annotations

from typing import Any

import pytest

from pilotlight.core.openai_routes import REWRITTEN_FIELDS
from pilotlight.worker.errors import InputError
from pilotlight.worker.rewrite import ignored_fields, rewrite_body


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"guided_json": '{"type":"object"}'}, {"json": '{"type":"object"}'}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": "root ::= x"}, {"grammar": "root ::= x"}),
        ({"guided_json": {}, "guided_whitespace_pattern": " "}, {"json": {}, "whitespace_pattern": " "}),
        ({"guided_choice": ["a"], "guided_decoding_backend": "outlines"}, {"choice": ["a"]}),
        ({"guided_decoding": {"regex": "a", "backend": "x"}}, {"regex": "a"}),
        ({"guided_json": None, "guided_regex": "a"}, {"regex": "a"}),
    ],
)
def test_old_spelling_becomes_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert rewrite_body({"prompt": "x", **old}) == {"prompt": "x", "structured_outputs": new}


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "structured_outputs": {"regex": "a"}}, {}])
def test_other_bodies_are_passed_on_as_they_are(body: dict[str, Any]) -> None:
    assert rewrite_body(body) is body


def test_fields_without_a_constraint_vanish() -> None:
    assert rewrite_body({"prompt": "x", "guided_decoding_backend": "auto", "guided_json": None}) == {
        "prompt": "x"
    }
    assert ignored_fields({"guided_decoding_backend": "auto"}) == ("guided_decoding_backend",)


@pytest.mark.parametrize(
    "body",
    [
        {"guided_json": {}, "guided_regex": "a"},
        {"guided_json": {}, "guided_decoding": {"json": {}}},
        {"guided_json": {}, "structured_outputs": {"regex": "a"}},
        {"guided_json": {}, "response_format": {"type": "json_object"}},
        {"guided_decoding": "json"},
        {"guided_whitespace_pattern": " "},
    ],
)
def test_contradictions_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        rewrite_body(body)
    assert caught.value.status == 400
    assert "guided" in caught.value.message


def test_truthy_streams_become_true() -> None:
    """§1.9: only JSON true streams."""
    assert rewrite_body({"stream": 1}) == {"stream": True}
    assert rewrite_body({"stream": 0}) == {"stream": 0}


def test_every_rewritten_field_is_removed() -> None:
    for name in REWRITTEN_FIELDS:
        value: Any = {"regex": "a"} if name == "guided_decoding" else "a"
        extra = {"guided_regex": "a"} if name == "guided_whitespace_pattern" else {}
        assert REWRITTEN_FIELDS.isdisjoint(rewrite_body({name: value, **extra}))
