"""The environment of workers (worker-protocol.md §2.1, §2.2; serverless-api.md §4.1)."""

from __future__ import annotations

import pytest

from pilotlight.core.worker_environment import (
    is_own_program,
    join_environment,
    without_jobs,
    worker_environment,
)

PLATFORM = worker_environment("http://h:8400", "ep", "w", "secret", ping_interval_ms=2000, host_name="box")


def test_every_variable_of_the_table_is_there():
    """§2.1."""
    assert {name: PLATFORM[name] for name in PLATFORM if name.startswith("RUNPOD_")} == {
        "RUNPOD_WEBHOOK_GET_JOB": "http://h:8400/v2/ep/job-take/$ID?gpu=cpu",
        "RUNPOD_WEBHOOK_POST_OUTPUT": "http://h:8400/v2/ep/job-done/$RUNPOD_POD_ID/$ID?gpu=cpu",
        "RUNPOD_WEBHOOK_POST_STREAM": "http://h:8400/v2/ep/job-stream/$RUNPOD_POD_ID/$ID?gpu=cpu",
        "RUNPOD_WEBHOOK_PING": "http://h:8400/v2/ep/ping/$RUNPOD_POD_ID?gpu=cpu",
        "RUNPOD_PING_INTERVAL": "2000",
        "RUNPOD_AI_API_KEY": "secret",
        "RUNPOD_POD_ID": "w",
        "RUNPOD_POD_HOSTNAME": "box",
        "RUNPOD_ENDPOINT_ID": "ep",
        "RUNPOD_DC_ID": "LOCAL",
        "RUNPOD_CPU_COUNT": "1",
        "RUNPOD_GPU_COUNT": "0",
        "RUNPOD_LOG_LEVEL": "INFO",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_ENDPOINT_BASE_URL": "http://h:8400/v2",
        "RUNPOD_API_BASE_URL": "http://h:8400",
    }


def test_hardware_is_named():
    """serverless-api.md §4.1: also where the URLs say what the worker runs on."""
    made = worker_environment(
        "http://h:8400", "ep", "w", "secret", ping_interval_ms=2000,
        gpu_type="NVIDIA RTX A5000", gpu_count=2, cpu_count=16,
    )  # fmt: skip
    assert (made["RUNPOD_CPU_COUNT"], made["RUNPOD_GPU_COUNT"]) == ("16", "2")
    assert made["RUNPOD_GPU_TYPE_ID"] == "NVIDIA RTX A5000"
    urls = [value for name, value in made.items() if name.startswith("RUNPOD_WEBHOOK_")]
    assert len(urls) == 4
    assert {url.partition("?")[2] for url in urls} == {"gpu=NVIDIA+RTX+A5000"}


def test_nobody_can_choose_hardware_or_place():
    """serverless-api.md §4.1, worker-protocol.md §2.2: what is not choosable is the platform's."""
    names = ("RUNPOD_DC_ID", "RUNPOD_CPU_COUNT", "RUNPOD_GPU_COUNT")
    joined = join_environment(dict.fromkeys(names, "forged"), PLATFORM)
    assert [joined[name] for name in names] == ["LOCAL", "1", "0"]


def test_the_platform_wins_but_for_what_may_be_chosen():
    chosen = {
        "RUNPOD_POD_ID": "forged",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "false",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "MINE": "1",
        "NO_PROXY": "corp",
    }
    joined = join_environment(chosen, PLATFORM)
    assert joined["RUNPOD_POD_ID"] == "w"
    assert joined["RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"] == "false"
    assert joined["RUNPOD_SKIP_GPU_CHECK"] == "true"
    assert joined["MINE"] == "1"
    assert joined["NO_PROXY"] == joined["no_proxy"] == "corp,h"


def test_the_gateways_own_exceptions_from_its_proxy_hold_in_both_spellings():
    """§2.1: libraries differ in which spelling they read first, and heartbeats must never go to a proxy."""
    inherited = {"http_proxy": "http://proxy:1", "NO_PROXY": "a, b", "no_proxy": "b,c"}
    joined = join_environment({"NO_PROXY": "d"}, PLATFORM, inherited)
    assert joined["NO_PROXY"] == joined["no_proxy"] == "a,b,c,d,h"


def test_a_chosen_debug_level_is_not_hidden_by_ours():
    """§2.1: of the two names the first one wins."""
    joined = join_environment({"RUNPOD_DEBUG_LEVEL": "ERROR"}, PLATFORM)
    assert "RUNPOD_LOG_LEVEL" not in joined
    assert joined["RUNPOD_DEBUG_LEVEL"] == "ERROR"


def test_a_worker_that_takes_no_jobs_gets_neither_addresses_nor_a_credential():
    left = without_jobs(PLATFORM)
    assert "secret" not in left.values()
    assert not [name for name in left if "WEBHOOK" in name]
    assert left["RUNPOD_POD_ID"] == "w"


@pytest.mark.parametrize(
    ("command", "own"),
    [
        (("/venv/bin/pilotlight", "worker"), True),
        (("pilotlight", "worker"), True),
        (("/usr/bin/python3", "-m", "pilotlight.worker"), True),
        (("python", "-m", "pilotlight", "worker"), True),
        (("pilotlight", "worker", "--explain"), False),
        (("python", "worker.py"), False),
        ((), False),
    ],
)
def test_our_own_program_is_known_by_its_command(command, own):
    assert is_own_program(command) is own
