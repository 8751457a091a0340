"""The worker's own listener, and that both roads give the same answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pilotlight.testing.protocol_server import PlatformStub

Start = Callable[..., Any]
CHAT = [{"role": "user", "content": "one two three"}]

BODIES = [
    ("/v1/chat/completions", {"messages": CHAT, "guided_choice": ["a", "b"]}),
    ("/v1/chat/completions", {"messages": CHAT, "guided_json": {"type": "object"}, "stream": True}),
    ("/v1/completions", {"prompt": "one two", "guided_regex": "a+", "guided_decoding_backend": "outlines"}),
    ("/v1/completions", {"prompt": "one two", "guided_regex": "a", "guided_json": {}}),
    ("/v1/completions", {"prompt": "one two", "model": "unknown", "guided_regex": "a"}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 9, "stream": True, "guided_decoding": {"regex": "a"}}),
]


@pytest.mark.parametrize(("route", "body"), BODIES)
async def test_the_job_path_and_the_listener_agree(
    start_worker: Start, platform: PlatformStub, route: str, body: dict[str, Any]
) -> None:
    """Same status, same body, same events, and the engine saw the same request twice."""
    worker = await start_worker()
    report = await worker.ready()
    await platform.submit("j", {"openai_route": route, "openai_input": body, "max_batch_size": 1})
    result = await platform.result("j")
    async with worker.listener(report) as client, client.post(route, json=body) as response:
        direct = await response.text()
        status = response.status
        content_type = response.content_type
    if "error" in result:
        by_job = json.loads(result["error"])["error"]
        by_listener = json.loads(direct)["error"]
        assert by_job["code"] == status
        assert (by_job["message"], by_job["type"]) == (by_listener["message"], by_listener["type"])
    elif body.get("stream"):
        assert (status, content_type) == (200, "text/event-stream")
        assert "".join(result["output"]) == direct
    else:
        assert status == 200
        assert result["output"] == [json.loads(direct)]
    seen = [entry["body"] for entry in worker.recorded("request") if entry["path"] == route][-2:]
    assert len(seen) == 2 or status == 400
    if len(seen) == 2 and status != 400:
        assert seen[0] == seen[1]
        assert not any(name.startswith("guided_") for name in seen[0])


async def test_guard_key_and_info(start_worker: Start, platform: PlatformStub) -> None:
    worker = await start_worker()
    report = await worker.ready()
    async with worker.listener(report) as client:
        for method, path, expected in [
            ("POST", "/sleep", 403),
            ("POST", "/invocations", 404),
            ("GET", "/v1/chat/completions", 405),
            ("GET", "/v1/models", 200),
            ("GET", "/metrics", 200),
        ]:
            async with client.request(method, path) as response:
                assert response.status == expected, path
                if expected >= 400:
                    assert (await response.json())["error"]["code"] == expected
        async with client.post("/v1/completions", data=b"{not json") as response:
            assert response.status == 400
            assert "JSON decode error" in await response.text()
        async with client.get("/worker/info") as response:
            info = await response.json()
        async with client.get("/worker/info", headers={"Authorization": "Bearer wrong"}) as response:
            assert response.status == 401
        async with client.post(
            "/v1/completions", json={"prompt": "x"}, headers={"Authorization": ""}
        ) as response:
            assert response.status == 401
    assert info["stage"] == "ready"
    assert info["argv"][3:5] == ["--model", "org/model"]
    assert info["models"] == ["org/model"]
    text = json.dumps(info)
    for secret in (report["engine"]["key"], report["listener"]["key"], platform.key):
        assert secret not in text


async def test_a_client_that_leaves_aborts_its_generation(start_worker: Start, tmp_path: Path) -> None:
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(tmp_path / "never"))
    report = await worker.ready()
    async with worker.listener(report) as client:
        response = await client.post("/v1/completions", json={"prompt": "a b c", "stream": True})
        assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
        response.close()
        await worker.until_recorded("aborted")


async def test_draining_waits_for_the_listeners_requests(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    hold = tmp_path / "go"
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(hold))
    report = await worker.ready()
    async with worker.listener(report) as client:
        response = await client.post("/v1/completions", json={"prompt": "a b c", "stream": True})
        await response.content.readuntil(b"\n\n")
        await platform.begin_drain()
        worker.process.terminate()
        await platform.stage("draining")
        hold.touch()
        assert (await response.text()).endswith("data: [DONE]\n\n")
    assert await worker.exit_code() == 0


async def test_an_engine_that_dies_mid_answer_breaks_the_connection(start_worker: Start) -> None:
    """The status is sent already; a clean end would make half an answer look whole."""
    worker = await start_worker(FAKE_ENGINE_EXIT_AFTER_EVENTS="2")
    report = await worker.ready()
    body = {"prompt": "a b c d", "stream": True}
    async with worker.listener(report) as client, client.post("/v1/completions", json=body) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    async with asyncio.timeout(20):
        assert await worker.exit_code() == 1
