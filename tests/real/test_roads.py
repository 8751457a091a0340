"""The same request by both roads and by the worker program's listener: same status, body and events."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

VOLATILE = {"id", "created", "request_id", "system_fingerprint"}
"""Fields that differ from one call to the next with any engine."""

QUESTION = {
    "messages": [{"role": "user", "content": "What is 2 plus 3?"}],
    "temperature": 0,
    "max_tokens": 24,
}
BODIES = {
    "chat": ("/v1/chat/completions", QUESTION),
    "guided": ("/v1/chat/completions", QUESTION | {"guided_choice": ["yes", "no"]}),
    "guided_regex": (
        "/v1/completions",
        {"prompt": "n:", "temperature": 0, "max_tokens": 4, "guided_regex": "[0-9]{3}"},
    ),
    "too_long": ("/v1/completions", {"prompt": "word " * 3000, "max_tokens": 4}),
    "unknown_model": ("/v1/chat/completions", QUESTION | {"model": "nobody/nothing"}),
    "two_constraints": ("/v1/chat/completions", QUESTION | {"guided_regex": "a", "guided_choice": ["b"]}),
}


def settled(value):
    """The value without what changes from call to call."""
    if isinstance(value, dict):
        return {name: settled(item) for name, item in value.items() if name not in VOLATILE}
    return [settled(item) for item in value] if isinstance(value, list) else value


def by_data_path(real, route, body):
    answer = real.api.post(f"/v2/{real.endpoint['id']}/openai{route}", json=body)
    return answer.status_code, answer.json()


def by_job(real, route, body):
    answer = real.api.post(
        f"/v2/{real.endpoint['id']}/runsync", json={"input": {"openai_route": route, "openai_input": body}}
    )
    job = answer.json()
    if job["status"] == "FAILED":
        error = json.loads(job["error"])
        return error["error"]["code"], error
    return 200, job["output"][0]


@pytest.mark.parametrize("case", BODIES)
def test_both_roads_give_the_same_answer(real, case):
    route, body = BODIES[case]
    data_status, data_body = by_data_path(real, route, body)
    job_status, job_body = by_job(real, route, body)
    assert data_status == job_status
    if data_status == 200:
        assert settled(data_body) == settled(job_body)
    else:
        assert data_body["error"]["message"] == job_body["error"]["message"]


def test_guided_fields_really_constrain(real):
    status, body = by_data_path(real, *BODIES["guided"])
    assert (status, body["choices"][0]["message"]["content"] in {"yes", "no"}) == (200, True)


@pytest.mark.parametrize("case", ["chat", "guided"])
def test_both_roads_stream_the_same(real, case):
    route, body = BODIES[case]
    body = body | {"stream": True}
    direct = real.api.post(f"/v2/{real.endpoint['id']}/openai{route}", json=body)
    job = real.api.post(
        f"/v2/{real.endpoint['id']}/runsync",
        json={"input": {"openai_route": route, "openai_input": body, "max_batch_size": 1}},
    ).json()
    assert job["status"] == "COMPLETED"

    def said(text):
        """All but how vLLM merged tokens into events, which depends on how busy it is."""
        *lines, end = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        events = [settled(json.loads(line)) for line in lines]
        choices = [choice for event in events for choice in event["choices"]]
        return {
            "shapes": {(*event, event["object"], event["model"]) for event in events},
            "roles": [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]],
            "text": "".join(choice["delta"].get("content") or "" for choice in choices),
            "finish": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
            "end": end,
        }

    ours, theirs = said(direct.text), said("".join(job["output"]))
    assert ours == theirs
    assert (ours["roles"], len(ours["finish"]), ours["end"]) == (["assistant"], 1, "[DONE]")
    assert ours["text"]


def test_neither_prompt_nor_messages_is_told_and_messages_win(real):
    """vllm-worker.md §1.1."""
    url = f"/v2/{real.endpoint['id']}/runsync"
    neither = real.api.post(url, json={"input": {"nothing": 1}}).json()
    assert neither["status"] == "FAILED"
    assert "prompt" in json.loads(neither["error"])["error"]["message"]
    both = real.api.post(
        url,
        json={
            "input": {
                "prompt": "ignored",
                "messages": QUESTION["messages"],
                "sampling_params": {"temperature": 0},
            }
        },
    ).json()
    assert both["output"][0]["object"] == "chat.completion"
