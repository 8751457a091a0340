"""What workers on this machine find in their environment (worker-protocol.md §2.1, vllm-worker.md §7)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotlight.clusters.ports import PortBook
from pilotlight.clusters.variables import WorkerVariables
from pilotlight.core.placement import HostResources
from pilotlight.domain.endpoint import Container, Endpoint, EndpointKind, Revision
from pilotlight.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path)


def variables(
    settings: Settings, *, env: dict[str, str] | None = None, launcher: Path | None = None, **changes: object
) -> dict[str, str]:
    """The environment of a worker of such an endpoint."""
    revision = Revision(endpoint_id="e", version=1, model="m", env=env or {})
    endpoint = Endpoint(**({"id": "e", "name": "e", "revision": revision} | changes))  # type: ignore[arg-type]
    made = WorkerVariables(
        settings,
        "http://127.0.0.1:8400",
        ports=PortBook(lambda _: True),
        run_folder=lambda worker_id: Path("/run") / worker_id,
        host=lambda: HostResources(memory_bytes_total=1, memory_bytes_available=1),
    )
    made.launcher = lambda asked: launcher if asked is endpoint else None
    return dict(made(endpoint, "w", "secret"))


@pytest.mark.parametrize(("timeout_ms", "drain"), [(5000, "5"), (600_000, "600"), (3_600_000, "600")])
def test_a_worker_may_finish_what_a_job_may_take(settings: Settings, timeout_ms: int, drain: str) -> None:
    """DRAIN_TIMEOUT = min(executionTimeout, 600 s)."""
    assert variables(settings, execution_timeout_ms=timeout_ms)["DRAIN_TIMEOUT"] == drain


@pytest.mark.parametrize(("said", "drain"), [("7", "7"), ("", "600"), ("None", "600")])
def test_the_users_own_drain_time_wins(settings: Settings, said: str, drain: str) -> None:
    """An empty variable is an unset one (vllm-worker.md §4.2)."""
    assert variables(settings, env={"DRAIN_TIMEOUT": said})["DRAIN_TIMEOUT"] == drain


def test_the_gateway_decides_how_many_requests_a_worker_takes(settings: Settings) -> None:
    made = variables(settings, env={"MAX_CONCURRENCY": "auto"}, concurrency=4)
    assert made["MAX_CONCURRENCY"] == "4"


def test_a_worker_without_a_key_is_reached_from_this_machine_only(settings: Settings) -> None:
    """vllm-worker.md §7.1: as a load-balancing worker our own program asks for none."""
    made = variables(settings, env={"WORKER_MODE": "http"}, kind=EndpointKind.LOAD_BALANCER)
    assert made["PILOTLIGHT_HTTP_HOST"] == "127.0.0.1"
    assert made["PORT"] == made["PORT_HEALTH"]
    assert made["PILOTLIGHT_ENGINE_HOME"] == str(settings.engine_home)
    assert "RUNPOD_WEBHOOK_GET_JOB" not in made
    assert "PILOTLIGHT_WORKER_STATE_URL" not in made


@pytest.mark.parametrize(("network", "host"), [("host", "127.0.0.1"), ("bridge", None)])
def test_a_container_on_the_hosts_network_is_reached_from_this_machine_only(
    tmp_path: Path, network: str, host: str | None
) -> None:
    """On a network of its own it listens everywhere, and only its published port leads there."""
    url = "http://gateway:8400"
    settings = load_settings(home=tmp_path, containers={"network": network, "gateway_url": url})
    revision = Revision(endpoint_id="e", version=1, model="", container=Container(image="org/worker"))
    made = variables(settings, kind=EndpointKind.LOAD_BALANCER, revision=revision)
    assert made.get("PILOTLIGHT_HTTP_HOST") == host


def test_an_endpoint_chooses_one_of_several_engines(tmp_path: Path) -> None:
    """The environment that the setting engine.homes names for its ENGINE_VERSION, else the usual one."""
    homes = {"0.31.0": str(tmp_path / "older")}
    settings = load_settings(home=tmp_path, engine={"home": str(tmp_path / "usual"), "homes": homes})
    for version, expected in (("0.31.0", "older"), ("0.32.0", "usual"), ("", "usual")):
        made = variables(settings, env={"ENGINE_VERSION": version})
        assert made["PILOTLIGHT_ENGINE_HOME"] == str(tmp_path / expected)


def test_a_worker_is_told_where_its_engine_can_be_forked(settings: Settings) -> None:
    assert variables(settings, launcher=Path("/run/l"))["PILOTLIGHT_LAUNCHER"] == "/run/l"
    assert "PILOTLIGHT_LAUNCHER" not in variables(settings)


def test_only_an_endpoint_with_flashboot_prepares_its_engine_for_it(settings: Settings) -> None:
    assert variables(settings)["PILOTLIGHT_FLASHBOOT"] == "1"
    assert "PILOTLIGHT_FLASHBOOT" not in variables(settings, flashboot=False)
