"""Looking after a hub cache: is a file still what the hub gave, and away with what nobody needs.

The hub names every file by a hash of its content, and the cache keeps it under that name, so damage is found
without a network.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pilotlight.models.cache import (
    CachedSnapshot,
    commit_of,
    config_marker,
    list_snapshots,
    lock_path,
    marker,
    pending,
    repository_folders,
)

COMMIT_CHARS_MIN = 4
"""Shortest beginning of a commit that means it."""

_HASH_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")


class Condition(StrEnum):
    """What became of a file."""

    GOOD = "good"
    DAMAGED = "damaged"
    MISSING = "missing"
    UNKNOWN = "unknown"
    """Its hash is not known: another tool has put it there as a plain file."""


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """One file of a snapshot.

    Attributes:
        path: Within the snapshot.
        condition: What became of it.
        size_bytes: Its size; 0 when it is missing.
    """

    path: str
    condition: Condition
    size_bytes: int


def verify(snapshot: Path, on_file: Callable[[str, int], None]) -> Iterator[CheckedFile]:
    """Read every file of a snapshot and compare it with the hash that is its name in the cache.

    Args:
        snapshot: The folder.
        on_file: Told each file's path and size before it is read.

    Yields:
        The files in order.
    """
    for path in sorted(snapshot.rglob("*")):
        if path.is_dir():
            continue
        name = str(path.relative_to(snapshot))
        if not path.exists():
            yield CheckedFile(name, Condition.MISSING, 0)
            continue
        size = path.stat().st_size
        on_file(name, size)
        yield CheckedFile(name, _condition(path), size)


def remove(cache: Path, name: str, commits: Sequence[str]) -> int:
    """Remove revisions of a repository, and all of it when none is left; gives the bytes that became free.

    The caller holds the repository's lock.

    Args:
        cache: The hub cache.
        name: The repository.
        commits: What to remove.
    """
    freed = 0
    for folder in repository_folders(cache, name):
        before = _disk_bytes(folder)
        for commit in commits:
            _remove_revision(folder, commit)
        if not any((folder / "snapshots").glob("*")):
            shutil.rmtree(folder)
            shutil.rmtree(lock_path(cache, name).parent / folder.name, ignore_errors=True)
        freed += before - _disk_bytes(folder)
    return freed


def select(cache: Path, name: str, revision: str | None) -> Sequence[CachedSnapshot]:
    """The cached revisions of a repository that a branch, tag or beginning of a commit means; all without."""
    found = list_snapshots(cache, name)
    if revision is None:
        return found
    meant = len(revision) >= COMMIT_CHARS_MIN
    return [one for one in found if revision in one.refs or (meant and one.commit.startswith(revision))]


def sha256_of(path: Path, on_chunk: Callable[[], None] = lambda: None) -> str:
    """The hash of a file's content, in hexadecimal; `on_chunk` may raise to end the reading."""
    return _hash_of(path, hashlib.sha256(), on_chunk)


def git_hash_of(path: Path, on_chunk: Callable[[], None] = lambda: None) -> str:
    """The hash by which git names a file of this content, in hexadecimal; `on_chunk` as in `sha256_of`."""
    start = f"blob {path.stat().st_size}\0".encode()
    return _hash_of(path, hashlib.sha1(start, usedforsecurity=False), on_chunk)


def _hash_of(path: Path, digest: hashlib._Hash, on_chunk: Callable[[], None]) -> str:
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            on_chunk()
            digest.update(chunk)
    return digest.hexdigest()


def _condition(path: Path) -> Condition:
    # One step only: a blob may itself lead to a store that several caches share.
    blob = path.readlink().name if path.is_symlink() else ""
    if _SHA256.fullmatch(blob):
        return Condition.GOOD if sha256_of(path) == blob else Condition.DAMAGED
    if _GIT.fullmatch(blob):
        return Condition.GOOD if git_hash_of(path) == blob else Condition.DAMAGED
    return Condition.UNKNOWN


def _remove_revision(folder: Path, commit: str) -> None:
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        return
    for refs in sorted((folder / "refs").rglob("*")):
        if refs.is_file() and commit_of(refs) == commit:
            refs.unlink()
    shutil.rmtree(snapshot)
    for path in (marker(snapshot), config_marker(snapshot), pending(snapshot)):
        path.unlink(missing_ok=True)
    needed = {path.readlink().name for path in (folder / "snapshots").rglob("*") if path.is_symlink()}
    for blob in (folder / "blobs").glob("*"):
        # Unfinished ones go as well: the lock says that nobody is at work.
        if blob.name not in needed:
            blob.unlink()


def _disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or path.is_file())
