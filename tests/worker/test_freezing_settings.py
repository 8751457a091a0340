"""What the environment says about freezing, and what an engine is started with for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pilotlight.core.openai_routes import check_route
from pilotlight.engines.manifest import EngineManifest, read_manifest
from pilotlight.worker.command import plan_command
from pilotlight.worker.config import WorkerConfig, planned_environment
from pilotlight.worker.errors import ConfigError

DATA = Path(__file__).parents[1] / "engines" / "data"

BASE = {"MODEL_NAME": "org/m", "RUNPOD_WEBHOOK_GET_JOB": "http://h/job-take/$ID?x"}
FLASHBOOT = {"PILOTLIGHT_FLASHBOOT": "1"}

DEV_ROUTES = (
    "/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory", "/collective_rpc", "/server_info",
    "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/pause", "/resume", "/is_paused",
    "/abort_requests", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update",
    "/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version",
    "/weight_info", "/weight_checker", "/get_world_size",
)  # fmt: skip
"""What vLLM 0.32 serves in addition with VLLM_SERVER_DEV_MODE=1."""


def config(**variables: str) -> WorkerConfig:
    return WorkerConfig.from_environment({**BASE, **variables}, python="/p")


def test_freezing_is_off_unless_the_platform_says_otherwise() -> None:
    assert (config().flashboot, config().sleep_level) == (False, 1)
    assert config(**FLASHBOOT).flashboot
    assert config(FLASHBOOT_SLEEP_LEVEL="2").sleep_level == 2


@pytest.mark.parametrize("text", ["0", "3", "deep", "1.5"])
def test_other_sleep_levels_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"FLASHBOOT_SLEEP_LEVEL must be one of 1, 2, not '{text}'"):
        config(FLASHBOOT_SLEEP_LEVEL=text)


@pytest.mark.parametrize(
    ("platform", "variables", "mode"),
    [
        ("cuda", FLASHBOOT, "1"),
        ("cuda", {**FLASHBOOT, "VLLM_SERVER_DEV_MODE": "0"}, "0"),
        ("cuda", {}, None),
        ("cpu", FLASHBOOT, None),
        ("", FLASHBOOT, None),
    ],
)
def test_the_routes_for_sleep_are_there_where_they_are_needed(
    platform: str, variables: dict[str, str], mode: str | None
) -> None:
    told = config(**variables)
    environment = planned_environment(
        told, told.environment, engine_key="k", offline=False, platform=platform
    )
    assert environment.get("VLLM_SERVER_DEV_MODE") == mode


@pytest.fixture
def gpu_engine() -> EngineManifest:
    return replace(read_manifest(DATA / "manifest-0.32.0.json"), platform="cuda")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (FLASHBOOT, ["--enable-sleep-mode"]),
        ({}, []),
        ({**FLASHBOOT, "ENABLE_SLEEP_MODE": "false"}, ["--no-enable-sleep-mode"]),
    ],
)
def test_an_engine_on_a_gpu_gets_sleep_mode_with_flashboot(
    gpu_engine: EngineManifest, tmp_path: Path, variables: dict[str, str], expected: list[str]
) -> None:
    told = config(**variables)
    command = plan_command(told, told.environment, gpu_engine, source="org/m", folder=tmp_path, gpus=1)
    assert command.plan.errors == ()
    assert [word for word in command.argv if "sleep" in word] == expected


def test_callers_reach_none_of_the_routes_that_dev_mode_adds() -> None:
    for path in DEV_ROUTES:
        for method in ("GET", "POST"):
            for spelling in (
                path,
                f"{path}/",
                path.upper(),
                f"{path}?level=2",
                f"/%{ord(path[1]):x}{path[2:]}",
            ):
                assert check_route(method, spelling).status == 403, spelling
