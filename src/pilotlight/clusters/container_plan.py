"""What a container is made with: from a worker's spec to the request that the container engine gets.

Pure. `clusters.containers` asks it for each worker; names and values are those of Docker's HTTP API, which
Podman speaks as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pilotlight.core.health_check import PORT_VARIABLE
from pilotlight.core.worker_environment import RUN_FOLDER_VARIABLE
from pilotlight.domain.worker import WORKER_COOKIE
from pilotlight.ports.cluster import WorkerSpec

INSTALLATION_LABEL = "io.pilotlight.installation"
WORKER_LABEL = "io.pilotlight.worker"
ENDPOINT_LABEL = "io.pilotlight.endpoint"

HOST_NETWORK = "host"
_LOOPBACK = "127.0.0.1"
_HUB = "docker.io"
_DEFAULT_TAG = "latest"
_SIGNALS_END = 128
_SIGNALS_MAX = 64

PIDS_MAX = 16_384
"""Processes and threads of one container, so that a worker that forks without end takes nobody else down; an
engine on eight GPUs has a tenth of them."""

_DROPPED = ("MKNOD", "NET_RAW", "AUDIT_WRITE")
"""What engines give to root in a container by default and no worker needs."""

GpuDriver = Literal["nvidia", "cdi"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What all containers of an installation have in common.

    Attributes:
        installation: Its id, by which leftovers are found.
        network: `host`, or the name of a network of the container engine.
        shm_bytes: Size of `/dev/shm` where an endpoint names none.
        gpu_driver: How the engine is asked for GPUs: by NVIDIA's runtime (Docker) or by CDI names (Podman).
        user: Whom workers with a run folder run as, `uid:gid`; "" for the user of the image.
        remapped: Whether users of containers are others outside, unless they are made without that.
    """

    installation: str
    network: str
    shm_bytes: int
    gpu_driver: GpuDriver
    user: str = ""
    remapped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerPlan:
    """A container to be made.

    Attributes:
        name: Of the container.
        config: The body of the request that makes it; holds secrets.
        run_folder: A folder of this machine that must exist before; None where there is none.
    """

    name: str
    config: dict[str, Any] = field(repr=False)
    run_folder: str | None = None


def plan_container(spec: WorkerSpec, place: Place) -> ContainerPlan:
    """What to make for a worker.

    Args:
        spec: The worker; it has a container.
        place: What all containers have in common.
    """
    container = spec.container
    assert container is not None, spec.worker_id
    run_folder = spec.env.get(RUN_FOLDER_VARIABLE)
    host: dict[str, Any] = {
        "NetworkMode": place.network,
        "ShmSize": container.shm_bytes or place.shm_bytes,
        "Mounts": [
            {
                "Type": "bind" if volume.source.startswith("/") else "volume",
                "Source": volume.source,
                "Target": volume.target,
                "ReadOnly": volume.read_only,
            }
            for volume in container.volumes
        ],
        "RestartPolicy": {"Name": "no"},
        "SecurityOpt": ["no-new-privileges"],
        "PidsLimit": PIDS_MAX,
        "CapDrop": list(_DROPPED),
        # Its output is read as it comes and kept by us; a second copy would grow without anybody's bound.
        "LogConfig": {"Type": "none", "Config": {}},
    }
    if run_folder is not None:
        # The gateway reaches the worker's sockets at the path that the worker registers.
        mount = {"Type": "bind", "Source": run_folder, "Target": run_folder, "ReadOnly": False}
        host["Mounts"].append(mount)
    if any(mount["Type"] == "bind" for mount in host["Mounts"]):
        # SELinux would keep the container from folders of the machine; labelling them anew changes files that
        # are not ours. Without SELinux this says nothing.
        host["SecurityOpt"].append("label=disable")
    if place.remapped and (run_folder is not None or place.network == HOST_NETWORK):
        # Nobody else may use the sockets, and Docker refuses the machine's network to remapped users.
        host["UsernsMode"] = "host"
    if spec.memory_bytes:
        # The same for memory and swap together: no swapping.
        host["Memory"] = host["MemorySwap"] = spec.memory_bytes
    if spec.devices:
        host["DeviceRequests"] = [_device_request(spec.devices, place.gpu_driver)]
    config: dict[str, Any] = {
        "Image": container.image,
        "Env": [f"{name}={value}" for name, value in _environment(spec).items()],
        "Labels": {
            INSTALLATION_LABEL: place.installation,
            WORKER_LABEL: spec.worker_id,
            ENDPOINT_LABEL: spec.endpoint_id,
        },
        "HostConfig": host,
        # Whether it is well is found out by us, by what it reports or answers.
        "Healthcheck": {"Test": ["NONE"]},
    }
    if spec.command:
        config["Cmd"] = list(spec.command)
    if run_folder is not None and place.user:
        config["User"] = place.user
    port = spec.env.get(PORT_VARIABLE)
    if port is not None and place.network != HOST_NETWORK:
        config["ExposedPorts"] = {f"{port}/tcp": {}}
        host["PortBindings"] = {f"{port}/tcp": [{"HostIp": _LOOPBACK, "HostPort": port}]}
    return ContainerPlan(name=f"pilotlight-{spec.worker_id}", config=config, run_folder=run_folder)


def _environment(spec: WorkerSpec) -> Mapping[str, str]:
    # NVIDIA's runtime gives every GPU to a container whose image asks for "all".
    visible = ",".join(str(index) for index in spec.devices) or "void"
    return {
        "PYTHONUNBUFFERED": "1",
        **spec.env,
        "NVIDIA_VISIBLE_DEVICES": visible,
        WORKER_COOKIE: spec.worker_id,
    }


def _device_request(devices: Sequence[int], driver: GpuDriver) -> dict[str, Any]:
    if driver == "cdi":
        return {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={index}" for index in devices]}
    return {
        "Driver": "nvidia",
        "DeviceIDs": [str(index) for index in devices],
        "Capabilities": [["gpu"]],
    }


def split_reference(image: str) -> tuple[str, str]:
    """The repository of an image's reference, and its tag or digest; `latest` where it names none."""
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    # A colon before a slash belongs to the registry's port.
    if not colon or "/" in tag:
        repository, tag = name, _DEFAULT_TAG
    return repository, digest or tag


def registry_of(image: str) -> str:
    """The host, and port, of the registry that an image's reference names; without one it is Docker's own."""
    first, slash, _ = image.partition("/")
    named = slash and ("." in first or ":" in first or first == "localhost")
    host = first.lower() if named else _HUB
    return _HUB if host == f"index.{_HUB}" else host


def exit_code_of(status: int) -> int:
    """A container's exit status as that of a process: 137 is the end by signal 9, thus -9."""
    number = status - _SIGNALS_END
    return -number if 0 < number <= _SIGNALS_MAX else status


def owner_of(user: str) -> tuple[int, int] | None:
    """The numbers in an image's `USER`; None for names, which only the image can tell. Empty means root."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", user or "0:0")
    return None if found is None else (int(found[1]), int(found[2] or 0))
