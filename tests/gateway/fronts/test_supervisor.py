"""Processes at a port: started, told to end, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from pilotlight.errors import SettingsError
from pilotlight.gateway.fronts.supervisor import FrontStartError, FrontSupervisor, pause_before
from pilotlight.serving import listen
from pilotlight.settings import ServerSettings, Settings

WAIT_S = 20


def listening_at(tmp_path, port, processes):
    return listen(Settings(home=tmp_path, server=ServerSettings(port=port, processes=processes)))


def test_each_process_has_a_socket_at_one_port_and_the_local_door_is_elsewhere(tmp_path):
    listening = listening_at(tmp_path, 0, 3)
    ports = {sock.getsockname()[1] for sock in listening.fronts}
    assert len(listening.fronts) == 3
    assert [f"http://127.0.0.1:{port}" for port in ports] == [listening.url]
    assert listening.local_url == f"http://127.0.0.1:{listening.plain.getsockname()[1]}" != listening.url
    assert listening.secured is None
    listening.close()
    # Everything was given back.
    listening_at(tmp_path, ports.pop(), 2).close()


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 2)])
def test_a_port_is_never_shared_with_another_gateway(tmp_path, first, second):
    listening = listening_at(tmp_path, 0, first)
    port = int(listening.url.rpartition(":")[2])
    with pytest.raises(SettingsError, match=f"port {port} on 127.0.0.1 is in use"):
        listening_at(tmp_path, port, second)
    listening.close()


def test_pauses_grow_to_a_bound():
    assert [pause_before(failures) for failures in (0, 1, 2, 3, 4, 1000)] == [0, 0, 0.5, 1, 2, 10]


@pytest.fixture
async def supervisor(rig, tmp_path):
    listening = listening_at(tmp_path, 0, 2)
    made = FrontSupervisor(rig.owner, listening.fronts[:1], lambda sock, _: sock.close())
    yield made
    await made.stop(WAIT_S)
    listening.close()


async def test_a_process_that_does_not_come_up_ends_the_start(supervisor, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(FrontStartError, match="ended with status 1 before it answered"):
        await supervisor.start()


async def test_a_program_that_is_not_there_ends_the_start(supervisor, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(FrontStartError, match="No such file"):
        await supervisor.start()


async def test_a_process_that_does_not_end_is_killed(supervisor):
    await supervisor.start()
    (front,) = supervisor._fronts
    pid = front._process.pid
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(WAIT_S):
        await supervisor.stop(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_signals_are_the_owners_and_a_lost_link_is_the_end(supervisor):
    await supervisor.start()
    (front,) = supervisor._fronts
    process, attached = front._process, front._attached
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    attached.close()
    async with asyncio.timeout(WAIT_S):
        assert await process.wait() == 3
        # Another one comes by itself.
        while front._attached in {None, attached}:
            await asyncio.sleep(0.001)
        await front._attached.ready.wait()
