"""The `pilotlight` command. `main` is the entry point; `root` holds the table of commands.

Each command lives in a module of its own that is imported when the command is used, so that `pilotlight
--help` and `pilotlight worker` start without an HTTP client, a table printer or a web framework.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

SIGINT_CODE = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT, as a shell has it."""
SIGPIPE_CODE = 141
"""Exit code after the reader of our output went away: 128 and the number of SIGPIPE."""

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process and end it with the command's exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A model's words may not fit the terminal's encoding; that must not end the command.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        code = _run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = SIGINT_CODE
    except BrokenPipeError:
        code = SIGPIPE_CODE
    if code in {SIGINT_CODE, SIGPIPE_CODE}:
        _silence_output()
    sys.exit(code)


def _run() -> int:
    arguments = sys.argv[1:]
    if arguments == ["worker"]:
        # One of these runs beside every engine for hours; it shall not carry the command line's modules.
        from pilotlight.worker.main import main as run_worker  # noqa: PLC0415

        return run_worker()
    from pilotlight.cli.root import app  # noqa: PLC0415 - keeps Ctrl-C during this import inside `main`

    try:
        app(prog_name="pilotlight")
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        return 0 if end.code is None else 1
    return 0


def _silence_output() -> None:
    """Let the interpreter's last flush go nowhere; the reader is gone, or wants no more."""
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
