"""`python -m pilotlight.worker.healthcheck`: whether the engine of this container answers its health check.

For container engines and orchestrators that ask the image; our own gateway is told by the worker program.
Asks the engine's socket in the run folder. Standard library only, since it runs every few seconds.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Final

from pilotlight.core.worker_environment import RUN_FOLDER_VARIABLE

TIMEOUT_SECONDS: Final = 5.0
ENGINE_SOCKET: Final = "engine.sock"

_QUESTION: Final = b"GET /health HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n"


def problem_of(folder: Path) -> str | None:
    """What is the matter with the engine of a run folder; None when it answers 200."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT_SECONDS)
            connection.connect(str(folder / ENGINE_SOCKET))
            connection.sendall(_QUESTION)
            status = connection.makefile("rb").readline().split(b" ")[1:2]
    except OSError as error:
        return f"the engine does not answer: {error}"
    return None if status == [b"200"] else f"the engine answered {b''.join(status).decode() or 'nothing'}"


def main() -> int:
    """The exit code: 0 healthy, 1 not."""
    folder = os.environ.get(RUN_FOLDER_VARIABLE)
    problem = problem_of(Path(folder)) if folder else f"{RUN_FOLDER_VARIABLE} is not set"
    if problem is not None:
        sys.stdout.write(f"{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
