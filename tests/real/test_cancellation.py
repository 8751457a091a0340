"""A job or call that nobody waits for any more frees its place in the engine (vllm-worker.md §7, §10 point 14)."""

from __future__ import annotations

import httpx
import pytest

from .waking import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

RUNNING = "vllm:num_requests_running"
MADE = "vllm:generation_tokens_total"
LONG = {"max_tokens": 1900, "n": 16, "ignore_eos": True}
ALL = 16 * 1900
"""Tokens; they take many seconds, far longer than somebody needs to look twice on a busy machine."""


@pytest.fixture
def idle(ember):
    until(lambda: ember.metric(RUNNING) == 0)
    before = ember.metric(MADE)
    yield ember
    until(lambda: ember.metric(RUNNING) == 0)
    assert ember.metric(MADE) - before < ALL


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_job(idle, stream):
    job_input = {"prompt": "one two", "stream": stream, "sampling_params": LONG}
    job = idle.api.post(f"{idle.path}/run", json={"input": job_input}).json()
    until(lambda: idle.metric(RUNNING) > 0)
    assert idle.api.post(f"{idle.path}/cancel/{job['id']}").json()["status"] == "CANCELLED"


def test_a_call_whose_client_leaves(idle):
    body = {"prompt": "one two", "stream": True, **LONG}
    with idle.api.stream("POST", f"{idle.path}/openai/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: where nobody holds it, httpx closes the connection
        assert next(lines)
        until(lambda: idle.metric(RUNNING) > 0)


def test_a_call_without_streaming_whose_client_leaves(idle):
    body = {"prompt": "one two", **LONG}
    url = f"{idle.path}/openai/v1/completions"
    with pytest.raises(httpx.ReadTimeout):
        idle.api.post(url, json=body, timeout=httpx.Timeout(10, read=0.5))
