"""The Hugging Face hub: what a repository holds, and its files in the local cache.

`catalog` imports this module only when a hub model is named, the worker program never: it runs `models.fetch`
in a process of its own. Everything blocks and runs in a thread. The cache has the layout of vllm-worker.md
§5.2 (`cache`), and whoever fetches holds the repository's lock: of two workers one downloads, the other waits
and finds the files.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session
from tqdm import tqdm  # type: ignore[import-untyped]

from pilotlight.domain.repository import Repository, RepositoryKind
from pilotlight.models.blobs import READ_BYTES, BlobFetcher, read_small
from pilotlight.models.cache import (
    MAIN,
    FetchCancelledError,
    config_marker,
    content_problem,
    exclusive,
    find_whole,
    folder_name,
    marker,
    pending,
    stored_bytes,
    write_marker,
)
from pilotlight.models.catalog import (
    BUILTIN_MODEL,
    CONFIG_BYTES_MAX,
    CONFIG_FILE,
    PARAMS_FILE,
    ModelFacts,
    config_of_params,
    facts_of,
    parse_config,
    read_folder,
)
from pilotlight.models.listing import HubFile, Listing, checked_listing, chosen_files
from pilotlight.models.problems import (
    DISK_ADVICE,
    HubAccess,
    HubRefusedError,
    HubUnreachableError,
    access_to,
    forbidden_by,
    translated,
    without_queries,
)

ProgressCallback = Callable[[int, int], None]
"""Called with bytes done and bytes in total, from several threads, many times per second."""

TIMEOUT_S = 20.0
"""Longest silence of the hub; the client library itself would wait for ever in some calls."""

DISK_RESERVE_BYTES = 512 * 1024 * 1024
"""Left free on the disk of the cache, so that the gateway's own store can still write."""

_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


def resolve(
    wanted: Repository, *, cache: Path, token: str | None = None, endpoint: str | None = None
) -> ModelFacts:
    """The facts of a hub model, from the cache where it is complete, else from the hub.

    Nothing is written to the cache.

    Args:
        wanted: Which model, and what of it the engine will read.
        cache: The hub cache; it need not exist.
        token: Hugging Face token; None asks as nobody.
        endpoint: URL of the hub; None is the one this process is set to.

    Raises:
        InvalidInputError: The hub has no such model or revision, will not show it, or it has no weights.
        HubUnreachableError: The hub does not answer and the cache does not hold the model.
    """
    access = access_to(endpoint, token)
    with translated(wanted, access, cache):
        cached = find_whole(cache, wanted)
        if cached is not None and marker(cached).exists():
            return read_folder(cached, wanted, kind="hub")
        try:
            with translated(wanted, access, cache):
                listing = _list(wanted, access)
                files = chosen_files(wanted, listing)
                config = _config(wanted, listing, access)
        except HubUnreachableError:
            # Without the hub nobody can say whether the tokenizer is complete; the weights have been checked.
            if cached is None:
                raise
            return read_folder(cached, wanted, kind="hub")
    size = listing.weight_bytes(files)
    return facts_of(config, name=wanted.name, kind="hub", path=None, weight_bytes=size)


def fetch(
    repository: Repository,
    *,
    cache: Path,
    token: str | None = None,
    endpoint: str | None = None,
    on_progress: ProgressCallback = lambda _done, _total: None,
    on_wait: Callable[[str], None] = lambda _holder: None,
    cancelled: threading.Event | None = None,
) -> Path:
    """The folder of a repository's files, downloaded where they are not in the cache yet.

    One weight format is fetched (safetensors, else .bin, else .pt) and every file that is not a weight. A
    download that was interrupted goes on where it stopped. Whoever comes second waits for the first, and then
    downloads what is still missing, which is usually nothing.

    Args:
        repository: What is needed.
        cache: The hub cache; made when it does not exist.
        token: Hugging Face token; None asks as nobody.
        endpoint: URL of the hub; None is the one this process is set to.
        on_progress: Told about bytes, those that somebody else fetches meanwhile included.
        on_wait: Told who is fetching it, about once per second while this waits.
        cancelled: Once set, the download ends within one network read.

    Raises:
        InvalidInputError: No such repository, no permission, or not enough disk space.
        HubUnreachableError: The hub does not answer.
        FetchCancelledError: `cancelled` was set.
    """
    if repository.name == BUILTIN_MODEL:
        raise HubRefusedError(
            f"{BUILTIN_MODEL} is built in: there is nothing to download", "", kind="bad_repository"
        )
    stop = cancelled or threading.Event()
    access = access_to(endpoint, token)
    with translated(repository, access, cache, stop):
        if forbidden_by() is not None and (whole := find_whole(cache, repository)) is not None:
            return whole
        listing, files = _wanted(repository, access)
        waits = False

        def waited(holder: str) -> None:
            nonlocal waits
            waits = True
            total = _total(files)
            on_wait(holder)
            on_progress(min(total, stored_bytes(cache, repository.name)), total)

        with exclusive(cache, repository.name, on_wait=waited, stop=stop) as alone:
            if waits:
                # A branch may have moved on since.
                listing, files = _wanted(repository, access)
            progress = _Progress(_total(files), on_progress, stop)
            fetcher = BlobFetcher(
                repository.name,
                listing.commit,
                blobs=cache / folder_name(repository.name) / "blobs",
                access=access,
                alone=alone,
                stop=stop,
            )
            folder = _fill(repository, listing.commit, files, cache, fetcher, progress)
    on_progress(_total(files), _total(files))
    return folder


def _wanted(repository: Repository, access: HubAccess) -> tuple[Listing, Mapping[str, HubFile]]:
    listing = _list(repository, access)
    return listing, {file: listing.files[file] for file in chosen_files(repository, listing)}


def _total(files: Mapping[str, HubFile]) -> int:
    return sum(file.size for file in files.values())


def _list(repository: Repository, access: HubAccess) -> Listing:
    if (variable := forbidden_by()) is not None:
        raise HubUnreachableError(
            f"{repository} is not complete in the cache, and {variable} is set here, so no hub is asked"
        )
    get_session().timeout = TIMEOUT_S
    info = HfApi(endpoint=access.endpoint, token=access.sent).model_info(
        repository.name, revision=repository.revision, files_metadata=True, timeout=TIMEOUT_S
    )
    files = [
        (
            file.rfilename,
            file.size,
            file.blob_id if file.lfs is None else file.lfs.sha256,
            file.lfs is not None,
        )
        for file in info.siblings or []
    ]
    return checked_listing(repository, info.sha, files)


def _config(wanted: Repository, listing: Listing, access: HubAccess) -> dict[str, Any]:
    path = CONFIG_FILE if CONFIG_FILE in listing.files else PARAMS_FILE
    file = listing.files.get(path)
    where = f"{path} of {wanted.name} on the hub"
    if file is None or file.size > CONFIG_BYTES_MAX:
        found = "does not exist" if file is None else f"has {file.size} bytes, more than {CONFIG_BYTES_MAX}"
        advice = "name a repository with a model in Hugging Face's format"
        raise HubRefusedError(f"{where} {found}", advice, kind="model_not_found")
    config = parse_config(read_small(wanted.name, listing.commit, path, file, access), where)
    return config if path == CONFIG_FILE else config_of_params(config)


def _fill(
    repository: Repository,
    commit: str,
    files: Mapping[str, HubFile],
    cache: Path,
    fetcher: BlobFetcher,
    progress: _Progress,
) -> Path:
    """Bring a snapshot to completion; the repository's lock is held."""
    name = repository.name
    home = cache / folder_name(name)
    snapshot, blobs = home / "snapshots" / commit, home / "blobs"
    missing = {path: file for path, file in files.items() if not _is_there(snapshot / path, file)}
    blobs.mkdir(parents=True, exist_ok=True)
    by_blob = {file.blob: file for file in missing.values()}
    fetcher.take_over(by_blob)
    needed = sum(file.size - fetcher.there(file) for file in by_blob.values())
    _check_disk(cache, name, needed)
    progress.begin(needed)
    snapshot.mkdir(parents=True, exist_ok=True)
    if missing:
        pending(snapshot).touch()
    fetcher.fetch(missing, progress)
    _link(snapshot, blobs, missing)
    lost = [path for path, file in files.items() if not _is_there(snapshot / path, file)]
    problem = f"{snapshot / lost[0]} is missing" if lost else content_problem(snapshot, repository)
    if problem is not None:
        raise HubUnreachableError(f"the download of {name} came out incomplete: {problem}")
    mark = (config_marker if repository.kind is RepositoryKind.CONFIG else marker)(snapshot)
    write_marker(mark, {path: file.size for path, file in files.items()}, repository.ignore)
    pending(snapshot).unlink(missing_ok=True)
    # Last, so that a worker that starts meanwhile still finds the revision before, whole.
    _write_ref(home, repository.revision or MAIN, commit)
    return snapshot


def _is_there(path: Path, file: HubFile) -> bool:
    try:
        return path.stat().st_size == file.size
    except FileNotFoundError:
        return False


def _link(snapshot: Path, blobs: Path, files: Mapping[str, HubFile]) -> None:
    """Let a snapshot's files lead to their blobs; where the disk has no links, move the blobs there."""
    copied: set[Path] = set()
    scratch = snapshot.parent.parent / f".link-{os.getpid()}-{threading.get_ident()}"
    for path, file in files.items():
        target, blob = snapshot / path, blobs / file.blob
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.unlink(missing_ok=True)
        try:
            scratch.symlink_to(os.path.relpath(blob, target.parent))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(blob, scratch)
            copied.add(blob)
        scratch.replace(target)
    for blob in copied:
        blob.unlink()


def _write_ref(home: Path, revision: str, commit: str) -> None:
    if revision == commit:
        return
    ref = home / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    scratch = ref.with_name(f".{ref.name}.{os.getpid()}")
    scratch.write_text(commit, encoding="utf-8")
    scratch.replace(ref)


def _check_disk(cache: Path, name: str, missing: int) -> None:
    free = shutil.disk_usage(cache).free
    if missing > 0 and missing + DISK_RESERVE_BYTES > free:
        cause = (
            f"model {name} needs {missing} more bytes on the disk of {cache} (and {DISK_RESERVE_BYTES} kept "
            f"free); {free} are free"
        )
        raise HubRefusedError(cause, DISK_ADVICE, kind="disk_full")


class _Progress:
    """Adds up the bytes of one download and stops it when asked to.

    The client library shows its progress through a class in tqdm's form. Files add up. For one it may open
    several bars (bytes over the network, bytes on the disk), of which the one that is furthest ahead counts.
    """

    def __init__(self, total: int, report: ProgressCallback, stop: threading.Event) -> None:
        self._total = total
        self._report = report
        self._stop = stop
        self._lock = threading.Lock()
        self._base = 0
        self._shown = 0

    def begin(self, missing: int) -> None:
        """Say how many bytes are to come; the rest is here, whole or in part."""
        self._add(self._total - missing)

    def _add(self, count: int) -> None:
        with self._lock:
            self._base += count
            self._show()

    def _show(self) -> None:
        if self._stop.is_set():
            raise FetchCancelledError("cancelled")
        done = min(self._total, self._base)
        # A hub that does not go on where it stopped sends bytes again; those count when they are new.
        self._shown = max(self._shown, done)
        self._report(self._shown, self._total)

    def bar_class(self) -> type[Any]:
        """For one file: a class that passes for tqdm and draws nothing, and raises to end the download."""
        progress = self
        bars: dict[int, int] = {}
        told = 0

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.pop("name", None)
                kwargs["disable"] = True
                super().__init__(*args, **kwargs)

            def update(self, n: float | None = 1) -> None:
                nonlocal told
                bars[id(self)] = bars.get(id(self), 0) + int(n or 0)
                before, told = told, max(bars.values())
                progress._add(told - before)

        return Bar


class _WithoutQueries(logging.Filter):
    """Takes the queries of addresses out of what the client library logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True."""
        record.msg, record.args = without_queries(record.getMessage()), None
        return True


def _set_up_library() -> None:
    constants.DOWNLOAD_CHUNK_SIZE = READ_BYTES
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_WithoutQueries())


_set_up_library()
