"""The table of commands and what all of them share: help, errors, exit codes.

A command is a function with Typer's annotations, or a `typer.Typer` with commands of its own. It raises
`PilotlightError` for what the user should read (exit code 1) and `typer.BadParameter` for wrong usage (2).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from pilotlight import __version__
from pilotlight.cli import SIGPIPE_CODE
from pilotlight.errors import PilotlightError

UsageError: type[typer.TyperException] = typer.BadParameter.__mro__[1]
"""Every kind of wrong usage; Typer exports only some of its subclasses."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command lives and its line in the list of commands.

    Attributes:
        module: Imported when the command is used; a module that does not exist hides the command.
        attribute: The function, or the `typer.Typer`.
        section: Heading under which the help lists it.
        summary: First line of its help.
    """

    module: str
    attribute: str
    section: str
    summary: str


_CLI = "pilotlight.cli"
COMMANDS: dict[str, Entry] = {
    "up": Entry(
        f"{_CLI}.up", "up_command", "Serve", "Start the gateway on this machine and keep it running."
    ),
    "deploy": Entry(
        f"{_CLI}.deploy",
        "deploy_command",
        "Serve",
        "Make an endpoint of a model or a command, or revise one.",
    ),
    "scale": Entry(
        f"{_CLI}.manage", "scale_command", "Serve", "Change how many workers an endpoint may have."
    ),
    "rm": Entry(f"{_CLI}.manage", "remove_command", "Serve", "Delete an endpoint with its workers and jobs."),
    "keys": Entry(f"{_CLI}.keys", "app", "Serve", "Create, list, change and revoke API keys."),
    "webhooks": Entry(
        f"{_CLI}.webhooks", "app", "Serve", "Show what signs webhooks, and deal with undelivered ones."
    ),
    "models": Entry(
        f"{_CLI}.models", "app", "Serve", "Fetch, list, check and remove models; list architectures."
    ),
    "chat": Entry(f"{_CLI}.chat", "chat_command", "Use", "Talk to an endpoint's model."),
    "run": Entry(f"{_CLI}.one_job", "run_command", "Use", "Submit a job to an endpoint."),
    "status": Entry(f"{_CLI}.one_job", "status_command", "Use", "Show a job."),
    "cancel": Entry(f"{_CLI}.one_job", "cancel_command", "Use", "Cancel a job."),
    "retry": Entry(f"{_CLI}.one_job", "retry_command", "Use", "Queue a failed job again."),
    "purge": Entry(f"{_CLI}.jobs", "purge_command", "Use", "Remove all queued jobs of an endpoint."),
    "ls": Entry(f"{_CLI}.listing", "list_command", "Look", "List endpoints."),
    "jobs": Entry(f"{_CLI}.jobs", "jobs_command", "Look", "List an endpoint's jobs."),
    "ps": Entry(f"{_CLI}.listing", "workers_command", "Look", "List workers."),
    "logs": Entry(f"{_CLI}.logs", "logs_command", "Look", "Show what workers wrote."),
    "starts": Entry(
        f"{_CLI}.history", "starts_command", "Look", "Show the latest starts of an endpoint's workers."
    ),
    "launchers": Entry(
        f"{_CLI}.launchers", "launchers_command", "Look", "List the launchers that engines are forked from."
    ),
    "usage": Entry(f"{_CLI}.history", "usage_command", "Look", "Show the time that workers have used."),
    "doctor": Entry(f"{_CLI}.doctor", "doctor_command", "Look", "Check this machine and say what to mend."),
    "bench": Entry("pilotlight.bench", "app", "Measure", "Measure Pilotlight on this machine."),
    "worker": Entry(
        f"{_CLI}.worker", "app", "Inside", "Run the worker program; the gateway starts it for you."
    ),
}


def available() -> list[str]:
    """Names of the commands whose module is installed, in the order of the help."""
    return [name for name, entry in COMMANDS.items() if find_spec(entry.module) is not None]


class CommandTable(typer.core.TyperGroup):
    """The root command: imports a command when it is used, and turns errors into messages and exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the signature is Typer's
        """Names of all commands."""
        return available()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The command of this name, or None."""
        return load_command(cmd_name) if cmd_name in available() else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the arguments name, and the arguments left for it."""
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None:
            near = difflib.get_close_matches(name, available(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return name, command, args[1:]

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the list of commands by section, without importing one of them."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in available():
            sections.setdefault(COMMANDS[name].section, []).append((name, COMMANDS[name].summary))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows, col_spacing=4)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what goes wrong ends as one message on standard error and an exit code."""
        arguments = [*ctx._protected_args, *ctx.args]  # noqa: SLF001 - no public name holds what is left to parse
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        as_json = "--json" in options
        try:
            return super().invoke(ctx)
        except PilotlightError as error:
            report_error(str(error), as_json=as_json)
            raise typer.Exit(1) from error
        except BrokenPipeError as error:
            raise typer.Exit(SIGPIPE_CODE) from error
        except UsageError as error:
            if not as_json:
                raise
            report_error(error.format_message(), as_json=True)
            raise typer.Exit(2) from error


def report_error(message: str, *, as_json: bool) -> None:
    """Write an error for the user to standard error: `{"error": …}` or one line of text."""
    sys.stdout.flush()
    text = json.dumps({"error": message}) if as_json else f"error: {message}"
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - this is where errors are printed


def load_command(name: str) -> Any:
    """The Typer command of this name, its module imported."""
    entry = COMMANDS[name]
    target = getattr(importlib.import_module(entry.module), entry.attribute)
    command = typer.main.get_command(target if isinstance(target, typer.Typer) else _wrap(target))
    command.name = name
    return command


def _wrap(function: Callable[..., object]) -> typer.Typer:
    single = new_app()
    single.command(help=help_text(function))(function)
    return single


def new_app() -> typer.Typer:
    """An empty Typer application with the settings that all of ours share."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def help_text(function: Callable[..., object]) -> str:
    """A function's docstring as help: examples keep their lines."""
    # The help formatter leaves a paragraph alone that begins with a line of one backspace character.
    return "\n\n".join(
        f"\b\n{part}" if part.startswith("Examples:") else part
        for part in (inspect.getdoc(function) or "").split("\n\n")
    )


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"pilotlight {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=CommandTable,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every command that prints something takes --json. Exit codes: 0 done, 1 failed, 2 wrong usage.",
)


@app.callback()
def root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Serverless LLM endpoints on machines you own."""
