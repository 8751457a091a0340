"""Files of a hub as blobs of the cache; whatever ended a download, the next one goes on where it stopped.

The client library writes each attempt to a file of its own and removes it afterwards; ten gigabytes that
broke off would begin again. Here every attempt has a file of its own too
(`blobs/<hash>.<host>-<process>-<number>.incomplete`), which stays, and the next attempt takes it over by
renaming it. That is safe where the repository's lock keeps others out (`cache.exclusive`); where it does not,
what was written to lately is left alone. A file is put in place only after its size and its hash were
compared with the listing.

Files are asked for by plain HTTP, those in the hub's Xet storage as well: the hub leads to a bridge that
gives them out whole. Xet's own way, in parallel pieces, is taken where `HF_XET_HIGH_PERFORMANCE=1` asks for
it and for files above what the hub gives out by HTTP; it begins every file anew and can be ended only all at
once.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get, xet_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils._xet import abort_xet_session

from pilotlight.models.listing import HubFile
from pilotlight.models.problems import HubAccess, comes_from_elsewhere
from pilotlight.models.upkeep import git_hash_of, sha256_of

DOWNLOADS_MAX = 4
"""Files fetched at the same time."""

READ_BYTES = 1 << 20
"""Read at once from the network; progress and the end of a cancelled download come as often."""

IDLE_S = 600.0
"""A file that was not written to for so long belongs to nobody, clocks of several hosts allowed for."""

_STOP_POLL_S = 0.2
_OWN_PARTIAL = re.compile(r"(?P<blob>[0-9a-f]{40,64})(\.[A-Za-z0-9_-]+-\d+-\d+)?\.incomplete")
_attempts = itertools.count(1)


class Progress(Protocol):
    """Takes bytes as they come; those that earlier attempts have left are the caller's to count."""

    def bar_class(self) -> type[Any]:
        """A class in tqdm's form for one file; its `update` may raise to end the download."""
        ...


class BlobFetcher:
    """Fetches files of one revision into the blobs of its repository.

    Args:
        repository: Its id.
        commit: At which revision.
        blobs: The folder for them, which exists.
        access: The hub, and as whom it is asked.
        alone: Whether the repository's lock keeps others out.
        stop: Once set, a download ends within one network read.
    """

    def __init__(
        self,
        repository: str,
        commit: str,
        *,
        blobs: Path,
        access: HubAccess,
        alone: bool,
        stop: threading.Event,
    ) -> None:
        self._repository = repository
        self._commit = commit
        self._blobs = blobs
        self._access = access
        self._alone = alone
        self._stop = stop
        self._given_up = threading.Event()
        host = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:40]
        self._attempt = f"{host}-{os.getpid()}-{next(_attempts)}"

    def take_over(self, wanted: Mapping[str, HubFile]) -> None:
        """Make what earlier attempts have left of these blobs ours, and remove what is of no use any more."""
        for path in sorted(self._blobs.glob("*.incomplete")):
            own = _OWN_PARTIAL.fullmatch(path.name)
            # Those of other programs may be in use: they do not know our lock.
            if not (self._alone and (own or path.name.endswith(".xet.incomplete"))) and _is_in_use(path):
                continue
            file = wanted.get(own["blob"]) if own else None
            if file is not None and _size(self.partial_path(file)) < _size(path) <= file.size:
                path.replace(self.partial_path(file))
            else:
                path.unlink(missing_ok=True)

    def there(self, file: HubFile) -> int:
        """Bytes of a file that are here, whole or in part."""
        blob = self._blobs / file.blob
        return file.size if _size(blob) == file.size else max(0, _size(self.partial_path(file)))

    def partial_path(self, file: HubFile) -> Path:
        """Where this attempt writes a blob until it is complete."""
        return self._blobs / f"{file.blob}.{self._attempt}.incomplete"

    def fetch(self, files: Mapping[str, HubFile], progress: Progress) -> None:
        """Have the blobs of these files here.

        Args:
            files: By path; those whose blob is there already are passed over.
            progress: Told about bytes.

        Raises:
            Exception: Whatever the client library or the disk raises; what came until then is kept.
        """
        # By blob: the same content may stand under several paths.
        missing = {
            file.blob: path for path, file in files.items() if _size(self._blobs / file.blob) != file.size
        }
        with ThreadPoolExecutor(DOWNLOADS_MAX, thread_name_prefix="fetch-file") as pool:
            futures = [pool.submit(self._fetch, path, files[path], progress) for path in missing.values()]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch(self, path: str, file: HubFile, progress: Progress) -> None:
        partial = self.partial_path(file)
        there = _size(partial) > 0
        bar_class = self._bar_class(progress)
        whole = self._by_xet(path, file, bar_class) or self._by_http(path, file, bar_class)
        if not self._is_right(whole, file) and there and whole == partial:
            # Parts that do not fit together; so that the next attempt does not meet them again.
            whole.unlink()
            whole = self._by_http(path, file, bar_class)
        if not self._is_right(whole, file):
            whole.unlink(missing_ok=True)
            raise OSError(f"{path} came out wrong: it is not the file that the hub lists")
        whole.replace(self._blobs / file.blob)

    def _by_http(self, path: str, file: HubFile, bar_class: type[Any]) -> Path:
        partial = self.partial_path(file)
        try:
            self._get(path, file, partial, bar_class)
        except HfHubHTTPError as error:
            stale = error.response.status_code in {401, 403} and comes_from_elsewhere(error, self._access)
            if not stale:
                raise
            # The hub signs the way to its storage for some minutes; asked again it signs another.
            self._get(path, file, partial, bar_class)
        return partial

    def _get(self, path: str, file: HubFile, partial: Path, bar_class: type[Any]) -> None:
        # Asked at the hub each time, which leads on: the token never leaves it, and no signature gets old.
        with io.BufferedWriter(_Bounded(partial, file.size)) as target:
            http_get(
                self._url(path),
                target,
                resume_size=max(0, _size(partial)),
                headers=self._headers(),
                expected_size=file.size,
                displayed_filename=path,
                tqdm_class=bar_class,
            )

    def _by_xet(self, path: str, file: HubFile, bar_class: type[Any]) -> Path | None:
        """The file by Xet's own way, or None where plain HTTP does."""
        wanted = constants.HF_XET_HIGH_PERFORMANCE or file.size > constants.MAX_HTTP_DOWNLOAD_SIZE
        if not (wanted and file.large and is_xet_available()):
            return None
        found = get_hf_file_metadata(
            self._url(path), token=self._access.sent, endpoint=self._access.endpoint
        ).xet_file_data
        if found is None:
            return None
        # Not in order: pieces lie where they belong, so that nobody can go on with this.
        partial = self._blobs / f"{file.blob}.{self._attempt}.xet.incomplete"
        over = threading.Event()
        threading.Thread(target=self._abort_xet, args=(over,), name="xet-stop", daemon=True).start()
        try:
            xet_get(
                incomplete_path=partial,
                xet_file_data=found,
                headers=self._headers(),
                expected_size=file.size,
                displayed_filename=path,
                tqdm_class=bar_class,
            )
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            over.set()
        return partial

    def _abort_xet(self, over: threading.Event) -> None:
        """End Xet's downloads when this one is not wanted any more; what a bar raises does not reach it."""
        while not over.wait(_STOP_POLL_S):
            if self._stop.is_set() or self._given_up.is_set():
                abort_xet_session()  # type: ignore[no-untyped-call]
                return

    def _is_right(self, path: Path, file: HubFile) -> bool:
        hash_of = sha256_of if file.large else git_hash_of
        return _size(path) == file.size and hash_of(path, self._check_wanted) == file.blob

    def _check_wanted(self) -> None:
        if self._given_up.is_set() or self._stop.is_set():
            raise OSError("this download was given up")

    def _bar_class(self, progress: Progress) -> type[Any]:
        check_wanted = self._check_wanted

        class Bar(progress.bar_class()):  # type: ignore[misc]
            def update(self, n: float | None = 1) -> None:
                check_wanted()
                super().update(n)

        return Bar

    def _url(self, path: str) -> str:
        return hf_hub_url(self._repository, path, revision=self._commit, endpoint=self._access.endpoint)

    def _headers(self) -> dict[str, str]:
        return dict(build_hf_headers(token=self._access.sent))


def read_small(repository: str, commit: str, path: str, file: HubFile, access: HubAccess) -> bytes:
    """The content of a small file, without the cache."""
    target = _BoundedBytes(file.size)
    http_get(
        hf_hub_url(repository, path, revision=commit, endpoint=access.endpoint),
        target,
        headers=dict(build_hf_headers(token=access.sent)),
        expected_size=file.size,
        displayed_filename=path,
    )
    return target.getvalue()


class _Bounded(io.FileIO):
    """A file to append to, up to what was announced."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        super().__init__(path, "ab")
        self._bytes_max = bytes_max

    def write(self, data: Any, /) -> int:
        """As of every file."""
        _check_length(self.tell() + len(data), self._bytes_max)
        return super().write(data) or 0


class _BoundedBytes(io.BytesIO):
    def __init__(self, bytes_max: int) -> None:
        super().__init__()
        self._bytes_max = bytes_max

    def write(self, data: Any, /) -> int:
        _check_length(self.tell() + len(data), self._bytes_max)
        return super().write(data)


def _check_length(length: int, bytes_max: int) -> None:
    if length > bytes_max:
        raise OSError(f"the hub sends more than the {bytes_max} bytes that it lists")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _is_in_use(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < IDLE_S
    except FileNotFoundError:
        return False
