"""What ends a worker and what it says of it, as processes: vllm-worker.md §7, §8 A4, §10 points 13 and 14."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotlight.engines.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from pilotlight.testing.protocol_server import PlatformStub
from pilotlight.worker import stages
from pilotlight.worker.gpus import DRIVER_LIST

Start = Callable[..., Any]

LOGS = Path(__file__).with_name("logs")
OUT_OF_MEMORY = (
    "(Worker pid=9) ERROR 11-29 18:14:37 [multiproc_executor.py:953] ValueError: Free memory on device cuda:0 "
    "(74.2/79.1 GiB) on startup is less than desired GPU memory utilization (0.95, 75.1 GiB)."
)
EAGER_HEALTH = "from pilotlight.worker import main, program; program.HEALTH_WATCH_SECONDS = 0.05; raise SystemExit(main.main())"
"""The program with a shorter pause between two questions for health; three failures still count as death."""


def error_of(result: dict[str, Any]) -> dict[str, Any]:
    error = json.loads(result["error"])["error"]
    assert isinstance(error, dict)
    return error


def engine_home(folder: Path, platform: str) -> Path:
    """An engine's environment as far as the worker program looks at it."""
    flag = {
        "flag": "--gpu-memory-utilization",
        "kind": "value",
        "multi": False,
        "choices": None,
        "value": "number",
        "short": [],
    }
    manifest = {
        "format": MANIFEST_FORMAT,
        "vllm": "0.32.0",
        "torch": "2.13.0",
        "platform": platform,
        "flags": {"GPU_MEMORY_UTILIZATION": flag},
        "architectures": [],
        "registered": {},
        "quantisations": {},
    }
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def utilizations(worker: Any) -> list[str | None]:
    """The share of the GPU's memory of every engine that was started."""
    starts = [dict(itertools.pairwise(start["argv"])) for start in worker.recorded("start")]
    return [start.get("--gpu-memory-utilization") for start in starts]


async def test_a_start_that_failed_for_memory_is_repeated_once_with_less(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """§8 A4: at 0.90 on CUDA, and the log says so."""
    worker = await start_worker(
        PILOTLIGHT_ENGINE_HOME=str(engine_home(tmp_path / "engine", "cuda")),
        FAKE_ENGINE_FAIL_TEXT=OUT_OF_MEMORY,
        FAKE_ENGINE_FITS_AT="0.90",
    )
    await worker.ready()
    first, second = utilizations(worker)
    assert first != "0.90"
    assert second == "0.90"
    # The second attempt is followed like the first.
    assert [state["stage"] for state in platform.states] == [
        "starting", "importing", "loading_weights",
        "importing", "loading_weights", "warming_up", "ready",
    ]  # fmt: skip
    worker.process.terminate()
    await platform.begin_drain()
    assert await worker.exit_code() == 0
    (retry,) = worker.events("engine.memory_retry")
    assert "less than desired GPU memory utilization" in retry["cause"]
    assert retry["gpu_memory_utilization"] == "0.90"


@pytest.mark.parametrize(
    ("build", "variables", "starts"),
    [
        ("cuda", {}, 2),
        ("cuda", {"GPU_MEMORY_UTILIZATION": "0.93"}, 1),
        ("cuda", {"VLLM_EXTRA_ARGS": "--gpu-memory-utilization=0.93"}, 1),
        ("cpu", {}, 1),
    ],
)
async def test_a_share_that_the_user_chose_and_a_second_failure_are_final(
    start_worker: Start,
    platform: PlatformStub,
    tmp_path: Path,
    build: str,
    variables: dict[str, str],
    starts: int,
) -> None:
    """§8 A4."""
    worker = await start_worker(
        PILOTLIGHT_ENGINE_HOME=str(engine_home(tmp_path / "engine", build)),
        FAKE_ENGINE_FAIL_TEXT=OUT_OF_MEMORY,
        **variables,
    )
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "out_of_memory"
    assert "GPU_MEMORY_UTILIZATION" in failed["detail"]["advice"]
    assert await worker.exit_code() == 1
    assert len(worker.recorded("start")) == starts
    assert worker.engine_processes() == {}


@pytest.mark.parametrize("log", sorted(path.stem for path in LOGS.glob("*.log")))
async def test_a_failed_start_is_told_with_class_cause_and_advice(
    start_worker: Start, platform: PlatformStub, log: str
) -> None:
    """§10 point 13, from logs of real starts that failed: never a take, exit code 1."""
    text = (LOGS / f"{log}.log").read_text()
    worker = await start_worker(FAKE_ENGINE_FAIL_TEXT=text)
    failed = await platform.stage("failed")
    expected = stages.classify_failure(text.splitlines(), 1)
    told = {name: failed["detail"][name] for name in ("kind", "cause", "advice", "rung", "memory_bytes")}
    assert told == {
        "kind": expected.kind,
        "cause": expected.cause,
        "advice": expected.advice,
        "rung": "plain",
        "memory_bytes": None,
    }
    assert [stage for stage, _ in failed["detail"]["timeline"]] == ["importing", "config", "loading_weights"]
    assert await worker.exit_code() == 1
    assert not list(platform.of_kind("take"))


async def test_a_mistake_in_a_variable_shows_before_model_and_engine(
    start_worker: Start, platform: PlatformStub
) -> None:
    """§10 point 13: at once, because neither is asked for anything."""
    worker = await start_worker(MODEL_NAME="nobody/nothing", VLLM_EXTRA_ARGS="--uds /x")
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "bad_flag"
    assert "VLLM_EXTRA_ARGS" in failed["detail"]["cause"]
    assert await worker.exit_code() == 1
    assert worker.events("engine.spawning") == worker.recorded("start") == []


async def test_the_gateways_questions_for_load_stay_out_of_the_log(
    start_worker: Start, platform: PlatformStub
) -> None:
    """They come every second and would push out what tells why an engine died."""
    asked = 'INFO:      - "GET /metrics/?name%5B%5D=vllm:num_requests_running HTTP/1.1" 200 OK'
    worker = await start_worker(FAKE_ENGINE_FAIL_TEXT=f"one line\n{asked}\nRuntimeError: broken")
    failed = await platform.stage("failed")
    assert "broken" in failed["detail"]["cause"]
    await worker.exit_code()
    assert "one line" in worker.log()
    assert "/metrics/" not in worker.log()


async def test_on_runpod_a_failed_start_is_one_clear_line_of_the_log(
    start_worker: Start, platform: PlatformStub
) -> None:
    """§7: without a state URL nobody else is told."""
    text = (LOGS / "unknown_architecture.log").read_text()
    worker = await start_worker(PILOTLIGHT_WORKER_STATE_URL="-", FAKE_ENGINE_FAIL_TEXT=text)
    assert await worker.exit_code() == 1
    (failed,) = [event for event in worker.events("worker.stage") if event["stage"] == "failed"]
    assert failed["kind"] == "unknown_architecture"
    assert failed["cause"].startswith("Model architectures ['FooForCausalLM'] are not supported")
    assert failed["advice"]
    last = worker.log().splitlines()[-1]
    assert last.startswith("worker failed: Model architectures ['FooForCausalLM'] are not supported")
    assert last.endswith(f"(unknown_architecture: {failed['advice']})")
    assert not list(platform.of_kind("take"))


async def test_a_fatal_answer_of_the_engine_ends_the_worker(
    start_worker: Start, platform: PlatformStub
) -> None:
    """§7 fatal texts: every running job asks for another worker; exit code 1."""
    text = "CUDA error: an illegal memory access was encountered"
    worker = await start_worker(FAKE_ENGINE_FATAL_TEXT=text)
    await worker.ready()
    await platform.submit("f", {"prompt": "a b"})
    error = error_of(await platform.result("f"))
    assert (error["code"], error["type"], error["retryable"]) == (503, "ServiceUnavailable", True)
    assert (await platform.stage("failed"))["detail"]["kind"] == "engine_died"
    assert await worker.exit_code() == 1
    assert worker.engine_processes() == {}


async def test_an_engine_that_is_not_healthy_three_times_counts_as_dead(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """§7: the engine lives and still holds a job, which another worker is asked to run."""
    sick = tmp_path / "sick"
    worker = await start_worker(
        "-c",
        EAGER_HEALTH,
        FAKE_ENGINE_SICK_FILE=str(sick),
        FAKE_ENGINE_HOLD_FILE=str(tmp_path / "never"),
        FAKE_ENGINE_IGNORE_SIGTERM="1",
    )
    await worker.ready()
    await platform.submit("h", {"prompt": "a b", "stream": True})
    await platform.until(lambda: bool(platform.chunks["h"]))
    sick.touch()
    error = error_of(await platform.result("h"))
    assert (error["code"], error["retryable"]) == (503, True)
    assert (await platform.stage("failed"))["detail"]["kind"] == "engine_died"
    assert await worker.exit_code() == 1
    assert len(worker.events("engine.unhealthy")) == 1
    assert worker.engine_processes() == {}


async def test_a_job_that_comes_to_a_dead_engine_is_not_sent_there(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """§7: an open take may be answered after the death; such a job, too, asks for another worker at once."""
    sick, hold = tmp_path / "sick", str(tmp_path / "never")
    program = f"from pilotlight.worker import jobs; jobs.TAKE_CLOSE_SECONDS = 1000; {EAGER_HEALTH}"
    worker = await start_worker(
        "-c", program, FAKE_ENGINE_SICK_FILE=str(sick), FAKE_ENGINE_HOLD_WHOLE_FILE=hold, DRAIN_TIMEOUT="1000"
    )
    await worker.ready()
    await platform.until(lambda: bool(list(platform.of_kind("take"))))
    sick.touch()
    await worker.until_event("worker.ending")
    await platform.submit("late", {"prompt": "a b"})
    error = error_of(await platform.result("late"))
    assert (error["code"], error["retryable"]) == (503, True)
    assert await worker.exit_code() == 1
    assert "three questions" in (await platform.stage("failed"))["detail"]["cause"]


@pytest.mark.parametrize(
    ("variables", "sign"),
    [({"FAKE_ENGINE_WARM_UP": "hang"}, "request"), ({"FAKE_ENGINE_HEALTH_HANGS": "1"}, "health")],
)
async def test_sigterm_is_obeyed_while_the_engine_does_not_answer(
    start_worker: Start, platform: PlatformStub, variables: dict[str, str], sign: str
) -> None:
    """§7: in warm-up and while its health is asked; nothing is left, and nothing was taken."""
    worker = await start_worker(FAKE_ENGINE_IGNORE_SIGTERM="1", **variables)
    await worker.until_recorded(sign)
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert [state["stage"] for state in platform.states][-1] == "draining"
    assert not list(platform.of_kind("take"))
    assert worker.engine_processes() == {}


@pytest.mark.skipif(DRIVER_LIST.exists(), reason="this driver is not asked by nvidia-smi")
async def test_sigterm_before_the_engine_is_spawned_keeps_it_from_being_spawned(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """While the GPUs are counted, which takes seconds on a machine that has just been started."""
    tools, asked = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\ntouch {asked}\nexec sleep 1000\n")
    (tools / "nvidia-smi").chmod(0o755)
    worker = await start_worker(
        PILOTLIGHT_ENGINE_HOME=str(engine_home(tmp_path / "engine", "cuda")),
        PATH=f"{tools}:{os.environ['PATH']}",
    )
    async with asyncio.timeout(20):
        while not asked.exists():
            await asyncio.sleep(0.01)
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert worker.events("engine.spawning") == worker.recorded("start") == []
    assert platform.states[-1]["stage"] == "draining"


async def test_a_warm_up_that_is_not_answered_in_time_is_a_failed_start(
    start_worker: Start, platform: PlatformStub
) -> None:
    """§7: the warm-up has what is left of VLLM_STARTUP_TIMEOUT."""
    worker = await start_worker(FAKE_ENGINE_WARM_UP="hang", VLLM_STARTUP_TIMEOUT="2")
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "start_timeout"
    assert "VLLM_STARTUP_TIMEOUT" in failed["detail"]["advice"]
    assert await worker.exit_code() == 1
    assert "ready" not in {state["stage"] for state in platform.states}
    assert not list(platform.of_kind("take"))
    assert worker.engine_processes() == {}


async def test_an_engine_that_dies_in_warm_up_never_becomes_ready(
    start_worker: Start, platform: PlatformStub
) -> None:
    """Its connections break before its process has ended."""
    worker = await start_worker(FAKE_ENGINE_WARM_UP="die")
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "gpu_unsupported"
    assert await worker.exit_code() == 1
    assert "ready" not in {state["stage"] for state in platform.states}
    assert not list(platform.of_kind("take"))


async def test_a_defect_is_told_and_leaves_no_engine(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """An engine whose list of models is no JSON stands for whatever nobody foresaw."""
    program = tmp_path / "odd_engine.py"
    program.write_text(
        "import sys\nfrom aiohttp import web\n"
        "async def answer(_):\n    return web.Response(text='not JSON')\n"
        "app = web.Application()\napp.router.add_route('*', '/{path:.*}', answer)\n"
        "web.run_app(app, path=sys.argv[sys.argv.index('--uds') + 1], print=None)\n"
    )
    worker = await start_worker(PILOTLIGHT_ENGINE_COMMAND=json.dumps([sys.executable, str(program)]))
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "worker_defect"
    assert "DecodeError" in failed["detail"]["cause"]
    assert await worker.exit_code() == 1
    assert "starting.py" in worker.events("worker.defect")[0]["trace"]
    assert worker.events("engine.ended")
    assert not list(platform.of_kind("take"))


async def test_an_engine_that_does_not_say_what_it_understands_is_started_all_the_same(
    start_worker: Start, tmp_path: Path
) -> None:
    """vllm-worker.md §4.3: without its answer only aliases are translated."""
    home = engine_home(tmp_path / "engine", "cpu")
    (home / MANIFEST_NAME).unlink()
    (home / "bin" / "python").write_text("#!/bin/sh\nexec sleep 1000\n")
    (home / "bin" / "python").chmod(0o755)
    package = home / "lib" / "python3.11" / "site-packages" / "vllm"
    package.mkdir(parents=True)
    (package / "_version.py").write_text("__version__ = version = '0.32.1'\n")
    program = "from pilotlight.worker import main, starting; starting.ASK_SECONDS = 0.2; raise SystemExit(main.main())"
    worker = await start_worker("-c", program, PILOTLIGHT_ENGINE_HOME=str(home))
    await worker.ready()
    assert "no answer within 0.2 s" in worker.events("engine.no_manifest")[-1]["error"]


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"MAX_CONCURRENCY": "auto", "FAKE_ENGINE_CONCURRENCY": "7.98"}, 7),
        ({"MAX_CONCURRENCY": "auto", "FAKE_ENGINE_CONCURRENCY": "0.4"}, 1),
        ({"MAX_CONCURRENCY": "auto"}, 30),
        ({"MAX_CONCURRENCY": "3", "FAKE_ENGINE_CONCURRENCY": "7.98"}, 3),
    ],
)
async def test_automatic_concurrency_is_what_the_engine_has_memory_for(
    start_worker: Start, platform: PlatformStub, variables: dict[str, str], slots: int
) -> None:
    """§7 `MAX_CONCURRENCY=auto`: told to the platform, and asked for with each take."""
    worker = await start_worker(**variables)
    assert (await worker.ready())["max_concurrency"] == slots
    await platform.until(lambda: bool(list(platform.of_kind("take"))))
    take = next(platform.of_kind("take"))
    assert take.query.get("batch_size", "1") == str(slots)
