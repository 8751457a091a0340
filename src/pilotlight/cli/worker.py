"""`pilotlight worker`: hand over to the worker program.

It reads everything it needs from its environment; arguments go through untouched.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from pilotlight.cli.root import new_app

app = new_app()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def worker_command(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed to the worker program as they are.")
    ] = None,
) -> None:
    """Run the worker program; the gateway starts it for you."""
    # Its own imports are kept small; the management of endpoints must not ride along with them.
    code = importlib.import_module("pilotlight.worker.main").main(arguments or [])
    raise typer.Exit(code if isinstance(code, int) else 0)
