"""One engine that imports once and forks its other processes: `python -m pilotlight_engine.serve ARGUMENTS`.

The arguments are those of vLLM's server. Whenever something speaks against forking, vLLM's own entry point
takes this process over, and a line on standard error says why.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pilotlight_engine.child import ENTRY_POINT, run_entry_point
from pilotlight_engine.forking import trial
from pilotlight_engine.imports import forbidding, import_engine, single_threaded
from pilotlight_engine.libraries import start_again

DISTRIBUTION = Path(__file__).parents[1]


def model_classes(arguments: Sequence[str]) -> tuple[str, ...]:
    """The classes that the model's `config.json` names; none where it is not in a folder."""
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, attached = name.partition("=")
        if option == "--model":
            try:
                config = json.loads(Path(attached or value, "config.json").read_text(encoding="utf-8"))
                return tuple(each for each in config["architectures"] if isinstance(each, str))
            except (OSError, ValueError, KeyError, TypeError):
                return ()
    return ()


def prepare(arguments: Sequence[str]) -> str:
    """Imports everything; what speaks against forking from here, "" if nothing does."""
    if (method := os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork")) != "fork":
        return f"VLLM_WORKER_MULTIPROC_METHOD is {method}"
    gc.disable()
    try:
        if problem := import_engine(lambda: None, model_classes(arguments)):
            return problem
    except Exception as error:  # noqa: BLE001 - whatever a library raises while it is imported
        return f"{type(error).__name__}: {error}"
    gc.collect()
    gc.freeze()
    trial()
    gc.enable()
    return forbidding() or single_threaded()


def start_plain(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by vLLM's own entry point, without anything of ours."""
    env = dict(os.environ)
    paths = env.pop("PYTHONPATH", "").split(":")
    if others := [path for path in paths if path and Path(path) != DISTRIBUTION]:
        env["PYTHONPATH"] = ":".join(others)
    env.pop("PILOTLIGHT_ENGINE_FORK", None)
    if env.get("VLLM_WORKER_MULTIPROC_METHOD") == "fork":
        del env["VLLM_WORKER_MULTIPROC_METHOD"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", ENTRY_POINT, *arguments], env)


def main(arguments: list[str]) -> None:
    """Serves until it is told to end."""
    start_again("pilotlight_engine.serve", arguments)
    if problem := prepare(arguments):
        sys.stderr.write(f"pilotlight_engine: vLLM is started as it is: {problem}\n")
        start_plain(arguments)
    run_entry_point()


if __name__ == "__main__":
    main(sys.argv[1:])
