"""Parts of the distribution that decide something, without processes."""

from pathlib import Path

import pytest

BLOCK = b"PILOTLIGHT_WORKER_ID=--------------\0A=1\0VLLM_API_KEY=" + b"-" * 43 + b"\0B=2\0"


def apply(block, env):
    from pilotlight_engine.environment import overwrites

    data = bytearray(block)
    for offset, content in overwrites(block, env):
        data[offset : offset + len(content)] = content
    return bytes(data)


def test_the_environment_is_overwritten_in_place():
    env = {"PILOTLIGHT_WORKER_ID": "abcdefghijklmn", "VLLM_API_KEY": "k" * 40}
    changed = apply(BLOCK, env)
    assert len(changed) == len(BLOCK)
    assert changed == (
        b"PILOTLIGHT_WORKER_ID=abcdefghijklmn\0A=1\0VLLM_API_KEY=" + b"k" * 40 + b"\0" * 4 + b"B=2\0"
    )


def test_a_name_that_ends_alike_is_another():
    block = b"MY_VLLM_API_KEY=x\0" + BLOCK
    changed = apply(block, {"PILOTLIGHT_WORKER_ID": "a" * 14, "VLLM_API_KEY": "k" * 43})
    assert changed.startswith(b"MY_VLLM_API_KEY=x\0")


@pytest.mark.parametrize(
    ("block", "key", "message"),
    [
        (BLOCK, "k" * 44, "VLLM_API_KEY must have 1 to 43 bytes, not 44"),
        (BLOCK, "", "VLLM_API_KEY must have 1 to 43 bytes, not 0"),
        (b"PILOTLIGHT_WORKER_ID=--------------\0", "k", "the launcher was started without VLLM_API_KEY"),
    ],
)
def test_what_does_not_fit_is_refused(block, key, message):
    from pilotlight_engine.environment import EnvironmentRefusedError

    with pytest.raises(EnvironmentRefusedError, match=message):
        apply(block, {"PILOTLIGHT_WORKER_ID": "a" * 14, "VLLM_API_KEY": key})


@pytest.mark.parametrize(
    ("env", "places"),
    [
        ({}, ()),
        ({"GOMP_CPU_AFFINITY": "0"}, ({0}, {0})),
        ({"GOMP_CPU_AFFINITY": "2 3"}, ({2}, {3})),
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[4,5]"}, ({4}, {5})),
        ({"OMP_PLACES": "{0,1,2}", "OMP_PROC_BIND": "true"}, ({0, 1, 2}, {0, 1, 2})),
        ({"GOMP_CPU_AFFINITY": "0-3:2"}, ()),
    ],
)
def test_places_of_threads(env, places):
    from pilotlight_engine.threads import read_places

    assert read_places(env, 2) == places


def test_libraries_are_loaded_as_vllm_would(tmp_path):
    from pilotlight_engine.libraries import preloads

    gomp = tmp_path / "torch" / "lib" / "libgomp.so.1"
    malloc = tmp_path / "vllm" / "libs" / "libtcmalloc_minimal.so.4"
    for path in (gomp, malloc):
        path.parent.mkdir(parents=True)
        path.touch()
    folders: dict[str, Path | None] = {"torch": tmp_path / "torch", "vllm": tmp_path / "vllm"}
    assert preloads({}, folders) == f"{malloc}:{gomp}"
    assert preloads({"LD_PRELOAD": "/x/libiomp5.so"}, folders) == f"{malloc}:/x/libiomp5.so"
    assert preloads({"LD_PRELOAD": f"{malloc}:{gomp}"}, folders) == f"{malloc}:{gomp}"
    assert preloads({}, folders | {"torch": None}) == ""
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert preloads({}, folders) == ""


def test_classes_of_a_model_in_a_folder(tmp_path):
    from pilotlight_engine.serve import model_classes

    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert model_classes(["--seed", "1", "--model", str(tmp_path)]) == ("LlamaForCausalLM",)
    assert model_classes([f"--model={tmp_path}"]) == ("LlamaForCausalLM",)
    assert model_classes(["--model", "org/name"]) == ()
    assert model_classes(["--model"]) == ()


def test_a_configuration_of_logging_is_applied_once(monkeypatch):
    import logging

    from pilotlight_engine.warming import RememberingConfigurator

    logger = logging.getLogger("of-this-test")
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "loggers": {"of-this-test": {"level": "ERROR"}},
    }
    RememberingConfigurator(config).configure()
    assert logger.level == logging.ERROR
    logger.setLevel(logging.DEBUG)
    RememberingConfigurator(config).configure()
    assert logger.level == logging.DEBUG
    config["loggers"]["of-this-test"]["level"] = "INFO"
    RememberingConfigurator(config).configure()
    assert logger.level == logging.INFO
