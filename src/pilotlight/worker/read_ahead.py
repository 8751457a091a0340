"""Reads a model's weights into the page cache while the engine still imports.

A hint to the kernel, which copies nothing and may be ignored; it pays where the disk is slower than the
engine's imports, and costs next to nothing where the files are cached already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Final

from pilotlight.domain.repository import WEIGHT_PATTERNS

STEP_BYTES: Final = 128 * 1024
"""How much is asked for at a time. The kernel cuts each question to the device's read-ahead, of which this is
the default: of a file of 64 MB asked for at once it read 8 MB (Linux 6.18)."""

SHARE_OF_MEMORY: Final = 0.5
"""Of the available memory: weights that do not fit would push each other out again."""


def read_ahead(folder: Path, *, available_bytes: int, given_up: Event) -> int:
    """Asks the kernel to read the weights of a folder; blocks while the disk's queue is full.

    Args:
        folder: The model's; may be a single file.
        available_bytes: Memory that the machine can give. Weights that would take more than half of it are
            left alone.
        given_up: Ends this early when it is set.

    Returns:
        Bytes that were asked for.
    """
    try:
        files = weight_files(folder)
        sizes = [path.stat().st_size for path in files]
    except OSError:
        return 0
    if sum(sizes) > available_bytes * SHARE_OF_MEMORY:
        return 0
    return sum(sum(_asked(path, size, given_up)) for path, size in zip(files, sizes, strict=True))


def weight_files(folder: Path) -> Sequence[Path]:
    """The weights in this folder, in the order in which engines load them; none where there is none."""
    if folder.is_file():
        return (folder,)
    for pattern in WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    return ()


def _asked(path: Path, size: int, given_up: Event) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for offset in range(0, size, STEP_BYTES):
            if given_up.is_set():
                return
            length = min(STEP_BYTES, size - offset)
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
            yield length
    except OSError:
        # A file system that takes no hints.
        return
    finally:
        os.close(descriptor)
