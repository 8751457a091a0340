"""What this process holds, put into huge pages, so that its processor finds it sooner.

The objects of hundreds of streams lie on thousands of pages of 4 KiB, more than a processor remembers the
places of, and to look one up again takes long, above all in a virtual machine. One huge page takes the place
of 512 (Linux' Documentation/admin-guide/mm/transhuge.rst). Python and the C library ask for memory in pieces
that are too small for Linux to choose huge pages by itself, so they are put together afterwards, while
everything goes on: `MADV_COLLAPSE` of madvise(2), which Linux has since 6.1.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import structlog

from pilotlight.memory import resident_bytes

_log = structlog.get_logger()

_KERNEL = Path("/sys/kernel/mm/transparent_hugepage")
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_COLLAPSE = 25
"""linux/mman.h; Python's mmap does not have it yet."""

_LOOK_S = 2.0
_CHANGE_BYTES = 2 << 20
"""Memory in use must have changed by this much for another walk through all of it."""

_FULL = 7 / 8
"""The least part that must be in use of what becomes a huge page. Measured under load: of 57 possible ones it
was so of 41, and of all others less than an eighth."""

_LARGEST_BYTES = 32 << 20
"""With pages of 64 KiB, as some ARM kernels have them, a huge page has 512 MiB: more than a gateway holds."""

_PAGE_BYTES = mmap.PAGESIZE
_ENTRY_BYTES = 8
"""One page in /proc/self/pagemap; the highest bit says that it is in memory (proc_pid_pagemap(5))."""
_ABSENT = bytes(range(0x80))

_HEAP = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[(?:heap|anon:.*)\])?$", re.MULTILINE)
"""Private memory without a file in /proc/self/maps: what the C library and Python have for objects."""


async def keep_in_huge_pages() -> None:
    """Put this process into huge pages now and whenever it holds more or less; ends where it cannot."""
    problem = await asyncio.to_thread(why_no_huge_pages)
    own, seen = os.getpid(), 0
    try:
        while not problem:
            if abs(resident_bytes(own) - seen) >= _CHANGE_BYTES:
                await asyncio.to_thread(collapse)
                seen = resident_bytes(own)
            await asyncio.sleep(_LOOK_S)
    except OSError as error:
        problem = f"cannot look at this process's memory: {error}"
    _log.info("no_huge_pages", problem=problem)


def why_no_huge_pages() -> str:
    """What keeps this process from having huge pages, in a sentence; "" where nothing does.

    Tried with a little memory, as containers and kernels differ in what they allow.
    """
    try:
        mode = (_KERNEL / "enabled").read_text()
        size = _huge_page_bytes()
    except OSError:
        return "this kernel has no transparent huge pages"
    if "[never]" in mode:
        return f"transparent huge pages are switched off: {_KERNEL}/enabled says never"
    if size > _LARGEST_BYTES:
        return f"a huge page of this kernel has {size >> 20} MiB, more than the gateway could fill"
    with mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        first = ctypes.c_char.from_buffer(memory)
        address = -(-ctypes.addressof(first) // size) * size
        memory[address - ctypes.addressof(first)] = 1
        error = _collapse(address, size)
        del first
    return f"the kernel refuses: {os.strerror(error)}; Linux has it since 6.1" if error else ""


def collapse() -> int:
    """Put everything of this process that may lie in huge pages into them; takes milliseconds.

    Only where nearly all pages are in use: the rest of a huge page counts as held, too. What cannot be done,
    for want of free huge pages or because a page is busy, stays as it is.

    Returns:
        How many bytes lie in huge pages because of this, or did before.
    """
    size = _huge_page_bytes()
    done = 0
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for start, end in _heap():
            for address in range(-(-start // size) * size, end - size + 1, size):
                if _used(pagemap, address, size) >= _FULL * size and not _collapse(address, size):
                    done += size
    return done


def _huge_page_bytes() -> int:
    return int((_KERNEL / "hpage_pmd_size").read_text())


def _heap() -> Iterator[tuple[int, int]]:
    """Where the heap lies: addresses of the first byte and after the last one of each part."""
    for start, end in _HEAP.findall(Path("/proc/self/maps").read_bytes()):
        yield int(start, 16), int(end, 16)


def _used(pagemap: BinaryIO, address: int, size: int) -> int:
    """How many bytes of a range are in memory."""
    pagemap.seek(address // _PAGE_BYTES * _ENTRY_BYTES)
    entries = pagemap.read(size // _PAGE_BYTES * _ENTRY_BYTES)
    return len(entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(None, _ABSENT)) * _PAGE_BYTES


def _collapse(address: int, size: int) -> int:
    """Make one huge page of a range; the number of the error, 0 for none."""
    return ctypes.get_errno() if _madvise(address, size, _MADV_COLLAPSE) else 0
