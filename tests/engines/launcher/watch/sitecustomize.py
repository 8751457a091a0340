"""Writes down which variables a process asks for, and whether it yields its processor.

Loaded by every Python that has this folder in its path.
"""

import os
from pathlib import Path

if target := os.environ.get("TEST_WATCH"):
    pid, known, read = os.getpid(), set(), type(os.environ).__getitem__

    def watch(self, name):
        if os.getpid() == pid and name not in known:
            known.add(name)
            with Path(target).open("ab") as file:
                file.write(os.fsencode(name) + b"\n")
        return read(self, name)

    type(os.environ).__getitem__ = watch

if mark := os.environ.get("TEST_YIELDS"):
    give_way = os.sched_yield

    def sched_yield():
        os.sched_yield = give_way
        Path(mark).touch()

    os.sched_yield = sched_yield
