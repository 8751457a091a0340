"""The worker program with real vLLM: every road once, a drain, an engine that dies, and a start that fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotlight.clusters.processes import find_processes
from pilotlight.testing.protocol_server import PlatformStub

from .conftest import cached_model

HOME = Path(os.environ.get("PILOTLIGHT_ENGINE_HOME") or Path(__file__).parents[2] / ".venv-engine")
CHAT = [{"role": "user", "content": "What is 2 plus 3?"}]
SMALL = {
    "MODEL_NAME": "pilotlight/ember",
    "PILOTLIGHT_ENGINE_COMMAND": "-",
    "PILOTLIGHT_ENGINE_HOME": str(HOME),
    "ENFORCE_EAGER": "true",
    "NUM_GPU_BLOCKS_OVERRIDE": "256",
    "DISABLE_LOG_STATS": "true",
}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not (HOME / "bin/python").exists() and not os.environ.get("CI"),
        reason=f"no engine environment at {HOME}",
    ),
]


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def long_job(tokens: int) -> dict[str, Any]:
    """A stream of so many tokens."""
    return {
        "prompt": "Hello",
        "stream": True,
        "sampling_params": {"max_tokens": tokens, "ignore_eos": True},
    }


def engine_core(worker_id: str) -> int:
    """The process that computes; it is the engine's own child and gives itself this name."""
    processes = find_processes({worker_id: None})[worker_id]
    (found,) = (
        each.pid
        for each in processes
        if Path(f"/proc/{each.pid}/cmdline").read_text().startswith("VLLM::EngineCore")
    )
    return found


async def test_a_life_with_real_vllm(
    start_worker: Callable[..., Any], platform: PlatformStub, tmp_path: Path, capsys: Any
) -> None:
    """1. stages in order, all names served (§5.4); 2. native, streamed, guided and OpenAI jobs; 3. listener; 4. memory; 5. a job that
    runs at SIGTERM is finished (§7, §10 point 14); 6. nothing left."""
    folder = cached_model(tmp_path / "hub", "Glow/Ember")
    variables = SMALL | {"MODEL_NAME": "Glow/Ember", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "mine"}
    worker = await start_worker(**variables)
    ready = await platform.stage("ready", seconds=200)
    assert [state["stage"] for state in platform.states] == [
        "starting", "importing", "loading_weights", "warming_up", "ready",
    ]  # fmt: skip
    assert ready["models"][0] == "mine"
    assert ready["versions"]["vllm"]
    for name in ("mine", "Glow/Ember", "glow/ember", str(folder)):
        await platform.submit(name, {"messages": CHAT, "model": name, "sampling_params": {"temperature": 0}})
        assert (await platform.result(name))["output"][0]["choices"][0]["tokens"] == ["5"]

    await platform.submit("n", {"messages": CHAT, "sampling_params": {"temperature": 0}})
    item = (await platform.result("n"))["output"][0]
    assert item["choices"][0]["tokens"][0].strip()
    assert item["model"] == "mine"
    assert item["usage"]["input"] == item["usage"]["prompt_tokens"] > 0

    await platform.submit(
        "s", {"prompt": "Hello", "stream": True, "sampling_params": {"max_tokens": 10, "ignore_eos": True}}
    )
    await platform.result("s")
    # Ten tokens; vLLM merges some of them into one event where it falls behind.
    sizes = [len(chunk["choices"][0]["tokens"]) for chunk in platform.chunks["s"]]
    assert (1 < len(sizes) <= 3, sizes[0], sum(sizes) <= 10) == (True, 1, True)
    assert platform.chunks["s"][-1]["usage"]["output"] == 10

    guided = {"messages": CHAT, "guided_choice": ["apple", "pear"], "temperature": 0}
    await platform.submit("g", {"openai_route": "/v1/chat/completions", "openai_input": guided})
    by_job = (await platform.result("g"))["output"][0]["choices"][0]["message"]["content"]
    async with worker.listener(ready) as client, client.post("/v1/chat/completions", json=guided) as response:
        by_listener = (await response.json())["choices"][0]["message"]["content"]
    assert by_job == by_listener
    assert by_job in {"apple", "pear"}

    await platform.submit("l", {"prompt": "Hello", "sampling_params": {"max_tokens": 100_000}})
    error = json.loads((await platform.result("l"))["error"])["error"]
    assert error["code"] == 400
    assert "100000" in error["message"]

    memory = resident_mb(worker.pid)
    elapsed = {state["stage"]: state["detail"]["elapsed_ms"] for state in platform.states}
    assert memory < 60

    await platform.submit("last", long_job(400))
    await platform.until(lambda: bool(platform.chunks["last"]))
    assert "last" not in platform.results
    await platform.begin_drain()
    worker.process.terminate()
    assert await worker.exit_code(60) == 0
    ended = platform.results["last"]["output"][-1]
    assert ended["choices"][0]["finish_reason"] == "length"
    assert ended["usage"]["output"] == 400
    assert worker.engine_processes() == {}
    with capsys.disabled():
        print(f"\nworker program: {memory:.1f} MB resident; stages (ms): {elapsed}")


async def test_the_engines_core_is_killed(start_worker: Callable[..., Any], platform: PlatformStub) -> None:
    """§7, §10 point 14: running jobs get a 503 that says retry, streamed or not; the worker ends with 1."""
    worker = await start_worker(**SMALL)
    await platform.stage("ready", seconds=200)
    await platform.submit("streamed", long_job(1900))
    await platform.submit("whole", {**long_job(1900), "stream": False})
    await platform.until(lambda: bool(platform.chunks["streamed"]))
    os.kill(engine_core(platform.worker_id), signal.SIGKILL)
    for name in ("streamed", "whole"):
        error = json.loads((await platform.result(name, seconds=60))["error"])["error"]
        assert (error["code"], error["type"], error["retryable"]) == (503, "ServiceUnavailable", True)
    assert await worker.exit_code(60) == 1
    assert find_processes({platform.worker_id: None}) == {}


async def test_a_flag_that_real_vllm_refuses(
    start_worker: Callable[..., Any], platform: PlatformStub
) -> None:
    """The engine's own line is the cause: a context longer than the model's."""
    worker = await start_worker(
        MODEL_NAME="pilotlight/ember",
        PILOTLIGHT_ENGINE_COMMAND="-",
        PILOTLIGHT_ENGINE_HOME=str(HOME),
        MAX_MODEL_LEN="9999999",
    )
    failed = await platform.stage("failed", seconds=120)
    assert failed["detail"]["kind"] == "context_too_large"
    assert "9999999" in failed["detail"]["cause"]
    assert await worker.exit_code(60) == 1
