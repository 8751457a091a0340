"""A worker program that is frozen and thawed by its platform: what goes on, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pilotlight.engines.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from pilotlight.testing.protocol_server import PlatformStub, Refusal

Start = Callable[..., Any]

IMPATIENT = (
    "from pilotlight.worker import engine, main, program; program.HEALTH_WATCH_SECONDS = 0.02; "
    "engine.Engine.healthy.__defaults__ = (0.2,); raise SystemExit(main.main())"
)
"""The program with a short time for an answer about its health; three failures still count as death."""

PATIENT_TAKE = (
    "from pilotlight.worker import jobs, main; jobs.TAKE_CLOSE_SECONDS = 1000; raise SystemExit(main.main())"
)
"""The program without the moment after which it closes a take that is open when it is told to end."""

HASTY = (
    "from pilotlight.worker import freezing, main; freezing.THAW_SECONDS = 0.2; raise SystemExit(main.main())"
)
"""The program with less patience after a thaw that nobody asked for."""

BRIEF = (
    "from pilotlight.worker import main, program; program.REPORT_GRACE_SECONDS = 0.1; "
    "raise SystemExit(main.main())"
)
"""The program that does not wait long for a platform to receive its last report."""

HANGING = (
    "import os, signal, sys; from pilotlight.testing import fake_engine; "
    "signal.signal(signal.SIGCONT, lambda *_: os.kill(os.getpid(), signal.SIGSTOP)); "
    "sys.exit(fake_engine.main(sys.argv[1:]))"
)
"""An engine that, when it is to go on, stops again before it does anything else."""


class Door:
    """What the platform asks of a worker by its listener."""

    def __init__(self, client: aiohttp.ClientSession) -> None:
        self.client = client

    async def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.client.request(method, path, **options) as response:
            return response.status, json.loads(await response.read())

    async def freeze(self) -> tuple[int, Any]:
        return await self.call("POST", "/worker/freeze")

    async def thaw(self, query: str = "?timeout_s=30") -> tuple[int, Any]:
        return await self.call("POST", f"/worker/thaw{query}")

    async def info(self) -> Any:
        return (await self.call("GET", "/worker/info"))[1]


@pytest.fixture
async def door():
    """The listener of a worker that is ready."""
    clients: list[aiohttp.ClientSession] = []

    def open_door(worker: Any, report: dict[str, Any]) -> Door:
        clients.append(worker.listener(report))
        return Door(clients[-1])

    yield open_door
    for client in clients:
        await client.close()


def states(worker: Any) -> set[str]:
    """States of the engine's processes, as the kernel shows them."""
    files = [Path(f"/proc/{pid}/stat") for pid in worker.engine_processes()]
    return {file.read_bytes().rpartition(b")")[2].split()[0].decode() for file in files}


async def test_the_worker_program_stays_awake_while_its_engine_stands_still(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    """Pings and polls go on, nobody asks for the engine's health, and work is answered after each thaw."""
    worker = await start_worker("-c", IMPATIENT)
    listener = door(worker, await worker.ready())
    assert (await listener.info())["frozen"] is False
    for number in range(2):
        status, frozen = await listener.freeze()
        assert (status, sorted(frozen)) == (200, ["memory_bytes", "slept", "took_ms"])
        assert frozen["memory_bytes"] > 20_000_000
        assert (await listener.info())["frozen"] is True
        assert states(worker) == {"T"}
        # The first time for longer than three questions for its health would take.
        pings = len(platform.pings) + (1 if number else 9)
        await platform.until(lambda pings=pings: len(platform.pings) >= pings)
        assert states(worker) == {"T"}
        status, thawed = await listener.thaw()
        assert (status, sorted(thawed)) == (200, ["took_ms"])
        assert (await listener.thaw()) == (200, {"took_ms": 0})
        await platform.submit(f"j{number}", {"prompt": "one two"})
        assert (await platform.result(f"j{number}"))["output"][0]["choices"][0]["tokens"] == ["one two"]
    assert not worker.events("engine.unhealthy")
    assert [state["stage"] for state in platform.states].count("ready") == 1


async def test_refused_while_work_is_in_hand(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door], tmp_path: Path
) -> None:
    hold = tmp_path / "go"
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(hold))
    listener = door(worker, await worker.ready())
    await platform.submit("j", {"prompt": "a b c", "stream": True})
    await platform.until(lambda: bool(platform.chunks["j"]))
    body = {"prompt": "a b c", "stream": True}
    async with listener.client.post("/v1/completions", json=body) as response:
        await response.content.readuntil(b"\n\n")
        status, answer = await listener.freeze()
        assert (status, answer["error"]["reason"]) == (409, "busy")
        assert "1 job and 1 request" in answer["error"]["message"]
        hold.touch()
        assert (await response.text()).endswith("data: [DONE]\n\n")
    assert "output" in await platform.result("j")
    async with asyncio.timeout(20):
        while (await listener.freeze())[0] != 200:
            await asyncio.sleep(0.01)
    status, answer = await listener.freeze()
    assert (status, answer["error"]["reason"]) == (409, "frozen")


async def test_a_job_that_is_handed_out_to_a_frozen_worker_is_answered(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    """The gateway's mistake; it is told that the worker is hot again."""
    worker = await start_worker()
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    await platform.submit("j", {"prompt": "one two"})
    assert "output" in await platform.result("j")
    await platform.until(lambda: platform.states[-1]["detail"].get("thawed_by") == "job")
    assert platform.states[-1]["stage"] == "ready"
    assert (await listener.info())["frozen"] is False


async def test_a_request_to_a_frozen_workers_listener_is_answered(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    worker = await start_worker()
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    body = {"prompt": "one two", "guided_regex": "a"}
    status, answer = await listener.call("POST", "/v1/completions", json=body)
    assert (status, answer["choices"][0]["text"]) == (200, "one two")
    await platform.until(lambda: platform.states[-1]["detail"].get("thawed_by") == "request")


async def test_in_direct_mode_a_request_thaws_the_worker_and_a_health_check_does_not(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = await start_worker(WORKER_MODE="http", PORT=str(port), PILOTLIGHT_HTTP_HOST="127.0.0.1")
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as caller:
        for path, status in (("/ping", 200), ("/", 200), ("/worker/info", 404)):
            async with caller.get(path) as response:
                assert response.status == status
        async with caller.post("/worker/thaw") as response:
            assert response.status == 404
        assert (await listener.info())["frozen"] is True
        async with caller.post("/v1/completions", json={"prompt": "one two"}) as response:
            assert (response.status, (await response.json())["choices"][0]["text"]) == (200, "one two")
    assert (await listener.info())["frozen"] is False


async def test_only_who_has_the_key_may_freeze(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    worker = await start_worker()
    listener = door(worker, await worker.ready())
    for path in ("/worker/freeze", "/worker/thaw"):
        status, _ = await listener.call("POST", path, headers={"Authorization": "Bearer wrong"})
        assert status == 401
        assert (await listener.call("GET", path))[0] == 404
    for text in ("soon", "0", "nan", "1e9"):
        status, answer = await listener.thaw(f"?timeout_s={text}")
        assert (status, answer["error"]["param"]) == (400, "timeout_s")
    assert (await listener.thaw("?timeout_s=2.5")) == (200, {"took_ms": 0})


async def test_told_to_end_while_frozen_the_engine_is_killed_as_it_is(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    worker = await start_worker()
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    await platform.begin_drain()
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert worker.recorded("sigterm") == []
    assert worker.engine_processes() == {}
    assert platform.states[-1]["stage"] == "draining"


async def test_a_job_delivered_while_a_frozen_worker_ends_is_still_run(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    """And a worker that is told to end cannot be frozen any more."""
    worker = await start_worker("-c", PATIENT_TAKE)
    listener = door(worker, await worker.ready())
    await platform.until(lambda: bool(list(platform.of_kind("take"))))
    assert (await listener.freeze())[0] == 200
    worker.process.terminate()
    await platform.stage("draining")
    await platform.submit("late", {"prompt": "x y"})
    assert "output" in await platform.result("late")
    assert await worker.exit_code() == 0
    # It was hot, so it was asked to end.
    assert len(worker.recorded("sigterm")) == 1
    assert worker.engine_processes() == {}


async def test_a_draining_worker_is_not_frozen(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door], tmp_path: Path
) -> None:
    hold = tmp_path / "go"
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(hold))
    listener = door(worker, await worker.ready())
    await platform.submit("j", {"prompt": "a b c", "stream": True})
    await platform.until(lambda: bool(platform.chunks["j"]))
    await platform.begin_drain()
    worker.process.terminate()
    await platform.stage("draining")
    status, answer = await listener.freeze()
    assert (status, answer["error"]["reason"]) == (409, "not_serving")
    hold.touch()
    assert "output" in await platform.result("j")
    assert await worker.exit_code() == 0


async def test_a_frozen_worker_whose_platform_vanished_ends_itself(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    worker = await start_worker("-c", BRIEF, PLATFORM_LOST_TIMEOUT="1")
    listener = door(worker, await worker.ready())
    await platform.until(lambda: bool(platform.pings))
    assert (await listener.freeze())[0] == 200
    await platform.stop()
    assert await worker.exit_code() == 1
    assert worker.engine_processes() == {}
    assert worker.recorded("sigterm") == []


async def test_a_platform_that_comes_back_may_say_that_a_frozen_worker_is_not_wanted(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    """1. It hears what it had heard before, but not once more that work thawed the worker, which stays frozen.
    2. One that has forgotten the worker answers 410, or the worker would stand still for ever."""
    worker = await start_worker()
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    await platform.submit("j", {"prompt": "one two"})
    await platform.until(lambda: platform.states[-1]["detail"].get("thawed_by") == "job")
    async with asyncio.timeout(20):
        while (await listener.freeze())[0] != 200:
            await asyncio.sleep(0.01)
    reports = len(platform.states)
    await platform.stop()
    await worker.until_event("platform.unreachable")
    await platform.start()
    await platform.until(lambda: len(platform.states) > reports)
    repeated = platform.states[-1]
    assert (repeated["stage"], "thawed_by" in repeated["detail"]) == ("ready", False)
    assert (await listener.info())["frozen"] is True
    await platform.stop()
    async with asyncio.timeout(20):
        while len(worker.events("platform.unreachable")) < 2:
            await asyncio.sleep(0.01)
    platform.refusals["state"] = Refusal(410, times=1)
    await platform.start()
    assert await worker.exit_code() == 0
    assert worker.events("worker.ending")[-1]["reason"] == "unwanted"
    assert worker.engine_processes() == {}
    assert worker.recorded("sigterm") == []


async def test_an_engine_killed_while_frozen_ends_the_worker_at_once(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    worker = await start_worker()
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    os.kill(worker.engine_pid, signal.SIGKILL)
    assert (await platform.stage("failed"))["detail"]["kind"] == "killed"
    assert await worker.exit_code() == 1


async def test_an_engine_that_hangs_after_the_thaw_ends_the_worker(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    """Whoever thaws gets a 503 before anything is ended."""
    worker = await start_worker(PILOTLIGHT_ENGINE_COMMAND=json.dumps([sys.executable, "-c", HANGING]))
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    status, answer = await listener.thaw("?timeout_s=0.3")
    assert status == 503
    assert "no token within 0.3 s" in answer["error"]["message"]
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "thaw_failed"
    assert "no token within 0.3 s" in failed["detail"]["cause"]
    assert await worker.exit_code() == 1
    assert worker.engine_processes() == {}


async def test_a_job_that_thaws_an_engine_in_vain_asks_for_another_worker(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door]
) -> None:
    worker = await start_worker(
        "-c", HASTY, PILOTLIGHT_ENGINE_COMMAND=json.dumps([sys.executable, "-c", HANGING])
    )
    listener = door(worker, await worker.ready())
    assert (await listener.freeze())[0] == 200
    await platform.submit("j", {"prompt": "one two"})
    error = json.loads((await platform.result("j"))["error"])["error"]
    assert (error["code"], error["retryable"]) == (503, True)
    assert await worker.exit_code() == 1


def gpu_home(folder: Path) -> Path:
    """An engine's environment with a GPU, as far as the worker program looks at it."""
    switch = {
        "flag": "--enable-sleep-mode", "kind": "pair", "multi": False, "choices": None, "value": "text", "short": [],
    }  # fmt: skip
    manifest = {
        "format": MANIFEST_FORMAT, "vllm": "0.32.0", "torch": "2.13.0", "platform": "cuda",
        "flags": {"ENABLE_SLEEP_MODE": switch}, "architectures": [], "registered": {}, "quantisations": {},
    }  # fmt: skip
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


async def test_on_a_gpu_a_worker_with_flashboot_sleeps_while_it_is_frozen(
    start_worker: Start, platform: PlatformStub, door: Callable[..., Door], tmp_path: Path
) -> None:
    """The engine is started with what that needs, none of which callers can reach."""
    worker = await start_worker(
        PILOTLIGHT_ENGINE_HOME=str(gpu_home(tmp_path / "engine")),
        PILOTLIGHT_FLASHBOOT="1",
        FLASHBOOT_SLEEP_LEVEL="2",
    )
    listener = door(worker, await worker.ready())
    start = worker.recorded("start")[0]
    assert "--enable-sleep-mode" in start["argv"]
    assert "VLLM_SERVER_DEV_MODE" in start["environment"]
    for method, path in itertools.product(("GET", "POST"), ("/sleep?level=2", "/wake_up", "/is_sleeping")):
        assert (await listener.call(method, path))[0] == 403
    await platform.submit("s", {"openai_route": "/collective_rpc", "openai_input": {"method": "x"}})
    assert json.loads((await platform.result("s"))["error"])["error"]["code"] == 403
    assert worker.recorded("sleep") == []
    status, frozen = await listener.freeze()
    assert (status, frozen["slept"]) == (200, True)
    assert (await listener.thaw())[0] == 200
    assert [entry["level"] for entry in worker.recorded("sleep")] == [2]
    await platform.submit("j", {"prompt": "one two"})
    assert (await platform.result("j"))["output"][0]["choices"][0]["tokens"] == ["one two"]
