"""What the host has: memory within cgroup limits, GPUs by a driver that is played here."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from pilotlight.clusters import devices
from pilotlight.core.placement import Gpu

GIB = 2**30


@pytest.fixture(autouse=True)
def forget_gpus():
    devices._read_gpus.cache_clear()
    yield
    devices._read_gpus.cache_clear()


def test_this_host_has_memory():
    host = devices.read_host()
    assert 0 < host.memory_bytes_available <= host.memory_bytes_total


def write_cgroup(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_limits_of_version_two_hold_at_each_level(tmp_path):
    mount = tmp_path / "cgroup"
    stat = "anon 1\ninactive_file 1000\nactive_file 5"
    write_cgroup(mount / "a", {"memory.max": 8 * GIB, "memory.current": 3 * GIB, "memory.stat": stat})
    write_cgroup(mount / "a/b", {"memory.max": "max", "memory.current": 2 * GIB, "memory.stat": stat})
    write_cgroup(mount / "a/b/c", {"memory.max": 4 * GIB, "memory.current": GIB})
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b/c\n")
    assert list(devices._read_cgroup_memory(membership, mount)) == [
        (4 * GIB, GIB),
        (8 * GIB, 3 * GIB - 1000),
    ]


def test_limits_of_version_one_and_the_paths_of_a_container(tmp_path):
    """Inside a container the membership names the host's path, which does not exist under the mount."""
    mount = tmp_path / "cgroup"
    write_cgroup(
        mount / "memory",
        {
            "memory.limit_in_bytes": 2 * GIB,
            "memory.usage_in_bytes": GIB,
            "memory.stat": "inactive_file 1\ntotal_inactive_file 4096",
        },
    )
    membership = tmp_path / "membership"
    membership.write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\nbroken\n")
    assert list(devices._read_cgroup_memory(membership, mount)) == [(2 * GIB, GIB - 4096)]


def test_without_a_limit_there_is_none(tmp_path):
    mount = tmp_path / "cgroup"
    write_cgroup(mount / "memory", {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": GIB})
    membership = tmp_path / "membership"
    membership.write_text("4:memory:/\n")
    assert list(devices._read_cgroup_memory(membership, mount)) == []
    assert list(devices._read_cgroup_memory(tmp_path / "missing", mount)) == []


def test_the_smallest_limit_counts(monkeypatch):
    monkeypatch.setattr(devices, "_read_cgroup_memory", lambda *_: [(3000, 1000), (2500, 2600)])
    host = devices.read_host()
    assert (host.memory_bytes_total, host.memory_bytes_available) == (2500, 0)


class Driver:
    """NVML with two GPUs; one of them shares the host's memory and does not say how much."""

    def __init__(self, monkeypatch):
        self.starts = 0
        for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
            monkeypatch.setattr(pynvml, name, getattr(self, name))
        monkeypatch.setattr(
            pynvml, "nvmlDeviceGetName", lambda handle: ["NVIDIA H200", b"NVIDIA GB10"][handle]
        )
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: ["GPU-aa11", "GPU-bb22"][handle])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self.memory)

    def nvmlInit(self):  # noqa: N802
        self.starts += 1

    def nvmlShutdown(self):  # noqa: N802
        pass

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def memory(self, handle):
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=141 * GIB)


H200 = Gpu(index=0, name="NVIDIA H200", memory_bytes=141 * GIB)
GB10 = Gpu(index=1, name="NVIDIA GB10", memory_bytes=0)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (H200, GB10)),
        ("0,1", (H200, GB10)),
        ("1", (GB10,)),
        ("GPU-aa", (H200,)),
        ("", ()),
        ("-1", ()),
    ],
)
def test_gpus_are_those_that_the_operator_lets_us_see(monkeypatch, visible, expected):
    driver = Driver(monkeypatch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.read_host().gpus == expected
    assert devices.read_host().gpus == expected
    assert driver.starts == 1


def test_no_driver_means_no_gpus_and_no_noise(monkeypatch, capsys):
    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert devices.read_host().gpus == ()
    assert capsys.readouterr() == ("", "")


def test_a_gpu_that_fell_off_the_bus_is_reported_once(monkeypatch, capsys):
    Driver(monkeypatch)

    def fail(index):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", fail)
    assert devices.read_host().gpus == ()
    assert "devices.gpu_unreadable" in capsys.readouterr().out
