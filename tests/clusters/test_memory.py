"""What frozen workers hold, and whether memory runs short; also where the kernel or the driver does not tell."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from pilotlight.clusters.memory import gpu_bytes, read_memory, read_pressure
from pilotlight.memory import proportional_bytes

MIB = 1 << 20

HOLD = f"""
import mmap, os, sys
shared = mmap.mmap(-1, {64 * MIB})
for page in range(0, {64 * MIB}, {mmap.PAGESIZE}): shared[page] = 1
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    for page in range(0, {64 * MIB}, {mmap.PAGESIZE}): shared[page]
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_shared_pages_count_once():
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        child = int(parent.stdout.readline())
        both = proportional_bytes([parent.pid, child])
        resident = psutil.Process(parent.pid).memory_info().rss + psutil.Process(child).memory_info().rss
        assert 64 * MIB <= both < 100 * MIB
        assert both < resident
        parent.stdin.close()
    assert proportional_bytes([child]) == 0, "it has ended"


def test_of_processes_that_may_not_be_looked_into_the_resident_size_counts(monkeypatch):
    read = Path.read_bytes

    def refuse(self):
        if self.name == "smaps_rollup":
            raise PermissionError(self)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    resident = psutil.Process().memory_info().rss
    assert proportional_bytes([os.getpid()]) == pytest.approx(resident, rel=0.1)


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        (
            "some avg10=12.34 avg60=1.00 avg300=0.00 total=5\nfull avg10=9.00 avg60=0 avg300=0 total=1\n",
            12.34,
        ),
        ("", None),
        ("nonsense\n", None),
        ("some avg10=x\n", None),
    ],
)
def test_pressure(tmp_path, text, percent):
    path = tmp_path / "memory"
    path.write_text(text)
    assert read_pressure(path) == percent
    assert read_pressure(tmp_path / "missing") is None


def test_memory_of_this_machine():
    memory = read_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_memory_on_gpus_is_that_of_the_fullest_one(monkeypatch):
    held = {0: [(7, 100), (8, None), (9, 50)], 1: [(7, 300), (1, 9000)]}
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(
        pynvml,
        "nvmlDeviceGetComputeRunningProcesses",
        lambda index: [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in held[index]],
    )
    assert gpu_bytes({7, 8, 9}, [0, 1]) == 300
    assert gpu_bytes({7, 8, 9}, [0]) == 150
    assert gpu_bytes({7}, []) == 0

    def lost(_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost)
    assert gpu_bytes({7}, [0]) == 0
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: lost(0))
    assert gpu_bytes({7}, [0]) == 0
