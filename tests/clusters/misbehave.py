"""A worker that misbehaves on request. Each argument is one step; prints `ready` after the last, then waits.

ignore-term       SIGTERM has no effect
child             a child in the same session
session           a child in a session of its own
daemon            a double-forked orphan in a session of its own, its parent gone
bare-session      a child with an empty environment that leads a session
print=TEXT        one line of output
spam=N            N lines of 100 bytes, as fast as possible
stop-self         SIGSTOP to itself, after `ready`
exit=N            end with that status, at once
crash             SIGKILL to itself, after `ready`
pids=PATH         where the numbers of all processes are written, before `ready`
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WAIT = [sys.executable, "-S", "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"]


def daemonize() -> int:
    """Start an orphan by two forks and return its number."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write_end, str(os.getpid()).encode())
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        os._exit(0)
    os.wait()
    return int(os.read(read_end, 20))


def main() -> None:
    pids = [os.getpid()]
    last = ""
    for argument in sys.argv[1:]:
        step, _, value = argument.partition("=")
        if step == "ignore-term":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif step == "child":
            pids.append(subprocess.Popen(WAIT).pid)
        elif step == "session":
            pids.append(subprocess.Popen(WAIT, start_new_session=True).pid)
        elif step == "bare-session":
            pids.append(subprocess.Popen(WAIT, start_new_session=True, env={}).pid)
        elif step == "daemon":
            pids.append(daemonize())
        elif step == "print":
            print(value, flush=True)
        elif step == "spam":
            line = b"x" * 99 + b"\n"
            for _ in range(int(value) // 100):
                os.write(1, line * 100)
        elif step == "exit":
            sys.exit(int(value))
        elif step == "pids":
            temporary = Path(value).with_suffix(".new")
            temporary.write_text(" ".join(map(str, pids)))
            temporary.rename(value)
        else:
            last = step
    print("ready", flush=True)
    if last == "stop-self":
        os.kill(os.getpid(), signal.SIGSTOP)
    if last == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)


main()
