"""What a hub says of one revision of a repository, checked before a single path is made of it. Pure.

Names, commits and hashes come from a stranger and become paths on our disks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pilotlight.domain.repository import WEIGHT_PATTERNS, Repository, RepositoryKind
from pilotlight.models.catalog import CONFIG_FILE, PARAMS_FILE
from pilotlight.models.problems import HubRefusedError, field_of

FILES_MAX = 20_000
"""Most files of a repository; the largest models have some hundreds."""

NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 1024

_SKIPPED_SUFFIXES = (
    ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".ckpt", ".zip",
)  # fmt: skip
_SKIPPED_FOLDERS = ("original/", "onnx/", "openvino/", "coreml/", "metal/", "gguf/")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".tensors")
_MODULE_FOLDER = re.compile(r"\d+_[A-Za-z]+")
"""Folders in which embedding models keep further layers with weights of their own, such as `2_Dense`."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_HASH = re.compile(r"[0-9a-f]{40}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository, as the hub's listing has it.

    Attributes:
        size: Bytes.
        blob: Its name among the blobs: sha256 of its content for large files, git's own hash for others.
        large: Whether it lies in the hub's storage for large files.
    """

    size: int
    blob: str
    large: bool


@dataclass(frozen=True, slots=True)
class Listing:
    """What the hub says of one revision.

    Attributes:
        commit: Which one.
        files: By path.
    """

    commit: str
    files: Mapping[str, HubFile]

    def weight_bytes(self, files: Iterable[str]) -> int:
        """Size of the weights among these files."""
        return sum(self.files[file].size for file in files if file.endswith(_WEIGHT_SUFFIXES))


def checked_listing(
    repository: Repository, commit: object, files: Sequence[tuple[object, object, object, bool]]
) -> Listing:
    """A listing, when everything in it can be what it says.

    Args:
        repository: What was asked for.
        commit: What the hub says it is.
        files: Path, size, hash, and whether it lies in the storage for large files.

    Raises:
        HubRefusedError: Names the first thing that is not as it must be.
    """
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _unsound(repository, f"the commit {commit!r}", "40 digits of hexadecimal")
    if len(files) > FILES_MAX:
        raise _unsound(repository, f"{len(files)} files", f"at most {FILES_MAX}")
    found: dict[str, HubFile] = {}
    for path, size, blob, large in files:
        if not isinstance(path, str) or not _is_plain_path(path):
            raise _unsound(repository, f"a file {path!r}", "a path within the repository")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise _unsound(repository, f"{path} with the size {size!r}", "a number of bytes")
        if not isinstance(blob, str) or not (_SHA256 if large else _GIT_HASH).fullmatch(blob):
            raise _unsound(repository, f"{path} with the hash {blob!r}", "a hash in hexadecimal")
        found[path] = HubFile(size=size, blob=blob, large=large)
    return Listing(commit, found)


def chosen_files(repository: Repository, listing: Listing) -> Sequence[str]:
    """The files to fetch of a repository.

    Raises:
        HubRefusedError: It is not what it is wanted for.
    """
    patterns = () if repository.kind is RepositoryKind.CONFIG else repository.patterns
    files = select_files(listing.files, patterns=patterns, ignore=repository.ignore)
    weights = any(file.endswith(_WEIGHT_SUFFIXES) for file in files)
    if repository.kind is RepositoryKind.MODEL:
        if not {CONFIG_FILE, PARAMS_FILE} & set(files):
            cause = f"model {repository.name} has no {CONFIG_FILE} on the hub"
            advice = "name a repository with a model in Hugging Face's format"
            raise HubRefusedError(cause, advice, kind="model_not_found")
        if not weights:
            wanted = "*.safetensors, *.bin or *.pt" if patterns == WEIGHT_PATTERNS else ", ".join(patterns)
            cause = f"model {repository.name} has no weights that the engine loads ({wanted}) on the hub"
            advice = "name another repository, or correct LOAD_FORMAT and IGNORE_PATTERNS"
            raise HubRefusedError(cause, advice, kind="model_not_found")
    if repository.kind is RepositoryKind.ADAPTER and not (weights and "adapter_config.json" in files):
        cause = f"{repository.name} is no LoRA adapter: it has no adapter_config.json with weights on the hub"
        advice = f"correct {repository.variable}"
        raise HubRefusedError(cause, advice, kind="model_not_found", field=field_of(repository))
    return files


def select_files(
    sizes: Mapping[str, object], *, patterns: Sequence[str] = WEIGHT_PATTERNS, ignore: Sequence[str] = ()
) -> Sequence[str]:
    """The files of a repository to fetch: one weight format and all that is not a weight.

    Args:
        sizes: By path in the repository; only the paths count.
        patterns: Weight formats, in the order of preference; none means that no weights are wanted.
        ignore: Patterns of paths that are left out.

    Returns:
        Paths in order; without any weight when the repository has none that the engine loads.
    """
    kept = [
        file
        for file in sorted(sizes)
        if not file.startswith(_SKIPPED_FOLDERS)
        and not file.lower().endswith(_SKIPPED_SUFFIXES)
        and not any(fnmatchcase(file, pattern) for pattern in ignore)
    ]
    weights = [file for file in kept if file.endswith(_WEIGHT_SUFFIXES)]
    chosen: set[str] = set()
    for folder in {file.rpartition("/")[0] for file in weights}:
        if folder and not _MODULE_FOLDER.fullmatch(folder):
            continue
        inside = {file for file in weights if file.rpartition("/")[0] == folder}
        formats = ({file for file in inside if fnmatchcase(_base(file), pattern)} for pattern in patterns)
        best = next((found for found in formats if found), set())
        # Some repositories carry the same weights twice, once as `consolidated*` in the maker's own format.
        if any(_base(file).startswith("model") for file in best):
            best = {file for file in best if not _base(file).startswith("consolidated")}
        chosen |= best
    return [file for file in kept if file in chosen or file not in weights]


def _is_plain_path(path: str) -> bool:
    parts = path.split("/")
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return False
    return (
        not _CONTROL.search(path)
        and not {"", ".", ".."} & set(parts)
        and max(lengths) <= NAME_BYTES_MAX
        and sum(lengths) + len(parts) - 1 <= PATH_BYTES_MAX
    )


def _unsound(repository: Repository, found: str, legal: str) -> HubRefusedError:
    cause = f"the hub's listing of {repository.name} has {found}; expected {legal}"
    advice = "nothing was downloaded; see that HF_ENDPOINT names a hub that you trust"
    return HubRefusedError(cause, advice, kind="bad_repository", field=field_of(repository))


def _base(file: str) -> str:
    return file.rpartition("/")[2]
