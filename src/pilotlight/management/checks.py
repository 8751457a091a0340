"""What an endpoint's workers would run, checked before anything is stored or started.

In order: the engine is installed; the model exists; the engine knows its architecture; the environment
holds nothing the engine would refuse; context and memory fit. Then the weights are fetched. All of it takes
milliseconds for a model that is there, so a typing error costs no cold start.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from pilotlight.core.placement import HostResources
from pilotlight.core.variables import clean_value
from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE, MODEL_VARIABLE
from pilotlight.domain.repository import Repository
from pilotlight.engines.flags import (
    FlagPlan,
    Ranks,
    config_path,
    decide_tensor_parallel,
    parse_boolean,
    read_config,
    translate,
    without_prefix,
)
from pilotlight.engines.flags.raw import CONFIG_FILE
from pilotlight.engines.flags.values import parse_object
from pilotlight.engines.manifest import EngineManifest
from pilotlight.engines.repositories import code_repositories, object_store_problem, repositories_needed
from pilotlight.errors import EngineEnvironmentError, InvalidInputError, PilotlightError
from pilotlight.management.problems import RejectedInputError, UnavailableError
from pilotlight.models import fit
from pilotlight.models.cache import endpoint_cache, find_whole
from pilotlight.models.catalog import BUILTIN_MODEL, ModelFacts, check_hub_name, resolve_model
from pilotlight.threads import call_in_thread

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
        load_manifest: Reads what the engine of a version (None: the usual one) understands; raises
            EngineEnvironmentError, and InvalidInputError for a version that is not installed.
        read_host: Reads what the host has.
        reserve_bytes: Host memory never given to workers.

    Attributes:
        fetching: Held once for each model that is being fetched.
    """

    def __init__(
        self,
        *,
        load_manifest: Callable[[str | None], EngineManifest],
        read_host: Callable[[], HostResources],
        reserve_bytes: int,
    ) -> None:
        self._load_manifest = load_manifest
        self._read_host = read_host
        self._reserve_bytes = reserve_bytes
        self.fetching = asyncio.Semaphore(FETCHES_MAX)

    async def manifest(self, version: str | None = None) -> EngineManifest:
        """What an installed engine understands; the usual one's where no version is asked for.

        Raises:
            InvalidInputError: This version is not installed; names those that are.
            EngineEnvironmentError: There is none; names the command that installs it.
        """
        try:
            return await asyncio.to_thread(self._load_manifest, version)
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
        asked, env = env, without_prefix(env)
        _check_model_variable(model, env)
        _check_mode(env)
        manifest = await self.manifest(fit.value_of(env, ENGINE_VERSION_VARIABLE))
        with _Unavailable():
            facts = await _resolve(model, env)
        check_architecture(facts, env, manifest)
        check_quantization(facts, env, manifest)
        added = {MODEL_VARIABLE: facts.name}
        if manifest.platform == "cpu":
            added |= fit.cpu_defaults(facts, env, await asyncio.to_thread(configured_options, env))
        full = {**env, **added}
        plan = plan_flags(full, manifest, facts.name)
        for note in (*plan.notes, *concurrency_notes(env)):
            progress("checking", note)
        fit.check_context(facts, full)
        if manifest.platform == "cpu":
            fit.check_cache(facts, full)
        devices = decide_gpu_count(facts, plan.ranks, manifest, gpu_count, kept=gpus_kept)
        if note := _spread_note(facts, plan.ranks, devices):
            progress("checking", note)
        need = await self._check_fit(facts, full, manifest, devices)
        await self._fetch_missing(facts, full, progress)
        return CheckedModel(model=facts.name, env={**asked, **added}, gpu_count=devices, memory_bytes=need)

    async def without_defaults(self, model: str, env: Mapping[str, str]) -> dict[str, str]:
        """An environment less the defaults that were once computed for a model, so that another gets its own.

        Args:
            model: The model the environment was completed for.
            env: That environment, without MODEL_NAME.
        """
        try:
            facts = await _resolve(model, without_prefix(env))
        except PilotlightError:
            # The old model may be gone; then its defaults stay, and are checked like anybody's choice.
            return dict(env)
        bare = {name: value for name, value in env.items() if name not in fit.DEFAULT_VARIABLES}
        bare = without_prefix(bare)
        defaults = fit.cpu_defaults(facts, bare, await asyncio.to_thread(configured_options, bare))
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

    async def _fetch_missing(self, facts: ModelFacts, env: Mapping[str, str], progress: Progress) -> None:
        """Have everything here that the engine will read: the model, adapters, drafts, tokenizers, code."""
        cache, folder = cache_of(env), facts.path
        others: list[tuple[Repository, Path]] = []
        for repository in repositories_needed(env):
            if repository.variable != MODEL_VARIABLE:
                others.append((repository, cache))
            else:
                # The facts' own folder may hold weights of another format than this one.
                folder = await self._have(repository, cache, facts.weight_bytes, env, progress)
        if folder is not None:
            where = cache_of({name: value for name, value in env.items() if name != "DOWNLOAD_DIR"})
            others += [(repository, where) for repository in code_repositories(env, folder)]
        for repository, place in others:
            await self._have(repository, place, None, env, progress)

    async def _have(
        self,
        repository: Repository,
        cache: Path,
        size: int | None,
        env: Mapping[str, str],
        progress: Progress,
    ) -> Path:
        """The folder of a repository, fetched where the cache does not have it whole."""
        found = await asyncio.to_thread(find_whole, cache, repository)
        if found is not None:
            return found
        check_hub_name(repository.name, field=f"env.{repository.variable}")
        if self.fetching.locked():
            message = f"{repository.name} waits until one of {FETCHES_MAX} other downloads has ended"
            progress("downloading", message)
        async with self.fetching:
            return await self._fetch(repository, cache, size, env, progress)

    async def _fetch(
        self,
        repository: Repository,
        cache: Path,
        size: int | None,
        env: Mapping[str, str],
        progress: Progress,
    ) -> Path:
        # Large; nothing but a hub model needs it.
        from pilotlight.models import hub  # noqa: PLC0415

        loop = asyncio.get_running_loop()
        stop = threading.Event()
        message = f"weights of {repository.name}"

        holders: list[str] = []

        def on_progress(done: int, total: int) -> None:
            # What was told just before belongs to it: then these bytes are somebody else's.
            told = f"{message}: waits for {holders.pop()}" if holders else message
            loop.call_soon_threadsafe(progress, "downloading", told, done, total)

        progress("downloading", message, 0, size)
        try:
            with _Unavailable():
                fetch = partial(
                    hub.fetch,
                    repository,
                    cache=cache,
                    token=hub_token(env),
                    endpoint=hub_endpoint(env),
                    on_progress=on_progress,
                    on_wait=holders.append,
                    cancelled=stop,
                )
                return await call_in_thread(fetch, name="fetch-model")
        finally:
            stop.set()


async def _resolve(model: str, env: Mapping[str, str]) -> ModelFacts:
    resolve = partial(
        resolve_model,
        wanted_model(model, env),
        cache=cache_of(env),
        token=hub_token(env),
        endpoint=hub_endpoint(env),
    )
    return await call_in_thread(resolve, name="resolve-model")


def wanted_model(model: str, env: Mapping[str, str]) -> Repository:
    """What of a model the engine will read, by the rules that the workers have."""
    # Asked by a repository's name: those that are needed are repositories, and the model may be a folder.
    (wanted, *_) = repositories_needed({**env, MODEL_VARIABLE: BUILTIN_MODEL})
    return replace(wanted, name=model)


def check_architecture(facts: ModelFacts, env: Mapping[str, str], manifest: EngineManifest) -> None:
    """Return when the engine can load this kind of model.

    Raises:
        InvalidInputError: It does not know the architecture; names the nearest ones that it knows.
    """
    if facts.kind == "object":
        if (problem := object_store_problem(env, None)) is not None:
            raise InvalidInputError(f"model {facts.name} cannot be read: {problem}", field="env.LOAD_FORMAT")
        return
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


def check_quantization(facts: ModelFacts, env: Mapping[str, str], manifest: EngineManifest) -> None:
    """Return when nothing says that the engine cannot run weights in this form.

    Raises:
        InvalidInputError: It does not know the method, or has no way to run this variant of it here; says
            which it can run.
    """
    if "quantization_config" in _overrides(env):
        return
    for form in facts.quantization_forms:
        method = form.partition(" ")[0]
        known = manifest.registered.get("QUANTIZATION")
        reason = manifest.quantizations.get(form)
        if known and method not in known:
            reason = "it does not know that method"
        if reason:
            can = sorted(each for each, problem in manifest.quantizations.items() if not problem)
            hint = f"; use a checkpoint in one of: {', '.join(can)}" if can else ""
            msg = (
                f"model {facts.name} has its weights in the form {form}, which vLLM {manifest.version} "
                f"cannot run here: {reason}{hint}"
            )
            raise InvalidInputError(msg, field="model")


def decide_gpu_count(
    facts: ModelFacts, ranks: Ranks, manifest: EngineManifest, asked: int | None, *, kept: int = 0
) -> int:
    """GPUs per worker.

    Args:
        facts: The model.
        ranks: Over how many GPUs the environment spreads the model.
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
    spread = decide_tensor_parallel(
        ranks, gpus=None, heads=facts.num_attention_heads, kv_heads=facts.num_kv_heads
    )
    if spread.error:
        msg = f"{ranks.variable} is {ranks.tensor}, but {spread.error}, {facts.name}"
        raise InvalidInputError(msg, field=f"env.{ranks.variable}")
    needed = (spread.size or 1) * ranks.pipeline * ranks.data
    if asked == 0:
        msg = f"gpu_count is 0, but the installed engine (vLLM {manifest.version}) is built for GPUs"
        raise InvalidInputError(msg, field="gpu_count")
    if asked is not None and asked < needed:
        msg = f"gpu_count is {asked}, but the environment asks for {needed} parallel ranks, one GPU each"
        raise InvalidInputError(msg, field="gpu_count")
    return asked or max(needed, kept)


def cache_of(env: Mapping[str, str]) -> Path:
    """Where the workers of an endpoint look for hub models: the endpoint's setting, else the gateway's."""
    return endpoint_cache(env, os.environ)


def hub_endpoint(env: Mapping[str, str]) -> str | None:
    """The URL of the hub that an endpoint's workers ask; None is the one that this process is set to."""
    return clean_value(env.get("HF_ENDPOINT"))


def hub_token(env: Mapping[str, str]) -> str | None:
    """The Hugging Face token of an endpoint, else the gateway's own; None when there is none.

    The gateway's goes to the gateway's hub and to no other that an endpoint names.
    """
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    elsewhere = hub_endpoint(env) not in {None, clean_value(os.environ.get("HF_ENDPOINT"))}
    sources = (env,) if elsewhere else (env, os.environ)
    found = (clean_value(source.get(name)) for source in sources for name in names)
    return next((token for token in found if token is not None), None)


def configured_options(env: Mapping[str, str]) -> frozenset[str] | None:
    """Names in capitals of what the engine's configuration file sets; None where it cannot be read here."""
    texts = {}
    path = clean_value(env.get("VLLM_CONFIG_FILE")) or CONFIG_FILE
    try:
        texts[path] = Path(path).read_text(encoding="utf-8")
        return frozenset(read_config(texts[path]))
    except (OSError, ValueError):
        return frozenset() if config_path(env, texts) is None else None


def _check_model_variable(model: str, env: Mapping[str, str]) -> None:
    named = fit.value_of(env, MODEL_VARIABLE)
    if named is not None and named != model:
        msg = f"env.{MODEL_VARIABLE} is {named!r}, but model is {model!r}; leave the variable out"
        raise InvalidInputError(msg, field=f"env.{MODEL_VARIABLE}")


def _check_mode(env: Mapping[str, str]) -> None:
    """Workers of this kind take jobs; a server on a port, which asks for no key, is nothing for them."""
    mode = fit.value_of(env, "WORKER_MODE") or "queue"
    if mode.lower() != "queue":
        msg = (
            f"env.WORKER_MODE is {mode!r}, but the kind vllm knows only 'queue'; a worker that serves HTTP "
            "itself is the command `pilotlight worker` of an endpoint of the kind load-balancer"
        )
        raise InvalidInputError(msg, field="env.WORKER_MODE")


def check_flags(env: Mapping[str, str], manifest: EngineManifest, model: str) -> Sequence[str]:
    """What the owner should know of an environment that the engine accepts, one sentence each.

    Raises:
        RejectedInputError: The engine would refuse it; names every variable.
    """
    return plan_flags(env, manifest, model).notes


def concurrency_notes(env: Mapping[str, str]) -> tuple[str, ...]:
    """What to say of a variable that has a meaning for our worker program, but none below a gateway."""
    value = fit.value_of(env, "MAX_CONCURRENCY")
    if value is None:
        return ()
    note = f"env.MAX_CONCURRENCY={value} has no effect: the endpoint's own concurrency counts"
    return (f"{note}, how many requests and jobs one worker takes at a time",)


def plan_flags(env: Mapping[str, str], manifest: EngineManifest, model: str) -> FlagPlan:
    """What the engine would be told; errors as in `check_flags`."""
    plan = translate(env, manifest, served_names=[model])
    if plan.errors:
        errors = [f"$.env.{error.variable}: {error.message}" for error in plan.errors]
        message = "; ".join(error.message for error in plan.errors)
        raise RejectedInputError(
            f"the engine (vLLM {manifest.version}) would refuse this environment: {message}", errors=errors
        )
    return plan


def _spread_note(facts: ModelFacts, ranks: Ranks, devices: int) -> str:
    """How a worker will spread the model over its GPUs, where that decides itself (vllm-worker.md §4.6)."""
    heads, kv_heads = facts.num_attention_heads, facts.num_kv_heads
    return decide_tensor_parallel(ranks, gpus=devices, heads=heads, kv_heads=kv_heads).note


def _overridden(env: Mapping[str, str]) -> tuple[str, ...]:
    named = _overrides(env).get("architectures")
    return tuple(str(name) for name in named) if isinstance(named, list) else ()


def _overrides(env: Mapping[str, str]) -> Mapping[str, object]:
    return parse_object(clean_value(env.get("HF_OVERRIDES")) or "{}") or {}


class _Unavailable:
    """Tells a hub that does not answer from input that is wrong; the hub's own classes are loaded lazily."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Translate."""
        if isinstance(error, PilotlightError) and not isinstance(error, InvalidInputError):
            raise UnavailableError(str(error)) from error
