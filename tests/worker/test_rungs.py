"""The warm ladder, rung by rung, and every way down it: worker programs, real launchers, a fake engine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.worker.launchers import Launcher, Launchers, describe

from pilotlight.engines.manifest import MANIFEST_NAME
from pilotlight.testing.protocol_server import PlatformStub

Start = Callable[..., Any]

IMPATIENT = "from pilotlight.worker import main, starting; starting.STUCK_SECONDS = 0.5; raise SystemExit(main.main())"


@pytest.fixture
async def launchers(tmp_path: Path) -> AsyncIterator[Launchers]:
    async with Launchers(tmp_path, HF_HUB_CACHE=str(tmp_path / "hub")) as launchers:
        yield launchers


@pytest.fixture
def start(start_worker: Start, launchers: Launchers) -> Start:
    """Starts a worker program that suits the launchers, with one of them or without."""

    async def start(launcher: Launcher | Path | None, *program: str, **variables: str) -> Any:
        path = launcher.path if isinstance(launcher, Launcher) else launcher
        asked = {"PILOTLIGHT_LAUNCHER": str(path)} if path is not None else {}
        own = {**launchers.variables(), "PILOTLIGHT_ENGINE_COMMAND": "-", **asked, **variables}
        return await start_worker(*program, **own)

    return start


def scripted_home(folder: Path, *, cold: str = "") -> Path:
    """An engine's environment whose Python runs the fake engine whatever it is to run.

    Args:
        folder: To be made.
        cold: A line of shell that is run where it is to import once.
    """
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    case = f'case "$2" in pilotlight_engine.serve) {cold};; esac\n' if cold else ""
    python.write_text(
        f'#!/bin/sh\n{case}shift 2\nexec {sys.executable} -m pilotlight.testing.fake_engine "$@"\n'
    )
    python.chmod(0o755)
    describe(folder)
    return folder


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])


def stages(report: dict[str, Any]) -> list[str]:
    return [stage for stage, _ in report["detail"]["timeline"]]


async def test_a_whole_life_from_a_launcher(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    """The launcher is the engine's parent, and neither taken for the engine's nor ended with it."""
    launcher = await launchers.start()
    worker = await start(launcher)
    ready = await worker.ready()
    detail = ready["detail"]
    assert (detail["rung"], detail["note"]) == ("launchable", "")
    assert detail["memory_bytes"] > 10_000_000
    assert stages(ready) == [
        "launched", "config", "loading_weights", "kv_cache", "warming_up", "registering", "ready",
    ]  # fmt: skip
    moments = [moment for _, moment in detail["timeline"]]
    assert moments == sorted(moments)
    assert moments[-1] <= detail["now_ms"] <= moments[0] + 60_000
    assert [state["stage"] for state in platform.states] == [
        "starting", "importing", "loading_weights", "warming_up", "ready",
    ]  # fmt: skip
    assert parent_of(worker.engine_pid) == launcher.pid
    assert worker.engine_processes() == {worker.engine_pid: False}
    assert worker.recorded("start")[0]["argv"][-2:] == ["--uds", f"{worker.run}/engine.sock"]
    await platform.submit("a", {"prompt": "one two"})
    assert (await platform.result("a"))["output"][0]["choices"][0]["tokens"] == ["one two"]
    platform.draining = True
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}
    assert (await launcher.until("ended"))["pid"] == worker.engine_pid
    assert launcher.alive


async def test_without_a_launcher_an_engine_imports_once(start: Start, tmp_path: Path) -> None:
    worker = await start(None, PILOTLIGHT_ENGINE_HOME=str(scripted_home(tmp_path / "engine")))
    ready = await worker.ready()
    assert ready["detail"]["rung"] == "cold"
    assert ready["detail"]["note"] == "the platform keeps no launcher for it"
    assert stages(ready)[0] == "importing"
    (spawning,) = worker.events("engine.spawning")
    assert spawning["argv"][1:3] == ["-m", "pilotlight_engine.serve"]
    assert "PILOTLIGHT_ENGINE_FORK" in worker.recorded("start")[0]["environment"]


async def test_an_engine_that_cannot_import_once_says_why_it_is_started_plainly(start: Start) -> None:
    worker = await start(None)
    ready = await worker.ready()
    assert ready["detail"]["rung"] == "plain"
    no_launcher, doubt = ready["detail"]["note"].split("; ", 1)
    assert no_launcher == "the platform keeps no launcher for it"
    assert "No module named 'torch'" in doubt
    assert len(worker.recorded("start")) == 1


async def test_a_command_that_replaces_vllm_is_started_plainly(start_worker: Start) -> None:
    worker = await start_worker(PILOTLIGHT_LAUNCHER="/no/launcher/is/asked")
    detail = (await worker.ready())["detail"]
    assert (detail["rung"], detail["note"]) == ("plain", "PILOTLIGHT_ENGINE_COMMAND replaces vLLM")


async def test_an_engine_that_nothing_is_known_of_is_started_plainly(
    start: Start, launchers: Launchers
) -> None:
    (launchers.home / MANIFEST_NAME).unlink()
    worker = await start(Path("/no/launcher/is/asked"))
    detail = (await worker.ready())["detail"]
    assert detail["rung"] == "plain"
    assert detail["note"] == "the engine has no manifest that says what it is"


async def test_a_launcher_that_is_not_there_is_passed_over(start: Start, launchers: Launchers) -> None:
    worker = await start(launchers.folder / "none.sock")
    detail = (await worker.ready())["detail"]
    assert detail["rung"] == "plain"
    assert detail["note"].startswith(f"no launcher at {launchers.folder}/none.sock: ")
    assert "No such file" in worker.events("engine.not_launched")[0]["reason"]


async def test_a_launcher_of_another_environment_is_passed_over(start: Start, launchers: Launchers) -> None:
    launcher = await launchers.start(OMP_NUM_THREADS="7")
    worker = await start(launcher)
    detail = (await worker.ready())["detail"]
    assert detail["rung"] == "plain"
    assert detail["note"].startswith("the launcher was started with another OMP_NUM_THREADS; ")


async def test_a_launcher_killed_in_the_middle_of_a_fork_costs_nothing_but_the_rung(
    start: Start, launchers: Launchers
) -> None:
    launcher = await launchers.start(dies_at_fork=True)
    worker = await start(launcher)
    detail = (await worker.ready())["detail"]
    assert detail["note"].startswith("the launcher ended before it had forked an engine; ")
    assert len(worker.recorded("start")) == 1
    assert list(worker.engine_processes()) == [worker.engine_pid]


async def test_a_launcher_that_imports_is_waited_for_and_the_platform_told(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    launcher = await launchers.start(imports_until="go")
    worker = await start(launcher)
    await platform.stage("importing")
    assert worker.recorded("start") == []
    launchers.touch("go")
    ready = await worker.ready()
    assert ready["detail"]["rung"] == "launchable"
    assert "launched" in stages(ready)


async def test_a_launcher_killed_while_it_imports_is_not_waited_for(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    launcher = await launchers.start(imports_until="never")
    worker = await start(launcher)
    await platform.stage("importing")
    await launcher.kill()
    detail = (await worker.ready())["detail"]
    assert detail["rung"] == "plain"
    # Mostly before it was connected to, sometimes after.
    assert "launcher" in detail["note"]


async def test_sigterm_is_obeyed_while_a_launcher_is_waited_for(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    launcher = await launchers.start(imports_until="never")
    worker = await start(launcher)
    await platform.stage("importing")
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert worker.recorded("start") == []
    assert launcher.alive


@pytest.mark.parametrize(("how", "cause"), [("fails", "something of the fork"), ("hangs", "did not begin")])
async def test_an_engine_that_works_only_where_it_is_not_forked_is_started_plainly(
    start: Start, launchers: Launchers, platform: PlatformStub, how: str, cause: str
) -> None:
    """The second attempt is followed like the first."""
    impatient = ("-c", IMPATIENT) if how == "hangs" else ()
    worker = await start(await launchers.start(), *impatient, TEST_FORKED=how)
    ready = await worker.ready()
    assert ready["detail"]["rung"] == "plain"
    assert ready["detail"]["note"].startswith("the launchable start failed: ")
    assert cause in ready["detail"]["note"]
    assert [state["stage"] for state in platform.states] == [
        "starting", "importing", "importing", "loading_weights", "warming_up", "ready",
    ]  # fmt: skip
    assert "launched" not in stages(ready)
    (retry,) = worker.events("engine.plain_retry")
    assert (retry["rung"], cause in retry["cause"]) == ("launchable", True)
    assert list(worker.engine_processes()) == [worker.engine_pid]


async def test_a_cold_start_that_fails_for_no_known_reason_is_repeated_plainly(
    start: Start, tmp_path: Path
) -> None:
    home = scripted_home(tmp_path / "engine", cold="echo oh no; exit 139")
    worker = await start(None, PILOTLIGHT_ENGINE_HOME=str(home))
    detail = (await worker.ready())["detail"]
    assert detail["rung"] == "plain"
    assert detail["note"].endswith("; the cold start failed: oh no")
    assert "PILOTLIGHT_ENGINE_FORK" not in worker.recorded("start")[0]["environment"]


async def test_a_mistake_of_the_user_is_not_repeated(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    text = "ValueError: Model architectures ['Foo'] are not supported for now."
    worker = await start(await launchers.start(), FAKE_ENGINE_FAIL_TEXT=text)
    failed = await platform.stage("failed")
    assert (failed["detail"]["kind"], failed["detail"]["rung"]) == ("unknown_architecture", "launchable")
    assert await worker.exit_code() == 1
    assert len(worker.recorded("start")) == 1
    assert worker.engine_processes() == {}


async def test_the_launcher_knows_how_its_engine_died(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    launcher = await launchers.start()
    worker = await start(launcher)
    await worker.ready()
    os.kill(worker.engine_pid, signal.SIGKILL)
    assert (await platform.stage("failed"))["detail"]["kind"] == "killed"
    assert await worker.exit_code() == 1
    assert (await launcher.until("ended"))["status"] == -9


async def test_an_engine_outlives_its_launcher_and_its_end_is_seen(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    launcher = await launchers.start()
    worker = await start(launcher)
    await worker.ready()
    await launcher.kill()
    await platform.submit("a", {"prompt": "still here"})
    assert "output" in await platform.result("a")
    os.kill(worker.engine_pid, signal.SIGKILL)
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "engine_died"
    assert "its launcher, which alone learns how, had ended before" in failed["detail"]["cause"]
    assert await worker.exit_code() == 1


async def test_an_engine_without_launcher_is_ended_with_its_worker(
    start: Start, launchers: Launchers, platform: PlatformStub
) -> None:
    launcher = await launchers.start()
    worker = await start(launcher)
    await worker.ready()
    await launcher.kill()
    platform.draining = True
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert worker.engine_processes() == {}


async def test_the_engine_ends_when_the_worker_program_is_killed(start: Start, launchers: Launchers) -> None:
    launcher = await launchers.start()
    worker = await start(launcher, FAKE_ENGINE_IGNORE_SIGTERM="1")
    await worker.ready()
    worker.process.kill()
    await worker.exit_code()
    assert (await launcher.until("ended"))["pid"] == worker.engine_pid
    async with asyncio.timeout(20):
        while worker.engine_processes():
            await asyncio.sleep(0.01)
