"""The RunPod clients and worker libraries, and a few servers, that tests run: each in its own environment.

    python tools/clients.py [name …]    build what is missing, print one path per line

An environment is built once from its committed lock in `requirements/clients`, into
`${PILOTLIGHT_CACHE:-~/.cache/pilotlight}/clients/<name>-<hash of the lock>`. Fixtures call
`ensure` for what a test needs; a file lock makes that safe among parallel test processes. Works with the
standard library alone, so that `.ci/run` can call it first and show what it costs.
"""

from __future__ import annotations

import sys

sys.path.insert(0, __file__.rsplit("/", maxsplit=2)[0] + "/src")

import argparse
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pilotlight.engines.environments import (
    CommandError,
    Reporter,
    SetupError,
    content_key,
    create_environment,
    exclusive,
    lock_entries,
    remove_tree,
    run_pip,
    run_streaming,
)

LOCKS = Path(__file__).resolve().parents[1] / "requirements" / "clients"

NODE = "runpod-sdk"
"""The one client that is no Python package."""

NAMES = (*sorted(path.stem for path in LOCKS.glob("*.lock")), NODE)

_READY = "pilotlight-ready"


def cache() -> Path:
    """The folder that holds all environments."""
    base = os.environ.get("PILOTLIGHT_CACHE")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pilotlight")
    return Path(base).expanduser().absolute() / "clients"


def home_of(name: str) -> Path:
    """Where the environment of a client is, or will be: its lock and the Python that runs it decide."""
    if name == NODE:
        parts = [path.read_bytes() for path in sorted((LOCKS / NODE).glob("package*.json"))]
    else:
        parts = [(LOCKS / f"{name}.lock").read_bytes(), sys.version.encode()]
    return cache() / f"{name}-{content_key(*parts)[:16]}"


def ensure(name: str, *, reporter: Reporter | None = None) -> Path:
    """The folder of a client's environment, built now if it is missing.

    Args:
        name: One of `NAMES`.
        reporter: Gets a line for what is slow.

    Raises:
        SetupError: It cannot be built; the message says why and what to do.
    """
    home, reporter = home_of(name), reporter or Reporter()
    if (home / _READY).exists():
        return home
    with exclusive(cache() / f"{home.name}.lock", reporter):
        if not (home / _READY).exists():
            log = cache() / f"{home.name}.log"
            reporter.line(f"building {home} from its lock")
            try:
                (_build_node if name == NODE else _build_python)(name, home, reporter, log)
            except CommandError as error:
                msg = f"{error}\nFull output: {log}. Mend the cause and run the same command again."
                raise SetupError(msg) from error
            (home / _READY).touch()
            reporter.line(f"built {home.name}")
    return home


def _build_python(name: str, home: Path, reporter: Reporter, log: Path) -> None:
    create_environment(home, reporter=reporter, log=log)
    lock = LOCKS / f"{name}.lock"
    # What is never imported need not be compiled; the rest is compiled when it is first imported.
    arguments: list[str | Path] = ["install", "--no-deps", "--no-compile", "--require-hashes", "-r", lock]
    run_pip(home, arguments, total=lock_entries(lock), verb="installing", reporter=reporter, log=log)


def _build_node(name: str, home: Path, reporter: Reporter, log: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        msg = f"{name} needs Node.js and npm. On Debian and Ubuntu: apt-get install npm"
        raise SetupError(msg)
    remove_tree(home)
    home.mkdir(parents=True)
    for path in (LOCKS / name).glob("package*.json"):
        shutil.copy(path, home)
    command = [npm, "ci", "--prefix", home, "--no-audit", "--no-fund", "--ignore-scripts"]
    run_streaming(command, reporter=reporter, log=log, doing=f"npm ci for {name}")


def main() -> int:
    """Build the named environments, or all; returns 0 or 1."""
    parser = argparse.ArgumentParser(prog="python tools/clients.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all when left out")
    names = parser.parse_args().names or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"no such client: {', '.join(unknown)}; legal: {', '.join(NAMES)}")
    reporter = Reporter()
    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for home in pool.map(lambda name: ensure(name, reporter=reporter), names):
                print(home)
    except (SetupError, OSError) as error:
        reporter.line(f"failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
