"""Memory of this machine as frozen workers meet it: whether it runs short, and what they hold on GPUs.

Everything here blocks: small files of /proc take about a millisecond, the memory of large processes and GPUs
takes longer, so call that from a thread.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pilotlight.clusters.devices import read_host
from pilotlight.core.freezing import HostMemory

_PRESSURE = Path("/proc/pressure/memory")


def gpu_bytes(pids: Collection[int], devices: Sequence[int]) -> int:
    """The most memory that processes hold on one of some GPUs; 0 where the driver does not tell.

    Args:
        pids: As this machine counts them, also of processes in containers.
        devices: Indices as the driver counts.
    """
    # Here, because the module is large and most machines never ask.
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        held = []
        for index in devices:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
            held.append(sum(each.usedGpuMemory or 0 for each in processes if each.pid in pids))
        return max(held, default=0)
    except pynvml.NVMLError:
        return 0
    finally:
        pynvml.nvmlShutdown()


def read_memory() -> HostMemory:
    """Memory as it is now, within the limit of our container, and how much it is fought for."""
    host = read_host()
    return HostMemory(
        total_bytes=host.memory_bytes_total,
        available_bytes=host.memory_bytes_available,
        pressure_percent=read_pressure(),
    )


def read_pressure(path: Path = _PRESSURE) -> float | None:
    """Share of the last ten seconds in which some task waited for memory, in percent (PSI, `some avg10`).

    None where the kernel does not tell: before 4.20, built without it, or started with `psi=0`.
    """
    try:
        first = path.read_text(encoding="ascii").splitlines()[0]
        fields = dict(field.split("=", 1) for field in first.split()[1:])
        return float(fields["avg10"])
    except (OSError, IndexError, KeyError, ValueError):
        return None
