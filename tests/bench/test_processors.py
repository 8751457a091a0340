"""An engine computes on a processor of its own, and the benchmark is as it was afterwards."""

import os
import subprocess
import sys

import psutil

from pilotlight.bench.processors import move_children, one_set_aside

# A server with a thread, whose child has a thread and a child.
ENGINE = """
import os, sys, threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
depth = int(sys.argv[1])
if depth:
    os.spawnl(os.P_NOWAIT, sys.executable, sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2])
else:
    print("ready", flush=True)
time.sleep(600)
"""


def of_threads(pid):
    """The processors that the threads of a process may run on."""
    return [os.sched_getaffinity(thread.id) for thread in psutil.Process(pid).threads()]


def test_what_a_server_started_gets_the_processor_and_nobody_else():
    before = os.sched_getaffinity(0)
    with one_set_aside() as aside:
        others = before - aside or before
        assert len(aside) == 1
        assert aside <= before
        assert os.sched_getaffinity(0) == others
        command = [sys.executable, "-c", ENGINE, "2", ENGINE]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        children = []
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            children = psutil.Process(server.pid).children(recursive=True)
            move_children(server.pid, aside)
            assert of_threads(server.pid) == [others] * 2
            assert [of_threads(child.pid) for child in children] == [[aside] * 2] * 2
        finally:
            for process in [*children, server]:
                process.kill()
            server.communicate()
    assert os.sched_getaffinity(0) == before
