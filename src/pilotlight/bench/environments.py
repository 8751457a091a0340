"""Environments for the packages that benchmarks compare with, each made on first use from a lock.

They lie in the cache under a name that is the hash of their lock, so a changed lock makes a new one. What
cannot be installed is a reason to leave its cases out, not to fail.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from pilotlight.bench.errors import BenchError
from pilotlight.cli.output import note
from pilotlight.engines.install import cache_folder

PROGRAMS = Path(str(files("pilotlight.bench"))) / "peers"
"""Where the locks lie, `NAME.lock`, and programs that run in their environments."""


def peer_python(name: str) -> Path:
    """The interpreter of an environment with everything that `peers/NAME.lock` names.

    Raises:
        BenchError: It is not there yet and cannot be made; nothing of it is left then.
    """
    lock = PROGRAMS / f"{name}.lock"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(lock.read_bytes() + version.encode()).hexdigest()[:16]
    folder = cache_folder() / f"bench-{name.replace('_', '-')}-{key}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists():
        return python
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / "bench-peers.lock").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not ready.exists():
                _make(folder, python, lock)
                ready.touch()
    except OSError as error:
        raise BenchError(f"{folder} cannot be made: {error.strerror}") from error
    return python


def _make(folder: Path, python: Path, lock: Path) -> None:
    note(f"making the environment {folder.name}, once")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _command([sys.executable, "-m", "venv", str(folder)])
        _command([str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(lock)])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _command(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchError(f"`{' '.join(command[:4])} …` failed: {last}")
