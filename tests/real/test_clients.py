"""Unmodified clients against a real engine: openai, anthropic, runpod, curl. One worker serves them all."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import anthropic
import openai
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

MODEL = "pilotlight/ember"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "Paris"
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=real.endpoint["openai_url"], api_key=real.key) as made:
        yield made


def test_openai_answers_the_question(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    assert ANSWER in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0


def test_openai_streams_the_same_answer_without_usage(client):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_openai_gets_usage_when_it_asks(client):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


async def test_openai_async_completions_concurrently(real):
    async with openai.AsyncOpenAI(base_url=real.endpoint["openai_url"], api_key=real.key) as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(model=MODEL, prompt="one two three", max_tokens=8, temperature=0)
                for _ in range(8)
            )
        )
        assert len({answer.choices[0].text for answer in answers}) == 1
        stream = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert ANSWER in text


def test_openai_lists_models_and_sees_true_errors(client, real):
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody/nothing", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 3000}])
    wrong = openai.OpenAI(base_url=real.endpoint["openai_url"], api_key="rpa_WRONG", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.chat.completions.create(model=MODEL, messages=QUESTION)


def test_openai_responses(client):
    answer = client.responses.create(
        model=MODEL, input="What is the capital of France?", temperature=0, max_output_tokens=32
    )
    assert ANSWER in answer.output_text


def test_openai_streams_responses_and_sees_their_errors(client):
    """vllm-worker.md §6.1, §6.3: named events, no `[DONE]`; an unknown model is a 404 here too."""
    asked = {"input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 32}
    events = list(client.responses.create(model=MODEL, stream=True, **asked))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert ANSWER in "".join(deltas)
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert events[-1].response.usage.output_tokens > 0
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nobody/nothing", **asked)


async def test_openai_async_responses(real):
    async with openai.AsyncOpenAI(base_url=real.endpoint["openai_url"], api_key=real.key) as client:
        answers = await asyncio.gather(
            *(
                client.responses.create(
                    model=MODEL, input="What is 2 plus 3?", temperature=0, max_output_tokens=8
                )
                for _ in range(4)
            )
        )
    assert {answer.output_text for answer in answers} == {"5"}


def test_openai_streams_completions_of_several_sequences(client):
    stream = client.completions.create(
        model=MODEL, prompt="one two three", max_tokens=6, n=2, seed=1, stream=True, temperature=1
    )
    words = {0: "", 1: ""}
    for chunk in stream:
        words[chunk.choices[0].index] += chunk.choices[0].text
    whole = client.completions.create(
        model=MODEL, prompt="one two three", max_tokens=6, n=2, seed=1, temperature=1
    )
    assert words == {choice.index: choice.text for choice in whole.choices}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"top_p": 0},
        {"n": 2, "temperature": 0},
        {"max_tokens": 0},
        {"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}},
        {"extra_body": {"best_of": 2, "n": 3}},
        {"stream_options": {"include_usage": True}},
    ],
    ids=str,
)
def test_what_openai_calls_cannot_ask_is_a_400(client, fields):
    """vllm-worker.md §1.11, §6.2: refused by the engine or by the worker program, the same class either way."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, **fields)
    assert caught.value.body["message"]


def test_anthropic_messages(real):
    """The Anthropic client sends x-api-key and calls /v1/messages."""
    with anthropic.Anthropic(base_url=f"{real.endpoint['url']}/openai", api_key=real.key) as client:
        answer = client.messages.create(
            model=MODEL, max_tokens=32, messages=QUESTION, extra_body={"temperature": 0}
        )
        assert ANSWER in answer.content[0].text
        with client.messages.stream(
            model=MODEL, max_tokens=32, messages=QUESTION, extra_body={"temperature": 0}
        ) as stream:
            assert ANSWER in stream.get_final_text()


async def test_anthropic_async_counts_and_streams(real):
    """vllm-worker.md §6.1: `/v1/messages/count_tokens`; the stream's events in Anthropic's order."""
    async with anthropic.AsyncAnthropic(
        base_url=f"{real.endpoint['url']}/openai", api_key=real.key
    ) as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=QUESTION)
        stream = await client.messages.create(
            model=MODEL, max_tokens=32, messages=QUESTION, stream=True, extra_body={"temperature": 0}
        )
        events = [event async for event in stream]
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert ANSWER in text
    assert [events[0].type, events[-1].type] == ["message_start", "message_stop"]
    assert counted.input_tokens == events[0].message.usage.input_tokens > 0


@pytest.mark.parametrize(
    ("fields", "key", "error"),
    [
        ({"model": "nobody/nothing"}, None, anthropic.NotFoundError),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, None, anthropic.BadRequestError),
        ({}, "rpa_WRONG", anthropic.AuthenticationError),
    ],
    ids=["model", "too long", "key"],
)
def test_anthropic_sees_true_errors(real, fields, key, error):
    """vllm-worker.md §3.7, §10 point 15: status and Anthropic's form of the body."""
    url = f"{real.endpoint['url']}/openai"
    body = {"model": MODEL, "max_tokens": 8, "messages": QUESTION} | fields
    client = anthropic.Anthropic(base_url=url, api_key=key or real.key, max_retries=0)
    with client, pytest.raises(error) as caught:
        client.messages.create(**body)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["message"]


RUNPOD = """
import json, sys
import runpod
runpod.api_key = sys.argv[2]
endpoint = runpod.Endpoint(sys.argv[1])
question = {"messages": [{"role": "user", "content": "What is the capital of France?"}],
            "sampling_params": {"temperature": 0, "max_tokens": 32}}
found = {"run_sync": endpoint.run_sync({"input": question}, timeout=120)}
job = endpoint.run({"input": question})
found["output"] = job.output(timeout=120)
found["status"] = job.status()
streaming = endpoint.run({"input": {**question, "stream": True}})
found["stream"] = list(streaming.stream())
long = endpoint.run({"input": {"prompt": "x", "sampling_params": {"max_tokens": 2000, "ignore_eos": True}}})
found["cancel"] = long.cancel()
found["health"] = endpoint.health()
print(json.dumps(found))
"""


def test_runpod_endpoint(real):
    """run, run_sync, stream, status, cancel, health of the `runpod` package (serverless-api.md §9.7 row 1)."""
    done = subprocess.run(
        [sys.executable, "-c", RUNPOD, real.endpoint["id"], real.key],
        env={**real.environment, "RUNPOD_ENDPOINT_BASE_URL": f"{real.url}/v2"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert ANSWER in found["run_sync"][0]["choices"][0]["tokens"][0]
    assert found["output"] == found["run_sync"] or ANSWER in found["output"][0]["choices"][0]["tokens"][0]
    assert found["status"] == "COMPLETED"
    streamed = "".join("".join(item["choices"][0]["tokens"]) for item in found["stream"])
    assert ANSWER in streamed
    assert found["cancel"]["status"] == "CANCELLED"
    assert found["health"]["workers"]["ready"] == 1
    assert set(found["health"]["jobs"]) == {"completed", "failed", "inProgress", "inQueue", "retried"}


def test_the_readmes_curl_examples_work_as_printed(real):
    text = README.read_text()
    examples = re.findall(r"^curl (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        command = example.replace("$URL", real.endpoint["url"]).replace("$KEY", real.key)
        done = subprocess.run(
            ["bash", "-c", command + " --fail-with-body --silent --show-error"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout
