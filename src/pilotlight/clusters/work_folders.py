"""Folders of workers that are any command: where such a worker begins, and what it takes for its home.

Both are empty at its start and removed with it. A worker that finds the folder of an earlier one may believe
that it still holds that one's job and never ask for another (worker-protocol.md §11), and a
`~/.runpod/config.toml` would replace its credential (§2.2). `clusters.local` is the only caller.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

_ASIDE_MAX = 100
"""Folders of one worker that are put aside because they cannot be removed."""


class WorkFolders:
    """Makes and removes them.

    Args:
        root: Where they are; made with mode 0700 when it is first needed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def make(self, worker_id: str) -> Path:
        """A fresh working directory of a worker, with its home beside it.

        Raises:
            OSError: It cannot be made.
        """
        folder = self._root / worker_id
        self.remove(worker_id)
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.exists():
            self._put_aside(folder)
        folder.mkdir(mode=0o700)
        (folder / "home").mkdir(mode=0o700)
        work = folder / "work"
        work.mkdir(mode=0o700)
        return work

    def environment(self, worker_id: str, base: Mapping[str, str]) -> dict[str, str]:
        """The variables that make the worker use its home, and caches that all workers of a user share.

        Args:
            worker_id: Whose.
            base: What it inherits of the gateway's environment.
        """
        folder = self._root / worker_id
        own = {"HOME": str(folder / "home"), "PWD": str(folder / "work")}
        user_home = base.get("HOME")
        if user_home:
            # Weights and packages that the user has are found where they always were.
            own["XDG_CACHE_HOME"] = base.get("XDG_CACHE_HOME") or os.path.join(user_home, ".cache")  # noqa: PTH118 - a text
            own["PYTHONUSERBASE"] = os.path.join(user_home, ".local")  # noqa: PTH118
        return own

    def remove(self, worker_id: str) -> None:
        """Remove a worker's folders; blocks for as long as its files take."""
        folder = self._root / worker_id
        if not folder.exists():
            return
        _remove_tree(folder)
        if folder.exists():
            _log.warning("work_folder_not_removed", worker_id=worker_id, folder=str(folder))

    def _put_aside(self, folder: Path) -> None:
        """Give the name free that a folder which cannot be removed has; `prune` tries again with it."""
        for number in range(_ASIDE_MAX):
            aside = folder.with_name(f"{folder.name}.left-{number}")
            if not aside.exists():
                folder.rename(aside)
                return
        raise FileExistsError(f"{_ASIDE_MAX} folders of earlier lives of {folder} cannot be removed")

    def prune(self, living: Collection[str]) -> None:
        """Remove the folders of all workers but these."""
        if self._root.is_dir():
            for folder in self._root.iterdir():
                if folder.name not in living:
                    self.remove(folder.name)


def _remove_tree(folder: Path) -> None:
    """Remove what can be removed, also out of folders that their owner made read-only."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    with contextlib.suppress(OSError):
        folder.chmod(stat.S_IRWXU)
        for at, names, _ in os.walk(folder):
            for each in (Path(at, name) for name in names):
                if not each.is_symlink():
                    each.chmod(stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)
