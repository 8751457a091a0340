"""What a container is made with: values in, values out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pilotlight.clusters.container_plan import (
    Place,
    exit_code_of,
    owner_of,
    plan_container,
    registry_of,
    split_reference,
)
from pilotlight.core.worker_environment import RUN_FOLDER_VARIABLE
from pilotlight.domain.endpoint import Container, Volume
from pilotlight.ports.cluster import WorkerSpec

PLACE = Place(installation="i", network="host", shm_bytes=1, gpu_driver="nvidia")


def spec(**fields) -> WorkerSpec:
    given = {
        "worker_id": "w",
        "endpoint_id": "e",
        "env": {},
        "command": [],
        "container": Container(image="a/b:1"),
    }
    return WorkerSpec(**given | fields)


def host_of(plan):
    return plan.config["HostConfig"]


def test_the_labels_tell_whose_it_is():
    plan = plan_container(spec(), PLACE)
    assert plan.name == "pilotlight-w"
    assert set(plan.config["Labels"].values()) == {"i", "w", "e"}


def test_secrets_are_in_the_environment_only():
    plan = plan_container(spec(env={"RUNPOD_AI_API_KEY": "secret"}), PLACE)
    assert "RUNPOD_AI_API_KEY=secret" in plan.config["Env"]
    assert "secret" not in repr(plan)
    assert "secret" not in repr({name: value for name, value in plan.config.items() if name != "Env"})


def test_a_command_are_arguments_and_none_leaves_the_image_its_own():
    assert "Cmd" not in plan_container(spec(), PLACE).config
    assert plan_container(spec(command=["a", "b"]), PLACE).config["Cmd"] == ["a", "b"]
    assert "Entrypoint" not in plan_container(spec(command=["a"]), PLACE).config


@pytest.mark.parametrize(
    ("driver", "request_"),
    [
        ("nvidia", {"Driver": "nvidia", "DeviceIDs": ["0", "3"], "Capabilities": [["gpu"]]}),
        ("cdi", {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0", "nvidia.com/gpu=3"]}),
    ],
)
def test_gpus_as_the_engine_wants_them_named(driver, request_):
    place = Place(installation="i", network="host", shm_bytes=1, gpu_driver=driver)
    plan = plan_container(spec(devices=(0, 3)), place)
    assert host_of(plan)["DeviceRequests"] == [request_]
    assert "NVIDIA_VISIBLE_DEVICES=0,3" in plan.config["Env"]


def test_a_worker_without_gpus_sees_none_whatever_its_image_asks_for():
    plan = plan_container(spec(), PLACE)
    assert "DeviceRequests" not in host_of(plan)
    assert "NVIDIA_VISIBLE_DEVICES=void" in plan.config["Env"]


def test_what_nvidia_shows_is_not_for_the_owner_to_say():
    """The variable opens GPUs of other workers where NVIDIA's runtime is the engine's default."""
    plan = plan_container(spec(env={"NVIDIA_VISIBLE_DEVICES": "all"}), PLACE)
    assert [item for item in plan.config["Env"] if item.startswith("NVIDIA")] == [
        "NVIDIA_VISIBLE_DEVICES=void"
    ]


def test_no_container_can_take_the_machine_down_or_more_rights_than_it_needs():
    host = host_of(plan_container(spec(), PLACE))
    assert host["PidsLimit"] == 16_384
    assert {"MKNOD", "NET_RAW", "AUDIT_WRITE"} <= set(host["CapDrop"])
    assert host["SecurityOpt"] == ["no-new-privileges"]


@pytest.mark.parametrize(("source", "disabled"), [("/srv/models", True), ("models", False)])
def test_selinux_lets_a_container_into_the_folders_it_is_given(source, disabled):
    volumes = (Volume(source=source, target="/data"),)
    host = host_of(plan_container(spec(container=Container(image="a", volumes=volumes)), PLACE))
    assert ("label=disable" in host["SecurityOpt"]) == disabled


@pytest.mark.parametrize(
    ("network", "env", "mode"),
    [
        ("host", {}, "host"),
        ("bridge", {}, None),
        ("bridge", {RUN_FOLDER_VARIABLE: "/tmp/x/w"}, "host"),
    ],
)
def test_users_are_not_remapped_where_that_cannot_work(network, env, mode):
    """Docker refuses the machine's network to remapped users, and their sockets are nobody's."""
    place = replace(PLACE, network=network, remapped=True)
    assert host_of(plan_container(spec(env=env), place)).get("UsernsMode") == mode
    assert "UsernsMode" not in host_of(plan_container(spec(env=env), replace(place, remapped=False)))


def test_memory_is_bounded_only_where_it_was_said():
    assert "Memory" not in host_of(plan_container(spec(), PLACE))
    host = host_of(plan_container(spec(memory_bytes=5), PLACE))
    assert (host["Memory"], host["MemorySwap"]) == (5, 5)


def test_ports_are_published_on_loopback_where_the_network_is_its_own():
    own = Place(installation="i", network="bridge", shm_bytes=1, gpu_driver="cdi")
    with_port = spec(env={"PORT": "12345"})
    assert "PortBindings" not in host_of(plan_container(with_port, PLACE))
    plan = plan_container(with_port, own)
    assert host_of(plan)["PortBindings"] == {"12345/tcp": [{"HostIp": "127.0.0.1", "HostPort": "12345"}]}
    assert plan.config["ExposedPorts"] == {"12345/tcp": {}}


def test_the_folder_of_sockets_has_the_same_path_inside():
    place = Place(installation="i", network="host", shm_bytes=1, gpu_driver="cdi", user="1000:1000")
    plan = plan_container(spec(env={RUN_FOLDER_VARIABLE: "/tmp/x/w"}), place)
    [mount] = host_of(plan)["Mounts"]
    assert (mount["Type"], mount["Source"], mount["Target"]) == ("bind", "/tmp/x/w", "/tmp/x/w")
    # Its sockets are for their owner only, so it has to be us.
    assert plan.config["User"] == "1000:1000"
    assert "User" not in plan_container(spec(), place).config


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("busybox", ("busybox", "latest")),
        ("a/b:1.2", ("a/b", "1.2")),
        ("host:5000/a/b", ("host:5000/a/b", "latest")),
        ("host:5000/a/b:x", ("host:5000/a/b", "x")),
        ("a/b@sha256:00", ("a/b", "sha256:00")),
        ("a/b:1@sha256:00", ("a/b", "sha256:00")),
    ],
)
def test_references(image, parts):
    assert split_reference(image) == parts


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("busybox", "docker.io"),
        ("me/worker:1", "docker.io"),
        ("index.docker.io/me/worker", "docker.io"),
        ("ghcr.io/me/worker:1", "ghcr.io"),
        ("Host.example:5000/a/b@sha256:00", "host.example:5000"),
        ("localhost/x", "localhost"),
        ("localhost:5000/x", "localhost:5000"),
    ],
)
def test_registries(image, host):
    assert registry_of(image) == host


def test_exit_statuses_name_signals():
    assert [exit_code_of(status) for status in (0, 3, 128, 137, 143, 255)] == [0, 3, 128, -9, -15, 255]


def test_users_of_images():
    assert owner_of("") == (0, 0)
    assert owner_of("1000") == (1000, 0)
    assert owner_of("1000:50") == (1000, 50)
    assert owner_of("worker") is None
