"""The Hugging Face hub: what a repository holds, and its weights in the local cache.

This is the only module that imports huggingface_hub, and `catalog` imports it only when a hub model is named.
Everything blocks and runs in a thread. The cache has the layout of vllm-worker.md §5.2, so a volume that
other tools have filled is used as it is.
"""

from __future__ import annotations

import glob
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from pilotlight.errors import InvalidInputError, PilotlightError
from pilotlight.models.catalog import CONFIG_FILE, MODEL_FIELD, ModelFacts, facts_of, read_config, read_folder

ProgressCallback = Callable[[int, int], None]
"""Called with bytes done and bytes in total, from several threads, many times per second."""

TIMEOUT_S = 20.0
"""Longest silence of the hub; the client library itself would wait for ever in some calls."""

DISK_RESERVE_BYTES = 512 * 1024 * 1024
"""Left free on the disk of the cache, so that the gateway's own store can still write."""

_MAIN = "main"
_SKIPPED_SUFFIXES = (
    ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".ckpt", ".zip",
)  # fmt: skip
_SKIPPED_FOLDERS = ("original/", "onnx/", "openvino/", "coreml/", "metal/", "gguf/")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class HubUnreachableError(PilotlightError):
    """A hub that does not answer; the caller may try again or use a folder."""


class FetchCancelledError(PilotlightError):
    """A download that its caller gave up."""


def resolve(name: str, *, cache: Path, revision: str | None, token: str | None) -> ModelFacts:
    """The facts of a hub model, from the cache where it is complete, else from the hub.

    Raises:
        InvalidInputError: The hub has no such model or revision, will not show it, or it has no weights.
        HubUnreachableError: The hub does not answer and the cache does not hold the model.
    """
    cached = find_snapshot(cache, name, revision)
    if cached is not None and _marker(cached).exists():
        return read_folder(cached, name=name, kind="hub")
    try:
        with _translated(name, revision):
            commit, sizes = _listing(name, revision, token)
            files = _chosen(name, sizes)
            config = read_config(
                Path(
                    hf_hub_download(
                        name, CONFIG_FILE, revision=commit, cache_dir=cache, token=token, endpoint=_endpoint()
                    )
                )
            )
    except HubUnreachableError:
        # Without the hub nobody can say whether the tokenizer is complete; the weights can be checked.
        if cached is None or not _loadable(cached, name):
            raise
        return read_folder(cached, name=name, kind="hub")
    size = sum(sizes[file] for file in files if file.endswith(_WEIGHT_SUFFIXES))
    return facts_of(config, name=name, kind="hub", path=None, weight_bytes=size)


def fetch(
    name: str,
    *,
    cache: Path,
    revision: str | None = None,
    token: str | None = None,
    on_progress: ProgressCallback = lambda _done, _total: None,
    cancelled: threading.Event | None = None,
) -> Path:
    """The folder of a model's files, downloaded where they are not in the cache yet.

    One weight format is fetched (safetensors, else .bin, else .pt) and every file that is not a weight. A
    download that was interrupted goes on where it stopped.

    Args:
        name: Repository id.
        cache: The hub cache; made when it does not exist.
        revision: Branch, tag or commit; None is the main branch.
        token: Hugging Face token.
        on_progress: Told about bytes.
        cancelled: Once set, the download ends within one network read.

    Raises:
        InvalidInputError: No such model, no permission, or not enough disk space.
        HubUnreachableError: The hub does not answer.
        FetchCancelledError: `cancelled` was set.
    """
    stop = cancelled or threading.Event()
    with _translated(name, revision, stop):
        commit, sizes = _listing(name, revision, token)
        files = _chosen(name, sizes)
        total = sum(sizes[file] for file in files)
        there = cache / _folder_name(name) / "snapshots" / commit
        missing = sum(sizes[file] for file in files if not (there / file).exists())
        _check_disk(cache, name, missing)
        progress = _Progress(total, total - missing, on_progress, stop)
        folder = Path(
            snapshot_download(
                name,
                revision=revision or _MAIN,
                cache_dir=cache,
                token=token,
                allow_patterns=[glob.escape(file) for file in files],
                max_workers=4,
                tqdm_class=progress.bar_class(),
                endpoint=_endpoint(),
            )
        )
    read_folder(folder, name=name, kind="hub")
    _marker(folder).touch()
    on_progress(total, total)
    return folder


def find_snapshot(cache: Path, name: str, revision: str | None) -> Path | None:
    """The cached snapshot of a model (vllm-worker.md §5.2), or None; it may be incomplete.

    The repository is found case-insensitively; the commit is the revision itself, the one its ref names, or,
    for the main branch without a ref, the only one there is.
    """
    wanted = _folder_name(name).lower()
    folder = next((path for path in _children(cache) if path.name.lower() == wanted), None)
    if folder is None:
        return None
    ref = folder / "refs" / (revision or _MAIN)
    commit = ref.read_text().strip() if ref.is_file() else (revision or "")
    exact = folder / "snapshots" / commit
    if commit and exact.is_dir():
        return exact
    snapshots = _children(folder / "snapshots")
    return snapshots[0] if revision is None and not commit and len(snapshots) == 1 else None


def select_files(sizes: Mapping[str, int]) -> Sequence[str]:
    """The files of a repository to fetch: one weight format and all that is not a weight; pure.

    Args:
        sizes: Bytes by path in the repository.

    Returns:
        Paths in order; without any weight when the repository has none that the engine loads.
    """
    kept = [
        file
        for file in sorted(sizes)
        if not file.startswith(_SKIPPED_FOLDERS) and not file.lower().endswith(_SKIPPED_SUFFIXES)
    ]
    weights = [file for file in kept if file.endswith(_WEIGHT_SUFFIXES)]
    root = [file for file in weights if "/" not in file]
    chosen: set[str] = set()
    for suffix in (".safetensors", ".bin", ".pt"):
        chosen = {file for file in root if file.endswith(suffix)}
        if chosen:
            break
    # Some repositories carry the same weights twice, once as `consolidated*` in the maker's own format.
    if any(file.startswith("model") for file in chosen):
        chosen = {file for file in chosen if not file.startswith("consolidated")}
    return [file for file in kept if file in chosen or file not in weights]


def _listing(name: str, revision: str | None, token: str | None) -> tuple[str, Mapping[str, int]]:
    get_session().timeout = TIMEOUT_S
    api = HfApi(endpoint=_endpoint(), token=token)
    info = api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    if info.sha is None:
        raise HubUnreachableError(f"the hub's answer about {name} names no commit")
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []}


def _chosen(name: str, sizes: Mapping[str, int]) -> Sequence[str]:
    if CONFIG_FILE not in sizes:
        raise InvalidInputError(f"model {name} has no {CONFIG_FILE} on the hub", field=MODEL_FIELD)
    files = select_files(sizes)
    if not any(file.endswith(_WEIGHT_SUFFIXES) for file in files):
        msg = f"model {name} has no weights that the engine loads (*.safetensors, *.bin or *.pt) on the hub"
        raise InvalidInputError(msg, field=MODEL_FIELD)
    return files


def _check_disk(cache: Path, name: str, missing: int) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if missing and missing + DISK_RESERVE_BYTES > free:
        msg = (
            f"model {name} needs {missing} more bytes on the disk of {cache} (and {DISK_RESERVE_BYTES} kept "
            f"free); {free} are free"
        )
        raise InvalidInputError(msg, field=MODEL_FIELD)


@contextmanager
def _translated(name: str, revision: str | None, stop: threading.Event | None = None) -> Iterator[None]:
    """Turn everything that the client library raises into our errors, cause kept."""
    page = f"{_endpoint() or 'https://huggingface.co'}/{name}"
    advice = "set HF_TOKEN in the endpoint's environment (--env HF_TOKEN=…) or in the gateway's"
    try:
        yield
    except PilotlightError:
        raise
    except GatedRepoError as error:
        msg = f"model {name} is gated: accept its terms at {page}, then {advice}"
        raise InvalidInputError(msg, field=MODEL_FIELD) from error
    except RevisionNotFoundError as error:
        msg = f"model {name} has no revision {revision or _MAIN!r} on the hub"
        raise InvalidInputError(msg, field="env.MODEL_REVISION") from error
    except RepositoryNotFoundError as error:
        msg = f"the hub has no model {name} at {page}; if it is private, {advice}"
        raise InvalidInputError(msg, field=MODEL_FIELD) from error
    except Exception as error:
        if stop is not None and stop.is_set():
            raise FetchCancelledError(f"the download of {name} was cancelled") from error
        if isinstance(error, EntryNotFoundError) and not isinstance(error, OSError):
            raise InvalidInputError(
                f"model {name} lacks a file on the hub: {error}", field=MODEL_FIELD
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        msg = f"model {name} cannot be read from {page}: {first}"
        raise HubUnreachableError(msg) from error


def _loadable(folder: Path, name: str) -> bool:
    try:
        read_folder(folder, name=name, kind="hub")
    except InvalidInputError:
        return False
    return True


def _endpoint() -> str | None:
    # The library reads the variable when it is imported, which may be before the operator's setting is known.
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def _folder_name(name: str) -> str:
    return "models--" + name.replace("/", "--")


def _marker(snapshot: Path) -> Path:
    """A file that says that every file of the snapshot was fetched, and not only the weights."""
    return snapshot.parent.parent / f".pilotlight-complete-{snapshot.name}"


def _children(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()


class _Progress:
    """Adds up the bytes of one download and stops it when asked to.

    The client library shows its progress through a class in tqdm's form. It opens several bars (bytes over
    the network, bytes on the disk, number of files); the byte bar that is furthest ahead is the truth.
    """

    def __init__(self, total: int, there: int, report: ProgressCallback, stop: threading.Event) -> None:
        self._total = total
        self._there = there
        self._report = report
        self._stop = stop
        self._lock = threading.Lock()
        self._bars: dict[int, int] = {}

    def advance(self, bar: int, count: int) -> None:
        """Count bytes of one bar; raises FetchCancelledError once the caller has given up."""
        if self._stop.is_set():
            raise FetchCancelledError("cancelled")
        with self._lock:
            self._bars[bar] = self._bars.get(bar, 0) + count
            done = min(self._total, self._there + max(self._bars.values()))
            self._report(done, self._total)

    def bar_class(self) -> type[Any]:
        """A class that passes for tqdm and draws nothing."""
        progress = self

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.pop("name", None)
                self._counts = kwargs.get("unit") == "B"
                kwargs["disable"] = True
                super().__init__(*args, **kwargs)

            def update(self, n: float | None = 1) -> None:
                if self._counts and n:
                    progress.advance(id(self), int(n))

        return Bar
