"""`pilotlight worker`: hand over to the worker program.

It reads everything it needs from its environment. `--explain` shows what it makes of that; where no engine is
named, the installation's own is asked.
"""

from __future__ import annotations

import importlib
import os
from typing import Annotated

import typer

from pilotlight.cli.root import new_app
from pilotlight.core.variables import clean_value
from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE
from pilotlight.settings import load_settings

app = new_app()


@app.command()
def worker_command(
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show what each variable of the environment becomes, and the engine's command line; start "
            "nothing. Ends with 1 where the environment would be refused.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --explain: one JSON object instead of a table.")
    ] = False,
) -> None:
    """Run the worker program; the gateway starts it for you.

    Its environment tells it everything: MODEL_NAME, any option of vLLM by its name in capitals (MAX_MODEL_LEN
    for --max-model-len), the variables of RunPod's worker-vllm, VLLM_EXTRA_ARGS for raw arguments,
    VLLM_CONFIG_FILE. To try an environment out:

    MODEL_NAME=pilotlight/ember MAX_NUM_SEQS=64 pilotlight worker --explain
    """
    if as_json and not explain:
        raise typer.BadParameter("--json goes with --explain")
    if explain and not os.environ.get("PILOTLIGHT_ENGINE_HOME"):
        version = clean_value(os.environ.get(ENGINE_VERSION_VARIABLE))
        os.environ["PILOTLIGHT_ENGINE_HOME"] = str(load_settings().engine_home_of(version))
    arguments = [name for name, given in (("--explain", explain), ("--json", as_json)) if given]
    # Its own imports are kept small; the management of endpoints must not ride along with them.
    raise typer.Exit(importlib.import_module("pilotlight.worker.main").main(arguments))
