"""Ends of the gateway, polite and brutal, at every moment: nothing is left behind, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time

import httpx
import pytest

SEED = int(os.environ.get("PILOTLIGHT_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)


# Ctrl-C.


def test_ctrl_c_while_starting_up(make_installation):
    """At several moments of the start-up: it ends in time, and the next start finds a folder in order."""
    installation = make_installation()
    for delay in (0.1, 0.7, 1.1, 1.6):
        process = installation.spawn()
        with process.stdout:
            # The moment is arbitrary by design; whichever it hits, the same must hold.
            with contextlib.suppress(Exception):
                process.wait(delay)
            os.killpg(process.pid, signal.SIGINT)
            # An interpreter that is only being set up ends in a way of its own.
            unborn = "Fatal Python error: init_" in installation.log.read_text()
            assert process.wait(10) in ({1} if unborn else {0, 130, -signal.SIGINT})
    assert installation.processes() == {}
    installation.start()
    assert installation.admin_key or (installation.home / "cli.key").exists()
    assert installation.interrupt() == 0
    assert installation.table("SELECT count(*) FROM workers") == [(0,)]


@pytest.mark.parametrize("moment", ["spawned", "loading", "ready"])
def test_ctrl_c_while_a_worker_starts(installation, tools, moment):
    """Held callers are answered, the worker is gone, its end is on record."""
    gate = installation.root / "loaded"
    endpoint = installation.deploy({"FAKE_ENGINE_LOAD_FILE": str(gate)})
    held = installation.background(lambda: endpoint.chat("x"))
    if moment == "spawned":
        tools.until(endpoint.workers, "a worker is spawned")
    else:
        endpoint.engine_pid()
    if moment == "ready":
        gate.touch()
    assert installation.interrupt(group=moment == "loading") == 0
    with contextlib.suppress(httpx.TransportError):
        answer = held.result()
        assert answer.status_code in {200, 503}, answer.text
    ((state, ended),) = installation.table("SELECT state, ended_ms FROM workers")
    assert state in {"stopped", "failed"}
    assert ended is not None
    installation.check_account()


@pytest.mark.parametrize("group", [True, False])
def test_ctrl_c_with_work_in_hand(installation, tools, group):
    """A stream in flight, jobs running and queued: everything ends within 10 s, the stream is told, and after the
    next start every job is run, its retry untouched."""
    hold = installation.root / "go-on"
    holds = {"FAKE_ENGINE_HOLD_FILE": str(hold), "FAKE_ENGINE_HOLD_WHOLE_FILE": str(hold)}
    endpoint = installation.deploy(holds, max=1, concurrency=3)
    jobs = [endpoint.run(f"count to {number}", stream=number % 2 == 0) for number in range(2, 6)]
    tools.until(lambda: endpoint.health()["jobs"]["inProgress"] == 3, "jobs run")
    installation.deploy()
    with contextlib.ExitStack() as stack:
        other = installation.deploy(holds)
        events = stack.enter_context(other.stream("count to 9"))
        next(events)
        os.kill(installation.pid, signal.SIGINT)
        if group:
            # A terminal sends it to everybody, and people press it twice.
            os.killpg(installation.pid, signal.SIGINT)
        lines = []
        with contextlib.suppress(httpx.TransportError):
            lines = list(events)
        assert "[DONE]" not in lines, "a cut stream must not look whole"
        assert installation.exited() == 0
    states = dict(installation.table("SELECT id, status FROM jobs"))
    assert {states[job] for job in jobs} <= {"IN_QUEUE", "IN_PROGRESS"}
    installation.check_account()

    hold.touch()
    installation.start()
    for job in jobs:
        done = endpoint.result(job)
        assert (done["status"], done.get("retries")) == ("COMPLETED", None), done


def test_ctrl_c_while_a_hub_does_not_answer(make_installation):
    """1. A deployment waits for a hub that accepts connections and says nothing. 2. It is told to go
    away and does not hold up the end."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        hub = f"http://127.0.0.1:{mute.getsockname()[1]}"
        installation = make_installation(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub).start()
        deploying = installation.background(
            lambda: installation.api.post("/pilotlight/v1/endpoints", json={"model": "some/model"})
        )
        connection, _ = mute.accept()
        with connection:
            assert installation.interrupt() == 0
    assert deploying.result().status_code == 503


def test_the_terminal_closes(make_installation, tools):
    """SIGHUP ends everything as Ctrl-C does; who follows a log reads it to its end."""
    installation = make_installation().start()
    endpoint = installation.deploy()
    assert endpoint.chat("x").status_code == 200
    assert len(installation.processes()) == 2
    path = f"/v2/serverless/{endpoint.id}/workers/{endpoint.ready()['id']}/logs?follow=true"
    with installation.api.stream("GET", path) as followed:
        lines = followed.iter_lines()
        assert next(lines)
        os.killpg(installation.pid, signal.SIGHUP)
        assert "worker.ending" in "".join(lines)
    assert installation.exited() == 0
    installation.check_account()


# kill -9.


def test_killed_with_jobs_queued_and_running(installation, tools):
    """1. The gateway is killed with a stream in flight, jobs running and queued; one worker of the dead gateway
    stands still, as if by SIGSTOP. 2. After the restart no process of the dead gateway's workers is left, and
    their usage is closed. 3. Queued and running jobs are run, their retry untouched; also the one of which a
    reader had read a chunk, whose stream begins anew (worker-protocol.md §7.2)."""
    hold = installation.root / "go-on"
    holds = {"FAKE_ENGINE_HOLD_FILE": str(hold), "FAKE_ENGINE_HOLD_WHOLE_FILE": str(hold)}
    endpoint = installation.deploy(holds, max=1, concurrency=3)
    frozen = installation.deploy(holds, max=1)
    read = endpoint.run("count to 2", stream=True)
    endpoint.first_chunks(read)
    unread = endpoint.run("count to 3", stream=True)
    whole = endpoint.run("count to 4")
    queued = [endpoint.run(f"count to {number}") for number in (5, 6)]
    tools.until(lambda: endpoint.health()["jobs"]["inProgress"] == 3, "three jobs run")
    with frozen.stream("count to 7") as events:
        next(events)
        for pid in installation.processes():
            if pid in {frozen.ready()["pid"], frozen.engine_pid()}:
                installation.signal(pid, signal.SIGSTOP)
        before = set(installation.processes())
        assert len(before) == 4
        installation.crash()
        with pytest.raises(httpx.TransportError):
            list(events)
    hold.touch()
    installation.start()
    for job in (read, unread, whole, *queued):
        done = endpoint.result(job)
        assert (done["status"], done.get("retries")) == ("COMPLETED", None), done
    assert endpoint.rest_of_stream(read) == "1 2"
    for pid in before:
        tools.wait_dead(pid)
    assert len(set(installation.processes().values())) == 1
    assert frozen.view()["workers"] == {}
    rows = [row["id"] for row in endpoint.requests(5)]
    assert len(rows) == len(set(rows))
    assert installation.interrupt() == 0
    installation.check_account()
    assert list(installation.sockets.iterdir()) == [], "also sockets of the dead gateway are gone"


def test_workers_that_died_after_their_gateway_are_charged_only_for_what_is_known(installation, tools):
    """1. The gateway is killed, its worker dies by itself. 2. Long after, the gateway starts again: the time in
    which nothing ran costs nothing."""
    endpoint = installation.deploy()
    assert endpoint.chat("x").status_code == 200
    tools.until(endpoint.usage, "the account of the start is written")
    installation.crash()
    for pid in installation.processes():
        installation.signal(pid, signal.SIGKILL)
        tools.wait_dead(pid)
    died_ms = time.time() * 1000
    installation.start()
    assert max(each["end_ms"] for each in endpoint.usage()) <= died_ms
    assert installation.interrupt() == 0
    installation.check_account()


@pytest.mark.timeout(240)
def test_killed_again_and_again(crash_campaign):
    """The short version of the campaign in test_soak_crash.py."""
    crash_campaign(kills=8, seed=SEED)
