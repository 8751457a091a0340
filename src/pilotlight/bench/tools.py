"""Programs from outside that a benchmark needs: where they are, and what to do where they are not."""

from __future__ import annotations

import os
import shutil
from importlib.resources import files
from pathlib import Path

from pilotlight.bench.processes import Bench, Child, children_of, free_port
from pilotlight.cli.root import UsageError

HARNESS = Path(str(files("pilotlight.bench"))) / "harness"

_ADMIN_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")
"""Where distributions put nginx, and many an ordinary user's path does not look."""


def find_tools(*names: str) -> dict[str, str]:
    """Paths of these programs.

    Raises:
        UsageError: Some are not installed; names all of them and the command that installs them.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_ADMIN_FOLDERS])
    found = {name: shutil.which(name, path=path) for name in names}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        raise UsageError(
            f"this benchmark needs {' and '.join(missing)}, not found on this machine; on Debian and Ubuntu: "
            f"apt-get install {' '.join(missing)}"
        )
    return {name: where for name, where in found.items() if where is not None}


class Nginx:
    """nginx with one worker in front of one engine; ended with its `Bench`.

    Args:
        bench: Where it runs.
        program: Path of nginx.
        engine_port: Where it passes everything.

    Attributes:
        port: Where it listens.
        pids: Master and worker.
    """

    def __init__(self, bench: Bench, program: str, engine_port: int) -> None:
        self.port = free_port()
        folder = bench.folder / f"nginx-{self.port}"
        folder.mkdir(mode=0o755)
        text = (HARNESS / "nginx.conf").read_text(encoding="ascii")
        text = text.replace("ENGINE_PORT", str(engine_port)).replace("LISTEN_PORT", str(self.port))
        (folder / "nginx.conf").write_text(text, encoding="ascii")
        self._child: Child = bench.start(
            f"nginx {self.port}", [program, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
        )
        self._child.wait_port(self.port)

    @property
    def pids(self) -> list[int]:
        """Master and worker."""
        return [self._child.pid, *children_of(self._child.pid)]
