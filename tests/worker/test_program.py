"""The worker program as a process, with a fake engine and a platform stub: start, jobs, drain, deaths.

Sections cited: worker-protocol.md §1 to §6 (as its client) and vllm-worker.md §3, §7.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotlight.testing.protocol_server import PlatformStub, Refusal

Start = Callable[..., Any]

PATIENT_TAKE = (
    "from pilotlight.worker import jobs, main; jobs.TAKE_CLOSE_SECONDS = 1000; raise SystemExit(main.main())"
)
"""The program without the moment after which it closes a take that is open when it is told to end."""


def error_of(result: dict[str, Any]) -> dict[str, Any]:
    error = json.loads(result["error"])["error"]
    assert isinstance(error, dict)
    return error


async def test_a_whole_life(start_worker: Start, platform: PlatformStub) -> None:
    """Stages in order, registration complete, jobs of each family answered, drained, nothing left."""
    worker = await start_worker()
    ready = await worker.ready()
    assert [state["stage"] for state in platform.states] == [
        "starting", "importing", "loading_weights", "warming_up", "ready",
    ]  # fmt: skip
    assert ready["engine"]["address"] == f"unix:{worker.run}/engine.sock"
    assert ready["listener"]["address"] == f"unix:{worker.run}/worker.sock"
    assert ready["engine"]["key"] != ready["listener"]["key"]
    assert ready["models"][0] == "org/model"
    assert ready["max_concurrency"] == 30
    assert ready["versions"]["pilotlight"]
    assert all(state["detail"]["elapsed_ms"] >= 0 for state in platform.states)
    assert (worker.run / "worker.sock").stat().st_mode & 0o077 == 0
    assert worker.run.stat().st_mode & 0o077 == 0

    await platform.submit("a", {"prompt": "one two three"})
    item = (await platform.result("a"))["output"][0]
    assert item["choices"][0]["tokens"] == ["one two three"]
    assert item["id"] == "cmpl-a"
    assert item["usage"]["input"] == 3
    assert platform.chunks["a"] == [item]

    platform.draining = True
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert platform.states[-1]["stage"] == "draining"
    assert worker.engine_processes() == {}


async def test_the_engine_is_started_as_the_contract_says(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """§4.1, §4.4: model first, address last, the key in the environment only, no platform secret."""
    worker = await start_worker(
        MAX_MODEL_LENGTH="512", DRAIN_TIMEOUT="7", VLLM_API_KEY="users-own", HF_TOKEN="hf"
    )
    ready = await worker.ready()
    start = worker.recorded("start")[0]
    snapshot = str(tmp_path / "hub" / "models--org--model" / "snapshots" / ("1" * 40))
    assert start["argv"][:2] == ["--model", snapshot]
    assert start["argv"][-4:] == ["--shutdown-timeout", "7", "--uds", f"{worker.run}/engine.sock"]
    assert ("--max-model-len", "512") in itertools.pairwise(start["argv"])
    assert ("--served-model-name", "org/model") in itertools.pairwise(start["argv"])
    environment = dict(
        pair.split("=", 1) for pair in Path(f"/proc/{start['pid']}/environ").read_text().split("\0") if pair
    )
    assert environment["VLLM_API_KEY"] == ready["engine"]["key"]
    assert environment["PILOTLIGHT_WORKER_ID"] == platform.worker_id
    assert environment["SPT_NOENV"] == "1"
    # vLLM's own patience is 600 s, the worker's 1200 s.
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "1200"
    assert environment["HF_TOKEN"] == "hf"
    assert not [name for name in environment if name.startswith("RUNPOD_")]
    assert "PILOTLIGHT_WORKER_STATE_URL" not in environment
    assert os.getsid(start["pid"]) == start["pid"]
    log = worker.log()
    for secret in (ready["engine"]["key"], ready["listener"]["key"], worker.platform.key, "users-own"):
        assert secret not in log
        assert secret not in " ".join(start["argv"])


async def test_streamed_native_job_in_growing_items(start_worker: Start, platform: PlatformStub) -> None:
    """§2.1: 40 pieces make items of 1, 3, 9 and 27; the final result holds all of them."""
    worker = await start_worker()
    await worker.ready()
    job_input = {"messages": [{"role": "user", "content": "count to 40"}], "stream": True}
    await platform.submit("s", {**job_input, "sampling_params": {"max_tokens": 100}})
    result = await platform.result("s")
    items = platform.chunks["s"]
    assert result == {"output": items}
    assert [len(item["choices"][0]["tokens"]) for item in items] == [1, 3, 9, 27]
    assert "".join(token for item in items for token in item["choices"][0]["tokens"]).split()[-1] == "40"
    assert items[-1]["usage"]["output"] == 40
    finals = [record.query for record in platform.of_kind("done")]
    chunks = [record.query for record in platform.of_kind("stream")]
    assert [query["isStream"] for query in finals] == ["true"]
    assert [(query["isStream"], query["seq"]) for query in chunks] == [("false", str(n)) for n in range(4)]


async def test_openai_jobs_stream_strings_that_join_to_a_valid_body(
    start_worker: Start, platform: PlatformStub
) -> None:
    worker = await start_worker()
    await worker.ready()
    body = {"messages": [{"role": "user", "content": "a b c"}], "stream": True}
    await platform.submit("o", {"openai_route": "/v1/chat/completions", "openai_input": body})
    text = "".join((await platform.result("o"))["output"])
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\n\n")[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "a b c"


@pytest.mark.parametrize(
    ("job_input", "code", "words"),
    [
        ({}, 400, "prompt"),
        ("text", 400, "JSON object"),
        ({"route": "/sleep", "method": "POST"}, 403, "sleep"),
        ({"prompt": "x", "sampling_params": {"max_tokens": 5000}}, 400, "max_model_len=1024"),
        ({"openai_input": {"model": "other", "messages": []}}, 404, "other"),
        ({"openai_input": {"messages": "x"}}, 400, "messages"),
    ],
)
async def test_bad_input_fails_the_job_with_an_envelope(
    start_worker: Start, platform: PlatformStub, job_input: Any, code: int, words: str
) -> None:
    worker = await start_worker()
    await worker.ready()
    await platform.submit("bad", job_input)
    result = await platform.result("bad")
    assert set(result) == {"error"}
    error = error_of(result)
    assert (error["code"], error["retryable"]) == (code, False)
    assert words in error["message"]
    assert platform.chunks["bad"] == []


async def test_cancel_mid_stream_aborts_in_the_engine_and_posts_nothing(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """worker-protocol.md §3.3: other jobs are unaffected; the id leaves the heartbeats."""
    hold = tmp_path / "go"
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(hold))
    await worker.ready()
    stream = {"messages": [{"role": "user", "content": "count to 5"}], "stream": True, "max_batch_size": 1}
    await platform.submit("x", {"openai_route": "/v1/chat/completions", "openai_input": stream})
    await platform.submit("y", stream)
    await platform.until(lambda: any({"x", "y"} <= set(ids) for ids in platform.pings))
    await platform.cancel("x")
    await worker.until_recorded("aborted")
    hold.touch()
    assert "output" in await platform.result("y")
    await platform.until(lambda: platform.pings[-1] == [])
    assert "x" not in platform.results
    assert [event["outcome"] for event in worker.events("job.finished") if event["job"] == "x"] == ["stopped"]


async def test_slots_are_filled_and_never_exceeded(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """§3.2: batch takes ask for the free slots; `job_in_progress` says whether any job is held."""
    hold = tmp_path / "go"
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(hold), MAX_CONCURRENCY="3")
    await worker.ready()
    for number in range(5):
        await platform.submit(f"j{number}", {"prompt": "a b", "stream": True})
    await platform.until(lambda: any(len(ids) == 3 for ids in platform.pings))
    assert len(platform.queue) == 2
    hold.touch()
    for number in range(5):
        assert "output" in await platform.result(f"j{number}")
    assert max(len(ids) for ids in platform.pings) == 3
    takes = [record.query for record in platform.of_kind("take")]
    assert (takes[0]["batch_size"], takes[0]["job_in_progress"]) == ("3", "0")
    assert all(int(query.get("batch_size", "1")) <= 3 for query in takes)
    assert any(query["job_in_progress"] == "1" for query in takes)


async def test_results_survive_a_restart_of_the_platform(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """The platform is away while a job ends; it comes back and gets the result, and the worker registers again."""
    hold = tmp_path / "go"
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(hold))
    await worker.ready()
    await platform.submit("r", {"prompt": "a b c", "stream": True})
    await platform.until(lambda: bool(platform.chunks["r"]))
    await platform.stop()
    hold.touch()
    async with asyncio.timeout(20):
        while not worker.events("platform.unreachable"):
            await asyncio.sleep(0.02)
    before = len(platform.states)
    await platform.start()
    result = await platform.result("r")
    assert len(result["output"]) == len(platform.chunks["r"])
    await platform.until(lambda: len(platform.states) > before)
    assert platform.states[-1]["stage"] == "ready"
    assert "engine" in platform.states[-1]


async def test_server_errors_are_retried_and_refusals_are_not(
    start_worker: Start, platform: PlatformStub
) -> None:
    """worker-protocol.md §3.4."""
    platform.refusals["done"] = Refusal(503, 2)
    platform.refusals["state"] = Refusal(500, 1)
    worker = await start_worker()
    await worker.ready()
    await platform.submit("a", {"prompt": "x"})
    assert "output" in await platform.result("a")
    assert len(list(platform.of_kind("done"))) == 3
    platform.refusals["done"] = Refusal(404, 1)
    await platform.submit("b", {"prompt": "x"})
    await platform.submit("c", {"prompt": "x"})
    await platform.until(lambda: len(platform.results) == 2)


@pytest.mark.parametrize("status", [401, 500, 404])
async def test_a_refusing_platform_is_not_stormed(
    start_worker: Start, platform: PlatformStub, status: int
) -> None:
    """Instant refusals are answered with growing pauses; the reference SDK asks thousands of times a second."""
    platform.refusals["take"] = Refusal(status, 4)
    worker = await start_worker()
    await worker.ready()
    await platform.submit("a", {"prompt": "x"})
    assert "output" in await platform.result("a")
    assert len(list(platform.of_kind("take"))) <= 7


async def test_sigterm_lets_running_jobs_finish(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """worker-protocol.md §6.3, vllm-worker.md §7: nothing new is taken, what runs is answered, exit 0."""
    hold = tmp_path / "go"
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(hold))
    await worker.ready()
    await platform.submit("d", {"prompt": "a b c", "stream": True})
    await platform.until(lambda: bool(platform.chunks["d"]))
    await platform.until(lambda: len(list(platform.of_kind("take"))) == 2)
    worker.process.terminate()
    await platform.stage("draining")
    # Only now is the open take answered: one answered just before the signal is rightly followed by another.
    await platform.begin_drain()
    hold.touch()
    assert "output" in await platform.result("d")
    assert await worker.exit_code() == 0
    assert len(list(platform.of_kind("take"))) == 2
    assert worker.engine_processes() == {}


async def test_a_job_delivered_after_sigterm_is_still_run(
    start_worker: Start, platform: PlatformStub
) -> None:
    """worker-protocol.md §6.3, the trap: the reference SDK accepts such a job and never runs it."""
    worker = await start_worker("-c", PATIENT_TAKE)
    await worker.ready()
    await platform.until(lambda: bool(list(platform.of_kind("take"))))
    worker.process.send_signal(signal.SIGTERM)
    await platform.stage("draining")
    await platform.submit("late", {"prompt": "x y"})
    assert "output" in await platform.result("late")
    assert await worker.exit_code() == 0
    assert len(list(platform.of_kind("take"))) == 1


async def test_drain_ends_at_its_limit_and_asks_for_another_worker(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    worker = await start_worker(
        FAKE_ENGINE_HOLD_FILE=str(tmp_path / "never"), DRAIN_TIMEOUT="0.3", FAKE_ENGINE_IGNORE_SIGTERM="1"
    )
    await worker.ready()
    await platform.submit("d", {"prompt": "a b", "stream": True})
    await platform.until(lambda: bool(platform.chunks["d"]))
    worker.process.terminate()
    error = error_of(await platform.result("d"))
    assert (error["code"], error["retryable"]) == (503, True)
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}


async def test_a_second_signal_cuts_the_drain_short(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(tmp_path / "never"), DRAIN_TIMEOUT="1000")
    await worker.ready()
    await platform.submit("d", {"prompt": "a b", "stream": True})
    await platform.until(lambda: bool(platform.chunks["d"]))
    worker.process.terminate()
    await platform.stage("draining")
    worker.process.terminate()
    error = error_of(await platform.result("d"))
    assert (error["code"], error["retryable"]) == (503, True)
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}


async def test_children_that_outlive_the_engine_are_ended_too(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    stray_file = tmp_path / "stray"
    worker = await start_worker(FAKE_ENGINE_STRAY_FILE=str(stray_file))
    await worker.ready()
    stray = int(stray_file.read_text())
    assert worker.engine_processes()[stray] is True
    await platform.begin_drain()
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}
    assert worker.events("engine.strays_killed")[0]["pids"] == [stray]


async def test_engine_killed_while_a_job_runs(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """vllm-worker.md §7: running jobs get a retryable 503, the stage is failed, the exit code 1."""
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(tmp_path / "never"))
    await worker.ready()
    await platform.submit("k", {"prompt": "a b", "stream": True})
    await platform.until(lambda: bool(platform.chunks["k"]))
    os.kill(worker.engine_pid, signal.SIGKILL)
    error = error_of(await platform.result("k"))
    assert (error["code"], error["type"], error["retryable"]) == (503, "ServiceUnavailable", True)
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "killed"
    assert await worker.exit_code() == 1


async def test_engine_that_dies_mid_stream_fails_the_job_retryably(
    start_worker: Start, platform: PlatformStub
) -> None:
    worker = await start_worker(FAKE_ENGINE_EXIT_AFTER_EVENTS="3")
    await worker.ready()
    await platform.submit("m", {"prompt": "a b c d e", "stream": True, "max_batch_size": 1})
    error = error_of(await platform.result("m"))
    assert (error["code"], error["retryable"]) == (503, True)
    assert len(platform.chunks["m"]) <= 3
    assert (await platform.stage("failed"))["detail"]["kind"] == "engine_died"
    assert await worker.exit_code() == 1


async def test_error_inside_a_stream_fails_the_job_after_its_items(
    start_worker: Start, platform: PlatformStub
) -> None:
    """§3.7."""
    worker = await start_worker(FAKE_ENGINE_ERROR_AFTER_EVENTS="2")
    await worker.ready()
    await platform.submit("e", {"prompt": "a b c", "stream": True, "max_batch_size": 1})
    assert error_of(await platform.result("e"))["message"] == "boom"
    assert [item["choices"][0]["tokens"] for item in platform.chunks["e"]] == [["a"], [" b"]]


async def test_a_job_past_its_time_is_aborted(
    start_worker: Start, platform: PlatformStub, tmp_path: Path
) -> None:
    """§1.11: 504, and the engine sees the disconnect."""
    worker = await start_worker(FAKE_ENGINE_HOLD_FILE=str(tmp_path / "never"), REQUEST_TIMEOUT="1")
    await worker.ready()
    await platform.submit("t", {"prompt": "a b", "stream": True})
    error = error_of(await platform.result("t"))
    assert (error["code"], error["type"], error["retryable"]) == (504, "TimeoutError", False)
    await worker.until_recorded("aborted")


@pytest.mark.parametrize(
    ("variables", "kind", "cause"),
    [
        (
            {
                "FAKE_ENGINE_FAIL_TEXT": "  Value error, Model architectures ['Foo'] are not supported for now."
            },
            "unknown_architecture",
            "Model architectures ['Foo'] are not supported for now.",
        ),
        ({"MODEL_NAME": "/no/such/folder"}, "model_not_found", "model folder /no/such/folder does not exist"),
        ({"VLLM_EXTRA_ARGS": "--uds /x"}, "bad_flag", "VLLM_EXTRA_ARGS='--uds'"),
        ({"PILOTLIGHT_ENGINE_COMMAND": '["/no/such/engine"]'}, "engine_missing", "/no/such/engine"),
        ({"PILOTLIGHT_ENGINE_COMMAND": '["no-such-engine"]'}, "engine_missing", "no-such-engine"),
        ({"PILOTLIGHT_WORKER_RUN_DIR": "/dev/null/run"}, "run_folder", "/dev/null"),
        (
            {"FAKE_ENGINE_START_SECONDS": "60", "VLLM_STARTUP_TIMEOUT": "3"},
            "start_timeout",
            "Starting to load model",
        ),
    ],
)
async def test_failed_starts_name_their_cause(
    start_worker: Start, platform: PlatformStub, variables: dict[str, str], kind: str, cause: str
) -> None:
    worker = await start_worker(**variables)
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == kind
    assert cause in failed["detail"]["cause"]
    assert failed["detail"]["advice"]
    assert await worker.exit_code() == 1
    assert not list(platform.of_kind("take"))
    assert worker.engine_processes() == {}


async def test_a_variable_that_cannot_be_read_is_told_as_such(
    start_worker: Start, platform: PlatformStub
) -> None:
    """vllm-worker.md §0.3 point 9: the value itself is malformed; nothing is started."""
    worker = await start_worker(DRAIN_TIMEOUT="soon")
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "bad_value"
    assert "DRAIN_TIMEOUT" in failed["detail"]["cause"]
    assert "soon" in failed["detail"]["cause"]
    assert await worker.exit_code() == 1
    assert "DRAIN_TIMEOUT" in worker.log()
    assert worker.recorded("start") == []


async def test_sigterm_during_the_start_ends_everything(start_worker: Start, tmp_path: Path) -> None:
    worker = await start_worker(FAKE_ENGINE_LOAD_FILE=str(tmp_path / "never"), FAKE_ENGINE_IGNORE_SIGTERM="1")
    await worker.platform.stage("loading_weights")
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}


async def test_an_unwanted_worker_drains_and_exits(start_worker: Start, platform: PlatformStub) -> None:
    """A state report answered 410 means: you are not wanted."""
    worker = await start_worker()
    await platform.until(lambda: bool(platform.states))
    platform.refusals["state"] = Refusal(410, 1)
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}


async def test_a_worker_whose_platform_vanished_ends_itself(
    start_worker: Start, platform: PlatformStub
) -> None:
    """Orphans must not live for ever."""
    worker = await start_worker(PLATFORM_LOST_TIMEOUT="1", DRAIN_TIMEOUT="1")
    await worker.ready()
    await platform.until(lambda: bool(platform.pings))
    await platform.stop()
    assert await worker.exit_code() == 1
    assert worker.engine_processes() == {}
    assert worker.events("worker.ending")[0]["reason"] == "platform_lost"


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
async def test_the_engine_ends_when_the_worker_program_is_killed(
    start_worker: Start, platform: PlatformStub
) -> None:
    """Nobody is left to end it, so the kernel tells it."""
    worker = await start_worker()
    await worker.ready()
    worker.process.kill()
    await worker.exit_code()
    async with asyncio.timeout(20):
        await worker.until_recorded("sigterm")
        while worker.engine_processes():
            await asyncio.sleep(0.01)


async def test_a_worker_that_never_reached_its_platform_ends_itself(
    start_worker: Start, platform: PlatformStub
) -> None:
    """The platform died while the worker was being started."""
    await platform.stop()
    worker = await start_worker(PLATFORM_LOST_TIMEOUT="1", DRAIN_TIMEOUT="1", FAKE_ENGINE_START_SECONDS="600")
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}
    assert platform.requests == []


async def test_proxies_of_the_environment_are_for_others(start_worker: Start, platform: PlatformStub) -> None:
    """vllm-worker.md §7 HTTP client: neither the platform nor the engine is asked through one."""
    proxy = "http://127.0.0.1:9"
    worker = await start_worker(
        NO_PROXY="-", HTTP_PROXY=proxy, http_proxy=proxy, HTTPS_PROXY=proxy, ALL_PROXY=proxy
    )
    await worker.ready()
    await platform.submit("p", {"prompt": "x"})
    assert "output" in await platform.result("p")
    await platform.until(lambda: bool(platform.pings))


async def test_without_a_state_url_it_runs_as_on_runpod(start_worker: Start, platform: PlatformStub) -> None:
    worker = await start_worker(PILOTLIGHT_WORKER_STATE_URL="-", PILOTLIGHT_WORKER_RUN_DIR="-")
    await platform.submit("a", {"prompt": "x"})
    assert "output" in await platform.result("a")
    assert platform.states == []
    await platform.begin_drain()
    worker.process.terminate()
    assert await worker.exit_code() == 0
    sockets = worker.recorded("start")[0]["argv"][-1]
    assert not Path(sockets).parent.exists()
