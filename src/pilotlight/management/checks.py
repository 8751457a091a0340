"""What an endpoint's workers would run, checked before anything is stored or started.

In order: the engine is installed; the model exists; the engine knows its architecture; the environment
holds nothing the engine would refuse; context and memory fit. Then the weights are fetched. All of it takes
milliseconds for a model that is there, so a typing error costs no cold start.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from pilotlight.core.placement import HostResources
from pilotlight.domain.endpoint import MODEL_VARIABLE
from pilotlight.engines.manifest import EngineManifest
from pilotlight.engines.vllm_flags import parse_boolean, translate
from pilotlight.errors import EngineEnvironmentError, InvalidInputError, PilotlightError
from pilotlight.management.problems import RejectedInputError, UnavailableError
from pilotlight.management.threads import call_in_thread
from pilotlight.models import fit
from pilotlight.models.catalog import ModelFacts, hub_cache, resolve_model

ProgressStage = Literal["checking", "downloading", "storing"]

FETCHES_MAX = 2
"""Models fetched at the same time; more would only share the same line and disk."""


class Progress(Protocol):
    """Is told how far a request has come; called on the event loop."""

    def __call__(
        self, stage: ProgressStage, message: str, done: int | None = None, total: int | None = None
    ) -> None:
        """Take one step.

        Args:
            stage: What is being done.
            message: The same for people.
            done: Bytes so far, where bytes are counted.
            total: Bytes in all.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedModel:
    """What a revision is made of.

    Attributes:
        model: The model's name; an absolute path for a folder.
        env: The complete environment, with defaults and MODEL_NAME.
        gpu_count: GPUs per worker.
        memory_bytes: Host memory per worker.
        command: Empty; the worker program is ours.
    """

    model: str
    env: Mapping[str, str]
    gpu_count: int
    memory_bytes: int
    command: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What an endpoint without a name is called after."""
        return self.model


class ModelChecker:
    """Checks models against the installed engine and this host.

    Args:
        load_manifest: Reads what the engine understands; raises EngineEnvironmentError.
        read_host: Reads what the host has.
        reserve_bytes: Host memory never given to workers.
    """

    def __init__(
        self,
        *,
        load_manifest: Callable[[], EngineManifest],
        read_host: Callable[[], HostResources],
        reserve_bytes: int,
    ) -> None:
        self._load_manifest = load_manifest
        self._read_host = read_host
        self._reserve_bytes = reserve_bytes
        self._fetching = asyncio.Semaphore(FETCHES_MAX)

    async def manifest(self) -> EngineManifest:
        """What the installed engine understands.

        Raises:
            EngineEnvironmentError: There is none; names the command that installs it.
        """
        try:
            return await asyncio.to_thread(self._load_manifest)
        except EngineEnvironmentError as error:
            raise EngineEnvironmentError(f"{error} (in a clone of Pilotlight: `make setup`)") from error

    async def host(self) -> HostResources:
        """What this host has now."""
        return await asyncio.to_thread(self._read_host)

    async def check(
        self,
        model: str,
        env: Mapping[str, str],
        gpu_count: int | None,
        progress: Progress,
        *,
        gpus_kept: int = 0,
    ) -> CheckedModel:
        """Check a model and have its weights here.

        Args:
            model: As the owner named it.
            env: As the owner set it.
            gpu_count: GPUs per worker, or None for what the model's settings need.
            progress: Told about each step.
            gpus_kept: GPUs per worker of the revision before; not fewer, where none are asked for.

        Returns:
            What to store.

        Raises:
            InvalidInputError: The first thing that does not fit; names it, its value and what is legal.
            EngineEnvironmentError: No engine is installed.
            UnavailableError: The model's hub does not answer.
        """
        progress("checking", f"model {model}")
        _check_model_variable(model, env)
        manifest = await self.manifest()
        revision = fit.value_of(env, "MODEL_REVISION")
        token = hub_token(env)
        with _Unavailable():
            resolve = partial(resolve_model, model, cache=cache_of(env), revision=revision, token=token)
            facts = await call_in_thread(resolve, name="resolve-model")
        check_architecture(facts, env, manifest)
        full = dict(env)
        if manifest.platform == "cpu":
            full |= fit.cpu_defaults(facts, env)
        full[MODEL_VARIABLE] = facts.name
        for note in _check_flags(full, manifest, facts):
            progress("checking", note)
        fit.check_context(facts, full)
        if manifest.platform == "cpu":
            fit.check_cache(facts, full)
        devices = decide_gpu_count(facts, full, manifest, gpu_count, kept=gpus_kept)
        need = await self._check_fit(facts, full, manifest, devices)
        if facts.kind == "hub" and facts.path is None:
            await self._fetch(facts, cache_of(env), revision, token, progress)
        return CheckedModel(model=facts.name, env=full, gpu_count=devices, memory_bytes=need)

    async def without_defaults(self, model: str, env: Mapping[str, str]) -> dict[str, str]:
        """An environment less the defaults that were once computed for a model, so that another gets its own.

        Args:
            model: The model the environment was completed for.
            env: That environment, without MODEL_NAME.
        """
        try:
            resolve = partial(
                resolve_model,
                model,
                cache=cache_of(env),
                revision=fit.value_of(env, "MODEL_REVISION"),
                token=hub_token(env),
            )
            facts = await call_in_thread(resolve, name="resolve-model")
        except PilotlightError:
            # The old model may be gone; then its defaults stay, and are checked like anybody's choice.
            return dict(env)
        bare = {name: value for name, value in env.items() if name not in fit.DEFAULT_VARIABLES}
        defaults = fit.cpu_defaults(facts, bare)
        return {name: value for name, value in env.items() if defaults.get(name) != value}

    async def _check_fit(
        self, facts: ModelFacts, env: Mapping[str, str], manifest: EngineManifest, devices: int
    ) -> int:
        host = await self.host()
        need = fit.estimate_memory(facts, env, manifest.platform, host_memory_bytes=host.memory_bytes_total)
        reason = fit.check_fit(need, host, reserve_bytes=self._reserve_bytes)
        if reason is None and devices:
            reason = fit.check_gpu_fit(facts, env, host.gpus, devices)
        if reason is not None:
            raise InvalidInputError(f"model {facts.name} does not fit: {reason}", field="model")
        return need.total

    async def _fetch(
        self, facts: ModelFacts, cache: Path, revision: str | None, token: str | None, progress: Progress
    ) -> None:
        # Large; nothing but a hub model needs it.
        from pilotlight.models import hub  # noqa: PLC0415

        loop = asyncio.get_running_loop()
        stop = threading.Event()
        message = f"weights of {facts.name}"

        def on_progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, "downloading", message, done, total)

        async with self._fetching:
            progress("downloading", message, 0, facts.weight_bytes)
            try:
                with _Unavailable():
                    fetch = partial(
                        hub.fetch,
                        facts.name,
                        cache=cache,
                        revision=revision,
                        token=token,
                        on_progress=on_progress,
                        cancelled=stop,
                    )
                    await call_in_thread(fetch, name="fetch-model")
            finally:
                stop.set()


def check_architecture(facts: ModelFacts, env: Mapping[str, str], manifest: EngineManifest) -> None:
    """Return when the engine can load this kind of model.

    Raises:
        InvalidInputError: It does not know the architecture; names the nearest ones that it knows.
    """
    architectures = _overridden(env) or facts.architectures
    # Code of the model's own, and vLLM's generic backend, bring classes that no list names.
    implementation = (fit.value_of(env, "MODEL_IMPL") or "auto").lower()
    trusted = parse_boolean(env.get("TRUST_REMOTE_CODE", "")) is True and facts.custom_code
    if trusted or implementation in {"transformers", "terratorch"}:
        return
    if not architectures:
        msg = f"model {facts.name}: config.json names no architectures, so no engine knows how to load it"
        raise InvalidInputError(msg, field="model")
    if any(manifest.supports(architecture) for architecture in architectures):
        return
    near = [found for name in architectures if (found := manifest.suggest(name)) is not None]
    hint = f"; the nearest it knows: {', '.join(near)}" if near else ""
    msg = (
        f"model {facts.name} has the architecture {', '.join(architectures)}, "
        f"which vLLM {manifest.version} does not know{hint}"
    )
    raise InvalidInputError(msg, field="model")


def decide_gpu_count(
    facts: ModelFacts, env: Mapping[str, str], manifest: EngineManifest, asked: int | None, *, kept: int = 0
) -> int:
    """GPUs per worker.

    Args:
        facts: The model.
        env: The environment; may ask for several ranks.
        manifest: What the engine was built for.
        asked: The owner's number, or None.
        kept: With None, not fewer than this on a GPU engine.

    Raises:
        InvalidInputError: The number contradicts the engine or the ranks asked for.
    """
    if manifest.platform == "cpu":
        if asked:
            msg = (
                f"gpu_count is {asked}, but the installed engine (vLLM {manifest.version}) is built for CPUs"
            )
            raise InvalidInputError(msg, field="gpu_count")
        return 0
    tensor = _ranks(env, "TENSOR_PARALLEL_SIZE") or _ranks(env, "NUM_GPU_SHARD") or 1
    pipeline = _ranks(env, "PIPELINE_PARALLEL_SIZE") or 1
    if tensor > 1 and facts.num_attention_heads % tensor:
        msg = (
            f"TENSOR_PARALLEL_SIZE is {tensor}, but must divide the {facts.num_attention_heads} "
            f"attention heads of {facts.name}"
        )
        raise InvalidInputError(msg, field="env.TENSOR_PARALLEL_SIZE")
    needed = tensor * pipeline
    if asked == 0:
        msg = f"gpu_count is 0, but the installed engine (vLLM {manifest.version}) is built for GPUs"
        raise InvalidInputError(msg, field="gpu_count")
    if asked is not None and asked < needed:
        msg = f"gpu_count is {asked}, but the environment asks for {needed} parallel ranks, one GPU each"
        raise InvalidInputError(msg, field="gpu_count")
    return asked or max(needed, kept)


def cache_of(env: Mapping[str, str]) -> Path:
    """Where the workers of an endpoint look for hub models: the endpoint's setting, else the gateway's."""
    return hub_cache({**os.environ, **env})


def hub_token(env: Mapping[str, str]) -> str | None:
    """The Hugging Face token of an endpoint, else the gateway's own; None when there is none."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return next(
        (value for source in (env, os.environ) for name in names if (value := source.get(name))), None
    )


def _check_model_variable(model: str, env: Mapping[str, str]) -> None:
    named = fit.value_of(env, MODEL_VARIABLE)
    if named is not None and named != model:
        msg = f"env.{MODEL_VARIABLE} is {named!r}, but model is {model!r}; leave the variable out"
        raise InvalidInputError(msg, field=f"env.{MODEL_VARIABLE}")


def _check_flags(env: Mapping[str, str], manifest: EngineManifest, facts: ModelFacts) -> Sequence[str]:
    plan = translate(env, manifest, served_names=[facts.name])
    if plan.errors:
        errors = [f"$.env.{error.variable}: {error.message}" for error in plan.errors]
        message = "; ".join(error.message for error in plan.errors)
        raise RejectedInputError(
            f"the engine (vLLM {manifest.version}) would refuse this environment: {message}", errors=errors
        )
    return plan.notes


def _overridden(env: Mapping[str, str]) -> tuple[str, ...]:
    try:
        overrides = json.loads(env.get("HF_OVERRIDES", "") or "{}")
    except ValueError:
        return ()
    named = overrides.get("architectures") if isinstance(overrides, dict) else None
    return tuple(str(name) for name in named) if isinstance(named, list) else ()


def _ranks(env: Mapping[str, str], name: str) -> int | None:
    return fit.parse_human(fit.value_of(env, name)) or None


class _Unavailable:
    """Tells a hub that does not answer from input that is wrong; the hub's own classes are loaded lazily."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Translate."""
        if isinstance(error, PilotlightError) and not isinstance(error, InvalidInputError):
            raise UnavailableError(str(error)) from error
