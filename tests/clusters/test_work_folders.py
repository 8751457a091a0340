"""Folders and ports of workers that are any command."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import uuid
from pathlib import Path

import pytest

from pilotlight.clusters.local import LocalCluster
from pilotlight.clusters.ports import PortBook, _outside
from pilotlight.clusters.work_folders import WorkFolders
from pilotlight.ports.cluster import WorkerSpec

PROGRAM = (
    "import os, pathlib, sys; here = pathlib.Path(sys.argv[1]);"
    "here.write_text('\\n'.join([os.getcwd(), os.environ['HOME'], repr(sorted(os.listdir('.'))),"
    " repr(os.listdir(os.environ['HOME'])), os.environ.get('XDG_CACHE_HOME', ''),"
    " os.environ.get('PYTHONUSERBASE', '')]));"
    "open('.runpod_jobs.pkl', 'w').close(); open(os.path.join(os.environ['HOME'], 'kept'), 'w').close()"
)


@pytest.fixture
async def cluster(tmp_path):
    made = LocalCluster(
        tmp_path / "logs", log_bytes=1_000_000, base_env={"HOME": "/somebody", "PATH": os.environ["PATH"]}
    )
    yield made
    await made.close()


def new_id():
    """Processes are found by their worker's id on the whole machine, so no two tests may use the same."""
    return f"w{uuid.uuid4().hex[:12]}"


async def run(cluster, report, worker_id=None, **spec):
    """Run the program to its end; what it saw."""
    worker_id = worker_id or new_id()
    ended = asyncio.Event()
    await cluster.start(
        WorkerSpec(
            worker_id=worker_id,
            endpoint_id="e",
            command=[sys.executable, "-c", PROGRAM, str(report)],
            **({"env": {}, "private_folders": True} | spec),
        ),
        lambda _: ended.set(),
    )
    await asyncio.wait_for(ended.wait(), 30)
    assert report.exists(), await cluster.logs.tail(worker_id)
    return report.read_text().split("\n")


async def test_every_worker_begins_in_an_empty_folder_which_goes_with_it(cluster, tmp_path):
    """worker-protocol.md §11: the state file of old libraries must never be found by another worker."""
    first = new_id()
    seen = [
        await run(cluster, tmp_path / name, worker_id) for name, worker_id in (("a", first), ("b", new_id()))
    ]
    seen.append(await run(cluster, tmp_path / "c", first))
    for cwd, home, files, kept, cache, base in seen:
        assert (files, kept) == ("[]", "[]")
        assert cwd != home
        assert not Path(cwd).exists()
        assert not Path(home).exists()
        assert (cache, base) == ("/somebody/.cache", "/somebody/.local")
    assert seen[0][0] != seen[1][0]
    assert list((tmp_path / "work").iterdir()) == []


async def test_the_endpoint_may_name_another_home(cluster, tmp_path):
    seen = await run(cluster, tmp_path / "a", env={"HOME": str(tmp_path)})
    assert seen[1] == str(tmp_path)


async def test_leftovers_of_an_earlier_life_are_removed(cluster, tmp_path):
    left = tmp_path / "work" / "old" / "work"
    left.mkdir(parents=True)
    (left / ".runpod_jobs.pkl").touch()
    await cluster.sweep({})
    assert list((tmp_path / "work").iterdir()) == []


async def test_a_program_that_cannot_be_run_leaves_no_folder(cluster, tmp_path):
    spec = WorkerSpec(worker_id=new_id(), endpoint_id="e", env={}, command=["/no/such"], private_folders=True)
    with pytest.raises(Exception, match="was not started"):
        await cluster.start(spec, lambda _: None)
    assert list((tmp_path / "work").iterdir()) == []


def test_each_worker_has_a_port_of_its_own_that_can_be_listened_on():
    living = set()
    book = PortBook(living.__contains__)
    ports = set()
    for number in range(50):
        living.add(str(number))
        port = book.take(str(number))
        assert book.url(str(number)) == f"http://127.0.0.1:{port}"
        ports.add(port)
    assert len(ports) == 50
    with socket.create_server(("127.0.0.1", book.take("w"))) as listening:
        assert book.url("w").endswith(str(listening.getsockname()[1]))
    book.release("w")
    book.release("unknown")


def test_ports_lie_outside_of_what_the_kernel_gives_to_connections():
    assert _outside((32_768, 60_999)) == [(10_000, 32_767), (61_000, 65_535)]
    assert _outside((1024, 65_535)) == [(10_000, 65_535)]


def test_read_only_folders_are_removed(tmp_path):
    """The module cache of Go, for one, is read-only."""
    folders = WorkFolders(tmp_path / "work")
    deep = folders.make("w") / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    for folder in (deep, deep.parent):
        folder.chmod(0o500)
    folders.remove("w")
    assert list((tmp_path / "work").iterdir()) == []


def test_what_cannot_be_removed_is_put_aside(tmp_path, monkeypatch):
    """worker-protocol.md §11: no worker may find the folder of an earlier one."""
    folders = WorkFolders(tmp_path / "work")
    (folders.make("w") / ".runpod_jobs.pkl").touch()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *_, **__: None)
        assert list(folders.make("w").iterdir()) == []
        assert list(folders.make("w").iterdir()) == []
    assert {each.name for each in (tmp_path / "work").iterdir()} == {"w", "w.left-0", "w.left-1"}
    folders.prune({"w"})
    assert {each.name for each in (tmp_path / "work").iterdir()} == {"w"}
