"""The engine's command line, made of the environment and of what the worker program sees around it.

`translate` is pure; here is what it wants to know: the small files that variables name, the GPUs, the model's
attention heads. The worker program asks before it starts the engine, `--explain` to show the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pilotlight.core.storage import compile_caches
from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE
from pilotlight.engines.flags import (
    FlagPlan,
    clean_value,
    config_path,
    named_files,
    read_config,
    translate,
)
from pilotlight.engines.manifest import MANIFEST_NAME, PROBE, EngineManifest, read_manifest
from pilotlight.errors import EngineEnvironmentError
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.gpus import visible_gpus

CPU_CACHE_BYTES: Final = str(1 << 30)
"""KV cache on CPUs where nobody says its size; vLLM would take nearly all of the host's memory."""

TEXT_BYTES_MAX: Final = 4 * 1024 * 1024
"""A configuration that is larger is none."""


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How to start the engine; usable if `plan` has no errors.

    Attributes:
        program: vLLM's own entry point, or what replaces it.
        arguments: What it is told, without the engine's address.
        plan: Where they come from.
    """

    program: tuple[str, ...]
    arguments: tuple[str, ...]
    plan: FlagPlan

    @property
    def argv(self) -> tuple[str, ...]:
        """The whole command line without the engine's address."""
        return (*self.program, *self.arguments)


def plan_command(
    config: WorkerConfig,
    environment: Mapping[str, str],
    manifest: EngineManifest | None,
    *,
    source: str,
    names: tuple[str, ...] = (),
    folder: Path,
    baked: Mapping[str, str] | None = None,
    gpus: int | None = None,
) -> EngineCommand:
    """The engine's command line (`vllm-worker.md` §4.1); reads small files and may run `nvidia-smi`.

    Args:
        config: What the worker was told.
        environment: Variables to translate.
        manifest: What the engine understands; None if unknown.
        source: The model as the engine gets it.
        names: Names to serve it under.
        folder: The run folder, for files that the command line names.
        baked: What was recorded when the weights were put into the image.
        gpus: How many there are; None = they are counted here where that matters.
    """
    defaults = {"SHUTDOWN_TIMEOUT": str(math.ceil(config.drain_seconds))}
    if manifest is not None:
        # One log line per request costs CPU and tells nothing that the platform does not record.
        defaults["DISABLE_UVICORN_ACCESS_LOG"] = "true"
        if manifest.platform == "cuda" and config.flashboot:
            # A frozen worker gives the GPU's memory back by sleeping.
            defaults["ENABLE_SLEEP_MODE"] = "true"
        if manifest.platform == "cpu":
            defaults["KV_CACHE_MEMORY_BYTES"] = CPU_CACHE_BYTES
    on_gpu = manifest is not None and manifest.platform == "cuda"
    heads, kv_heads = attention_heads(Path(source))
    plan = translate(
        environment,
        manifest,
        served_names=names,
        run_folder=str(folder),
        texts=read_texts(named_files(environment)),
        baked=baked,
        defaults=defaults,
        gpus=(visible_gpus(environment) if gpus is None else gpus) if on_gpu else None,
        heads=heads,
        kv_heads=kv_heads,
    )
    program = config.engine_command or (config.engine_python, "-m", "vllm.entrypoints.openai.api_server")
    # This entry point has no positional model; `--model` is its form.
    return EngineCommand(program, ("--model", source, *plan.argv), plan)


def version_problem(env: Mapping[str, str], manifest: EngineManifest | None) -> str | None:
    """That another engine is asked for than the one that is here; None if it is not, or nobody knows."""
    wanted = clean_value(env.get(ENGINE_VERSION_VARIABLE))
    if wanted is None or manifest is None or manifest.version == wanted:
        return None
    return f"{ENGINE_VERSION_VARIABLE} is {wanted}, but the engine here is vLLM {manifest.version}"


async def ask_engine(home: Path, folder: Path, environment: Mapping[str, str]) -> EngineManifest:
    """What the installed vLLM understands, from itself (`vllm-worker.md` §4.3); takes about ten seconds.

    For an engine that was exchanged since its manifest was written. The answer is kept in the engine's folder
    where that can be written. Whoever cancels this ends the question.

    Args:
        home: The engine's virtual environment.
        folder: Where the answer may be written in any case.
        environment: The engine's, without secrets.

    Raises:
        EngineEnvironmentError: It gave no answer; says why.
    """
    answer = folder / MANIFEST_NAME
    process = await asyncio.create_subprocess_exec(
        home / "bin" / "python", "-I", PROBE, "--output", answer,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        env=dict(environment),
    )  # fmt: skip
    try:
        _, said = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    lines = said.decode("utf-8", "replace").strip().splitlines()
    if process.returncode:
        raise EngineEnvironmentError(
            f"vLLM cannot be asked for its options: {lines[-1] if lines else 'no reason'}"
        )
    try:
        manifest = read_manifest(answer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineEnvironmentError(f"vLLM's answer about its options makes no sense: {error!r}") from error
    with contextlib.suppress(OSError):
        kept = home / f".{MANIFEST_NAME}.{os.getpid()}"
        shutil.copyfile(answer, kept)
        kept.replace(home / MANIFEST_NAME)
    return manifest


def read_texts(paths: Iterable[str]) -> dict[str, str]:
    """The contents of those files that can be read as text, by path."""
    found = {}
    for name in paths:
        path = Path(name)
        try:
            if path.is_file() and path.stat().st_size <= TEXT_BYTES_MAX:
                found[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            # What cannot be read is reported as missing, with the variable that names it.
            continue
    return found


def attention_heads(folder: Path) -> tuple[int | None, int | None]:
    """Attention heads and key-value heads of the model in this folder; None where it does not say."""
    config = _configuration(folder)
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) and _count(nested, "num_attention_heads") else config
    heads = _count(text, "num_attention_heads", "n_head", "num_heads")
    return heads, _count(text, "num_key_value_heads", "num_kv_heads") or heads


def architectures_of(folder: Path) -> tuple[str, ...]:
    """The model classes that the model in this folder names; none where it does not say."""
    named = _configuration(folder).get("architectures")
    return tuple(name for name in named if isinstance(name, str)) if isinstance(named, list) else ()


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def usable_caches(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without those compile caches on a volume that cannot be written to.

    The engine would not start with such a folder; what the user chose himself stays.
    """
    kept = dict(env)
    for name, folder in compile_caches(env).items():
        if env.get(name) != folder:
            continue
        try:
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            usable = os.access(folder, os.W_OK)
        except OSError:
            usable = False
        if not usable:
            del kept[name]
    return kept


def fallback_model(env: Mapping[str, str]) -> str | None:
    """The model that the configuration file names; None where there is none."""
    texts = read_texts(named_files(env))
    path = config_path({name: text for name, raw in env.items() if (text := clean_value(raw))}, texts)
    try:
        model = read_config(texts[path]).get("MODEL") if path in texts else None
    except ValueError:
        return None
    return model if isinstance(model, str) else None


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
