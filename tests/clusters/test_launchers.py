"""Launchers under supervision, with small scripts in their place and, at the end, the real one without vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from pilotlight.clusters import processes
from pilotlight.clusters.launcher import LauncherPlan, LauncherState
from pilotlight.clusters.launchers import Launchers
from pilotlight.clusters.local import LocalCluster
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.ids import short_id
from pilotlight.engines.launching import launcher_command, launcher_environment
from pilotlight.settings import LauncherSettings

from .conftest import count_descriptors

GB = 10**9

READY = """
import json, os, sys
print("imports now", file=sys.stderr, flush=True)
print(json.dumps({"event": "ready", "seconds": 0.5, "memory_bytes": 7, "vllm": "0.32.0"}), flush=True)
sys.stdin.read()
"""
TALKING = READY.replace(
    "sys.stdin.read()",
    """
import select
while not select.select([0], [], [], 0.05)[0]:
    print(json.dumps({"event": "alive"}), flush=True)
""",
)
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}\nsignal.pause()"
IMPORTING = "import sys; sys.stdin.read()"
BROKEN = "import sys; sys.exit('no module named vllm')"
REFUSING = """
import json, sys
print(json.dumps({"event": "problem", "text": "CUDA was touched"}), flush=True)
sys.stdin.read()
"""

COMPLAINING = """
import json, sys
ready = {"event": "ready", "seconds": 0.5, "memory_bytes": 7, "vllm": "0.32.0"}
launched = {"event": "launched", "pid": 1, "worker_id": "w"}
problem = {"event": "problem", "text": "it computed"}
for event in [ready, problem, problem, launched, problem, problem, *[problem] * MORE]:
    print(json.dumps(event), flush=True)
sys.stdin.read()
"""


async def until(look, what="it"):
    """What `look` returns as soon as it is true."""
    async with asyncio.timeout(30):
        while not (found := look()):
            await asyncio.sleep(0.005)
    return found


class World:
    """Launchers whose plans come from here: by default each endpoint has one of its own, a script."""

    def __init__(self, folder: Path, cluster: LocalCluster) -> None:
        self.folder = folder
        self.logs = cluster.logs
        self.scripts: dict[str, str] = {}
        self.lives: list[str] = []
        self.names: dict[str, str] = {}
        self.asked: list[list[str]] = []
        self.classes: dict[str, tuple[str, ...]] = {}
        self.available = 64 * GB
        self.endpoints: dict[str, Endpoint] = {}
        self.launchers = self.make()

    def make(self, **settings) -> Launchers:
        return Launchers(
            self.plan,
            logs=self.logs,
            settings=LauncherSettings(**settings),
            available=lambda: self.available,
            reserve_bytes=1 * GB,
            pauses_s=(0, 0),
        )

    def plan(self, endpoint: Endpoint) -> LauncherPlan | str:
        if endpoint.revision.model == "foreign":
            return "its workers are not our own program"
        if endpoint.revision.model == "beyond":
            raise ValueError(endpoint.revision.model)
        name = self.names.get(endpoint.id, endpoint.id)

        def command(classes):
            self.asked.append(list(classes))
            script = self.lives.pop(0) if self.lives else self.scripts.get(name, READY)
            return [sys.executable, "-I", "-S", "-c", script]

        return LauncherPlan(
            fingerprint=name,
            version="0.32.0",
            socket=self.folder / f"{name}.sock",
            environment={"PATH": os.environ["PATH"]},
            worker_bytes=2 * GB,
            command=command,
            classes=lambda: self.classes.get(endpoint.id, ()),
        )

    def endpoint(self, endpoint_id: str, **changes) -> Endpoint:
        model = changes.pop("model", "m")
        version = len([each for each in self.endpoints if each == endpoint_id]) + 1
        revision = Revision(endpoint_id=endpoint_id, version=version, model=model)
        self.endpoints[endpoint_id] = Endpoint(id=endpoint_id, name=endpoint_id, revision=revision, **changes)
        return self.endpoints[endpoint_id]

    def add(self, endpoint_id: str, **changes) -> Endpoint:
        endpoint = self.endpoint(endpoint_id, **changes)
        self.launchers.changed(endpoint)
        return endpoint

    def find(self, name: str):
        return self.launchers._launchers.get(name)

    async def ready(self, name: str):
        """The launcher of this name once it is ready."""

        def look():
            launcher = self.find(name)
            return launcher if launcher is not None and launcher.state is LauncherState.READY else None

        return await until(look)


@pytest.fixture
async def world(tmp_path, cluster):
    world = World(tmp_path, cluster)
    world.launchers.begin([])
    yield world
    await world.launchers.stop()


async def test_endpoints_that_agree_share_one_launcher_which_ends_with_the_last_of_them(world):
    world.names = {"a": "same", "b": "same"}
    world.classes = {"a": ("LlamaForCausalLM",)}
    first, second = world.add("a"), world.add("b")
    launcher = await world.ready("same")
    (info,) = await world.launchers.infos()
    assert (info.fingerprint, info.version, info.state, info.pid) == ("same", "0.32.0", "ready", launcher.pid)
    assert (info.endpoints, info.launches, info.ready_s) == (("a", "b"), 0, 0.5)
    assert info.memory_bytes > 10**6
    assert world.asked == [["LlamaForCausalLM"]]
    assert world.launchers.socket(first) == world.launchers.socket(second) == world.folder / "same.sock"
    assert world.launchers.launchable("a")
    pid = launcher.pid
    assert os.getsid(pid) == pid
    world.launchers.deleted("a")
    world.launchers.deleted("b")
    await until(lambda: not world.find("same") and processes.identify(pid) is None)
    assert await world.launchers.infos() == []


async def test_nobody_is_told_of_a_launcher_before_the_lead_or_after_it(world):
    endpoint = world.add("a")
    await world.ready("a")
    await world.launchers.stop()
    assert world.launchers.socket(endpoint) is None
    assert not world.launchers.launchable("a")
    assert not (world.folder / "a.sock").exists()
    assert (await world.logs.tail("launcher-a"))[-1].text == "ended by SIGTERM"
    world.launchers.begin([endpoint])
    await world.ready("a")
    assert world.launchers.socket(endpoint) is not None


async def test_what_cannot_use_a_launcher_has_none(world):
    for endpoint in (world.add("foreign", model="foreign"), world.add("paused", workers_max=0)):
        assert world.launchers.socket(endpoint) is None
    off = world.make(enabled=False)
    off.begin([])
    assert off.socket(world.endpoint("a")) is None
    assert await off.infos() == await world.launchers.infos() == []


async def test_a_worker_is_told_of_a_launcher_that_is_still_importing(world):
    """Asked for in the moment in which the gateway begins to lead, before anything was started."""
    world.scripts["a"] = IMPORTING
    endpoint = world.endpoint("a")
    world.launchers.begin([endpoint])
    assert world.launchers.socket(endpoint) == world.folder / "a.sock"
    assert not world.launchers.launchable("a")


async def test_the_one_that_was_wanted_least_recently_makes_room_for_another(world):
    first, second = world.add("a"), world.add("b")
    await world.ready("a")
    await world.ready("b")
    world.launchers.socket(second)
    world.launchers.socket(first)
    world.add("c")
    await world.ready("c")
    assert {info.fingerprint for info in await world.launchers.infos()} == {"a", "c"}
    # And the start of a worker brings it back, in the place of the one that is not wanted now.
    assert world.launchers.socket(second) is not None
    await world.ready("b")
    assert {info.fingerprint for info in await world.launchers.infos()} == {"b", "c"}


async def test_a_gateway_that_starts_keeps_those_whose_endpoints_were_changed_last(world):
    """It tells of every endpoint then, and none of them has changed."""
    endpoints = [world.endpoint(name, updated_ms=at_ms) for name, at_ms in (("a", 3), ("b", 2), ("c", 1))]
    world.launchers.begin(endpoints)
    launchers = [await world.ready(name) for name in "ab"]
    for endpoint in endpoints:
        world.launchers.changed(endpoint)
    await asyncio.sleep(0)
    assert [world.find(name) for name in "abc"] == [*launchers, None]
    world.launchers.changed(replace(endpoints[2], updated_ms=4))
    await world.ready("c")
    assert {info.fingerprint for info in await world.launchers.infos()} == {"a", "c"}


async def test_a_fault_in_a_plan_keeps_nobody_from_starting(world):
    with structlog.testing.capture_logs() as lines:
        endpoint = world.add("a", model="beyond")
        assert world.launchers.socket(endpoint) is None
    assert {line["event"] for line in lines if line["log_level"] == "error"} == {"launcher_not_planned"}


async def test_a_model_that_cannot_be_read_does_other_endpoints_no_harm(world):
    world.names = {"a": "same", "b": "same"}
    world.classes = {"a": None, "b": ("LlamaForCausalLM",)}
    with structlog.testing.capture_logs() as lines:
        world.add("a")
        world.add("b")
        await world.ready("same")
    assert world.asked == [["LlamaForCausalLM"]]
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["launcher_classes_unknown"]


async def test_a_fault_in_a_life_is_a_life_that_failed(world):
    """Else workers would be sent to a launcher that nobody starts."""
    world.asked = None
    with structlog.testing.capture_logs() as lines:
        endpoint = world.add("a")
        await until(lambda: any(line["event"] == "launcher_given_up" for line in lines))
    assert "AttributeError" in lines[-1]["problem"]
    assert world.launchers.socket(endpoint) is None


async def test_one_that_ends_comes_again_and_is_given_up_after_some_lives(world):
    world.scripts["a"] = BROKEN
    with structlog.testing.capture_logs() as lines:
        endpoint = world.add("a")
        await until(lambda: any(line["event"] == "launcher_given_up" for line in lines))
    given_up = lines[-1]
    assert (given_up["log_level"], given_up["failures"]) == ("error", 3)
    assert given_up["problem"] == "exited with status 1"
    assert len([line for line in lines if line["event"] == "launcher_started"]) == 3
    assert world.launchers.socket(endpoint) is None
    (info,) = await world.launchers.infos()
    assert (info.state, info.pid, info.problem) == ("failed", None, "exited with status 1")
    texts = [line.text for line in await world.logs.tail(info.log)]
    assert "no module named vllm" in texts
    # Whatever was wrong may be mended when the endpoint is changed.
    world.scripts["a"] = READY
    world.launchers.changed(endpoint)
    await world.ready("a")


async def test_nobody_waits_for_one_that_did_not_become_ready_before(world):
    world.lives = [BROKEN, IMPORTING, READY, IMPORTING]
    endpoint = world.add("a")
    assert world.launchers.socket(endpoint) is not None
    launcher = world.find("a")
    launcher._pauses_s = (0, 0, 0)
    second = await until(lambda: launcher._failures == 1 and launcher.pid)
    assert launcher.state is LauncherState.IMPORTING
    assert world.launchers.socket(endpoint) is None
    os.kill(second, signal.SIGKILL)
    third = (await world.ready("a")).pid
    # Once it was, it is waited for.
    os.kill(third, signal.SIGKILL)
    await until(lambda: launcher.pid not in {None, third})
    assert launcher.state is LauncherState.IMPORTING
    assert world.launchers.socket(endpoint) is not None


async def test_one_that_can_launch_nothing_is_ended_and_says_why(world):
    world.scripts["a"] = REFUSING
    world.add("a")
    await until(lambda: (it := world.find("a")) and it._failures == 3)
    (info,) = await world.launchers.infos()
    assert (info.problem, info.pid) == ("CUDA was touched", None)


@pytest.mark.parametrize(("more", "state"), [(0, "ready"), (1, "failed")])
async def test_one_that_refuses_three_engines_in_a_row_is_begun_anew(world, more, state):
    """It would refuse all that follow; a single refusal may be that engine's fault."""
    world.scripts["a"] = COMPLAINING.replace("MORE", str(more))
    world.add("a")
    expected = (1, 2, 0) if state == "ready" else (3, 3, 3)

    def reached():
        launcher = world.find("a")
        return launcher and (launcher.launches, launcher._complaints, launcher._failures) == expected

    await until(reached)
    (info,) = await world.launchers.infos()
    assert (info.state, info.problem) == (state, "it computed")


async def test_one_that_was_ready_and_dies_comes_again(world):
    endpoint = world.add("a")
    launcher = await world.ready("a")
    first = launcher.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: launcher.pid not in {None, first} and launcher.state is LauncherState.READY)
    assert world.launchers.socket(endpoint) is not None
    assert processes.identify(first) is None, "it was reaped"


async def test_one_that_was_stopped_is_replaced_and_one_that_says_that_it_is_there_is_not(world, monkeypatch):
    """Connections to one that was stopped would be taken by the kernel and never be answered."""
    monkeypatch.setattr("pilotlight.clusters.launcher.SILENCE_S", 2.5)
    monkeypatch.setattr("pilotlight.clusters.launcher._END_S", 0.0)
    world.scripts["a"] = TALKING
    with structlog.testing.capture_logs() as lines:
        world.add("a")
        launcher = await world.ready("a")
        first, loop = launcher.pid, asyncio.get_running_loop()
        longer = loop.time() + 3.0
        await until(lambda: loop.time() > longer)
        assert launcher.pid == first
        os.kill(first, signal.SIGSTOP)
        await until(lambda: launcher.pid not in {None, first})
    (said,) = [line for line in lines if line["event"] == "launcher_failed"]
    assert said["problem"] == "it has said nothing for 2.5 s"
    assert processes.identify(first) is None


async def test_none_is_started_where_it_would_take_the_place_of_a_worker(world):
    """0.6 GB for itself, 2 for a worker, 1 in reserve: 3.6."""
    world.available = int(3.5 * GB)
    with structlog.testing.capture_logs() as lines:
        endpoint = world.add("a")
        assert world.launchers.socket(endpoint) is None
        await asyncio.sleep(0)
    (said,) = [line for line in lines if line["event"] == "launcher_not_started"]
    assert "3.5 GB are available" in said["problem"]
    (info,) = await world.launchers.infos()
    assert (info.state, info.problem) == ("failed", said["problem"])
    world.available = int(3.7 * GB)
    world.launchers.changed(endpoint)
    await world.ready("a")


@pytest.mark.parametrize("script", [READY, IMPORTING, STUBBORN])
async def test_stopping_leaves_no_process_and_no_descriptor(world, script):
    world.scripts = dict.fromkeys("ab", script)
    # The first one also opens what the capture of logs keeps.
    world.add("warm")
    await world.ready("warm")
    await world.launchers.stop()
    # What earlier tests left is closed now, and not meanwhile.
    gc.collect()
    before = count_descriptors()
    world.launchers.begin([world.endpoint("a"), world.endpoint("b")])
    pids = await until(
        lambda: (found := [it.pid for it in world.launchers._launchers.values() if it.pid])[1:] and found
    )
    if script != IMPORTING:
        await world.ready("a")
        await world.ready("b")
    await world.launchers.stop()
    assert [processes.identify(pid) for pid in pids] == [None, None]
    assert count_descriptors() == before


GATEWAY = """
import asyncio, os, sys
from pathlib import Path
from pilotlight.clusters.launcher import LauncherPlan
from pilotlight.clusters.launchers import Launchers
from pilotlight.clusters.logs import WorkerLogs
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.settings import LauncherSettings

async def main(folder, script):
    plan = LauncherPlan(fingerprint="x", version="", socket=folder / "x.sock", environment={},
                        worker_bytes=0, classes=tuple,
                        command=lambda classes: [sys.executable, "-I", "-S", "-c", script])
    launchers = Launchers(lambda endpoint: plan, logs=WorkerLogs(folder / "logs", log_bytes=10000),
                          settings=LauncherSettings(), available=lambda: 10**12, reserve_bytes=0)
    launchers.begin([Endpoint(id="e", name="e", revision=Revision(endpoint_id="e", version=1, model="m"))])
    while not (known := launchers._launchers.get("x")) or known.state != "ready":
        await asyncio.sleep(0.01)
    print(known.pid, file=sys.stderr, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.parametrize(
    "script",
    [READY, READY.replace("sys.stdin.read()", "import signal; signal.pause()")],
    ids=["reads", "never reads"],
)
def test_a_launcher_ends_with_a_gateway_that_is_killed(tmp_path, script):
    """By the end of its standard input; one that hangs by the signal that the kernel sends for us."""
    command = [sys.executable, "-c", GATEWAY, str(tmp_path), script]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as gateway:
        try:
            identity = processes.identify(int(gateway.stderr.readline()))
        finally:
            gateway.kill()
    deadline = time.monotonic() + 30
    while processes.is_alive(identity):
        assert time.monotonic() < deadline, "the launcher outlived its gateway"
        time.sleep(0.005)


class RealLauncher:
    """The launcher that runs in the engine's Python, with a target that only waits in the place of vLLM."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "l.sock"
        self.environment = launcher_environment({"PATH": os.environ["PATH"]})

    def plan(self, _endpoint: Endpoint) -> LauncherPlan:
        command = [*launcher_command(Path(sys.prefix), self.path), "--target", "signal:pause"]
        return LauncherPlan(
            fingerprint="f",
            version="",
            socket=self.path,
            environment=self.environment,
            worker_bytes=0,
            command=lambda _: command,
            classes=tuple,
        )

    def launch(self, worker_id: str) -> tuple[socket.socket, int]:
        """The connection that holds an engine, and its process."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        lines = connection.makefile("rb")
        hello = json.loads(lines.readline())
        assert hello["problem"] == ""
        environment = {"PILOTLIGHT_WORKER_ID": worker_id, "VLLM_API_KEY": "k" * 43}
        request = {
            "arguments": [],
            "environment": environment,
            "folder": "/",
            "architectures": [],
            "worker_id": worker_id,
        }
        with open("/dev/null", "wb") as null:  # noqa: PTH123 - its descriptor is what is wanted
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [null.fileno()])
        return connection, json.loads(lines.readline())["pid"]


async def test_engines_are_counted_and_survive_their_launcher_and_sweeps_spare_it(tmp_path, cluster):
    """1. An engine is launched. 2. Its launcher is killed: the engine lives, another launcher comes to the same
    socket and launches another one. 3. Whatever carries a worker's id is swept: the engines, not the launcher.
    """
    real = RealLauncher(tmp_path)
    endpoint = Endpoint(id="e", name="e", revision=Revision(endpoint_id="e", version=1, model="m"))
    launchers = Launchers(
        real.plan,
        logs=cluster.logs,
        settings=LauncherSettings(),
        available=lambda: 64 * GB,
        reserve_bytes=0,
        pauses_s=(0,),
    )
    ids = [short_id(os.urandom(14)) for _ in range(2)]
    with contextlib.ExitStack() as connections:
        try:
            launchers.begin([])
            assert launchers.socket(endpoint) == real.path
            launcher = launchers._launchers["f"]
            await until(lambda: launcher.state is LauncherState.READY)
            first = launcher.pid
            connection, engine = await asyncio.to_thread(real.launch, ids[0])
            connections.enter_context(connection)
            await until(lambda: (launcher.launches, launcher.engines) == (1, 1))

            os.kill(first, signal.SIGKILL)
            await until(lambda: launcher.pid not in {None, first} and launcher.state is LauncherState.READY)
            second = launcher.pid
            assert processes.is_alive(processes.identify(engine))
            connection, _ = await asyncio.to_thread(real.launch, ids[1])
            connections.enter_context(connection)
            await until(lambda: (launcher.launches, launcher.engines) == (2, 1))

            assert sorted(await cluster.sweep(dict.fromkeys(ids))) == sorted(ids)
            await until(lambda: launcher.engines == 0)
            assert launcher.pid == second
            assert processes.is_alive(processes.identify(second))
        finally:
            await launchers.stop()
            await cluster.sweep(dict.fromkeys(ids))
