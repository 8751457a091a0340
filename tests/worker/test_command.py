"""The engine's command line; an engine that is asked for its options before its start (§4.1, §4.3)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pilotlight.core.storage import storage_environment
from pilotlight.engines.manifest import MANIFEST_NAME, load_manifest, read_manifest
from pilotlight.errors import EngineEnvironmentError
from pilotlight.worker.command import (
    CPU_CACHE_BYTES,
    architectures_of,
    ask_engine,
    plan_command,
    usable_caches,
)
from pilotlight.worker.config import WorkerConfig, engine_environment
from pilotlight.worker.engine import Engine
from pilotlight.worker.log import LogSink
from pilotlight.worker.starting import EngineStart, _LifeEndedError

DATA = Path(__file__).parents[1] / "engines" / "data" / "manifest-0.32.0.json"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An environment whose manifest is of another version than its vLLM; its Python writes the right one."""
    home = tmp_path / "engine"
    package = home / "lib" / "python3.12" / "dist-packages" / "vllm"
    package.mkdir(parents=True)
    (package / "_version.py").write_text("__version__ = version = '0.32.0'\n")
    (home / "bin").mkdir()
    (home / MANIFEST_NAME).write_text(DATA.read_text().replace('"0.32.0"', '"0.31.0"'))
    say(home, f'printenv > "$4.env"; cp {DATA} "$4"')
    return home


def say(home: Path, script: str) -> None:
    python = home / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_caches_on_a_volume_that_cannot_be_written_are_not_used(tmp_path: Path) -> None:
    """What the user chose stays; the engine would say what is wrong with it."""
    (tmp_path / "file").touch()
    for base, usable in ((tmp_path / "volume", True), (tmp_path / "file", False)):
        env = {"BASE_PATH": str(base), "OTHER": "x"}
        env |= storage_environment(env, volume_present=False)
        kept = usable_caches(env)
        assert {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"} & kept.keys() == (
            {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"} if usable else set()
        )
        assert kept["OTHER"] == "x"
        assert usable_caches({**env, "VLLM_CACHE_ROOT": "/chosen"})["VLLM_CACHE_ROOT"] == "/chosen"
    assert Path(tmp_path / "volume" / "compile-cache" / "vllm").is_dir()
    assert usable_caches({"OTHER": "x"}) == {"OTHER": "x"}


def test_the_classes_that_a_model_names(tmp_path: Path) -> None:
    assert architectures_of(tmp_path) == ()
    for text, names in (('["A", 3]', ("A",)), ('"A"', ()), ("null", ())):
        (tmp_path / "config.json").write_text(f'{{"architectures": {text}}}')
        assert architectures_of(tmp_path) == names


async def serve_nothing(_engine: Engine) -> None:
    """These starts end before there is an engine."""


def start(home: Path, folder: Path, ending: asyncio.Future[object]) -> EngineStart:
    env = {
        "MODEL_NAME": "org/m", "RUNPOD_WEBHOOK_GET_JOB": "http://h/job-take/$ID?x", "RUNPOD_AI_API_KEY": "S3CRET",
        "PILOTLIGHT_ENGINE_HOME": str(home), "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    config = WorkerConfig.from_environment(env, python="/p")
    return EngineStart(
        config, LogSink(), folder, ending=ending, on_stage=lambda *_, **__: None, on_healthy=serve_nothing
    )


async def test_an_exchanged_engine_is_asked_and_the_answer_kept(home: Path, tmp_path: Path) -> None:
    manifest = await start(home, tmp_path, asyncio.Future())._manifest()
    assert manifest is not None
    assert manifest == load_manifest(home)
    assert "S3CRET" not in (tmp_path / f"{MANIFEST_NAME}.env").read_text()
    say(home, "exit 1")
    assert await start(home, tmp_path, asyncio.Future())._manifest() == manifest


async def test_an_engine_that_cannot_answer_is_started_all_the_same(home: Path, tmp_path: Path) -> None:
    say(home, "echo 'no such luck' >&2; exit 3")
    with pytest.raises(EngineEnvironmentError, match="no such luck"):
        await ask_engine(home, tmp_path, {})
    assert await start(home, tmp_path, asyncio.Future())._manifest() is None
    say(home, 'echo "{}" > "$4"')
    with pytest.raises(EngineEnvironmentError, match="makes no sense"):
        await ask_engine(home, tmp_path, {})


async def test_the_question_ends_with_the_life(home: Path, tmp_path: Path) -> None:
    say(home, 'echo $$ > "$4.pid"; exec sleep 600')
    ending: asyncio.Future[object] = asyncio.Future()
    asking = asyncio.create_task(start(home, tmp_path, ending)._manifest())
    note = tmp_path / f"{MANIFEST_NAME}.pid"
    while not (note.exists() and note.read_text().strip()):
        await asyncio.sleep(0.01)
    ending.set_result("signal")
    with pytest.raises(_LifeEndedError):
        await asking
    assert not Path(f"/proc/{int(note.read_text())}").exists()


async def test_without_vllm_nobody_is_asked(home: Path, tmp_path: Path) -> None:
    (home / "lib" / "python3.12" / "dist-packages" / "vllm" / "_version.py").unlink()
    (home / MANIFEST_NAME).unlink()
    say(home, 'touch "$4"')
    assert await start(home, tmp_path, asyncio.Future())._manifest() is None
    assert not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, CPU_CACHE_BYTES),
        ({"GPU_MEMORY_UTILIZATION": "0.95"}, CPU_CACHE_BYTES),
        ({"KV_CACHE_MEMORY_BYTES": "83886080"}, "83886080"),
        ({"VLLM_CPU_KVCACHE_SPACE": "2"}, None),
        ({"GPU_MEMORY_UTILIZATION": "0.5"}, None),
        ({"VLLM_EXTRA_ARGS": "--gpu-memory-utilization 0.5"}, None),
    ],
)
def test_the_cache_on_cpus_is_what_somebody_said(env, expected, tmp_path: Path) -> None:
    """vLLM's CPU build takes the old variable over every option, so that is only passed on, never made."""
    given = {"MODEL_NAME": "org/m", "RUNPOD_WEBHOOK_GET_JOB": "http://h/job-take/$ID?x", **env}
    config = WorkerConfig.from_environment(given, python="/p")
    command = plan_command(config, given, read_manifest(DATA), source="/m", folder=tmp_path)
    assert not command.plan.errors
    sizes = dict(zip(command.argv, command.argv[1:], strict=False))
    assert sizes.get("--kv-cache-memory-bytes") == expected
    child = engine_environment(given, worker_id="w", engine_key="k", offline=True, platform="cpu")
    assert child.get("VLLM_CPU_KVCACHE_SPACE") == env.get("VLLM_CPU_KVCACHE_SPACE")
