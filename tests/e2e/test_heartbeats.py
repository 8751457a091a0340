"""A stream that waits for a whole start, told of it: real gateway, worker program and packages."""

from __future__ import annotations

import subprocess

import anthropic
import httpx
import openai

from .conftest import PROGRAM

MESSAGES = [{"role": "user", "content": "count to 3"}]
BODY = {"model": "pilotlight/ember", "messages": MESSAGES, "stream": True}


def test_callers_that_wait_see_a_start_and_their_packages_do_not_notice(shared, tmp_path):
    """1. A key that asks for heartbeats is made and listed. 2. While an engine loads, its streams get comments
    with the stage. 3. The packages read the same stream as ever, and a failure is one for them."""
    command = [PROGRAM[0], "keys"]

    def keys(*arguments):
        environment = shared.environment | {"PILOTLIGHT_URL": shared.url}
        return subprocess.run(
            [*command, *arguments], env=environment, check=True, capture_output=True, text=True
        ).stdout

    key = keys("create", "chat", "--scope", "admin", "--heartbeat", "1").strip()
    assert " 1 s " in keys("ls")

    load = tmp_path / "load"
    endpoint = shared.deploy({"FAKE_ENGINE_LOAD_FILE": str(load)})
    base = f"{shared.url}/v2/{endpoint.id}/openai"

    def with_openai(model="pilotlight/ember"):
        with openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0) as client:
            chunks = client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def with_anthropic():
        with (
            anthropic.Anthropic(base_url=base, auth_token=key, api_key=None, max_retries=0) as client,
            client.messages.create(
                model="pilotlight/ember", max_tokens=9, messages=MESSAGES, stream=True
            ) as stream,
        ):
            return "".join(event.delta.text for event in stream if event.type == "content_block_delta")

    texts = [shared.background(call) for call in (with_openai, with_anthropic)]
    wrong = shared.background(lambda: with_openai("nobody/nothing"))
    with httpx.stream(
        "POST",
        f"{base}/v1/chat/completions",
        json=BODY,
        headers={"authorization": f"Bearer {key}"},
        timeout=30,
    ) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        lines = answer.iter_lines()
        assert next(lines).startswith(": pilotlight starting stage=")
        while " stage=loading_weights " not in next(lines):
            pass
        load.touch()
        told = [line for line in lines if line and not line.startswith(":")]
    assert told[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in told)
    assert [text.result() for text in texts] == [" 1 2 3"] * 2
    error = wrong.exception()
    assert isinstance(error, openai.APIError)
    assert "does not exist" in str(error)
