"""The list of models that is told without waking a worker (vllm-worker.md §4.8, §5.4, §6.1)."""

from __future__ import annotations

import json

import pytest

from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.gateway.model_cards import model_cards


def cards(**env: str) -> list[tuple[object, object, object]]:
    revision = Revision(endpoint_id="ep", version=1, model="org/model", env=env, created_ms=5000)
    endpoint = Endpoint(id="ep", name="ep", revision=revision)
    found = model_cards(endpoint)
    assert all((card["object"], card["created"]) == ("model", 5) for card in found)
    return [(card["id"], card["root"], card["parent"]) for card in found]


def test_the_models_own_names():
    assert cards() == [("org/model", "org/model", None)]
    assert cards(OPENAI_SERVED_MODEL_NAME_OVERRIDE="a,b") == [
        ("a", "org/model", None), ("b", "org/model", None), ("org/model", "org/model", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"name": "ice", "path": "/l/ice"}, {"name": "fire", "path": "org/fire"}]),
        "ice=/l/ice fire=org/fire",
    ],
)
def test_adapters_follow_with_their_place_and_the_model_they_change(text):
    found = cards(OPENAI_SERVED_MODEL_NAME_OVERRIDE="mine", LORA_MODULES=text)
    assert found[2:] == [("ice", "/l/ice", "mine"), ("fire", "org/fire", "mine")]


@pytest.mark.parametrize("text", ["", "None", "[]", "[{"])
def test_no_adapters_and_bad_ones_leave_the_model(text):
    assert cards(LORA_MODULES=text) == [("org/model", "org/model", None)]
