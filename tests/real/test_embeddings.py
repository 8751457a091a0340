"""Embeddings from a real engine: the built-in model served as a pooling model by one variable (§4.5, TASK)."""

from __future__ import annotations

import base64
import math
import struct

import openai
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

MODEL = "pilotlight/ember"
SIZE = 256
TEXTS = ["What is the capital of France?", "What is the capital of Spain?", "3, 4, 5, 6"]


@pytest.fixture(scope="module")
def embedder(serve):
    return serve(MODEL, "embedder", TASK="embed")


def likeness(left, right):
    """The cosine of the angle between two vectors."""
    return sum(a * b for a, b in zip(left, right, strict=True)) / math.hypot(*left) / math.hypot(*right)


def test_like_texts_have_like_vectors(embedder):
    answer = embedder.openai("/v1/embeddings", {"model": MODEL, "input": TEXTS})
    france, spain, numbers = (item["embedding"] for item in answer["data"])
    assert len(france) == SIZE
    assert likeness(france, france) == pytest.approx(1)
    assert likeness(france, spain) > likeness(france, numbers)


def test_the_openai_client(embedder, installation):
    """vllm-worker.md §6.1, §10 point 15. The client asks for base64 unless told otherwise."""
    url = embedder.endpoint["openai_url"]
    with openai.OpenAI(base_url=url, api_key=installation.key) as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS)
        assert [len(item.embedding) for item in answer.data] == [SIZE] * 3
        assert answer.usage.prompt_tokens > 0
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello!"}])


def test_by_jobs(embedder):
    """The same vector by `openai_route` and by `route` (§1.1), as numbers and as base64."""
    body = {"model": MODEL, "input": TEXTS[0]}
    direct = embedder.openai("/v1/embeddings", body)["data"][0]["embedding"]
    for job_input in (
        {"openai_route": "/v1/embeddings", "openai_input": body},
        {"route": "/v1/embeddings", "body": body},
    ):
        job = embedder.job(job_input)
        assert job["output"][0]["data"][0]["embedding"] == pytest.approx(direct, abs=1e-3)
    coded = embedder.openai("/v1/embeddings", body | {"encoding_format": "base64"})["data"][0]["embedding"]
    numbers = struct.unpack(f"<{SIZE}f", base64.b64decode(coded))
    assert list(numbers) == pytest.approx(direct, abs=1e-3)


def test_a_text_job_is_refused(embedder):
    error = embedder.refusal({"prompt": "Hello"})
    assert error["code"] == 404
