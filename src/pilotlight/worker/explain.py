"""`pilotlight worker --explain`: what this environment would start, variable by variable.

Nothing is started. All that the worker program does before it spawns the engine is done here as well,
downloads excepted: the same functions answer, so what is shown is what would run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE
from pilotlight.engines.flags import (
    Explanation,
    FlagError,
    FlagPlan,
    Source,
    clean_value,
    mask_secrets,
    mask_value,
    named_files,
    translate,
)
from pilotlight.engines.flags.translation import MODEL_ID
from pilotlight.engines.manifest import EngineManifest, load_manifest
from pilotlight.errors import EngineEnvironmentError
from pilotlight.worker.command import (
    EngineCommand,
    fallback_model,
    plan_command,
    read_texts,
    version_problem,
)
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.errors import ConfigError, ModelMissingError
from pilotlight.worker.gpus import visible_gpus
from pilotlight.worker.model import Baked, look_for_model, read_baked

TAKE_URL: Final = "RUNPOD_WEBHOOK_GET_JOB"

_SHOWN_CHARS_MAX: Final = 60
_ANY_TAKE_URL: Final = "http://127.0.0.1/job-take/$ID?explain"
_RUN_FOLDER: Final = Path("/tmp/pilotlight-worker-XXXXXXXX")  # noqa: S108 - stands for a folder made at the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What would be started.

    Attributes:
        model: The model as the engine would get it; "" if it cannot be told.
        engine: Version and platform of the installed vLLM; None if nobody has asked it.
        variables: One line for each variable and flag.
        notes: What the log of a start would say.
        errors: What would refuse the start.
        argv: The engine's command line, secrets hidden; empty if it cannot be told.
    """

    model: str
    engine: Mapping[str, str] | None
    variables: tuple[Explanation, ...]
    notes: tuple[str, ...]
    errors: tuple[FlagError, ...]
    argv: tuple[str, ...]


def explain_environment(env: Mapping[str, str], *, python: str, root: Path = Path("/")) -> Report:
    """What a worker with this environment would start; reads small files, starts nothing.

    Args:
        env: The process environment.
        python: Interpreter to start the engine with where `PILOTLIGHT_ENGINE_HOME` names none.
        root: Where an image says what is baked into it.
    """
    notes: list[str] = []
    errors: list[FlagError] = []
    config: WorkerConfig | None = None
    given = dict(env)
    if not clean_value(env.get(TAKE_URL)):
        notes.append(f"{TAKE_URL} is not set: the platform sets it, without it there are no jobs to take")
        given[TAKE_URL] = _ANY_TAKE_URL
    try:
        baked = read_baked(root, env)
        fallback = (baked.repository or baked.variables["MODEL_NAME"]) if baked else fallback_model(env)
        config = WorkerConfig.from_environment(given, python=python, fallback_model=fallback)
    except ModelMissingError as error:
        baked = None
        errors.append(_error("", error.failure.cause))
    except ConfigError as error:
        errors.append(_error("", str(error)))
    home = clean_value(env.get("PILOTLIGHT_ENGINE_HOME"))
    manifest = _manifest(Path(home) if home else Path(python).parent.parent, notes)
    if (problem := version_problem(env, manifest)) is not None:
        errors.append(_error(ENGINE_VERSION_VARIABLE, problem))
    if config is None:
        plan = translate(env, manifest, texts=read_texts(named_files(env)))
        command = EngineCommand((), (), plan)
        source = ""
    else:
        source, command, plan = _plan(config, env, manifest, baked, root, notes, errors)
    # What the worker program cannot read, both say; the flags' own sentence names what is legal.
    named = {error.variable for error in plan.errors}
    errors = [error for error in errors if not any(name in error.message for name in named)]
    own = _workers_own(config, source, env, baked)
    flagged = {line.variable for line in own if line.variable == "MODEL_NAME"}
    lines = (*(line for line in plan.explanations if line.flag or line.variable not in flagged), *own)
    return Report(
        model=mask_value(source),
        engine=None if manifest is None else {"vllm": manifest.version, "platform": manifest.platform},
        variables=tuple(sorted(lines, key=lambda line: (not line.variable, line.variable))),
        notes=tuple(dict.fromkeys(mask_value(note) for note in (*notes, *plan.notes))),
        errors=(*errors, *plan.errors),
        argv=tuple(mask_secrets([*command.argv, *_address(config)])) if command.argv else (),
    )


def render_text(report: Report) -> str:
    """The report as a table for people, with notes, errors and the command line below."""
    rows = [("VARIABLE", "FLAG", "VALUE", "SOURCE", "")]
    rows += [
        (line.variable or "(worker)", line.flag or "-", _short(line.value), str(line.source), line.note)
        for line in report.variables
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    engine = report.engine
    about = f"vLLM {engine['vllm']} ({engine['platform']})" if engine else "an unknown vLLM"
    text = [*table, "", f"model: {report.model or 'unknown'}, served by {about}"]
    for title, sentences in (("notes", report.notes), ("errors", [error.message for error in report.errors])):
        if sentences:
            text += ["", f"{title}:", *(f"  {sentence}" for sentence in sentences)]
    if report.argv:
        text += ["", "command:", f"  {shlex.join(report.argv)}"]
    verdict = (
        "This environment cannot start a worker." if report.errors else "This environment can start a worker."
    )
    return "\n".join([*text, "", verdict, ""])


def render_json(report: Report) -> str:
    """The report as one JSON object."""
    return json.dumps(asdict(report), indent=1) + "\n"


def _plan(
    config: WorkerConfig,
    env: Mapping[str, str],
    manifest: EngineManifest | None,
    baked: Baked | None,
    root: Path,
    notes: list[str],
    errors: list[FlagError],
) -> tuple[str, EngineCommand, FlagPlan]:
    """The model, the command line with folders in it, and the plan of the variables as they are."""
    try:
        model, missing = look_for_model(config.environment, engine_home=config.engine_home, root=root)
    except ModelMissingError as error:
        errors.append(_error("MODEL_NAME", error.failure.cause))
        return (
            "",
            EngineCommand((), (), FlagPlan(argv=())),
            _plan_of(config, env, manifest, "", (), baked).plan,
        )
    notes += model.notes
    notes += [f"{one} ({one.variable}) is not here yet and would be downloaded first" for one in missing]
    # Counted once: it may take a second.
    on_gpu = manifest is not None and manifest.platform == "cuda"
    gpus = visible_gpus(model.environment) if on_gpu else None
    folder = config.run_folder or _RUN_FOLDER
    command = plan_command(
        config, model.environment, manifest, source=model.source, names=model.names, folder=folder, gpus=gpus
    )
    return model.source, command, _plan_of(config, env, manifest, model.source, model.names, baked, gpus).plan


def _plan_of(
    config: WorkerConfig,
    env: Mapping[str, str],
    manifest: EngineManifest | None,
    source: str,
    names: Sequence[str],
    baked: Baked | None,
    gpus: int | None = None,
) -> EngineCommand:
    recorded = {**baked.variables, MODEL_ID: baked.repository or ""} if baked is not None else None
    return plan_command(
        config,
        env,
        manifest,
        source=source,
        names=tuple(names),
        folder=config.run_folder or _RUN_FOLDER,
        baked=recorded,
        gpus=gpus,
    )


def _workers_own(
    config: WorkerConfig | None, source: str, env: Mapping[str, str], baked: Baked | None
) -> tuple[Explanation, ...]:
    if config is None or not source:
        return ()
    named = clean_value(env.get("MODEL_NAME"))
    by = Source.VARIABLE if named else Source.CONFIG_FILE
    model = Explanation(
        variable="MODEL_NAME" if named or baked else "VLLM_CONFIG_FILE",
        flag="--model",
        value=mask_value(source),
        source=Source.BAKED if baked else by,
    )
    flag, value = _address(config)
    return (model, Explanation(variable="", flag=flag, value=value, source=Source.OWNED))


def _address(config: WorkerConfig | None) -> tuple[str, str]:
    folder = (config.run_folder if config is not None else None) or _RUN_FOLDER
    return "--uds", str(folder / "engine.sock")


def _manifest(home: Path, notes: list[str]) -> EngineManifest | None:
    try:
        return load_manifest(home)
    except EngineEnvironmentError as error:
        notes.append(str(error))
        return None


def _error(variable: str, message: str) -> FlagError:
    return FlagError(variable=variable, value="", message=mask_value(message))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS_MAX else f"{line[: _SHOWN_CHARS_MAX - 1]}…"
