"""Weights in the page cache before the engine asks for them."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event

import pytest

from pilotlight.memory import available_bytes, proportional_bytes
from pilotlight.worker.read_ahead import STEP_BYTES, read_ahead, weight_files

PLENTY = 1 << 40


def model(folder: Path, **sizes: int) -> Path:
    for name, size in sizes.items():
        (folder / name.replace("_", ".")).write_bytes(b"x" * size)
    return folder


def test_all_weights_are_asked_for_in_the_order_in_which_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces: the kernel cuts a larger question short."""
    folder = model(
        tmp_path, b_safetensors=3, a_safetensors=2 * STEP_BYTES + 1, old_bin=9, config_json=5, c_safetensors=0
    )
    asked: list[tuple[str, int, int]] = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, length))

    monkeypatch.setattr(os, "posix_fadvise", note)
    assert read_ahead(folder, available_bytes=PLENTY, given_up=Event()) == 2 * STEP_BYTES + 4
    assert asked == [
        ("a.safetensors", 0, STEP_BYTES),
        ("a.safetensors", STEP_BYTES, STEP_BYTES),
        ("a.safetensors", 2 * STEP_BYTES, 1),
        ("b.safetensors", 0, 3),
    ]


def test_the_kernel_takes_the_hint(tmp_path: Path) -> None:
    folder = model(tmp_path, a_bin=STEP_BYTES)
    assert read_ahead(folder, available_bytes=PLENTY, given_up=Event()) == STEP_BYTES
    assert read_ahead(folder / "a.bin", available_bytes=PLENTY, given_up=Event()) == STEP_BYTES


def test_weights_that_do_not_fit_or_are_not_there_are_left_alone(tmp_path: Path) -> None:
    folder = model(tmp_path, a_safetensors=100)
    assert read_ahead(folder, available_bytes=200, given_up=Event()) == 100
    assert read_ahead(folder, available_bytes=199, given_up=Event()) == 0
    assert read_ahead(folder / "nowhere", available_bytes=PLENTY, given_up=Event()) == 0
    assert read_ahead(Path("s3://bucket/model"), available_bytes=PLENTY, given_up=Event()) == 0
    assert read_ahead(folder / ("x" * 300), available_bytes=PLENTY, given_up=Event()) == 0
    (folder / "b.safetensors").symlink_to("nothing")
    assert read_ahead(folder, available_bytes=PLENTY, given_up=Event()) == 0
    assert weight_files(folder / "nowhere") == ()


def test_it_ends_with_the_start(tmp_path: Path) -> None:
    given_up = Event()
    given_up.set()
    assert read_ahead(model(tmp_path, a_pt=9), available_bytes=PLENTY, given_up=given_up) == 0


def test_memory_is_counted_as_the_kernel_does() -> None:
    own = proportional_bytes([os.getpid()])
    assert 1_000_000 < own < available_bytes()
    assert proportional_bytes([]) == proportional_bytes([1 << 30]) == 0
