"""`pilotlight worker` and `python -m pilotlight.worker`: one worker, told what to do by its environment."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop

from pilotlight.core.storage import VOLUME, storage_environment
from pilotlight.core.variables import clean_value
from pilotlight.domain.worker import Failure
from pilotlight.worker.command import fallback_model
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.errors import ConfigError, ModelMissingError
from pilotlight.worker.log import LogSink
from pilotlight.worker.model import read_baked
from pilotlight.worker.program import Program
from pilotlight.worker.state import report_failure

USAGE = """usage: pilotlight worker [--explain [--json]]

Runs one vLLM worker: takes jobs, serves requests, ends when told to. Its environment tells it everything.

  --explain   show what each variable becomes, and the engine's command line; start nothing.
              Exit code 0: this environment can start a worker; 1: it would be refused.
  --json      with --explain: one JSON object instead of a table

The environment:

  MODEL_NAME=org/model                the model: a hub id, a folder, an object store, or pilotlight/ember
  MAX_MODEL_LEN=8192, DTYPE=...       any option of vLLM by its name in capitals: --max-model-len
  LORA_MODULES, SPECULATIVE_MODEL,    names of RunPod's worker-vllm, older ones too; what is obsolete is
  CUSTOM_CHAT_TEMPLATE, ...           named in the log with its replacement
  VLLM_EXTRA_ARGS='--seed 7'          arguments for vLLM as they are; they win over variables
  VLLM_CONFIG_FILE=/x.yaml            a file of vLLM's options; variables win over it
  MAX_CONCURRENCY, DRAIN_TIMEOUT,     how many jobs at a time, how long they may run
  REQUEST_TIMEOUT, ...                and how they are answered
  HF_TOKEN, BASE_PATH, HF_HUB_CACHE   access to models, and where they are kept
  RUNPOD_*, PILOTLIGHT_*              set by the platform: where jobs come from, where results go

Example: MODEL_NAME=pilotlight/ember MAX_NUM_SEQS=64 pilotlight worker --explain
"""


def main(argv: Sequence[str] = ()) -> int:
    """The exit code of one worker's life: 0 ended on request, 1 failed or wrongly configured, 2 wrong usage.

    With `--explain`: 0 when the environment could start a worker, else 1.

    Args:
        argv: Command-line arguments after the program's name.
    """
    if set(argv) & {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return 0
    if set(argv) - {"--explain", "--json"} or (argv and "--explain" not in argv):
        sys.stderr.write(USAGE)
        return 2
    env = {**os.environ, **storage_environment(os.environ, volume_present=Path(VOLUME).is_dir())}
    if argv:
        return _explain(env, as_json="--json" in argv)
    try:
        config = WorkerConfig.from_environment(env, python=sys.executable, fallback_model=_other_model(env))
    except ConfigError as error:
        sys.stderr.write(f"pilotlight worker: {error}\n")
        if url := clean_value(env.get("PILOTLIGHT_WORKER_STATE_URL")):
            failure = Failure(kind="bad_value", cause=str(error), advice="Correct or remove the variable.")
            asyncio.run(report_failure(url, env.get("RUNPOD_AI_API_KEY", ""), failure))
        return 1
    # Sockets, templates and everything else written from here on is for the owner only.
    os.umask(0o077)
    log = LogSink()
    try:
        return uvloop.run(_run(config, log))
    finally:
        log.close()


def _explain(env: Mapping[str, str], *, as_json: bool) -> int:
    # Workers need none of it, and they stay small.
    from pilotlight.worker.explain import explain_environment, render_json, render_text  # noqa: PLC0415

    report = explain_environment(env, python=sys.executable)
    text = render_json(report) if as_json else render_text(report)
    # What the output cannot show (variables may hold any bytes) is written as an escape.
    coding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(coding, "backslashreplace").decode(coding))
    return 1 if report.errors else 0


def _other_model(env: Mapping[str, str]) -> str | None:
    """What to serve where `MODEL_NAME` is unset: the image's own model, or the configuration file's."""
    try:
        baked = read_baked(Path("/"), env)
    except ModelMissingError as error:
        # The start says the same, and tells the platform.
        return error.failure.cause
    return (baked.repository or baked.variables["MODEL_NAME"]) if baked is not None else fallback_model(env)


async def _run(config: WorkerConfig, log: LogSink) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: log.event("worker.defect", message=context.get("message")))
    return await Program(config, log).run()
