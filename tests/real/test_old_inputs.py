"""What the older public worker's README and tests send, unchanged, against an endpoint of ours on a real engine.

Native, OpenAI and route style (`tests/worker/data/old_inputs.json`); as published, and with streaming the other
way round; waiting with `/runsync` and polling `/stream`.
"""

from __future__ import annotations

import copy
import json
import time

import pytest
from tests.worker.old_inputs import load_old_inputs

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

OLD = load_old_inputs("pilotlight/ember")
CHATS = ("/v1/chat/completions", "/v1/completions")


def body_of(job_input):
    """Where the input says `stream`."""
    return job_input.get("openai_input") or job_input.get("body") or job_input


def words(old, output, *, streamed):
    """What a reader of the time finds in the output. A small model may end at once; then there are no words."""
    if old.style == "native":
        return "".join(piece for item in output for choice in item["choices"] for piece in choice["tokens"])
    if streamed:
        text = "".join(output)
        assert text.endswith("data: [DONE]\n\n")
        events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if "{" in event]
        choices = [choice for event in events for choice in event["choices"]]
        return "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
        )
    (answer,) = output
    if "choices" in answer:
        return answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"]
    if "data" in answer:
        return answer["data"][0]["id"]
    parts = answer.get("output") or [answer]
    return "".join(part["text"] for each in parts for part in each["content"])


@pytest.mark.parametrize("old", OLD, ids=[old.name for old in OLD])
def test_as_published(ember, old):
    job = ember.job(old.input)
    assert job["status"] == "COMPLETED", job
    assert isinstance(words(old, job["output"], streamed=old.streamed), str)
    if old.style == "native":
        usage = job["output"][-1]["usage"]
        assert usage["input"] > 0
        assert 0 < usage["output"] <= old.input.get("sampling_params", {}).get("max_tokens", 16)


TURNED = [old for old in OLD if old.style == "native" or old.input.get("openai_route") in CHATS]


@pytest.mark.parametrize("old", TURNED, ids=[old.name for old in TURNED])
def test_with_streaming_the_other_way_round(ember, old):
    """`/run` and `/stream` until nothing more comes; the items make the same answer as `/status` gives."""
    job_input = copy.deepcopy(old.input)
    body_of(job_input)["stream"] = not old.streamed
    job = ember.api.post(f"{ember.path}/run", json={"input": job_input}).json()
    items = []
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, "the stream has no end"
        answer = ember.api.get(f"{ember.path}/stream/{job['id']}").json()
        items += [part["output"] for part in answer["stream"]]
        if answer["status"] not in {"IN_QUEUE", "IN_PROGRESS"} and not answer["stream"]:
            break
    whole = ember.api.get(f"{ember.path}/status/{job['id']}").json()
    assert whole["status"] == "COMPLETED", whole
    assert items == whole["output"]
    assert items
    assert isinstance(words(old, items, streamed=not old.streamed), str)
