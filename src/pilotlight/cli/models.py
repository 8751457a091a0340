"""`pilotlight models`: what is in this machine's model cache, and what the engine can serve."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pilotlight.cli.output import JsonOption, connect, note, print_json, print_table, size, write
from pilotlight.cli.progress import Waiting
from pilotlight.cli.root import help_text, new_app
from pilotlight.domain.repository import Repository, RepositoryKind
from pilotlight.engines.repositories import MODEL_VARIABLE, repositories_needed
from pilotlight.engines.versions import load_version
from pilotlight.errors import ConflictError, InvalidInputError, NotFoundError, PilotlightError
from pilotlight.models.cache import (
    CachedSnapshot,
    endpoint_cache,
    exclusive_now,
    list_snapshots,
    usable,
)
from pilotlight.models.catalog import BUILTIN_MODEL, builtin_folder, check_hub_name, resolve_model
from pilotlight.models.upkeep import CheckedFile, Condition, remove, select, verify
from pilotlight.settings import load_settings

COMMIT_SHOWN = 8
"""Characters of a commit in a table; `models rm` and `verify` take them."""

app = new_app()

NameArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face id.", show_default=False)]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit.", show_default=False)
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of the cache (default: the gateway's own).", show_default=False),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.callback(no_args_is_help=True, help="Fetch, list, check and remove models; list architectures.")
def group() -> None:
    """Fetch, list, check and remove models; list architectures."""


def pull_command(
    model: NameArgument,
    revision: RevisionOption = None,
    kind: Annotated[
        RepositoryKind,
        typer.Option(help="What is needed of it; `config` is a tokenizer, or anything without its weights."),
    ] = RepositoryKind.MODEL,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model into the cache, or what is missing of it.

    `deploy` does the same by itself. A download that was interrupted goes on where it stopped. A branch that
    has moved on is followed. Gated and private models need the environment variable HF_TOKEN.

    Examples:
      pilotlight models pull Qwen/Qwen3-0.6B
      pilotlight models pull org/adapter --kind adapter --revision v2
    """
    if model == BUILTIN_MODEL:
        raise InvalidInputError(f"{BUILTIN_MODEL} is built in: there is nothing to download")
    check_hub_name(model)
    # The client library is large, and the other commands do without.
    from pilotlight.models import hub  # noqa: PLC0415

    stop = threading.Event()
    repository = Repository(name=model, revision=revision, kind=kind)
    with Waiting() as waiting, _interruption(stop):

        def on_progress(done: int, total: int) -> None:
            share = f" ({100 * done // total} %)" if total else ""
            waiting.say(f"downloading {repository}: {size(done)} of {size(total)}{share}", step="fetching")

        def on_wait(holder: str) -> None:
            waiting.say(f"waiting for {holder}, which downloads {model}", step="fetching")

        path = hub.fetch(
            repository,
            cache=_cache(cache),
            token=os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None,
            on_progress=on_progress,
            on_wait=on_wait,
            cancelled=stop,
        )
    (snapshot,) = [one for one in list_snapshots(_cache(cache), model) if one.path == path]
    if as_json:
        print_json(_described(snapshot, None))
    else:
        write(f"{path}\n")


def list_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Only this one.", show_default=False)
    ] = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the built-in model and what lies in the cache.

    Endpoints that use a model are shown where a gateway answers.

    Examples:
      pilotlight models ls
      pilotlight models ls --json
    """
    users = _users()
    with usable(_cache(cache)):
        found = [
            *([_built_in()] if model in {None, BUILTIN_MODEL} else []),
            *list_snapshots(_cache(cache), model),
        ]
    if as_json:
        print_json([_described(one, users) for one in found])
        return
    if not found:
        note(f"{_cache(cache)} holds no {model}; `pilotlight models pull {model}` fetches it")
        return
    print_table(
        ["MODEL", "REVISION", "REFS", ">SIZE", "STATE", "USED BY"],
        [
            [
                one.repository,
                one.commit[:COMMIT_SHOWN],
                ", ".join(one.refs),
                size(one.size_bytes),
                "complete" if one.problem is None else "incomplete",
                ", ".join(_users_of(one, users) or ()),
            ]
            for one in found
        ],
    )
    for one in found:
        if one.problem is not None:
            note(f"{one.repository}: {one.problem}")


def remove_command(
    model: NameArgument,
    revision: RevisionOption = None,
    yes: Yes = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a model from the cache, or one revision of it.

    Refused while it is being downloaded. Workers that have loaded it go on; the next one downloads it again.

    Examples:
      pilotlight models rm Qwen/Qwen3-0.6B
      pilotlight models rm Qwen/Qwen3-0.6B --revision v1 --yes
    """
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("nobody is here to confirm; add --yes", param_hint="--yes")
    folder = _cache(cache)
    with usable(folder):
        found = _selected(folder, model, revision)
    if not yes:
        used = sorted({name for one in found for name in _users_of(one, _users()) or ()})
        users = f", used by {', '.join(used)}" if used else ""
        total = size(sum(one.size_bytes for one in found))
        what = ", ".join(one.commit[:COMMIT_SHOWN] for one in found)
        if not typer.confirm(f"Remove {model} ({what}), {total}{users}?", err=True):
            note("nothing was removed")
            raise typer.Exit(1)
    agreed = {one.commit for one in found}
    with usable(folder), exclusive_now(folder, model) as holder:
        if holder is not None:
            raise ConflictError(f"{model} is being downloaded by {holder}; try again when that has ended")
        # Looked at again: a download may have ended since, and what it brought was not asked about.
        found = [one for one in _selected(folder, model, revision) if one.commit in agreed]
        freed = remove(folder, model, [one.commit for one in found])
    if as_json:
        print_json(
            {"model": model, "removed": True, "commits": [one.commit for one in found], "freed_bytes": freed}
        )
    else:
        note(f"removed {model}; {size(freed)} are free again")


def verify_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Hugging Face id; without it, all.", show_default=False),
    ] = None,
    revision: RevisionOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every file in the cache with the hash that the hub gave it.

    Needs no network. Exit code 1 when a file is damaged or missing; `models rm` and `models pull` mend that.

    Examples:
      pilotlight models verify Qwen/Qwen3-0.6B
      pilotlight models verify --json
    """
    if model is None and revision is not None:
        raise typer.BadParameter("name the model as well", param_hint="--revision")
    folder = _cache(cache)
    with usable(folder), Waiting() as waiting:
        found = list_snapshots(folder) if model is None else _selected(folder, model, revision)
        reports = [(one, _verified(one, waiting)) for one in found]
    good = all(one.problem is None and not _bad(files) for one, files in reports)
    if as_json:
        print_json(
            {
                "ok": good,
                "snapshots": [
                    {
                        **_described(one, None),
                        "ok": one.problem is None and not _bad(files),
                        "files": list(map(asdict, files)),
                    }
                    for one, files in reports
                ],
            }
        )
    else:
        _print_verdicts(reports)
    if not good:
        raise typer.Exit(1)


def architectures_command(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEXT]", help="Only those that contain this, in any case.", show_default=False
        ),
    ] = None,
    engine_version: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Of this engine (setting engine.homes).", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the model architectures that the installed engine can load.

    A model's config.json names its own under "architectures".

    Examples:
      pilotlight models architectures
      pilotlight models architectures qwen3
    """
    settings = load_settings()
    manifest = load_version(settings.engine_home, settings.engine.homes, engine_version)
    found = sorted(one for one in manifest.architectures if (text or "").lower() in one.lower())
    if text is not None and not found:
        near = manifest.suggest(text)
        hint = f"; the nearest is {near}" if near else ""
        raise NotFoundError(f"vLLM {manifest.version} knows no architecture with {text!r} in its name{hint}")
    if as_json:
        print_json(
            {"engine": f"vllm {manifest.version}", "platform": manifest.platform, "architectures": found}
        )
        return
    write("".join(f"{one}\n" for one in found))
    note(f"{len(found)} of {len(manifest.architectures)} architectures of vLLM {manifest.version}")


@contextlib.contextmanager
def _interruption(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C ends the download in order; pressed again, or where the network is silent, at once."""

    def on_signal(*_: object) -> None:
        if stop.is_set():
            # Files are put in place whole, so that nothing is lost but what was on its way.
            os._exit(130)
        stop.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    except PilotlightError as error:
        if stop.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _cache(given: Path | None) -> Path:
    return given if given is not None else endpoint_cache({}, os.environ)


def _selected(cache: Path, model: str, revision: str | None) -> Sequence[CachedSnapshot]:
    if model == BUILTIN_MODEL:
        raise InvalidInputError(f"{BUILTIN_MODEL} is part of Pilotlight and not of the cache")
    check_hub_name(model)
    found = select(cache, model, revision)
    if found:
        return found
    there = list_snapshots(cache, model)
    if not there:
        raise NotFoundError(f"{cache} holds no {model} (`pilotlight models ls` lists what it holds)")
    known = ", ".join(name for one in there for name in (*one.refs, one.commit[:COMMIT_SHOWN]))
    raise NotFoundError(f"{cache} holds no revision {revision!r} of {model}; it has {known}")


def _built_in() -> CachedSnapshot:
    folder = builtin_folder()
    return CachedSnapshot(
        repository=BUILTIN_MODEL,
        commit="",
        refs=("built in",),
        path=folder,
        size_bytes=resolve_model(Repository(name=BUILTIN_MODEL), cache=folder).weight_bytes,
        problem=None,
    )


def _users() -> dict[str, list[str]] | None:
    """Names of endpoints by the repositories they need, in lower case; None where no gateway answers."""
    try:
        with connect() as client:
            endpoints = client.endpoints()
    except PilotlightError:
        return None
    users: dict[str, list[str]] = {}
    for one in endpoints:
        env = {**(one.get("env") or {}), MODEL_VARIABLE: one.get("model") or ""}
        needed: Sequence[Repository] = ()
        # One of an earlier release may have a revision that is refused now.
        with contextlib.suppress(InvalidInputError):
            needed = repositories_needed(env)
        for name in {repository.name.lower() for repository in needed}:
            users.setdefault(name, []).append(one["name"])
    return users


def _users_of(snapshot: CachedSnapshot, users: dict[str, list[str]] | None) -> list[str] | None:
    return None if users is None else users.get(snapshot.repository.lower(), [])


def _described(snapshot: CachedSnapshot, users: dict[str, list[str]] | None) -> dict[str, Any]:
    return {
        "name": snapshot.repository,
        "commit": snapshot.commit or None,
        "refs": list(snapshot.refs),
        "path": str(snapshot.path),
        "size_bytes": snapshot.size_bytes,
        "complete": snapshot.problem is None,
        "problem": snapshot.problem,
        **({"used_by": _users_of(snapshot, users)} if users is not None else {}),
    }


def _verified(snapshot: CachedSnapshot, waiting: Waiting) -> list[CheckedFile]:
    def on_file(path: str, count: int) -> None:
        waiting.say(f"reading {snapshot.repository}: {path} ({size(count)})", step=snapshot.repository)

    return list(verify(snapshot.path, on_file))


def _bad(files: Sequence[CheckedFile]) -> list[CheckedFile]:
    return [file for file in files if file.condition in {Condition.DAMAGED, Condition.MISSING}]


def _print_verdicts(reports: Sequence[tuple[CachedSnapshot, list[CheckedFile]]]) -> None:
    if not reports:
        note("the cache is empty")
    for one, files in reports:
        title = f"{one.repository} {one.commit[:COMMIT_SHOWN]}"
        for file in _bad(files):
            write(f"{title}: {file.path} is {file.condition}\n")
        if one.problem is not None and not _bad(files):
            write(f"{title}: {one.problem}\n")
        if one.problem is None and not _bad(files):
            unknown = sum(file.condition is Condition.UNKNOWN for file in files)
            rest = f", {unknown} without a known hash" if unknown else ""
            write(f"{title}: {len(files) - unknown} files are good{rest}\n")


for _name, _function in (
    ("pull", pull_command),
    ("ls", list_command),
    ("rm", remove_command),
    ("verify", verify_command),
    ("architectures", architectures_command),
):
    app.command(_name, help=help_text(_function))(_function)
