"""Makes a checkout ready: `.venv` from the hashed locks, and the engine's own `.venv-engine`.

The Makefile calls this before everything else, so the second run must cost next to nothing: each part has the
hash of its inputs in a stamp (`.venv/pilotlight-setup.json`) and is left alone while the hash holds. Standard
library only.

    python tools/setup.py [--dev] [--engine auto|cpu|cuda|none]
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  this runs before anybody has looked
    sys.exit(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")

sys.path.insert(0, __file__.rsplit("/", maxsplit=2)[0] + "/src")

import argparse
import json
import tomllib
from pathlib import Path

from pilotlight.engines import install
from pilotlight.engines.environments import (
    CommandError,
    Reporter,
    SetupError,
    content_key,
    create_environment,
    exclusive,
    is_environment,
    lock_entries,
    read_json,
    run_pip,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv"
STAMP = HOME / "pilotlight-setup.json"
UNFINISHED = HOME / "pilotlight-unfinished"
REQUIREMENTS = ROOT / "requirements"


def wanted(*, dev: bool) -> dict[str, str]:
    """The hash of the inputs of each part of `.venv`, in the order of installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = {part: project.get(part) for part in ("build-system", "project")}
    keys = {
        "base": content_key(
            *(REQUIREMENTS.joinpath(name).read_bytes() for name in ("base.lock", "build.lock"))
        ),
        "project": content_key(json.dumps(parts, sort_keys=True)),
    }
    if dev:
        keys["dev"] = content_key((REQUIREMENTS / "dev.lock").read_bytes())
    return keys


def usable() -> bool:
    """Whether `.venv` is whole: a folder that an interrupted run left behind is not."""
    # pip's command is the last thing that the creation of an environment writes.
    return is_environment(HOME) and (HOME / "bin" / "pip").exists() and not UNFINISHED.exists()


def missing(keys: dict[str, str]) -> list[str]:
    """The parts of `.venv` that are not as their inputs say; all of them where `.venv` is broken."""
    if not usable():
        return list(keys)
    stamp = read_json(STAMP)
    return [part for part, key in keys.items() if stamp.get(part) != key]


def build(parts: list[str], keys: dict[str, str], reporter: Reporter) -> None:
    """Install the parts into `.venv`; an environment that an earlier run left half-done is made anew."""
    log = ROOT / ".cache" / "setup.log"
    log.write_text("", encoding="utf-8")
    if not usable():
        reporter.line(f"creating {HOME.relative_to(ROOT)} with {sys.executable}")
        create_environment(HOME, reporter=reporter, log=log)
    done = {name: key for name, key in read_json(STAMP).items() if name not in parts}
    for part in parts:
        UNFINISHED.touch()
        locks = {"base": ["base.lock", "build.lock"], "dev": ["dev.lock"], "project": []}[part]
        arguments: list[str | Path] = ["install", "--no-deps"]
        if locks:
            arguments.append("--require-hashes")
            for lock in locks:
                arguments += ["-r", REQUIREMENTS / lock]
            reporter.line(f"installing {', '.join(f'requirements/{lock}' for lock in locks)}")
        else:
            arguments += ["--no-build-isolation", "--no-index", "--editable", ROOT]
            reporter.line("installing the project itself")
        total = sum(lock_entries(REQUIREMENTS / lock) for lock in locks) or 1
        try:
            run_pip(HOME, arguments, total=total, verb="installing", reporter=reporter, log=log)
        except CommandError as error:
            msg = f"{error}\nFull output: {log}. Mend the cause and run the same command again."
            raise SetupError(msg) from error
        done[part] = keys[part]
        write_atomically(STAMP, json.dumps(done))
        UNFINISHED.unlink()


def main() -> int:
    """Set up what is missing; returns 0, 1 (failed) or 130 (interrupted)."""
    parser = argparse.ArgumentParser(prog="python tools/setup.py", description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="also install what tests and checks need")
    parser.add_argument("--engine", choices=("auto", "cpu", "cuda", "none"), default="auto")
    options = parser.parse_args()
    reporter = Reporter()
    keys = wanted(dev=options.dev)
    try:
        if missing(keys):
            with exclusive(ROOT / ".cache" / "setup.lock", reporter):
                build(missing(keys), keys, reporter)
    except (SetupError, OSError) as error:
        reporter.line(f"set-up failed: {error}")
        return 1
    except KeyboardInterrupt:
        reporter.line("set-up: interrupted; run the same command again")
        return 130
    if options.engine == "none":
        return 0
    return install.main(["--into", str(ROOT / ".venv-engine"), "--engine", options.engine])


if __name__ == "__main__":
    sys.exit(main())
