"""Commands and environments, and what worker program and gateway must agree on."""

from pathlib import Path

import pytest

from pilotlight.engines.launching import (
    DISTRIBUTION,
    differences,
    fingerprint,
    import_environment,
    launcher_command,
    launcher_environment,
    serve_command,
    serve_environment,
)
from pilotlight.worker.config import engine_environment

HOME = Path("/engines/one")
VERSION = "0.32.0"


def engine(**worker: str) -> dict[str, str]:
    base = {"PATH": "/usr/bin", "HOME": "/home/x", "LANG": "C.UTF-8"} | worker
    return engine_environment(
        base, worker_id="abcdefghijklmn", engine_key="k" * 43, offline=True, platform="cpu"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HOME", "/data"), ("VLLM_LOGGING_LEVEL", "DEBUG"), ("OMP_NUM_THREADS", "3"), ("LD_PRELOAD", "/x.so"),
        ("HOME", "/root"), ("PYTHONPATH", "/more"), ("HF_HUB_OFFLINE", "0"), ("VLLM_ENGINE_READY_TIMEOUT_S", "5"),
    ],
)  # fmt: skip
def test_what_importing_reads_must_be_the_same(name, value):
    launcher = launcher_environment(engine())
    assert differences(launcher, engine()) == ()
    assert differences(launcher, engine(**{name: value})) == (name,)
    assert fingerprint(HOME, VERSION, engine(**{name: value})) != fingerprint(HOME, VERSION, engine())


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_CPU_KVCACHE_SPACE", "HF_TOKEN", "CUDA_VISIBLE_DEVICES", "HTTPS_PROXY", "MAX_MODEL_LEN", "SEED",
        "ENABLE_PREFIX_CACHING", "ENABLE_LORA", "ENABLE_EPLB", "HF_OVERRIDES", "LANGUAGE_MODEL_ONLY",
        "OPENAI_SERVED_MODEL_NAME_OVERRIDE",
    ],
)  # fmt: skip
def test_what_is_read_at_use_may_differ(name):
    assert differences(launcher_environment(engine()), engine(**{name: "1"})) == ()
    assert fingerprint(HOME, VERSION, engine(**{name: "1"})) == fingerprint(
        HOME, VERSION, launcher_environment(engine())
    )


def test_what_python_says_of_a_missing_locale_is_no_difference():
    env = engine()
    del env["LANG"]
    assert differences(launcher_environment(env) | {"LC_CTYPE": "C.UTF-8"}, env) == ()
    assert fingerprint(HOME, VERSION, env | {"LC_CTYPE": "C.UTF-8"}) == fingerprint(HOME, VERSION, env)
    assert differences(launcher_environment(env), env | {"LC_CTYPE": "de_DE.UTF-8"}) == ("LC_CTYPE",)


def test_a_fingerprint_is_of_one_home():
    assert fingerprint(HOME, VERSION, engine()) != fingerprint(Path("/engines/two"), VERSION, engine())
    assert fingerprint(HOME, VERSION, engine()) != fingerprint(HOME, "0.33.0", engine())


def test_a_launcher_knows_no_secret_and_has_room_for_them():
    env = launcher_environment(engine(PYTHONPATH="/more"))
    assert (env["PILOTLIGHT_WORKER_ID"], env["VLLM_API_KEY"]) == ("-" * 14, "-" * 43)
    assert env["PYTHONPATH"] == f"{DISTRIBUTION}:/more"
    assert env["PILOTLIGHT_ENGINE_FORK"] == "1"


def test_a_method_that_somebody_chose_stays():
    assert serve_environment({})["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    env = serve_environment({"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    assert env["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_an_environment_made_twice_is_the_same():
    assert serve_environment(serve_environment(engine())) == serve_environment(engine())


def test_commands():
    assert serve_command(HOME) == ("/engines/one/bin/python", "-m", "pilotlight_engine.serve")
    command = launcher_command(HOME, Path("/run/l.sock"), ("A", "B"))
    assert command[1:] == ("-m", "pilotlight_engine.launcher", "--socket", "/run/l.sock", "--preload", "A,B")
    assert "--preload" not in launcher_command(HOME, Path("/run/l.sock"))


def test_the_distribution_says_what_it_is():
    from importlib.metadata import distributions

    (found,) = distributions(path=[str(DISTRIBUTION)])
    (entry,) = found.entry_points
    assert (found.name, entry.group, entry.value) == (
        "pilotlight-engine",
        "vllm.platform_plugins",
        "pilotlight_engine.plugin:register",
    )


def test_import_environment_is_sorted():
    assert list(import_environment({"TZ": "UTC", "PATH": "/", "HF_HOME": "/h"})) == ["HF_HOME", "TZ"]
