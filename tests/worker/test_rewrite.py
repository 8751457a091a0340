"""`guided_*` to `structured_outputs`, on every body alike: vllm-worker.md §1.7, §1.9, §10 point 10."""

from __future__ import annotations

from typing import Any

import pytest

from pilotlight.core.openai_routes import REWRITTEN_FIELDS
from pilotlight.worker.errors import InputError
from pilotlight.worker.parameters import GUIDED
from pilotlight.worker.rewrite import ignored_guided, rewrite_guided, translate_body


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
        ({"guided_decoding": {"regex": "a", "backend": "x", "disable_fallback": True}}, {"regex": "a"}),
        ({"guided_json": None, "guided_regex": "a"}, {"regex": "a"}),
    ],
)
def test_old_spelling_becomes_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert rewrite_guided({"prompt": "x", **old}) == {"prompt": "x", "structured_outputs": new}


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "structured_outputs": {"regex": "a"}}, {}])
def test_other_bodies_are_passed_on_as_they_are(body: dict[str, Any]) -> None:
    assert rewrite_guided(body) is body


def test_fields_without_a_constraint_vanish() -> None:
    assert rewrite_guided({"prompt": "x", "guided_decoding_backend": "auto", "guided_json": None}) == {
        "prompt": "x"
    }
    assert [one.name for one in ignored_guided({"guided_decoding_backend": "auto"})] == [
        "guided_decoding_backend"
    ]
    assert ignored_guided({"guided_decoding": {"backend": "x", "regex": "a"}})
    assert not ignored_guided({"guided_decoding": {"regex": "a"}, "guided_decoding_backend": None})


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
        rewrite_guided(body)
    assert caught.value.status == 400
    assert "guided" in caught.value.message


def test_openai_bodies_are_translated_unless_told_not_to() -> None:
    """§1.9: users put the old fields into `extra_body`."""
    body = {"messages": [], "guided_choice": ["a"], "guided_decoding_backend": "x"}
    translation = translate_body("/v1/chat/completions", body, strict=False)
    assert translation.body == {"messages": [], "structured_outputs": {"choice": ["a"]}}
    assert [one.name for one in translation.ignored] == ["guided_decoding_backend"]
    assert translate_body("/v1/chat/completions", body, strict=True).body is body
    plain = {"messages": [], "stream": True, "n": 2}
    assert translate_body("/v1/chat/completions", plain, strict=False).body is plain


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_routes_that_know_constraints(path: str) -> None:
    body = translate_body(path, {"guided_regex": "a"}, strict=False).body
    assert body == {"structured_outputs": {"regex": "a"}}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/embeddings", "/v1/audio/transcriptions"])
def test_elsewhere_constraints_are_refused_by_name(path: str) -> None:
    """§0.3 point 5: these routes have no `structured_outputs`, so it would silently do nothing."""
    for name, value in (("guided_regex", "a"), ("guided_decoding", {"regex": "a"})):
        with pytest.raises(InputError, match=path) as caught:
            translate_body(path, {"model": "m", name: value}, strict=False)
        assert (caught.value.status, caught.value.param) == (400, name)
    idle = {"guided_regex": None, "guided_decoding": {"backend": "x"}, "guided_decoding_backend": "x"}
    assert translate_body(path, {"model": "m", **idle}, strict=False).body == {"model": "m"}
    body = {"guided_regex": "a"}
    assert translate_body(path, body, strict=True).body is body


def test_the_gateway_looks_for_exactly_the_fields_that_are_translated() -> None:
    assert GUIDED | {"best_of"} == REWRITTEN_FIELDS


def test_every_guided_field_is_removed() -> None:
    for name in GUIDED:
        value: Any = {"regex": "a"} if name == "guided_decoding" else "a"
        extra = {"guided_regex": "a"} if name == "guided_whitespace_pattern" else {}
        assert GUIDED.isdisjoint(rewrite_guided({name: value, **extra}))
