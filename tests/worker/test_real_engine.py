"""The worker program with real vLLM: one start, every road once, a clean stop, and one start that fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotlight.testing.protocol_server import PlatformStub

HOME = Path(os.environ.get("PILOTLIGHT_ENGINE_HOME") or Path(__file__).parents[2] / ".venv-engine")
CHAT = [{"role": "user", "content": "What is 2 plus 3?"}]

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


async def test_a_life_with_real_vllm(
    start_worker: Callable[..., Any], platform: PlatformStub, capsys: Any
) -> None:
    """1. stages in order; 2. native, streamed, guided and OpenAI jobs; 3. listener; 4. memory; 5. nothing left."""
    worker = await start_worker(
        MODEL_NAME="pilotlight/ember",
        PILOTLIGHT_ENGINE_COMMAND="-",
        PILOTLIGHT_ENGINE_HOME=str(HOME),
        ENFORCE_EAGER="true",
        NUM_GPU_BLOCKS_OVERRIDE="256",
        DISABLE_LOG_STATS="true",
    )
    ready = await platform.stage("ready", seconds=200)
    assert [state["stage"] for state in platform.states] == [
        "starting", "importing", "loading_weights", "warming_up", "ready",
    ]  # fmt: skip
    assert ready["models"][0] == "pilotlight/ember"
    assert ready["versions"]["vllm"]

    await platform.submit("n", {"messages": CHAT, "sampling_params": {"temperature": 0}})
    item = (await platform.result("n"))["output"][0]
    assert item["choices"][0]["tokens"][0].strip()
    assert item["model"] == "pilotlight/ember"
    assert item["usage"]["input"] == item["usage"]["prompt_tokens"] > 0

    await platform.submit(
        "s", {"prompt": "Hello", "stream": True, "sampling_params": {"max_tokens": 10, "ignore_eos": True}}
    )
    await platform.result("s")
    assert [len(chunk["choices"][0]["tokens"]) for chunk in platform.chunks["s"]] == [1, 3, 6]
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
    await platform.begin_drain()
    worker.process.terminate()
    assert await worker.exit_code(60) == 0
    assert worker.engine_processes() == {}
    with capsys.disabled():
        print(f"\nworker program: {memory:.1f} MB resident; stages (ms): {elapsed}")


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
    assert await worker.exit_code(20) == 1
