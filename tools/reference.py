"""Writes docs/reference from the code: settings, commands' help, states of a job, variables of the worker.

Run it with the gateway's environment after either changed; `--check` says whether the files are current.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from typer.testing import CliRunner

from pilotlight.cli.root import app, available, load_command
from pilotlight.core.lifecycle import transition_table
from pilotlight.engines.flags.variables import GROUPS, Kind, Variable
from pilotlight.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"


def settings_page() -> str:
    """The settings, section by section."""
    lines = [
        "# Settings",
        "",
        "Made by `tools/reference.py` from `src/pilotlight/settings.py`. A setting is an environment",
        "variable or a key in `pilotlight.toml` in the data folder (or the file named by",
        "`PILOTLIGHT_CONFIG`); the environment wins. Unknown keys and bad values end the start with a",
        "message that names them. The data folder itself is `PILOTLIGHT_HOME`.",
    ]
    for section, field in Settings.model_fields.items():
        fields = getattr(field.annotation, "model_fields", None)
        if fields is None:
            continue
        lines += ["", f"## [{section}]", "", (field.annotation.__doc__ or "").strip(), ""]
        lines += ["| key | environment | default | meaning |", "|---|---|---|---|"]
        for name, item in fields.items():
            variable = f"PILOTLIGHT_{section.upper()}__{name.upper()}"
            meaning = " ".join((item.description or "").split())
            lines.append(f"| `{name}` | `{variable}` | `{item.default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1")
    runner = CliRunner()

    def shown(*arguments: str) -> list[str]:
        result = runner.invoke(app, [*arguments, "--help"], prog_name="pilotlight", terminal_width=100)
        text = result.output
        return ["", "```", *(line.rstrip() for line in text.strip("\n").splitlines()), "```"]

    lines = ["# Commands", "", "Made by `tools/reference.py` from the commands' own help.", *shown()]
    for name in available():
        lines += ["", f"## pilotlight {name}", *shown(name)]
        for inner in getattr(load_command(name), "commands", {}):
            lines += ["", f"### pilotlight {name} {inner}", *shown(name, inner)]
    return "\n".join(lines) + "\n"


def job_states_page() -> str:
    """Which event leads a job from which status to which other ones."""
    lines = [
        "# States of a job",
        "",
        "Made by `tools/reference.py` from `JOB_TRANSITIONS` in `src/pilotlight/core/lifecycle.py`. An event",
        "that has no row for the status in which a job is changes nothing, so one that comes late, twice or",
        "out of order does no harm; nor does one that names another attempt or worker than the running ones.",
        "",
        transition_table(),
    ]
    return "\n".join(lines) + "\n"


def worker_variables_page() -> str:
    """Every variable of the vLLM worker and what becomes of it, group by group."""
    lines = [
        "# Variables of the vLLM worker",
        "",
        "Made by `tools/reference.py` from `src/pilotlight/engines/flags/variables.py`. Set them with",
        "`pilotlight deploy --env NAME=VALUE`, or in the environment of the worker program or its image.",
        "`pilotlight worker --explain` shows what becomes of those that are set, and starts nothing. Every",
        "option of the installed vLLM that is not listed here is set by its name in capitals as well:",
        "`--kv-offloading-size` by `KV_OFFLOADING_SIZE`.",
    ]
    for title, variables in GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| variable | kind | documented default | becomes |",
            "|---|---|---|---|",
        ]
        for row in variables:
            default = f"`{row.default}`" if row.default else ""
            lines.append(f"| `{row.name}` | {row.kind} | {default} | {_becomes(row)} |")
    return "\n".join(lines) + "\n"


def _becomes(row: Variable) -> str:
    option = f"--{(row.option or row.name).lower().replace('_', '-')}"
    return f"`{option}`" if row.kind in {Kind.OPTION, Kind.ALIAS} else row.note


PAGES = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "job-states.md": job_states_page,
    "worker-variables.md": worker_variables_page,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when a page is out of date"
    )
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(("out of date: " if check else "written: ") + ", ".join(stale))
        if check:
            print("run .venv/bin/python tools/reference.py", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
