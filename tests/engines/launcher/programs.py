"""What a launcher runs in these tests in place of vLLM; imported by it, in plain Python."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

if gate := os.environ.get("TEST_GATE"):
    # Importing takes as long as nobody opens the other end.
    Path(gate).read_text()
if os.environ.get("TEST_THREAD"):
    threading.Thread(target=threading.Event().wait, name="pool", daemon=True).start()
if os.environ.get("TEST_CUDA"):
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))
if os.environ.get("TEST_COMPUTES"):
    # As if the first model's class computed while it was imported.
    sys.modules["__main__"].load_nothing = lambda architectures: "computed"
if os.environ.get("TEST_ALIVE"):
    sys.modules["__main__"].ALIVE_SECONDS = 0.01


# As libraries do that name their files; drawn from once, so that it is seeded.
names = tempfile._RandomNameSequence()
next(names)


def run():
    """Does what the first argument says."""
    {"report": report, "exit": leave, "wait": wait, "family": family}[sys.argv[1]]()


def report():
    """Says what this process is like."""
    status = Path("/proc/self/status").read_text()
    say(
        argv=sys.argv[1:],
        environment=dict(os.environ),
        folder=str(Path.cwd()),
        descriptors={name: str(os.path.realpath(f"/proc/self/fd/{name}")) for name in open_descriptors()},
        session=os.getsid(0),
        group=os.getpgid(0),
        random=[random.random(), multiprocessing.current_process().authkey.hex(), next(names)],
        umask=re.search("Umask:\t(.*)", status)[1],
        segfault_is_handled=bool(int(re.search("SigCgt:\t(.*)", status)[1], 16) & 1 << signal.SIGSEGV - 1),
        ignored=sorted(n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN),
    )


def leave():
    sys.exit(int(sys.argv[2]))


def wait():
    say(ready=True)
    signal.pause()


def family():
    """A second process in the same session, which is stopped, and one more with an environment of its own."""
    stopped = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    child = os.fork()
    if child == 0:
        signal.pause()
    os.kill(stopped.pid, signal.SIGSTOP)
    say(pids=[os.getpid(), stopped.pid, child])
    signal.pause()


def open_descriptors():
    found = []
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            os.fstat(int(path.name))
            found.append(path.name)
    return found


def say(**facts):
    print(json.dumps(facts), flush=True)
