"""What a benchmark starts is ended, whatever ends the benchmark."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pilotlight.bench.errors import BenchError
from pilotlight.bench.processes import Bench, environment

STUBBORN = (
    "import os, signal, sys, time\n"
    "child = os.fork()\n"
    "if child: print(os.getpid(), child, flush=True)\n"
    "time.sleep(600)\n"
)
BENCH = (
    "import sys, time\n"
    "from pilotlight.bench.processes import Bench\n"
    "with Bench() as bench:\n"
    f"    child = bench.start('one', [sys.executable, '-c', {STUBBORN!r}], stdout=True)\n"
    "    print(bench.folder, child.read_line().decode(), flush=True)\n"
    "    time.sleep(600)\n"
)


def gone(pid: int) -> bool:
    """Not there any more, or a zombie that somebody else has to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_process_and_removes_the_folder(number):
    bench = subprocess.Popen(
        [sys.executable, "-c", BENCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert bench.stdout is not None
    folder, *pids = bench.stdout.readline().split()
    assert Path(os.fsdecode(folder)).is_dir()
    bench.send_signal(number)
    bench.communicate(timeout=30)
    assert bench.returncode not in {0, None}
    while not all(gone(int(pid)) for pid in pids):
        # Told to end, and not yet there.
        time.sleep(0.01)
    assert not Path(os.fsdecode(folder)).exists()


def test_a_program_that_dies_at_its_start_is_quoted():
    command = [sys.executable, "-c", "import sys; sys.exit('no such flag: --x')"]
    with Bench() as bench, pytest.raises(BenchError, match=r"(?s)engine did not say.*no such flag: --x"):
        bench.start("engine", command, stdout=True).read_line()


def test_a_program_that_fails_is_quoted():
    command = [sys.executable, "-c", "import sys; print('half'); sys.exit('out of paper')"]
    with (
        Bench() as bench,
        pytest.raises(BenchError, match=r"(?s)printer failed with exit code 1.*out of paper"),
    ):
        bench.run("printer", command, timeout_s=30)


def test_a_program_that_never_listens_is_an_error():
    with Bench() as bench:
        child = bench.start("mute", [sys.executable, "-c", ""])
        with pytest.raises(BenchError, match="ended with exit code 0 instead of listening"):
            child.wait_port(1)


def test_a_missing_program_is_an_error():
    with Bench() as bench, pytest.raises(BenchError):
        bench.run("ghost", ["/nonexistent/ghost"], timeout_s=5)


def test_the_users_settings_do_not_reach_what_is_measured(monkeypatch):
    monkeypatch.setenv("PILOTLIGHT_LOG__LEVEL", "debug")
    assert not [name for name in environment() if name.startswith("PILOTLIGHT_")]
    assert environment(PILOTLIGHT_HOME="x")["PILOTLIGHT_HOME"] == "x"
