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
from pilotlight.worker.listener import FailureFinder

Start = Callable[..., Any]
CHAT = [{"role": "user", "content": "one two three"}]
PICK = [{"role": "user", "content": "pick one aaa b cc"}]

BODIES = [
    ("/v1/chat/completions", {"messages": CHAT, "guided_choice": ["a", "b"]}),
    ("/v1/chat/completions", {"messages": CHAT, "guided_json": {"type": "object"}, "stream": True}),
    ("/v1/completions", {"prompt": "one two", "guided_regex": "a+", "guided_decoding_backend": "outlines"}),
    ("/v1/completions", {"prompt": "one two", "guided_regex": "a", "guided_json": {}}),
    ("/v1/completions", {"prompt": "one two", "model": "unknown", "guided_regex": "a"}),
    ("/v1/completions", {"prompt": "pick one aaa b cc", "best_of": 3, "n": 2}),
    ("/v1/completions", {"prompt": "pick one aaa b cc", "best_of": 3, "stream": True}),
    (
        "/v1/chat/completions",
        {"messages": PICK, "best_of": 3, "stream": True, "stream_options": {"include_usage": True}},
    ),
    ("/v1/completions", {"prompt": ["pick one a bb", "pick one cc d"], "best_of": 2, "guided_regex": "a"}),
    ("/v1/completions", {"prompt": "pick one aaa b", "best_of": 2, "use_beam_search": True, "stream": True}),
    ("/v1/completions", {"prompt": "x", "best_of": 1, "n": 2}),
    ("/v1/completions", {"prompt": "x", "best_of": 2, "temperature": 0}),
    ("/v1/completions", {"prompt": "x", "best_of": 2, "model": "unknown", "stream": True}),
    ("/v1/completions", {"prompt": "x y", "best_of": 1, "stream": True}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 9, "stream": True, "guided_decoding": {"regex": "a"}}),
]


@pytest.mark.parametrize(("route", "body"), BODIES)
async def test_the_job_path_and_the_listener_agree(
    start_worker: Start, platform: PlatformStub, route: str, body: dict[str, Any]
) -> None:
    """Same status, same body, same events, and the engine saw the same request twice, or none."""
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
    if status == 400:
        assert seen == []
    else:
        assert len(seen) == 2
        assert seen[0] == seen[1]
        assert not any(name.startswith(("guided_", "best_of")) for name in seen[0])


async def test_the_best_candidate_comes_back_by_the_listener(start_worker: Start) -> None:
    """vllm-worker.md §1.7, §8 A15."""
    worker = await start_worker()
    report = await worker.ready()
    body = {"messages": PICK, "best_of": 3, "logprobs": True}
    async with (
        worker.listener(report) as client,
        client.post("/v1/chat/completions", json=body) as response,
    ):
        answer = await response.json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["b"]
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "b"
    assert (answer["usage"]["completion_tokens"], answer["usage"]["kept_tokens"]) == (3, 1)


async def test_strict_passthrough_goes_for_both_roads(start_worker: Start, platform: PlatformStub) -> None:
    """§1.9: the engine sees, and overlooks, what it dropped."""
    worker = await start_worker(OPENAI_STRICT_PASSTHROUGH="1")
    report = await worker.ready()
    body = {"prompt": "x", "best_of": 3, "guided_json": {}, "guided_regex": "a"}
    await platform.submit("j", {"openai_route": "/v1/completions", "openai_input": body})
    assert "output" in await platform.result("j")
    async with worker.listener(report) as client, client.post("/v1/completions", json=body) as response:
        assert response.status == 200
    seen = [entry["body"] for entry in worker.recorded("request")][-2:]
    assert seen == [body, body]


async def test_fields_without_effect_are_said_once_for_both_roads(
    start_worker: Start, platform: PlatformStub
) -> None:
    """§1.7: the backend of guided decoding is a start option now."""
    worker = await start_worker()
    report = await worker.ready()
    body = {"prompt": "x", "guided_regex": "a", "guided_decoding_backend": "outlines"}
    await platform.submit("j", {"openai_route": "/v1/completions", "openai_input": body})
    await platform.result("j")
    async with worker.listener(report) as client, client.post("/v1/completions", json=body) as response:
        assert response.status == 200
    worker.process.terminate()
    await worker.exit_code()
    said = worker.events("job.parameter_ignored")
    assert [line["parameter"] for line in said] == ["guided_decoding_backend"]


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (b'{"prompt":"x","user":"\\ud83d!","guided_regex":"a"}', {"user": "\ufffd!"}),
        (b'{"prompt":"x","made_up":NaN,"guided_regex":"a"}', {"made_up": None}),
        (b'{"prompt":"x","user":"\\ud83d"}', {"user": "\ufffd"}),
    ],
)
async def test_bodies_that_only_python_reads_are_rewritten_too(
    start_worker: Start, body: bytes, seen: dict[str, Any]
) -> None:
    """As on the job path, which mends what cannot be sent on."""
    worker = await start_worker()
    report = await worker.ready()
    async with worker.listener(report) as client, client.post("/v1/completions", data=body) as response:
        assert response.status == 200
    guided = {"structured_outputs": {"regex": "a"}} if b"guided" in body else {}
    assert worker.recorded("request")[-1]["body"] == {"prompt": "x", **seen, **guided}


async def test_a_body_that_is_nested_too_deeply_is_a_400(start_worker: Start) -> None:
    worker = await start_worker()
    report = await worker.ready()
    async with worker.listener(report) as client:
        for inner in (b"[" * 100_000 + b"]" * 100_000, b"NaN," + b"[" * 100_000 + b"]" * 100_000):
            body = b'{"prompt":"x","a":[' + inner + b"]}"
            async with client.post("/v1/completions", data=body) as response:
                assert response.status == 400
                assert "nested too deeply" in (await response.json())["error"]["message"]


async def test_refusals_on_the_messages_route_take_its_form(start_worker: Start) -> None:
    """§3.7."""
    worker = await start_worker()
    report = await worker.ready()
    async with worker.listener(report) as client:
        async with client.get("/v1/messages?x=1") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
            answer = await response.json()
        assert (answer["type"], answer["error"]["type"]) == ("error", "MethodNotAllowed")
        async with client.post("/v1/messages/unknown", json={}) as response:
            assert (response.status, (await response.json())["type"]) == (404, "error")


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
    assert info["argv"][3] == "--model"
    assert info["models"][0] == "org/model"
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


def failure(message: str, code: object = 500, name: str = "") -> bytes:
    data = json.dumps({"error": {"message": message, "type": "InternalServerError", "code": code}})
    return f"{name}data: {data}\n\n".encode()


PIECE = b'data: {"choices":[{"text":"\\"error\\": CUDA error: x"}]}\n\n'


@pytest.mark.parametrize(
    ("event", "fatal"),
    [
        (failure("CUDA error: out of luck"), True),
        (failure("EngineCore encountered an issue"), True),
        (failure("NCCL error: unhandled", None, "event: error\n"), True),
        (failure("boom"), False),
        (failure("the prompt says NCCL error: x", 400), False),
        (b'data: {"error": CUDA error: x}\n\n', False),
        (PIECE, False),
    ],
)
def test_a_dead_engines_last_event_is_found_wherever_the_network_cut(event: bytes, fatal: bool) -> None:
    """vllm-worker.md §7, §6.3."""
    stream = PIECE + event + b"data: [DONE]\n\n"
    for cut in range(len(stream)):
        finder = FailureFinder()
        found = [finder.is_fatal(part) for part in (stream[:cut], stream[cut:])]
        assert any(found) is fatal
    finder = FailureFinder()
    found = [finder.is_fatal(stream[at : at + 1]) for at in range(len(stream))]
    assert any(found) is fatal


async def test_the_widest_beam_is_half_of_what_the_engine_was_started_with(
    start_worker: Start, platform: PlatformStub
) -> None:
    """§1.7: `--max-logprobs` may come from anywhere."""
    worker = await start_worker(VLLM_EXTRA_ARGS="--max-logprobs=8")
    await worker.ready()
    for width in (4, 5):
        await platform.submit(f"j{width}", {"prompt": "x", "use_beam_search": True, "n": width})
    assert "output" in await platform.result("j4")
    error = json.loads((await platform.result("j5"))["error"])["error"]
    assert (error["code"], error["param"]) == (400, "n")
    assert "of at most 4" in error["message"]
