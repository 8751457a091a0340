"""LocalCluster with real processes: complete ends, sweeps, environments, no leaks. On asyncio and uvloop."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pilotlight.clusters import processes
from pilotlight.clusters.local import LocalCluster
from pilotlight.domain.worker import WORKER_COOKIE
from pilotlight.errors import ClusterError
from pilotlight.processes import read_process

from .conftest import MISBEHAVE, count_descriptors, none_alive

FAMILY = ("ignore-term", "child", "session", "daemon", "bare-session")
"""One process of each kind: five in all, the main one included."""


async def test_the_exit_status_is_reported_after_the_last_line_is_in_the_log(workers):
    spec = workers.spec("print=out of memory", "exit=7")
    await workers.start(spec)
    end = await workers.ended(spec.worker_id)
    assert (end.worker_id, end.code) == (spec.worker_id, 7)
    texts = [line.text for line in await workers.cluster.logs.tail(spec.worker_id)]
    assert texts[-2:] == ["out of memory", "exited with status 7"]


async def test_the_main_process_leads_its_own_session(workers):
    worker_id, [main] = await workers.start_ready("print=x")
    assert os.getsid(main.pid) == main.pid
    assert os.getpgid(main.pid) == main.pid
    await workers.cluster.kill(worker_id)


async def test_terminate_reaches_the_main_process_only(workers):
    """worker-protocol.md §6.3: signals to the group would end the SDK's heartbeat first."""
    worker_id, identities = await workers.start_ready("child")
    await workers.cluster.terminate(worker_id)
    end = await workers.ended(worker_id)
    assert end.code == -signal.SIGTERM
    assert none_alive(identities)


async def test_terminate_and_kill_of_an_unknown_or_ended_worker_do_nothing(workers):
    await workers.cluster.terminate("nobody")
    await workers.cluster.kill("nobody")
    spec = workers.spec("exit=0")
    await workers.start(spec)
    await workers.ended(spec.worker_id)
    await workers.cluster.terminate(spec.worker_id)
    await workers.cluster.kill(spec.worker_id)
    assert len(workers.exits) == 1


async def test_kill_returns_when_no_process_is_left(workers):
    """1. A worker that ignores SIGTERM, with children, sessions, an orphan. 2. kill. 3. Nothing is left."""
    worker_id, identities = await workers.start_ready(*FAMILY)
    assert len(identities) == 5
    await workers.cluster.terminate(worker_id)
    assert all(processes.is_alive(identity) for identity in identities)
    await workers.cluster.kill(worker_id)
    assert none_alive(identities)
    assert processes.find_processes({worker_id: None}) == {}
    assert [(end.worker_id, end.code) for end in workers.exits] == [(worker_id, -signal.SIGKILL)]


async def test_concurrent_kills_report_one_exit(workers):
    worker_id, identities = await workers.start_ready(*FAMILY)
    await asyncio.gather(*(workers.cluster.kill(worker_id) for _ in range(4)))
    assert none_alive(identities)
    assert len(workers.exits) == 1


async def test_the_death_of_the_main_process_ends_the_rest_before_the_exit_is_reported(workers):
    worker_id, identities = await workers.start_ready(*FAMILY[:-1])
    os.kill(identities[0].pid, signal.SIGKILL)
    end = await workers.ended(worker_id)
    assert none_alive(identities)
    assert end.code == -signal.SIGKILL


async def test_a_worker_that_ends_itself_leaves_nothing_behind(workers):
    worker_id, identities = await workers.start_ready("session", "daemon", "print=x")
    await workers.cluster.terminate(worker_id)
    await workers.ended(worker_id)
    assert none_alive(identities)


async def test_a_stopped_worker_can_be_killed(workers):
    worker_id, identities = await workers.start_ready("child", "stop-self")
    os.kill(identities[1].pid, signal.SIGSTOP)
    await workers.cluster.kill(worker_id)
    assert none_alive(identities)


def states_of(identities):
    return [read_process(identity.pid).state for identity in identities]


async def test_a_frozen_worker_stands_still_as_a_whole_and_goes_on(workers):
    worker_id, identities = await workers.start_ready(*FAMILY)
    held = await workers.cluster.freeze(worker_id)
    assert states_of(identities) == ["T"] * 5
    assert held > 5 * 100_000, "some memory for each"
    await workers.cluster.thaw(worker_id)
    assert "T" not in states_of(identities)
    await workers.cluster.kill(worker_id)
    with pytest.raises(ClusterError, match="does not run here"):
        await workers.cluster.freeze(worker_id)
    with pytest.raises(ClusterError, match="does not run here"):
        await workers.cluster.thaw(worker_id)
    assert await workers.cluster.gpu_memory(worker_id, [0]) == 0


@pytest.mark.parametrize("way", ["kill", "close", "outside"])
async def test_a_frozen_worker_can_be_ended(workers, way):
    # One that gave up its environment is found by its parent, who must not be dead.
    worker_id, identities = await workers.start_ready(*(FAMILY[:-1] if way == "outside" else FAMILY))
    await workers.cluster.freeze(worker_id)
    match way:
        case "kill":
            await workers.cluster.kill(worker_id)
        case "close":
            await workers.cluster.close()
        case _:
            os.kill(identities[0].pid, signal.SIGKILL)
    assert (await workers.ended(worker_id)).code == -signal.SIGKILL
    assert none_alive(identities)


async def test_a_frozen_worker_of_a_dead_gateway_is_swept(workers, tmp_path):
    worker_id, identities = await workers.start_ready(*FAMILY)
    await workers.cluster.freeze(worker_id)
    later = LocalCluster(tmp_path / "later", log_bytes=1000, base_env={})
    assert await later.sweep({worker_id: identities[0]}) == [worker_id]
    assert none_alive(identities)
    await later.close()


async def test_one_workers_end_leaves_the_others_alone(workers):
    first, first_processes = await workers.start_ready("session")
    _, second_processes = await workers.start_ready("session", "daemon")
    await workers.cluster.kill(first)
    assert none_alive(first_processes)
    assert all(processes.is_alive(identity) for identity in second_processes)


async def test_close_ends_everything_and_refuses_further_starts(workers):
    _, polite = await workers.start_ready("child")
    _, stubborn = await workers.start_ready(*FAMILY)
    await workers.cluster.close()
    assert none_alive(polite + stubborn)
    assert sorted(end.code for end in workers.exits) == [-signal.SIGTERM, -signal.SIGKILL]
    with pytest.raises(ClusterError, match="closed"):
        await workers.start(workers.spec())
    await workers.cluster.close()


ON_ITS_WAY_OUT = """
import os, signal, sys, time
def leave(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("leaving", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
while True:
    signal.pause()
"""


async def test_who_was_asked_to_end_is_not_asked_again(workers, tmp_path):
    """Python takes its handlers away before it ends: the second SIGTERM would kill a worker that obeys."""
    workers.cluster._close_grace_s = 30
    go = tmp_path / "go"
    spec = workers.spec(command=[sys.executable, "-c", ON_ITS_WAY_OUT, str(go)])
    await workers.start(spec)
    await workers.line(spec.worker_id, "ready")
    await workers.cluster.terminate(spec.worker_id)
    await workers.line(spec.worker_id, "leaving")
    await workers.cluster.terminate(spec.worker_id)
    closing = asyncio.create_task(workers.cluster.close())
    await asyncio.sleep(0)
    go.touch()
    await closing
    assert [end.code for end in workers.exits] == [0]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/no/such/program"], "No such file"),
        (["/etc"], "Permission denied"),
        ([sys.executable, "nul\0byte"], "null byte"),
        ([], "no command"),
    ],
)
async def test_what_cannot_be_started_is_an_error_and_leaves_nothing(workers, command, message):
    spec = workers.spec(command=command)
    before = count_descriptors()
    with pytest.raises(ClusterError, match=message) as raised:
        await workers.start(spec)
    assert spec.worker_id in str(raised.value)
    assert workers.exits == []
    # The first start also opens what the capture thread keeps until `close`.
    with pytest.raises(ClusterError, match=message):
        await workers.start(dataclasses.replace(spec, worker_id=workers.new_id()))
    assert count_descriptors() <= before + 2


async def test_the_same_id_cannot_run_twice(workers):
    worker_id, [main] = await workers.start_ready("print=x")
    with pytest.raises(ClusterError, match="is running"):
        await workers.start(workers.spec(worker_id=worker_id))
    assert processes.is_alive(main)


async def test_a_log_folder_that_cannot_be_written_is_an_error(tmp_path, workers):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cluster = LocalCluster(blocked / "logs", log_bytes=1000, base_env={})
    with pytest.raises(ClusterError, match="cannot be written"):
        await cluster.start(workers.spec(), lambda _: None)
    await cluster.close()


async def test_a_failing_callback_does_not_keep_kill_waiting(workers):
    spec = workers.spec()

    def fail(_):
        raise RuntimeError("the caller's fault")

    await workers.cluster.start(spec, fail)
    await workers.cluster.kill(spec.worker_id)


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


async def test_workers_inherit_an_allow_list_and_no_secrets(tmp_path, workers):
    base = {
        "PATH": os.environ["PATH"],
        "LC_ALL": "C.UTF-8",
        "PILOTLIGHT_API_KEY": "rpa_SECRET",
        "HF_TOKEN": "hf_SECRET",
        "AWS_SECRET_ACCESS_KEY": "SECRET",
        "CUDA_VISIBLE_DEVICES": "3",
    }
    workers.cluster = cluster = LocalCluster(tmp_path / "own", log_bytes=1000, base_env=base)
    _, [main] = await workers.start_ready("print=x", env={"MODEL_NAME": "m", WORKER_COOKIE: "forged"})
    env = environment_of(main.pid)
    await cluster.close()
    cookie = env.pop(WORKER_COOKIE)
    assert cookie != "forged"
    assert env == {
        "PATH": os.environ["PATH"],
        "LC_ALL": "C.UTF-8",
        "MODEL_NAME": "m",
        "PYTHONUNBUFFERED": "1",
        "SPT_NOENV": "1",
    }


async def test_a_worker_on_a_volume_of_its_own_does_not_look_into_the_gateways_cache(tmp_path, workers):
    """vllm-worker.md §5.2: `BASE_PATH` of an endpoint goes before the inherited cache."""
    base = {"PATH": os.environ["PATH"], "HF_HUB_CACHE": "/gateway/hub"}
    workers.cluster = cluster = LocalCluster(tmp_path / "own", log_bytes=1000, base_env=base)
    _, [main] = await workers.start_ready("print=x", env={"BASE_PATH": "/volume"})
    env = environment_of(main.pid)
    await cluster.close()
    assert env["HF_HUB_CACHE"] == env["HF_HOME"] == "/volume/huggingface-cache/hub"


@pytest.mark.parametrize(
    ("has_gpus", "devices", "visible"), [(True, (1, 3), "1,3"), (True, (), ""), (False, (), None)]
)
async def test_devices_are_shown_and_hidden_by_cuda_visible_devices(
    tmp_path, workers, has_gpus, devices, visible
):
    workers.cluster = cluster = LocalCluster(
        tmp_path / "own", log_bytes=1000, base_env={}, host_has_gpus=has_gpus
    )
    _, [main] = await workers.start_ready("print=x", devices=devices)
    env = environment_of(main.pid)
    await cluster.close()
    assert env.get("CUDA_VISIBLE_DEVICES") == visible
    assert env.get("CUDA_DEVICE_ORDER") == (None if visible is None else "PCI_BUS_ID")


async def test_workers_get_their_own_limit_on_open_files(tmp_path, workers):
    """The gateway raises its own, which programs that use select() must not inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers.cluster = cluster = LocalCluster(tmp_path / "own", log_bytes=1000, base_env={}, descriptors=200)
    _, [main] = await workers.start_ready("print=x")
    assert resource.prlimit(main.pid, resource.RLIMIT_NOFILE) == (200, hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    await cluster.close()


GATEWAY = """
import asyncio, os, sys
from pathlib import Path
from pilotlight.clusters.local import LocalCluster
from pilotlight.ports.cluster import WorkerSpec

async def main(folder, misbehave, worker_id, *steps):
    cluster = LocalCluster(Path(folder), log_bytes=100_000, base_env=os.environ)
    spec = WorkerSpec(worker_id=worker_id, endpoint_id="ep", env={},
                      command=[sys.executable, "-S", misbehave, *steps])
    identity = await cluster.start(spec, lambda _: None)
    async for line in cluster.logs.follow(worker_id, 0):
        if line.text == "ready":
            print(identity.pid, identity.started_ticks, identity.boot_id, flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def start_and_lose_gateway(tmp_path, worker_id, *steps):
    """Another gateway process starts a worker and is killed; the worker's processes, main one first."""
    pids = tmp_path / "pids"
    arguments = [str(tmp_path / "logs"), str(MISBEHAVE), worker_id, *steps, f"pids={pids}"]
    with subprocess.Popen([sys.executable, "-c", GATEWAY, *arguments], stdout=subprocess.PIPE) as gateway:
        pid, ticks, boot_id = gateway.stdout.readline().split()
        gateway.kill()
    identities = [processes.identify(int(each)) for each in pids.read_text().split()]
    main = identities[0]
    assert (main.pid, main.started_ticks, main.boot_id) == (int(pid), int(ticks), boot_id.decode())
    assert all(processes.is_alive(identity) for identity in identities)
    return identities


async def test_sweep_ends_what_a_killed_gateway_left(tmp_path, workers):
    worker_id = workers.new_id()
    identities = start_and_lose_gateway(tmp_path, worker_id, *FAMILY)
    own, own_processes = await workers.start_ready("session")
    recorded = {worker_id: identities[0], own: own_processes[0], workers.new_id(): None}
    assert await workers.cluster.sweep(recorded) == [worker_id]
    assert none_alive(identities)
    assert all(processes.is_alive(identity) for identity in own_processes)
    last = (await workers.cluster.logs.tail(worker_id))[-1]
    assert (last.source, last.text) == ("system", "ended 5 processes left over by an earlier gateway")
    assert await workers.cluster.sweep(recorded) == []


async def test_sweep_finds_by_cookie_what_was_never_recorded(tmp_path, workers):
    """The gateway died between the spawn and the record, and so did the main process."""
    worker_id = workers.new_id()
    identities = start_and_lose_gateway(tmp_path, worker_id, "ignore-term", "session", "daemon")
    os.kill(identities[0].pid, signal.SIGKILL)
    assert await workers.cluster.sweep({worker_id: None}) == [worker_id]
    assert none_alive(identities)


async def test_sweep_leaves_a_process_alone_that_only_has_the_number(workers):
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        try:
            present = processes.identify(stranger.pid)
            earlier = dataclasses.replace(present, started_ticks=present.started_ticks - 1)
            other_boot = dataclasses.replace(present, boot_id="0" * 36)
            recorded = {workers.new_id(): earlier, workers.new_id(): other_boot}
            assert await workers.cluster.sweep(recorded) == []
            assert stranger.poll() is None
        finally:
            stranger.kill()


async def test_many_short_lives_leave_no_descriptor_no_zombie_no_task(workers):
    async def live(number: int) -> None:
        command = ["true"] if number % 2 else ["sleep", "60"]
        spec = workers.spec(command=command)
        await workers.start(spec)
        await workers.cluster.kill(spec.worker_id)

    # Services that other tests share may be among them.
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()
    await live(0)
    await live(1)
    descriptors = count_descriptors()
    for number in range(0, 200, 10):
        await asyncio.gather(*(live(number + each) for each in range(10)))
    assert len(workers.exits) == 202
    assert count_descriptors() <= descriptors
    assert children.read_text().split() == before
    assert len(asyncio.all_tasks()) == 1


async def test_without_pidfds_everything_works_by_number(workers, monkeypatch):
    """Some sandboxes and old kernels lack the call."""

    def refuse(pid, flags=0):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    worker_id, identities = await workers.start_ready(*FAMILY)
    await workers.cluster.kill(worker_id)
    assert none_alive(identities)
    assert workers.exits[0].code == -signal.SIGKILL


async def test_survivors_of_sigkill_are_reported_and_the_exit_is_not(workers, monkeypatch):
    """A process inside the kernel cannot be ended; on_exit waits until it really is."""
    worker_id, identities = await workers.start_ready("session")
    released = asyncio.Event()
    kill_all = processes.kill_all

    def survive(workers):
        if not released.is_set():
            raise ClusterError("process 1 (state D) still exists")
        return kill_all(workers)

    monkeypatch.setattr(processes, "kill_all", survive)
    monkeypatch.setattr("pilotlight.clusters.local._RETRY_S", 0.001)
    os.kill(identities[0].pid, signal.SIGKILL)
    with pytest.raises(ClusterError, match="state D"):
        await workers.cluster.kill(worker_id)
    await workers.line(worker_id, "process 1 (state D) still exists")
    assert workers.exits == []
    released.set()
    await workers.ended(worker_id)
    assert none_alive(identities)
