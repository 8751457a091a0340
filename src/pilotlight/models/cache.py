"""The hub cache on this machine's disks: what lies in it, what of that is whole, who is filling it.

The layout is the client library's, and vllm-worker.md §5.2's: `models--ORG--NAME/{refs,snapshots,blobs}`.
Volumes that other tools have filled are used as they are. Standard library only: the worker program looks
here before it decides whether a download is needed at all, and it stays small.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pilotlight.core.storage import CACHE_VARIABLES, VOLUME, chosen_cache, storage_environment
from pilotlight.core.variables import clean_value
from pilotlight.domain.repository import WEIGHT_PATTERNS, Repository, RepositoryKind
from pilotlight.errors import InvalidInputError, PilotlightError
from pilotlight.models.catalog import (
    BUILTIN_MODEL,
    CONFIG_FILE,
    PARAMS_FILE,
    builtin_folder,
    read_configuration,
    weight_bytes,
)

MAIN = "main"
"""The revision that is meant where none is named."""

LOCK_POLL_S = 0.2
"""Pause between two looks at a lock that somebody else holds; nothing wakes one who waits for it."""

LOOKS_PER_WORD = 5
"""So many looks for each time that the waiting is told of: once per second."""

_PREFIX = "models--"
_COMMIT = re.compile(r"\w{1,64}")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CONFIG_FILES = (CONFIG_FILE, PARAMS_FILE)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
)
_PARTS_NEEDED: Mapping[str, Sequence[tuple[str, Sequence[str]]]] = {
    "HF_CONFIG_PATH": [("a configuration", _CONFIG_FILES)],
    "TRUST_REMOTE_CODE": [("code", ("*.py",))],
    "MODEL_NAME": [("a configuration", _CONFIG_FILES), ("a tokenizer", _TOKENIZER_FILES)],
}
"""What must be there of a repository without its weights, by the variable that names it; else a tokenizer."""

_UNLOCKABLE = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


class FetchCancelledError(PilotlightError):
    """A download that its caller gave up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSnapshot:
    """One revision of a repository that lies in a cache.

    Attributes:
        repository: Its id, as far as the folder's name tells it.
        commit: Which revision.
        refs: Branches and tags that lead to it.
        path: The folder with its files.
        size_bytes: All its files; those it shares with other revisions included.
        problem: Why it cannot be used; None when it is whole.
    """

    repository: str
    commit: str
    refs: tuple[str, ...]
    path: Path
    size_bytes: int
    problem: str | None


def hub_cache(env: Mapping[str, str]) -> Path:
    """The cache of hub models that a program with this environment uses.

    `DOWNLOAD_DIR` of the contract; else the client library's own variables; else the layout of a volume below
    `BASE_PATH` (vllm-worker.md §5.2); else the client library's default, so that gateway, workers and other
    programs share one download.
    """
    placed = {**env, **storage_environment(env, volume_present=Path(VOLUME).is_dir())}
    placed = {name: text for name, raw in placed.items() if (text := clean_value(raw)) is not None}
    for name in ("DOWNLOAD_DIR", "HF_HUB_CACHE"):
        if name in placed:
            return Path(placed[name]).expanduser()
    if "HF_HOME" in placed:
        return Path(placed["HF_HOME"]).expanduser() / "hub"
    base = placed.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "huggingface" / "hub"


def endpoint_cache(env: Mapping[str, str], inherited: Mapping[str, str]) -> Path:
    """The cache that an endpoint's workers use: by its own variables, else by what they inherit.

    Args:
        env: The endpoint's variables; none for what is fetched before there is an endpoint.
        inherited: Those of the program that starts workers.
    """
    passed = {name: inherited[name] for name in CACHE_VARIABLES if name in inherited}
    return hub_cache({**passed, **chosen_cache(env, volume_present=Path(VOLUME).is_dir()), **env})


def code_cache(env: Mapping[str, str]) -> Path:
    """Where the engine itself looks for code of other repositories; `DOWNLOAD_DIR` does not move that."""
    return hub_cache({name: value for name, value in env.items() if name != "DOWNLOAD_DIR"})


def folder_name(name: str) -> str:
    """The folder of a repository within a cache."""
    return _PREFIX + name.replace("/", "--")


def find_snapshot(cache: Path, name: str, revision: str | None) -> Path | None:
    """The cached snapshot of a repository (vllm-worker.md §5.2), or None; it may be incomplete."""
    return next(iter(_snapshots(cache, name, revision)), None)


def find_whole(cache: Path, repository: Repository) -> Path | None:
    """The cached snapshot of a repository if it has everything that is needed of it, else None.

    The built-in model needs no cache.

    The repository is found case-insensitively, because some caches have names in lower case; the commit is
    the revision itself, the one its ref names, or, for the main branch without a ref, the only one there is.
    """
    if repository.name == BUILTIN_MODEL:
        return builtin_folder()
    found = _snapshots(cache, repository.name, repository.revision)
    return next((path for path in found if problem_of(path, repository) is None), None)


def problem_of(snapshot: Path, repository: Repository) -> str | None:
    """What keeps a snapshot from being used as this repository, or None when it is whole.

    A file that was fetched and is gone or shorter, a shard that the index names, a link that leads nowhere
    and a weight file that is shorter than its header promises are found; damage within a file is
    `upkeep.verify`'s business.
    """
    record = _record_of(marker(snapshot))
    whole = record is not None
    if repository.kind is RepositoryKind.CONFIG and record is None:
        record = _record_of(config_marker(snapshot))
    if record is None and pending(snapshot).exists():
        return f"its download into {snapshot} was not finished"
    if record is not None and (unwanted := record.ignored - set(repository.ignore)):
        return f"{snapshot} was fetched without the files that match {', '.join(sorted(unwanted))}"
    for name, size in (record.files if record is not None else {}).items():
        if _size_of(snapshot / name) != size:
            return f"{snapshot / name} is gone or not as long as it was"
    if lost := [path for path in _files(snapshot) if not path.exists()]:
        return f"{lost[0]} leads nowhere"
    match repository.kind:
        case RepositoryKind.MODEL | RepositoryKind.ADAPTER:
            return content_problem(snapshot, repository)
        case RepositoryKind.CONFIG:
            return None if record is not None else _config_problem(snapshot, repository)
        case RepositoryKind.EXTRA:
            return None if whole or any(True for _ in _files(snapshot)) else f"{snapshot} is empty"


def content_problem(snapshot: Path, repository: Repository) -> str | None:
    """What a folder lacks to be this model or adapter, or None."""
    match repository.kind:
        case RepositoryKind.MODEL:
            return _model_problem(snapshot, repository.patterns)
        case RepositoryKind.ADAPTER:
            return _adapter_problem(snapshot)
    return None


def kind_of(snapshot: Path) -> RepositoryKind:
    """What a snapshot seems to be, by the files it has."""
    if (snapshot / _ADAPTER_CONFIG).exists():
        return RepositoryKind.ADAPTER
    if config_marker(snapshot).exists() and not marker(snapshot).exists():
        return RepositoryKind.CONFIG
    modelled = any((snapshot / name).exists() for name in (CONFIG_FILE, PARAMS_FILE))
    return RepositoryKind.MODEL if modelled else RepositoryKind.EXTRA


def list_snapshots(cache: Path, name: str | None = None) -> Sequence[CachedSnapshot]:
    """Every snapshot in a cache, by repository and commit.

    Args:
        cache: The hub cache; it need not exist.
        name: Only this repository, whatever its case.
    """
    found = []
    for folder in _children(cache):
        if not folder.name.startswith(_PREFIX):
            continue
        if name is not None and folder.name.lower() != folder_name(name).lower():
            continue
        repository = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
        refs = _refs(folder)
        found += [
            CachedSnapshot(
                repository=repository,
                commit=snapshot.name,
                refs=tuple(sorted(ref for ref, commit in refs.items() if commit == snapshot.name)),
                path=snapshot,
                size_bytes=_size(snapshot),
                problem=problem_of(snapshot, _as_fetched(repository, snapshot)),
            )
            for snapshot in _children(folder / "snapshots")
        ]
    return found


def repository_folders(cache: Path, name: str) -> Sequence[Path]:
    """The folders of a repository in a cache, that with the exact name first."""
    exact = folder_name(name)
    found = [folder for folder in _children(cache) if folder.name.lower() == exact.lower()]
    return sorted(found, key=lambda folder: folder.name != exact)


def stored_bytes(cache: Path, name: str) -> int:
    """Bytes that lie in a repository's folders, those of unfinished files included."""
    blobs = [path for folder in repository_folders(cache, name) for path in (folder / "blobs").glob("*")]
    return sum(_size_of(path) for path in blobs)


def marker(snapshot: Path) -> Path:
    """A file that says that every file of the snapshot was fetched, and not only the weights, and which."""
    return snapshot.parent.parent / f".pilotlight-complete-{snapshot.name}"


def config_marker(snapshot: Path) -> Path:
    """The same for everything but the weights."""
    return snapshot.parent.parent / f".pilotlight-config-{snapshot.name}"


def write_marker(path: Path, sizes: Mapping[str, int], ignored: Sequence[str]) -> None:
    """Say what a snapshot has now; what an earlier marker says of it stays true.

    Args:
        path: `marker` or `config_marker`.
        sizes: Of the files that were fetched, by path.
        ignored: Patterns of paths that were left out.
    """
    before = _record_of(path)
    if before is not None:
        sizes = {**before.files, **sizes}
        ignored = sorted(before.ignored & set(ignored))
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps({"files": sizes, "ignored": list(ignored)}), encoding="utf-8")
    scratch.replace(path)


def pending(snapshot: Path) -> Path:
    """A file that says that the snapshot is being fetched, or that this was given up half-way."""
    return snapshot.parent.parent / f".pilotlight-pending-{snapshot.name}"


@contextmanager
def exclusive(
    cache: Path,
    name: str,
    *,
    on_wait: Callable[[str], None] = lambda _holder: None,
    stop: threading.Event | None = None,
) -> Iterator[bool]:
    """Be the only one on this volume who changes a repository's folder, other processes and threads included.

    The kernel gives the lock back when its holder ends, however that comes. Gives whether the file system
    does keep others out. Where it has no locks, or grants one to everybody, nobody waits for anybody: then
    what others are writing must be left alone, and a file be put in place only whole and checked.

    Args:
        cache: The hub cache; made when it does not exist.
        name: The repository.
        on_wait: Told who holds the lock, at once and then about once per second while this waits.
        stop: Once set, the wait ends.

    Raises:
        FetchCancelledError: `stop` was set.
    """
    path = lock_path(cache, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        looks = 0
        while not _try_lock(file):
            if looks % LOOKS_PER_WORD == 0:
                on_wait(_holder(path))
            looks += 1
            if (stop or threading.Event()).wait(LOCK_POLL_S):
                raise FetchCancelledError(f"waiting for the download of {name} was cancelled")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        with path.open("a+", encoding="utf-8") as another:
            alone = not _try_lock(another)
        try:
            yield alone
        finally:
            file.truncate(0)


@contextmanager
def exclusive_now(cache: Path, name: str) -> Iterator[str | None]:
    """As `exclusive`, but at once: gives who holds the lock, or None when it is ours for the block."""
    path = lock_path(cache, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        yield None if _try_lock(file) else _holder(path)


def lock_path(cache: Path, name: str) -> Path:
    """The lock of a repository, beside its folder: in `.locks`, which the hub's own tools pass over."""
    return cache / ".locks" / f"{folder_name(name).lower()}.pilotlight.lock"


def local_problem(cache: Path, error: OSError) -> str:
    """What this machine's disks have against a cache, in one sentence."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"the model cache {cache} cannot be used: {where}{error.strerror or error}"


@contextmanager
def usable(cache: Path) -> Iterator[None]:
    """Turn what the disks say into InvalidInputError, which names the cache and the path."""
    try:
        yield
    except OSError as error:
        raise InvalidInputError(local_problem(cache, error)) from error


def commit_of(ref: Path) -> str:
    """The commit that a branch or tag leads to; "" when the file holds none."""
    text = ref.read_text(encoding="utf-8", errors="replace").strip()
    return text if _COMMIT.fullmatch(text) else ""


@dataclass(frozen=True, slots=True)
class _Record:
    """What a marker says; one of earlier releases is empty and knows no files."""

    files: Mapping[str, int]
    ignored: frozenset[str]


def _record_of(path: Path) -> _Record | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text or "{}")
        files = {str(name): int(size) for name, size in content.get("files", {}).items()}
        return _Record(files, frozenset(map(str, content.get("ignored", []))))
    except (ValueError, TypeError, AttributeError):
        # Cut by a full disk; then the files speak for themselves.
        return None


def _as_fetched(name: str, snapshot: Path) -> Repository:
    """A snapshot as whoever fetched it wanted it; where nobody wrote that down, as its files look."""
    record = _record_of(marker(snapshot))
    if record is not None and record.files:
        return Repository(name=name, kind=RepositoryKind.EXTRA, ignore=tuple(record.ignored))
    return Repository(name=name, kind=kind_of(snapshot))


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNLOCKABLE:
            raise
    return True


def _holder(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"


def _snapshots(cache: Path, name: str, revision: str | None) -> Iterator[Path]:
    for folder in repository_folders(cache, name):
        ref = folder / "refs" / (revision or MAIN)
        commit = commit_of(ref) if ref.is_file() else (revision or "")
        exact = folder / "snapshots" / commit
        if commit and exact.is_dir():
            yield exact
            continue
        snapshots = _children(folder / "snapshots")
        if revision in {None, MAIN} and not ref.is_file() and len(snapshots) == 1:
            yield snapshots[0]


def _model_problem(snapshot: Path, patterns: Sequence[str]) -> str | None:
    try:
        read_configuration(snapshot)
        if tuple(patterns) == WEIGHT_PATTERNS:
            weight_bytes(snapshot)
        elif not any(True for pattern in patterns for _ in snapshot.glob(pattern)):
            return f"{snapshot} holds no {' or '.join(patterns)}"
    except InvalidInputError as error:
        return str(error)
    return None


def _config_problem(snapshot: Path, repository: Repository) -> str | None:
    needed = _PARTS_NEEDED.get(repository.variable, [("a tokenizer", _TOKENIZER_FILES)])
    for part, patterns in needed:
        if not any(path.is_file() for pattern in patterns for path in snapshot.glob(pattern)):
            return f"{snapshot} lacks {part} ({', '.join(patterns)})"
    return None


def _adapter_problem(snapshot: Path) -> str | None:
    if not (snapshot / _ADAPTER_CONFIG).is_file():
        return f"{snapshot} has no {_ADAPTER_CONFIG}, so it is no LoRA adapter"
    if not any((snapshot / name).is_file() for name in _ADAPTER_WEIGHTS):
        return f"{snapshot} has no {' or '.join(_ADAPTER_WEIGHTS)}"
    return None


def _refs(folder: Path) -> Mapping[str, str]:
    root = folder / "refs"
    paths = [path for path in root.rglob("*") if path.is_file()] if root.is_dir() else []
    return {str(path.relative_to(root)): commit_of(path) for path in paths}


def _files(snapshot: Path) -> Iterator[Path]:
    return (path for path in sorted(snapshot.rglob("*")) if path.is_symlink() or not path.is_dir())


def _size(snapshot: Path) -> int:
    blobs = {path.resolve() for path in _files(snapshot)}
    return sum(_size_of(path) for path in blobs)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        # Gone since it was listed, or a link that leads nowhere.
        return 0


def _children(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
