"""Identity of processes, and finding all that belong to a worker."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pilotlight.clusters import processes
from pilotlight.domain.worker import WORKER_COOKIE
from pilotlight.errors import ClusterError
from pilotlight.processes import read_process, stop_found


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_process_is_identified_by_number_start_and_boot(sleeper):
    identity = processes.identify(sleeper.pid)
    assert identity == processes.identify(sleeper.pid)
    assert identity.pid == sleeper.pid
    assert len(identity.boot_id) == 36
    assert processes.is_alive(identity)
    own = processes.identify(os.getpid())
    assert own.started_ticks <= identity.started_ticks


def test_no_process_has_no_identity():
    beyond = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    assert processes.identify(beyond) is None


def test_zombies_are_dead_and_stopped_processes_alive(sleeper):
    identity = processes.identify(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
    assert processes.is_alive(identity)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not processes.is_alive(identity)
    assert processes.identify(sleeper.pid) == identity
    sleeper.wait()
    assert processes.identify(sleeper.pid) is None


def test_a_main_thread_that_ended_before_the_others_is_not_a_dead_process():
    """Such a process shows as Z in /proc and still runs."""
    program = (
        "import ctypes, threading, signal\n"
        "threading.Thread(target=lambda: (print('up', flush=True), signal.pause())).start()\n"
        "ctypes.CDLL(None).syscall(60, 0)\n"  # exit of this thread only, on x86-64
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the number of the system call is that of x86-64")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        identity = processes.identify(process.pid)
        process.stdout.readline()
        assert processes.is_alive(identity)
        process.kill()
        process.wait()
        assert not processes.is_alive(identity)


@pytest.mark.parametrize("change", [{"started_ticks": 1}, {"boot_id": "0" * 36}])
def test_a_reused_number_is_never_signalled(sleeper, change):
    stale = dataclasses.replace(processes.identify(sleeper.pid), **change)
    assert not processes.is_alive(stale)
    assert processes.send_signal(stale, signal.SIGKILL) is False
    assert processes.kill_all({secrets.token_hex(7): stale}) == {}
    assert sleeper.poll() is None


def test_signalling_a_process_that_is_gone_says_so(sleeper):
    identity = processes.identify(sleeper.pid)
    assert processes.send_signal(identity, signal.SIGKILL) is True
    sleeper.wait()
    assert processes.send_signal(identity, signal.SIGKILL) is False


def test_names_with_spaces_and_parentheses_do_not_confuse(tmp_path):
    program = tmp_path / ") S 1 (a"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as process:
        assert processes.is_alive(processes.identify(process.pid))
        process.kill()


def test_the_cookie_must_match_as_a_whole():
    worker_id = secrets.token_hex(7)
    env = {**os.environ, WORKER_COOKIE: f"{worker_id}x", f"X{WORKER_COOKIE}": worker_id, "A": worker_id}
    with subprocess.Popen(["sleep", "60"], env=env) as process:
        assert processes.find_processes({worker_id: None}) == {}
        assert list(processes.find_processes({f"{worker_id}x": None})) == [f"{worker_id}x"]
        process.kill()


def test_the_caller_is_never_among_the_found(monkeypatch):
    """A gateway that was started by a worker carries the cookie of that worker."""
    worker_id = secrets.token_hex(7)
    program = (
        "import sys; from pilotlight.clusters import processes\n"
        "print(processes.find_processes({sys.argv[1]: processes.identify(__import__('os').getpid())}))"
    )
    env = {**os.environ, WORKER_COOKIE: worker_id}
    done = subprocess.run(
        [sys.executable, "-c", program, worker_id], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "{}"


def test_a_worker_that_forks_on_and_on_is_ended():
    """Each child forks another and ends; a look at the processes is always out of date."""
    worker_id = secrets.token_hex(7)
    program = "import os, time\nprint('up', flush=True)\nwhile True:\n    if os.fork(): time.sleep(0.02); os._exit(0)"
    env = {**os.environ, WORKER_COOKIE: worker_id}
    with subprocess.Popen([sys.executable, "-S", "-c", program], env=env, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert list(processes.kill_all({worker_id: None})) == [worker_id]
        assert processes.find_processes({worker_id: None}) == {}


def test_survivors_are_named(sleeper, monkeypatch):
    worker_id = secrets.token_hex(7)
    identity = processes.identify(sleeper.pid)
    while processes.read_process(sleeper.pid).state != "S":
        time.sleep(0.01)
    monkeypatch.setattr(processes, "send_signal", lambda *_: True)
    message = rf"worker {worker_id}: process {sleeper.pid} \(state S\) still exists 0.05 s"
    with pytest.raises(ClusterError, match=message):
        processes.kill_all({worker_id: identity}, timeout_s=0.05)


def test_a_worker_that_forks_on_and_on_is_stopped_whole():
    """1. Each child forks another and ends. 2. When the call returns, all that is found stands still. 3. Nothing
    has been added afterwards. 4. Let go, it forks on."""
    worker_id = secrets.token_hex(7)
    program = "import os, time\nprint('up', flush=True)\nwhile True:\n    if os.fork(): time.sleep(0.02); os._exit(0)"
    env = {**os.environ, WORKER_COOKIE: worker_id}
    with subprocess.Popen([sys.executable, "-S", "-c", program], env=env, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        stopped = processes.stop_all({worker_id: None})
        assert stopped
        assert {read_process(identity.pid).state for identity in stopped} == {"T"}
        assert processes.find_processes({worker_id: None}) == {worker_id: stopped}
        processes.let_go_on(stopped)
        while processes.find_processes({worker_id: None}).get(worker_id) == stopped:
            time.sleep(0.01)
        processes.kill_all({worker_id: None})


def test_what_cannot_be_stopped_in_time_goes_on(sleeper):
    worker_id = secrets.token_hex(7)
    identity = processes.identify(sleeper.pid)
    with pytest.raises(ClusterError, match=rf"process {sleeper.pid} .* still runs 0 s after SIGSTOP"):
        processes.stop_all({worker_id: identity}, timeout_s=0)
    assert read_process(sleeper.pid).state in {"R", "S"}, "it runs, or sleeps as before"


def test_a_look_that_breaks_leaves_nothing_stopped(sleeper):
    states = []

    def find():
        states.append(read_process(sleeper.pid).state)
        if len(states) == 2:
            raise OSError("too many open files")
        return [processes.identify(sleeper.pid)]

    with pytest.raises(OSError, match="too many"):
        stop_found(find, "w")
    assert states[1] == "T"
    assert read_process(sleeper.pid).state != "T"
