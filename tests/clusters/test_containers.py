"""ContainerCluster with real Podman: images, output, complete ends, sweeps. On asyncio and uvloop."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import re
import secrets
import signal
import tarfile
import threading
from dataclasses import replace

import pytest

from pilotlight.clusters import container_engine, containers
from pilotlight.clusters.container_engine import (
    ContainerEngine,
    EngineFacts,
    Login,
    UnreachableError,
    _first_file,
)
from pilotlight.clusters.container_plan import INSTALLATION_LABEL, Place, plan_container
from pilotlight.clusters.containers import ContainerCluster
from pilotlight.clusters.local import LocalCluster
from pilotlight.clusters.logs import WorkerLogs
from pilotlight.clusters.places import Places
from pilotlight.core.worker_environment import RUN_FOLDER_VARIABLE
from pilotlight.domain.endpoint import Container, Volume
from pilotlight.domain.worker import ProcessIdentity
from pilotlight.errors import ClusterError
from pilotlight.ports.cluster import WorkerExit, WorkerSpec

from ..registry import private_registry  # noqa: TID252

pytestmark = pytest.mark.timeout(600)
"""Images are made by whoever comes first."""

MIB = 1 << 20
ANYBODY = {"anybody": None}
"""Workers on record, one of them without a process: then containers are looked for."""

OBEDIENT = "import signal, time; signal.signal(15, lambda *_: exit(3)); print('ready'); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready'); time.sleep(600)"


class Contained:
    """Starts containers on a cluster and remembers their ends."""

    def __init__(self, cluster, logs, image, installation):
        self.cluster = cluster
        self.logs = logs
        self.image = image
        self.installation = installation
        self.exits: list[WorkerExit] = []
        self._ended: dict[str, asyncio.Event] = {}
        self._numbers = itertools.count()

    def spec(self, program, *, container=None, **fields):
        worker_id = f"{self.installation}{next(self._numbers)}"
        container = container or Container(image=self.image)
        command = ["python", "-c", program]
        return WorkerSpec(
            **{
                "worker_id": worker_id,
                "endpoint_id": "ep",
                "env": {},
                "command": command,
                "container": container,
            }
            | fields
        )

    async def start(self, program, **fields):
        spec = self.spec(program, **fields)
        self._ended[spec.worker_id] = asyncio.Event()
        assert await self.cluster.start(spec, self._on_exit) is None
        return spec.worker_id

    async def line(self, worker_id, text):
        async for line in self.logs.follow(worker_id, 0):
            if text in line.text:
                return
        pytest.fail(f"the log of {worker_id} ended without {text!r}")

    async def start_ready(self, program, **fields):
        worker_id = await self.start(program, **fields)
        await self.line(worker_id, "ready")
        await self.line(worker_id, "started for endpoint")
        return worker_id

    async def ended(self, worker_id):
        await self._ended[worker_id].wait()
        return next(end for end in self.exits if end.worker_id == worker_id)

    async def run(self, program, **fields):
        """The end of a worker and what it wrote."""
        worker_id = await self.start(program, **fields)
        end = await self.ended(worker_id)
        return end, [line.text for line in await self.logs.tail(worker_id, 1000)]

    def _on_exit(self, end):
        self.exits.append(end)
        self._ended[end.worker_id].set()


@pytest.fixture
def engine(podman):
    engine = ContainerEngine(podman.url)
    yield engine
    engine.close()


@pytest.fixture
async def contained(podman, engine, tmp_path):
    """A cluster, closed at the end, that leaves no container behind."""
    image, installation = podman.base(), secrets.token_hex(6)
    logs = WorkerLogs(tmp_path / "logs", log_bytes=MIB)
    cluster = ContainerCluster(
        engine, logs, installation=installation, network="host", shm_bytes=16 * MIB, close_grace_s=10,
        volume_roots=[tmp_path],
    )  # fmt: skip
    workers = Contained(cluster, logs, image, installation)
    yield workers
    await cluster.close()
    await logs.close()
    assert podman.containers(f"io.pilotlight.installation={installation}") == []


@pytest.fixture
def impatient(monkeypatch):
    """What is tried again is tried again at once."""
    monkeypatch.setattr(containers, "RETRY_S", 0.05)
    monkeypatch.setattr(containers, "PROGRESS_S", 0)


async def test_output_and_exit_status(contained):
    end, texts = await contained.run("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert (end.code, end.failure) == (7, None)
    assert {"out", "err"} <= set(texts)
    assert texts[-1] == "exited with status 7"
    assert any("Podman" in text for text in texts)


async def test_terminate_is_sigterm_to_the_main_process(contained):
    worker_id = await contained.start_ready(OBEDIENT)
    await contained.cluster.terminate(worker_id)
    assert (await contained.ended(worker_id)).code == 3


async def test_kill_ends_what_ignores_the_signal_and_all_its_children(contained, podman):
    worker_id = await contained.start_ready(
        "import subprocess; subprocess.Popen(['sleep', '600']);" + STUBBORN
    )
    await contained.cluster.terminate(worker_id)
    await contained.cluster.kill(worker_id)
    assert (await contained.ended(worker_id)).code == -signal.SIGKILL
    assert podman.containers(f"io.pilotlight.worker={worker_id}") == []
    await contained.cluster.kill(worker_id)
    await contained.cluster.terminate("nobody")


COUNTS = """
import subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready")
number = 0
while True:
    number += 1
    print("count", number)
    time.sleep(0.01)
"""


async def test_a_frozen_container_stands_still_as_a_whole_and_goes_on(contained, podman):
    worker_id = await contained.start_ready(COUNTS)
    assert await contained.cluster.freeze(worker_id) > MIB
    (container,) = podman.containers(f"io.pilotlight.worker={worker_id}")
    assert podman.run("inspect", "--format", "{{.State.Status}}", container).strip() == "paused"
    assert contained.cluster.engine.runs(container), "it has not ended"
    with pytest.raises(ClusterError):
        await contained.cluster.freeze(worker_id)
    with pytest.raises(ClusterError):
        await contained.cluster.thaw(worker_id)
    await contained.cluster.freeze(worker_id)
    await contained.cluster.thaw(worker_id)
    shown = [line.text for line in await contained.logs.tail(worker_id, 1000)]
    last = max(int(text.split()[1]) for text in shown if text.startswith("count "))
    await contained.line(worker_id, f"count {last + 5}")
    assert await contained.cluster.gpu_memory(worker_id, [0]) == 0
    await contained.cluster.kill(worker_id)
    with pytest.raises(ClusterError, match="no container that runs"):
        await contained.cluster.freeze(worker_id)


async def test_a_frozen_container_can_be_ended(contained, podman):
    worker_id = await contained.start_ready(STUBBORN)
    await contained.cluster.freeze(worker_id)
    await contained.cluster.kill(worker_id)
    assert podman.containers(f"io.pilotlight.worker={worker_id}") == []
    assert (await contained.ended(worker_id)).failure is None


async def test_what_a_container_is_given(contained, tmp_path):
    """Memory, shared memory, volumes, variables, the folder of sockets, and nothing of our own environment."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    (data / "weights").write_text("w")
    program = f"""
import glob, os, sys
print(open("/runpod-volume/weights").read() == "w", os.access("/runpod-volume", os.W_OK))
limits = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max")
print("memory", [open(path).read().strip() for path in limits if os.path.exists(path)])
shm = os.statvfs("/dev/shm")
print("shm", shm.f_blocks * shm.f_frsize)
print("cookie", os.environ["PILOTLIGHT_WORKER_ID"], os.environ["NAME"], os.environ.get("MARK"))
open({str(run)!r} + "/engine.sock", "w").write("here")
print("pid", os.getpid())
"""
    container = Container(
        image=contained.image,
        volumes=(
            Volume(source=str(data), target="/runpod-volume", read_only=True),
            Volume(source=f"pl-{contained.installation}", target="/named"),
        ),
        shm_bytes=32 * MIB,
    )
    spec = {"env": {"NAME": "value", RUN_FOLDER_VARIABLE: str(run)}, "memory_bytes": 256 * MIB}
    os.environ["MARK"] = "ours"
    try:
        end, texts = await contained.run(program, container=container, **spec)
    finally:
        del os.environ["MARK"]
        contained.cluster.engine._connect().remove_volume(f"pl-{contained.installation}")
    assert end.code == 0, texts
    assert "True False" in texts
    assert f"memory ['{256 * MIB}']" in texts
    assert f"shm {32 * MIB}" in texts
    assert f"cookie {end.worker_id} value None" in texts
    # As process 1 it takes its heartbeat process with it when it dies (worker-protocol.md §1 line 13).
    assert "pid 1" in texts
    assert (run / "engine.sock").read_text() == "here"


async def test_more_memory_than_its_limit(contained):
    end, texts = await contained.run("x = bytearray(512 << 20); print(len(x))", memory_bytes=64 * MIB)
    assert end.failure is not None, texts
    assert end.failure.kind == "out_of_memory"
    assert str(64 * MIB) in end.failure.cause


async def test_a_kill_from_outside_is_no_lack_of_memory_where_none_was_bounded(contained, podman):
    """Nobody knows why it was killed; with a limit it is the likely reason on engines that do not say."""
    for memory_bytes, kind in ((0, None), (256 * MIB, "out_of_memory")):
        worker_id = await contained.start_ready(OBEDIENT, memory_bytes=memory_bytes)
        [container_id] = podman.containers(f"io.pilotlight.worker={worker_id}")
        podman.run("kill", "--signal", "KILL", container_id)
        end = await contained.ended(worker_id)
        assert (end.code, end.failure and end.failure.kind) == (-signal.SIGKILL, kind)


async def test_anonymous_volumes_go_with_their_container(contained, podman):
    text = f"FROM {contained.image}\nVOLUME /cache\n"
    image = podman.build("volume", text, {"unused": ""})
    volumes = (Volume(source=f"pl-{contained.installation}", target="/named"),)
    worker_id = await contained.start_ready(OBEDIENT, container=Container(image=image, volumes=volumes))
    [container_id] = podman.containers(f"io.pilotlight.worker={worker_id}")
    names = podman.volumes(container_id)
    await contained.cluster.kill(worker_id)
    assert len(names) == 2
    assert {name for name in names if podman.has_volume(name)} == {f"pl-{contained.installation}"}
    podman.run("volume", "rm", f"pl-{contained.installation}")


async def test_a_volume_from_elsewhere_is_not_mounted(contained, tmp_path):
    """What was allowed when the endpoint was made may have become a link since."""
    (tmp_path / "link").symlink_to("/")
    volumes = (Volume(source=str(tmp_path / "link"), target="/data"),)
    end, _ = await contained.run(OBEDIENT, container=Container(image=contained.image, volumes=volumes))
    assert (end.failure.kind, "may not be given" in end.failure.cause) == ("container_failed", True)


async def test_a_program_that_the_image_lacks(contained):
    worker_id = await contained.start("", command=["/no/such/program"])
    end = await contained.ended(worker_id)
    assert end.code is None
    assert end.failure.kind == "container_failed"
    assert "/no/such/program" in end.failure.cause


async def test_an_image_that_cannot_be_fetched(contained):
    """Told like a failed start, with what to do; nothing is left of it."""
    container = Container(image="localhost:1/nobody/nothing:1")
    end, texts = await contained.run("", container=container)
    assert end.failure.kind == "image_missing"
    assert "localhost:1/nobody/nothing:1" in end.failure.cause
    assert "registry_user" in end.failure.advice
    assert texts[0].endswith("fetching image localhost:1/nobody/nothing:1")


async def test_output_is_whole_and_in_order(contained):
    """More than the pipes on the way hold, in one go."""
    end, _ = await contained.run("import sys; sys.stdout.writelines(f'line {n}\\n' for n in range(15000))")
    assert end.code == 0
    texts = [line.text for line in await contained.logs.tail(end.worker_id, 50_000)]
    assert [text for text in texts if text.startswith("line")] == [f"line {n}" for n in range(15000)]


async def test_close_ends_all_politely_and_then_by_force(contained):
    polite = await contained.start_ready(OBEDIENT)
    contained.cluster._close_grace_s = 0.1
    stubborn = await contained.start_ready(STUBBORN)
    await contained.cluster.close()
    assert {end.worker_id for end in contained.exits} == {polite, stubborn}
    assert (await contained.ended(stubborn)).code == -signal.SIGKILL
    with pytest.raises(ClusterError, match="closed"):
        await contained.cluster.start(contained.spec(""), lambda _: None)


class Hesitant(ContainerEngine):
    """Podman that takes its time between making a container and saying so."""

    def __init__(self, url):
        super().__init__(url)
        self.made, self.go_on = threading.Event(), threading.Event()

    def create(self, plan):
        container_id = super().create(plan)
        self.made.set()
        self.go_on.wait()
        return container_id


async def test_told_to_end_before_it_runs(contained, podman):
    """A container that is made already is not started any more, and is removed."""
    contained.cluster.engine = engine = Hesitant(podman.url)
    worker_id = await contained.start(OBEDIENT)
    await asyncio.to_thread(engine.made.wait)
    assert len(podman.containers(f"io.pilotlight.worker={worker_id}")) == 1
    await contained.cluster.terminate(worker_id)
    engine.go_on.set()
    assert (await contained.ended(worker_id)).code is None
    assert [line.text for line in await contained.logs.tail(worker_id)] == ["ended before it ran"]
    assert podman.containers(f"io.pilotlight.worker={worker_id}") == []


async def test_a_container_whose_id_is_not_told_is_removed_by_its_name(contained, podman):
    """The engine makes it, and its answer comes too late."""

    class Late(ContainerEngine):
        def create(self, plan):
            super().create(plan)
            raise UnreachableError("the container engine does not answer: timed out")

    contained.cluster.engine = Late(podman.url)
    worker_id = await contained.start(OBEDIENT)
    assert (await contained.ended(worker_id)).failure.kind == "engine_unreachable"
    assert podman.containers(f"io.pilotlight.worker={worker_id}") == []


class TestEngineAway:
    """The engine stops and comes back, as at an update; its containers live on meanwhile."""

    LOOP = """
import pathlib, signal, time
signal.signal(15, lambda *_: exit(3))
while True:
    print(pathlib.Path("/data/word").read_text(), flush=True)
    time.sleep(0.05)
"""

    async def repeating(self, contained, folder):
        """A worker that writes again and again what the file `word` of the folder holds, `ready` at first."""
        (folder / "word").write_text("ready")
        volumes = (Volume(source=str(folder), target="/data"),)
        container = Container(image=contained.image, volumes=volumes)
        return await contained.start_ready(self.LOOP, container=container)

    async def test_a_worker_lives_on_and_is_heard_again(self, contained, podman, impatient, tmp_path):
        worker_id = await self.repeating(contained, tmp_path)
        podman.stop()
        (tmp_path / "word").write_text("second")
        podman.start()
        await contained.line(worker_id, "second")
        await contained.cluster.terminate(worker_id)
        assert (await contained.ended(worker_id)).code == 3

    async def test_a_frozen_one_is_heard_again_after_its_thaw(self, contained, podman, impatient, tmp_path):
        """Nothing can attach to it before that."""
        worker_id = await self.repeating(contained, tmp_path)
        await contained.cluster.freeze(worker_id)
        refused = asyncio.Event()
        loop = asyncio.get_running_loop()

        class Refusing(ContainerEngine):
            def attach_again(self, container_id):
                try:
                    return super().attach_again(container_id)
                except UnreachableError:
                    raise
                except ClusterError:
                    loop.call_soon_threadsafe(refused.set)
                    raise

        contained.cluster.engine = Refusing(podman.url)
        podman.stop()
        podman.start()
        await refused.wait()
        (tmp_path / "word").write_text("second")
        await contained.cluster.thaw(worker_id)
        await contained.line(worker_id, "second")

    async def test_asked_to_end_meanwhile(self, contained, podman, impatient):
        """The signal is sent when it is back."""
        worker_id = await contained.start_ready(OBEDIENT)
        podman.stop()
        await contained.cluster.terminate(worker_id)
        podman.start()
        assert (await contained.ended(worker_id)).code == 3

    async def test_killed_meanwhile(self, contained, podman, impatient):
        """Without a second try such a worker would live for ever."""
        worker_id = await contained.start_ready(STUBBORN)
        podman.stop()
        killing = asyncio.create_task(contained.cluster.kill(worker_id))
        await asyncio.sleep(0)
        podman.start()
        await killing
        # None where it was removed before it was seen to have ended.
        assert (await contained.ended(worker_id)).code in {None, -signal.SIGKILL}
        assert podman.containers(f"io.pilotlight.worker={worker_id}") == []

    async def test_one_that_no_signal_reaches(self, contained, podman, impatient):
        """The engine takes what it was starting when it ended for something that does not run."""

        class Deaf(ContainerEngine):
            def signal(self, container_id, name):
                pass

        contained.cluster.engine = Deaf(podman.url)
        worker_id = await contained.start_ready(OBEDIENT)
        await contained.cluster.kill(worker_id)
        assert (await contained.ended(worker_id)).failure is None
        assert podman.containers(f"io.pilotlight.worker={worker_id}") == []

    async def test_one_that_ended_meanwhile(self, contained, podman, impatient, tmp_path):
        worker_id = await contained.start_ready(STUBBORN)
        [container_id] = podman.containers(f"io.pilotlight.worker={worker_id}")
        podman.stop()
        podman.run("kill", "--signal", "KILL", container_id)
        podman.start()
        assert (await contained.ended(worker_id)).code == -signal.SIGKILL

    async def test_one_that_ends_just_before_it_is_listened_to_again(
        self, contained, podman, impatient, monkeypatch
    ):
        """Podman prepares it for another start then, and would say nothing until that."""
        monkeypatch.setattr(container_engine, "_STATUS_PAUSE_S", 0)
        asked = threading.Event()

        class Late(ContainerEngine):
            def runs(self, container_id):
                runs = super().runs(container_id)
                if not asked.is_set():
                    asked.set()
                    podman.run("kill", "--signal", "KILL", container_id)
                    podman.run("wait", container_id)
                return runs

        contained.cluster.engine = Late(podman.url)
        worker_id = await contained.start_ready(OBEDIENT)
        podman.stop()
        podman.start()
        end = await contained.ended(worker_id)
        assert asked.is_set()
        # The status is forgotten with that.
        assert (end.code, end.failure) == (None, None)

    async def test_close_leaves_to_the_next_sweep_what_it_cannot_end(self, contained, podman, impatient):
        worker_id = await contained.start_ready(STUBBORN)
        engine = contained.cluster.engine
        contained.cluster._close_grace_s, engine.timeout_s, timeout_s = 0.1, 0.1, engine.timeout_s
        podman.stop()
        killing = asyncio.create_task(contained.cluster.kill(worker_id))
        await contained.cluster.close()
        # Whoever waits for its end is not kept waiting.
        await killing
        assert contained.exits == []
        engine.timeout_s = timeout_s
        podman.start()
        assert len(podman.containers(f"io.pilotlight.worker={worker_id}")) == 1
        successor = TestSweep().successor(contained)
        assert await successor.sweep({worker_id: None}) == [worker_id]


async def test_somebody_else_removes_it(contained, podman):
    worker_id = await contained.start_ready(OBEDIENT)
    [container_id] = podman.containers(f"io.pilotlight.worker={worker_id}")
    podman.run("rm", "--force", "--time", "0", container_id)
    end = await contained.ended(worker_id)
    # Whether the engine still knew how it ended is a matter of luck.
    assert end.failure is not None or end.code == -signal.SIGKILL


class TestSweep:
    def successor(self, contained, installation=None):
        """A cluster of the next life of the same installation."""
        return ContainerCluster(
            contained.cluster.engine, contained.logs,
            installation=installation or contained.installation, network="host", shm_bytes=MIB,
        )  # fmt: skip

    async def test_leftovers_of_an_earlier_life_are_removed(self, contained, podman):
        worker_id = await contained.start_ready(STUBBORN)
        assert await self.successor(contained).sweep({worker_id: None}) == [worker_id]
        assert podman.containers(f"io.pilotlight.worker={worker_id}") == []
        await contained.line(worker_id, "left over by an earlier gateway")

    async def test_those_of_other_installations_and_of_this_life_are_left_alone(self, contained, podman):
        worker_id = await contained.start_ready(OBEDIENT)
        assert await self.successor(contained, "other").sweep(ANYBODY) == []
        assert await contained.cluster.sweep({worker_id: None}) == []
        assert len(podman.containers(f"io.pilotlight.worker={worker_id}")) == 1

    @pytest.mark.parametrize(
        "rows", [{}, {"w": ProcessIdentity(pid=1, started_ticks=1, boot_id="b")}], ids=["none", "a process"]
    )
    async def test_leftovers_that_nobody_remembers_are_removed(self, contained, podman, rows):
        """The rows may be gone with a data folder, or tell of processes only."""
        worker_id = await contained.start_ready(STUBBORN)
        assert await self.successor(contained).sweep(rows) == [worker_id]
        assert podman.containers(f"io.pilotlight.worker={worker_id}") == []

    async def test_what_never_ran_is_removed_too(self, contained, podman):
        """A gateway is killed between making and starting, or while it reads a file of an image."""
        place = Place(installation=contained.installation, network="host", shm_bytes=MIB, gpu_driver="cdi")
        contained.cluster.engine.create(plan_container(contained.spec(""), place))
        labels = ("--label", f"{INSTALLATION_LABEL}={contained.installation}")
        podman.run("create", *labels, contained.image, "none")
        assert await self.successor(contained).sweep({}) == []
        assert podman.containers(f"{INSTALLATION_LABEL}={contained.installation}") == []

    async def test_one_that_cannot_be_removed_keeps_nobody_from_anything(self, contained, podman):
        """Such as one whose files are busy: the others go, and the gateway starts."""
        contained.cluster._close_grace_s = 0.1
        first, second = await contained.start_ready(STUBBORN), await contained.start_ready(STUBBORN)
        [stuck] = podman.containers(f"io.pilotlight.worker={first}")

        class Refusing(ContainerEngine):
            def remove(self, container):
                if container == stuck:
                    raise ClusterError("device or resource busy")
                super().remove(container)

        later = self.successor(contained)
        later.engine = Refusing(podman.url)
        assert await later.sweep({}) == [second]
        assert len(podman.containers(f"io.pilotlight.worker={first}")) == 1

    async def test_no_engine_is_no_trouble_where_none_is_needed(self, contained, tmp_path):
        cluster = self.successor(contained)
        cluster.engine = ContainerEngine(f"unix://{tmp_path}/nothing")
        assert await cluster.sweep({}) == []

    async def test_an_engine_that_was_away_is_swept_before_the_next_container(
        self, contained, podman, tmp_path
    ):
        """1. A gateway is killed. 2. The next one starts while Podman is away. 3. Podman is back."""
        leftover = await contained.start_ready(STUBBORN)
        later = self.successor(contained)
        engine, later.engine = later.engine, ContainerEngine(f"unix://{tmp_path}/nothing")
        assert await later.sweep({leftover: None}) == []
        later.engine = engine
        workers = Contained(later, contained.logs, contained.image, f"{contained.installation}b")
        end, _ = await workers.run("print('x')")
        assert end.code == 0
        assert podman.containers(f"io.pilotlight.worker={leftover}") == []


class TestRegistry:
    """A registry that asks for a password."""

    @pytest.fixture
    def private(self, podman, tmp_path):
        """A registry with an image that is only there."""
        source = podman.build(
            "tiny", 'FROM scratch\nCOPY hello /hello\nCMD ["/nothing"]\n', {"hello": "x" * 4096}
        )
        with private_registry(podman, source, "team/tiny", tmp_path) as registry:
            yield registry

    @pytest.fixture
    def workers(self, contained):
        """The same, with the password."""
        contained.cluster._login = lambda _id, _container: Login(user="me", password="secret-word")
        return contained

    def test_fetched_with_the_password(self, podman, private, engine):
        reference = f"{private.address}/team/tiny:1"
        seen = []
        engine.pull(reference, Login(user="me", password="secret-word"), lambda *step: seen.append(step))
        assert engine.image(reference).command
        assert seen
        assert any(given for _, given in private.asked)

    def test_refused_without_it(self, private, engine):
        reference = f"{private.address}/team/tiny:1"
        for login in (None, Login(user="me", password="wrong-word")):
            with pytest.raises(ClusterError, match="cannot be fetched") as refused:
                engine.pull(reference, login, lambda *_: None)
            assert "wrong-word" not in str(refused.value)
        assert "wrong-word" not in repr(login)

    async def test_a_worker_fetches_its_image(self, workers, private, impatient):
        """The first worker on a machine that has not got it, with progress in its log and to whoever follows."""
        reports = []

        async def on_progress(worker_id, done, total):
            reports.append((worker_id, done, total))

        async def on_fetched(worker_id):
            reports.append((worker_id, "fetched"))

        workers.cluster._on_progress, workers.cluster._on_fetched = on_progress, on_fetched
        reference = f"{private.address}/team/tiny:1"
        end, texts = await workers.run("", container=Container(image=reference), command=[])
        assert texts[0] == f"fetching image {reference}"
        progress = [text for text in texts if re.fullmatch(r"fetching image \S+: \d+ of \d+ MiB", text)]
        assert texts[1 : len(progress) + 2] == [*progress, f"fetched image {reference}"]
        assert progress
        assert (reports[0], reports[-1]) == ((end.worker_id, 0, 0), (end.worker_id, "fetched"))
        assert len(reports) == len(progress) + 2
        # There is nothing in it that could be run.
        assert end.failure.kind == "container_failed"
        assert "secret-word" not in "".join(texts)

    async def test_told_to_end_while_a_silent_registry_keeps_its_image(self, workers, podman, private):
        """1. The registry stops half-way. 2. The worker is killed, and is gone at once."""
        private.open.clear()
        worker_id = await workers.start("", container=Container(image=f"{private.address}/team/tiny:1"))
        await asyncio.to_thread(private.reached.wait)
        await workers.cluster.kill(worker_id)
        assert (await workers.ended(worker_id)).code is None
        assert not private.open.is_set()
        assert podman.containers(f"io.pilotlight.worker={worker_id}") == []
        private.open.set()
        for thread in threading.enumerate():
            if thread.name == f"pull-{worker_id}":
                await asyncio.to_thread(thread.join)


@pytest.mark.parametrize(
    ("facts", "driver", "sentence"),
    [
        (EngineFacts(name="Podman 4.9.3", version=(4, 9), podman=True), "cdi", "Podman 4.9.3 gives no GPUs"),
        (EngineFacts(name="Podman 5.3.2", version=(5, 3), podman=True), "cdi", "use 5.4 or newer"),
        (EngineFacts(name="Podman 5.4.0", version=(5, 4), podman=True), "nvidia", "by CDI only"),
        (EngineFacts(name="Podman 5.4.0", version=(5, 4), podman=True), "cdi", None),
        (EngineFacts(name="Docker 20.10.1", version=(20, 10), podman=False), "nvidia", None),
    ],
)
def test_engines_that_would_ignore_a_request_for_gpus_are_refused(facts, driver, sentence):
    if sentence is None:
        containers._check_gpus(facts, driver)
    else:
        with pytest.raises(ClusterError, match=sentence):
            containers._check_gpus(facts, driver)


async def test_a_worker_is_not_started_without_the_gpus_it_needs(contained, engine):
    """With real Podman, whichever it is."""
    facts = engine.facts()
    end, _ = await contained.run(OBEDIENT, devices=(0,))
    assert end.failure.kind == "container_failed"
    assert facts.version >= containers.PODMAN_CDI or "gives no GPUs" in end.failure.cause


async def test_both_kinds_of_workers_side_by_side(contained, tmp_path):
    processes = LocalCluster(tmp_path / "logs", log_bytes=MIB, base_env=dict(os.environ))
    places = Places(processes, contained.cluster)
    contained.cluster._logs = contained.logs = processes.logs
    contained.cluster = places
    inside = await contained.start_ready(OBEDIENT)
    spec = replace(contained.spec(""), container=None, command=["sleep", "600"])
    identity = await places.start(spec, contained._on_exit)
    contained._ended[spec.worker_id] = asyncio.Event()
    assert identity is not None
    for worker_id in (inside, spec.worker_id):
        assert await places.freeze(worker_id) > 0
        assert await places.gpu_memory(worker_id, [0]) == 0
        await places.thaw(worker_id)
    await places.terminate(spec.worker_id)
    assert (await contained.ended(spec.worker_id)).code == -signal.SIGTERM
    await places.close()
    assert (await contained.ended(inside)).code == 3
    assert [line.text for line in await processes.logs.tail(inside)][-1] == "exited with status 3"


async def test_logs_are_closed_after_all_workers_whatever_fails(tmp_path):
    """A process that cannot be ended does not cut off the last lines of containers, which take longer."""
    order = []

    class Processes(LocalCluster):
        async def end_all(self):
            if not order:
                raise ClusterError("a process survived")

        async def close(self):
            order.append("logs")
            await super().close()

    class Containers:
        async def close(self):
            for _ in range(10):
                await asyncio.sleep(0)
            order.append("containers")

    places = Places(Processes(tmp_path / "logs", log_bytes=MIB, base_env={}), Containers())
    with pytest.raises(ClusterError, match="a process survived"):
        await places.close()
    assert order == ["containers", "logs"]


def test_no_engine_is_said_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr("pilotlight.clusters.container_engine.SOCKETS", (str(tmp_path / "none"),))
    with pytest.raises(UnreachableError, match=r"containers\.url"):
        ContainerEngine().facts()


def test_an_engine_of_another_machine_is_refused(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    with pytest.raises(UnreachableError, match="DOCKER_HOST is tcp"):
        ContainerEngine().facts()


def test_a_file_of_an_image(podman, engine):
    image = podman.build("files", "FROM scratch\nCOPY file /folder/file\n", {"file": "content"})
    installation = secrets.token_hex(6)
    assert engine.read_file(image, "/folder/file", installation=installation) == b"content"
    assert engine.read_file(image, "/none", installation=installation) is None
    with pytest.raises(ClusterError, match=f"/folder of image {image} cannot be read: it is no file"):
        engine.read_file(image, "/folder", installation=installation)
    assert podman.containers(f"{INSTALLATION_LABEL}={installation}") == []


def test_a_link_in_an_image_is_no_file():
    """Docker sends the link itself, whose target is not in the archive."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "target"
        archive.addfile(entry)
    with pytest.raises(ValueError, match="it is a link"):
        _first_file(data.getvalue())
