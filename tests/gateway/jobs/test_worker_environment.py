"""The variables by which a worker finds the platform (worker-protocol.md §2.1, serverless-api.md §4.1)."""

from __future__ import annotations

from pilotlight.core.worker_environment import worker_environment


def test_templates_keep_their_tokens_and_have_a_query():
    """serverless-api.md §4.1: `$ID` and `$RUNPOD_POD_ID` are the library's to replace."""
    made = worker_environment(
        "http://127.0.0.1:8400/", "ep", "w", "s3cret", ping_interval_ms=2000, gpu_type="NVIDIA H200"
    )
    prefix, query = "http://127.0.0.1:8400/v2/ep", "?gpu=NVIDIA+H200"
    assert made["RUNPOD_WEBHOOK_GET_JOB"] == f"{prefix}/job-take/$ID{query}"
    assert made["RUNPOD_WEBHOOK_POST_OUTPUT"] == f"{prefix}/job-done/$RUNPOD_POD_ID/$ID{query}"
    assert made["RUNPOD_WEBHOOK_POST_STREAM"] == f"{prefix}/job-stream/$RUNPOD_POD_ID/$ID{query}"
    assert made["RUNPOD_WEBHOOK_PING"] == f"{prefix}/ping/$RUNPOD_POD_ID{query}"
    assert made["PILOTLIGHT_WORKER_STATE_URL"] == "http://127.0.0.1:8400/pilotlight/v1/worker-state/ep/w"
    assert (made["RUNPOD_PING_INTERVAL"], made["NO_PROXY"]) == ("2000", "127.0.0.1")


def test_secret_is_in_no_url():
    """worker-protocol.md §13: the library prints URLs."""
    made = worker_environment("http://h", "ep", "w", "s3cret", ping_interval_ms=2000)
    assert [name for name, value in made.items() if "s3cret" in value] == ["RUNPOD_AI_API_KEY"]
