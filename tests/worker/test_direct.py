"""Direct HTTP mode, as a process: the worker is the server and takes no jobs (vllm-worker.md §7.1)."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pilotlight.testing.protocol_server import PlatformStub
from pilotlight.worker.config import DirectSettings, WorkerConfig
from pilotlight.worker.errors import ConfigError

Start = Callable[..., Any]

CHAT = {"messages": [{"role": "user", "content": "one two three"}]}
NO_JOBS = dict.fromkeys(
    (
        "RUNPOD_WEBHOOK_GET_JOB",
        "RUNPOD_WEBHOOK_POST_OUTPUT",
        "RUNPOD_WEBHOOK_POST_STREAM",
        "RUNPOD_WEBHOOK_PING",
    ),
    "-",
)
"""Variables that a load-balancing worker does not get."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Direct:
    """A worker in direct mode, as its platform sees it."""

    def __init__(self, worker: Any, port: int, session: aiohttp.ClientSession) -> None:
        self.worker = worker
        self.port = port
        self.session = session

    async def health(self, url: str = "/ping") -> int | None:
        """The status of a check; None where nobody listens."""
        try:
            async with self.session.get(url) as answer:
                return answer.status
        except aiohttp.ClientConnectionError:
            return None

    async def until_health(self, *wanted: int | None, url: str = "/ping") -> list[int | None]:
        """Every different status until one of those that are wanted."""
        seen: list[int | None] = []
        async with asyncio.timeout(20):
            while not seen or seen[-1] not in wanted:
                status = await self.health(url)
                if not seen or seen[-1] != status:
                    seen.append(status)
                await asyncio.sleep(0.01)
        return seen


@pytest.fixture
async def direct(start_worker: Start) -> AsyncIterator[Callable[..., Any]]:
    """Starts a worker in direct mode on a free port."""
    sessions: list[aiohttp.ClientSession] = []

    async def start(*program: str, **variables: str) -> Direct:
        port = str(free_port())
        variables = {"PILOTLIGHT_WORKER_STATE_URL": "-", "PILOTLIGHT_HTTP_HOST": "127.0.0.1", **variables}
        worker = await start_worker(*program, **NO_JOBS, WORKER_MODE="http", PORT=port, **variables)
        sessions.append(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))
        return Direct(worker, int(port), sessions[-1])

    yield start
    for session in sessions:
        await session.close()


async def test_health_tells_the_start_from_its_first_moment(
    direct: Callable[..., Any], tmp_path: Path
) -> None:
    """204 while the model loads, 200 once it serves; before that requests get 503 with Retry-After."""
    load = tmp_path / "load"
    server = await direct(FAKE_ENGINE_LOAD_FILE=str(load))
    assert (await server.until_health(204))[-2:] in ([204], [None, 204])
    async with server.session.get("/") as answer:
        status = await answer.json()
    assert status["status"] in {"starting", "importing", "loading_weights"}
    async with server.session.post("/v1/chat/completions", json=CHAT) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        assert (await answer.json())["error"]["retryable"] is True
    load.touch()
    assert await server.until_health(200) == [204, 200]
    async with server.session.get("/") as answer:
        status = await answer.json()
    assert (status["status"], status["models"][0]) == ("ready", "org/model")


async def test_the_engines_own_paths_are_served_without_a_key(direct: Callable[..., Any]) -> None:
    """The platform lets callers in; bodies are rewritten as on every other road, admin routes stay closed."""
    server = await direct()
    await server.until_health(200)
    async with server.session.post("/v1/chat/completions", json=CHAT) as answer:
        assert (await answer.json())["choices"][0]["message"]["content"] == "one two three"
    async with server.session.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert answer.content_type == "text/event-stream"
        assert (await answer.text()).endswith("data: [DONE]\n\n")
    async with server.session.post(
        "/v1/completions", json={"prompt": "a", "guided_choice": ["a", "b"]}
    ) as answer:
        assert answer.status == 200
    assert server.worker.recorded("request")[-1]["body"]["structured_outputs"] == {"choice": ["a", "b"]}
    async with server.session.get("/v1/models") as answer:
        assert (await answer.json())["data"][0]["id"] == "org/model"
    for path in ("/sleep", "/collective_rpc", "/worker/info"):
        async with server.session.post(path, json={}) as answer:
            assert answer.status in {403, 404}, path
    assert not [event for event in server.worker.recorded("request") if event["path"] == "/sleep"]


async def test_health_may_have_a_port_and_a_path_of_its_own(direct: Callable[..., Any]) -> None:
    port = free_port()
    server = await direct(PORT_HEALTH=str(port), HEALTH_CHECK_PATH="/healthz")
    assert 200 in await server.until_health(200, url=f"http://127.0.0.1:{port}/healthz")
    assert await server.health("/healthz") == 200


async def test_no_job_is_asked_for(direct: Callable[..., Any], platform: PlatformStub) -> None:
    server = await direct()
    await server.until_health(200)
    server.worker.process.terminate()
    assert await server.worker.exit_code() == 0
    assert platform.requests == []


async def test_a_stream_is_finished_before_the_end(direct: Callable[..., Any], tmp_path: Path) -> None:
    """§7 shutdown: from SIGTERM on health says 503, what runs is answered, and the exit code is 0."""
    hold = tmp_path / "go"
    server = await direct(FAKE_ENGINE_HOLD_FILE=str(hold))
    await server.until_health(200)
    async with server.session.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        first = await answer.content.readuntil(b"\n\n")
        server.worker.process.terminate()
        assert await server.until_health(503) in ([503], [200, 503])
        hold.touch()
        rest = await answer.read()
    assert (first + rest).endswith(b"data: [DONE]\n\n")
    assert await server.worker.exit_code() == 0
    assert server.worker.engine_processes() == {}


async def test_a_body_that_does_not_arrive_does_not_hold_up_the_end(direct: Callable[..., Any]) -> None:
    """§7 shutdown: after DRAIN_TIMEOUT its connection is closed, though the client says nothing more."""
    server = await direct(DRAIN_TIMEOUT="0.2")
    await server.until_health(200)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    writer.write(head.encode())
    await writer.drain()
    async with server.session.get("/v1/models") as answer:
        assert answer.status == 200
    server.worker.process.terminate()
    assert await server.worker.exit_code() == 0
    writer.close()


async def test_a_body_that_never_arrives_is_a_408(direct: Callable[..., Any]) -> None:
    program = "from pilotlight.worker import listener, main; listener.BODY_SECONDS = 0.2; raise SystemExit(main.main())"
    server = await direct("-c", program)
    await server.until_health(200)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()


async def test_what_an_open_port_means_is_said_in_the_log(direct: Callable[..., Any]) -> None:
    server = await direct(VLLM_API_KEY="users-own", ALLOW_ADMIN_ROUTES="1")
    await server.until_health(200)
    notes = " ".join(event["note"] for event in server.worker.events("direct.note"))
    assert "VLLM_API_KEY is ignored" in notes
    assert "ALLOW_ADMIN_ROUTES is set" in notes
    assert "users-own" not in server.worker.log()


async def test_a_client_that_goes_away_ends_its_request(direct: Callable[..., Any], tmp_path: Path) -> None:
    server = await direct(FAKE_ENGINE_HOLD_FILE=str(tmp_path / "never"))
    await server.until_health(200)
    async with server.session.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
    await server.worker.until_recorded("aborted")


async def test_a_dead_engine_ends_the_worker(direct: Callable[..., Any]) -> None:
    """§7 engine death: the stream is broken off, the platform finds nobody any more, exit code 1."""
    server = await direct(FAKE_ENGINE_EXIT_AFTER_EVENTS="2")
    await server.until_health(200)
    with pytest.raises(aiohttp.ClientError):
        async with server.session.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            await answer.read()
    assert await server.worker.exit_code() == 1
    assert await server.health() is None


async def test_a_request_that_runs_too_long_is_a_504(direct: Callable[..., Any], tmp_path: Path) -> None:
    """§7 timeout: the sequence is freed; a stream that has begun ends with an event that says so."""
    never = str(tmp_path / "never")
    server = await direct(REQUEST_TIMEOUT="1", FAKE_ENGINE_HOLD_FILE=never, FAKE_ENGINE_HOLD_WHOLE_FILE=never)
    await server.until_health(200)
    async with server.session.post("/v1/chat/completions", json=CHAT) as answer:
        assert answer.status == 504
        error = (await answer.json())["error"]
    assert (error["type"], error["retryable"]) == ("TimeoutError", False)
    await server.worker.until_recorded("aborted")
    async with server.session.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        events = (await answer.text()).split("\n\n")
    assert answer.status == 200
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 504


async def test_an_engine_that_says_it_is_dead_ends_the_worker(direct: Callable[..., Any]) -> None:
    """§7 fatal texts."""
    server = await direct(FAKE_ENGINE_FATAL_TEXT="CUDA error: an illegal memory access was encountered")
    await server.until_health(200)
    async with server.session.post("/v1/chat/completions", json=CHAT) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["retryable"] is True
    assert await server.worker.exit_code() == 1


async def test_an_engine_that_says_so_inside_a_stream_ends_the_worker(direct: Callable[..., Any]) -> None:
    """§7; the caller gets the engine's own words."""
    server = await direct(FAKE_ENGINE_ERROR_AFTER_EVENTS="2", FAKE_ENGINE_ERROR_TEXT="EngineDeadError()")
    await server.until_health(200)
    async with server.session.post("/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert "EngineDeadError()" in await answer.text()
    assert await server.worker.exit_code() == 1


async def test_other_failures_and_words_about_them_end_nothing(direct: Callable[..., Any]) -> None:
    server = await direct(FAKE_ENGINE_ERROR_AFTER_EVENTS="4")
    await server.until_health(200)
    talk = {"messages": [{"role": "user", "content": '{"error": EngineDeadError() NCCL error CUDA error: x'}]}
    for _ in range(2):
        async with server.session.post("/v1/chat/completions", json={**talk, "stream": True}) as answer:
            said = await answer.text()
        assert "EngineDeadError" in said
        assert '"boom"' in said
    assert await server.health() == 200


async def test_a_port_that_is_taken_fails_the_start(direct: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = await direct(PORT_HEALTH=str(taken.getsockname()[1]))
        assert await server.worker.exit_code() == 1
    (failed,) = [event for event in server.worker.events("worker.stage") if event["stage"] == "failed"]
    assert failed["kind"] == "address_in_use"
    assert "PORT_HEALTH" in failed["advice"]
    assert server.worker.recorded("start") == []


async def test_both_kinds_of_reports_agree(direct: Callable[..., Any], platform: PlatformStub) -> None:
    """With a state URL the worker also says where its other doors are, as in queue mode."""
    state_url = platform.environment()["PILOTLIGHT_WORKER_STATE_URL"]
    server = await direct(PILOTLIGHT_WORKER_STATE_URL=state_url)
    report = await platform.stage("ready")
    assert await server.health() == 200
    assert json.dumps(report["listener"]).count("unix:") == 1


BASE = {"MODEL_NAME": "m", "WORKER_MODE": "http"}


@pytest.mark.parametrize(
    ("variables", "port", "health_port", "path"),
    [
        ({}, 80, 80, "/ping"),
        ({"PORT": "8000"}, 8000, 8000, "/ping"),
        ({"PORT": "8000", "PORT_HEALTH": "8001", "HEALTH_CHECK_PATH": "/up"}, 8000, 8001, "/up"),
        ({"PORT": "None", "HEALTH_CHECK_PATH": ""}, 80, 80, "/ping"),
    ],
)
def test_where_it_listens_is_the_platforms_word(
    variables: dict[str, str], port: int, health_port: int, path: str
) -> None:
    """The three variables of §7.1 and their defaults; in a container every interface is meant."""
    config = WorkerConfig.from_environment({**BASE, **variables}, python="python")
    assert config.direct == DirectSettings(
        host="0.0.0.0", port=port, health_port=health_port, health_path=path
    )


def test_queue_mode_is_the_default_and_needs_somewhere_to_take_jobs() -> None:
    with pytest.raises(ConfigError, match="RUNPOD_WEBHOOK_GET_JOB"):
        WorkerConfig.from_environment({"MODEL_NAME": "m"}, python="python")
    take = {"RUNPOD_WEBHOOK_GET_JOB": "http://h/v2/ep/job-take/$ID?x=1", "PORT": "x"}
    assert WorkerConfig.from_environment({"MODEL_NAME": "m", **take}, python="python").direct is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKER_MODE", "socket"),
        ("PORT", "http"),
        ("PORT", "0"),
        ("PORT", "70000"),
        ("HEALTH_CHECK_PATH", "ping"),
    ],
)
def test_what_cannot_be_listened_on_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        WorkerConfig.from_environment({**BASE, name: value}, python="python")
