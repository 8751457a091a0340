"""The locks of `requirements/` and of the engine: made here with uv, and checked here without it.

    python tools/locks.py            resolve again and write every lock (needs uv and a network)
    python tools/locks.py --upgrade  the same, with the newest versions that the inputs allow
    python tools/locks.py --check    offline: fail where a lock was made from other inputs than today's

Every lock opens with the hash of its inputs; that is what `--check` compares.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
ENGINES = ROOT / "src" / "pilotlight" / "engines" / "locks"
PEERS = ROOT / "src" / "pilotlight" / "bench" / "peers"

# Both kinds of engine exist for Linux only; without this, the resolver looks for builds for all systems at
# once.
LINUX = """[tool.uv]
environments = [
    "sys_platform == 'linux' and platform_machine == 'x86_64'",
    "sys_platform == 'linux' and platform_machine == 'aarch64'",
]
"""


@dataclass(frozen=True)
class Lock:
    """One lock file, and what it is made from.

    Attributes:
        path: The lock.
        source: A `.in` file, or pyproject.toml.
        group: The dependency group of pyproject.toml to add.
        overrides: A file of overrides.
        constraint: Another lock whose versions are kept.
        linux: Resolve for Linux only.
    """

    path: Path
    source: Path
    group: str | None = None
    overrides: Path | None = None
    constraint: Path | None = None
    linux: bool = False

    def inputs_hash(self) -> str:
        """The SHA-256 of everything that the resolution starts from, versions of the index aside."""
        if self.source.name == "pyproject.toml":
            project = tomllib.loads(self.source.read_text(encoding="utf-8"))
            inputs: list[object] = [project["project"]["dependencies"], project["project"]["requires-python"]]
            if self.group is not None:
                inputs.append(project["dependency-groups"][self.group])
        else:
            inputs = [file.read_text(encoding="utf-8") for file in (self.source, self.overrides) if file]
        return hashlib.sha256(json.dumps([*inputs, self.linux]).encode()).hexdigest()

    def command(self, *, upgrade: bool) -> list[str]:
        """The uv command that writes the lock."""
        command = [
            os.environ.get("UV", "uv"),
            "pip",
            "compile",
            "--universal",
            "--generate-hashes",
            "--quiet",
        ]
        command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        command += ["--python-version", "3.11", str(self.source), "--output-file", str(self.path)]
        command += ["--group", f"{self.source}:{self.group}"] if self.group else []
        command += ["--overrides", str(self.overrides)] if self.overrides else []
        command += ["--constraints", str(self.constraint)] if self.constraint else []
        return [*command, "--upgrade"] if upgrade else command


BASE = Lock(REQUIREMENTS / "base.lock", ROOT / "pyproject.toml")
LOCKS = (
    BASE,
    Lock(REQUIREMENTS / "build.lock", REQUIREMENTS / "build.in", constraint=BASE.path),
    Lock(REQUIREMENTS / "dev.lock", ROOT / "pyproject.toml", group="dev", constraint=BASE.path),
    Lock(REQUIREMENTS / "tracing.lock", REQUIREMENTS / "tracing.in", constraint=BASE.path),
    Lock(REQUIREMENTS / "worker.lock", REQUIREMENTS / "worker.in", constraint=BASE.path, linux=True),
    Lock(
        ENGINES / "engine-cpu.lock",
        ENGINES / "engine-cpu.in",
        overrides=ENGINES / "engine-cpu.overrides",
        linux=True,
    ),
    Lock(ENGINES / "engine-cuda.lock", ENGINES / "engine-cuda.in", linux=True),
    *(Lock(source.with_suffix(".lock"), source, linux=True) for source in sorted(PEERS.glob("*.in"))),
    *(
        Lock(source.with_suffix(".lock"), source)
        for source in sorted((REQUIREMENTS / "clients").glob("*.in"))
    ),
)


def header(lock: Lock) -> str:
    """The lines that open a lock."""
    return f"# Written by `make lock`; do not edit.\n# inputs sha256:{lock.inputs_hash()}\n"


def stale_locks() -> list[str]:
    """The locks that were made from other inputs than today's, as paths from the root."""
    return [
        str(lock.path.relative_to(ROOT))
        for lock in LOCKS
        if not lock.path.read_text(encoding="utf-8").startswith(header(lock))
    ]


def write(lock: Lock, *, upgrade: bool) -> None:
    """Resolve one lock again; versions stay where the inputs allow them, unless `upgrade`."""
    with tempfile.TemporaryDirectory() as folder:
        if lock.linux:
            Path(folder, "pyproject.toml").write_text(LINUX, encoding="utf-8")
        subprocess.run(lock.command(upgrade=upgrade), cwd=folder, check=True)
    body = lock.path.read_text(encoding="utf-8")
    kept = "".join(line for line in body.splitlines(keepends=True) if not line.startswith("#"))
    lock.path.write_text(header(lock) + kept, encoding="utf-8")
    entries = len(re.findall(r"^[A-Za-z0-9]", kept, re.MULTILINE))
    print(f"{lock.path.relative_to(ROOT)}: {entries} entries")


def main() -> int:
    """Write or check the locks; returns 0 or 1."""
    parser = argparse.ArgumentParser(prog="python tools/locks.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    options = parser.parse_args()
    if options.check:
        stale = stale_locks()
        for path in stale:
            print(f"{path} is older than its inputs: run `make lock`", file=sys.stderr)
        return 1 if stale else 0
    if shutil.which(os.environ.get("UV", "uv")) is None:
        print("uv is needed to resolve: `pip install uv`, or name it in the variable UV", file=sys.stderr)
        return 1
    for lock in LOCKS:
        write(lock, upgrade=options.upgrade)
    return 0


if __name__ == "__main__":
    sys.exit(main())
