"""`python -m pilotlight.models.fetch`: downloads in processes of their own, against a hub on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotlight.domain.repository import Repository
from pilotlight.models import cache as hub_cache
from pilotlight.models.blobs import READ_BYTES

NAME = "org/model"
LARGE = 45_000_000
"""Held back half-way, twenty reads of 1 MiB have been written."""


class Fetch:
    """One download process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def next(self, event: str) -> dict[str, Any]:
        """The next event of this kind; those before it are passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = json.loads(line)
            if found["event"] == event:
                return dict(found)
        raise AssertionError(f"it ended without {event!r}")

    def end(self) -> tuple[int, dict[str, Any]]:
        """Its exit code and last event."""
        assert self.process.stdout is not None
        lines = self.process.stdout.readlines()
        return self.process.wait(30), json.loads(lines[-1]) if lines else {}


@pytest.fixture
def start(hub_server, tmp_path) -> Iterator[Callable[..., Fetch]]:
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, name: str = NAME, **environment: str) -> Fetch:
        process = subprocess.Popen(
            [sys.executable, "-m", "pilotlight.models.fetch", "--cache", tmp_path / "hub", *arguments, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "HF_ENDPOINT": hub_server.url, **environment},
        )
        started.append(process)
        return Fetch(process)

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def large(hub_server, model_files, safetensors_bytes):
    return hub_server.add(NAME, model_files | {"model.safetensors": safetensors_bytes(LARGE)})


def content(repository) -> bytes:
    return repository.commits[repository.refs["main"]]["model.safetensors"]


def test_two_processes_one_download(start, large, hub_server, tmp_path):
    """§5.2: only one process downloads per volume; the other waits, says so, and finds the files."""
    hold = hub_server.hold("model.safetensors")
    first = start()
    assert hold.reached.wait(30)
    second = start()
    assert f"process {first.process.pid} on " in second.next("waiting")["holder"]
    progress = second.next("progress")
    assert 0 <= progress["done"] < progress["total"]
    hold.release.set()
    (code, done), (other_code, other) = first.end(), second.end()
    assert (code, other_code) == (0, 0)
    assert done == other == {"event": "done", "path": done["path"]}
    assert (Path(done["path"]) / "model.safetensors").read_bytes() == content(large)
    assert len(hub_server.downloads("model.safetensors")) == 1


def test_a_killed_download_frees_its_lock_and_the_next_goes_on(start, large, hub_server, tmp_path):
    hold = hub_server.hold("model.safetensors")
    first = start()
    assert hold.reached.wait(30)
    while first.next("progress")["done"] < 20_000_000:
        pass
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait(30)
    assert hub_cache.find_whole(tmp_path / "hub", Repository(name=NAME)) is None
    code, done = start().end()
    assert code == 0
    assert hub_server.downloads("model.safetensors")[-1].first >= 20_000_000 - READ_BYTES
    assert (Path(done["path"]) / "model.safetensors").read_bytes() == content(large)


@pytest.mark.parametrize("how", ["signal", "stdin"])
def test_it_ends_when_nobody_wants_the_files(start, large, hub_server, how):
    hold = hub_server.hold("model.safetensors")
    fetch = start()
    assert hold.reached.wait(30)
    if how == "signal":
        fetch.process.terminate()
    else:
        fetch.process.stdin.close()
    # Bit by bit, so that the file cannot be complete before the process has learnt of it.
    while fetch.process.poll() is None:
        hold.give(READ_BYTES)
        assert not hold.is_all_given()
        with contextlib.suppress(subprocess.TimeoutExpired):
            fetch.process.wait(0.2)
    code, last = fetch.end()
    assert (code, last["event"], last["kind"]) == (1, "failed", "cancelled")


def test_it_ends_with_its_parent_even_if_the_hub_is_silent(start, large, hub_server):
    hold = hub_server.hold("model.safetensors")
    fetch = start()
    assert hold.reached.wait(30)
    while fetch.next("progress")["done"] < 20_000_000:
        pass
    fetch.process.stdin.close()
    assert fetch.process.wait(30) == 1
    assert not hold.release.is_set()


def test_a_refusal_comes_with_its_class_and_advice_and_the_token_by_the_environment(start, large, hub_server):
    large.gated = True
    large.granted = {"hf_secret"}
    code, last = start().end()
    assert code == 1
    assert (last["event"], last["kind"]) == ("failed", "unauthorized")
    assert last["cause"] == f"model {NAME} is gated"
    assert "HF_TOKEN" in last["advice"]
    hold = hub_server.hold("model.safetensors")
    fetch = start(HF_TOKEN="hf_secret")
    assert hold.reached.wait(30)
    command = Path(f"/proc/{fetch.process.pid}/cmdline").read_bytes()
    assert b"models.fetch" in command
    assert b"hf_secret" not in command
    hold.release.set()
    assert fetch.end()[0] == 0


def test_a_hub_that_is_away_is_no_refusal(start):
    code, last = start(HF_ENDPOINT="http://127.0.0.1:9").end()
    assert (code, last["kind"]) == (1, "hub_unreachable")
    assert "Try again" in last["advice"]


@pytest.mark.parametrize(
    ("arguments", "name", "cause"),
    [
        ([], "a b", "'a b' is neither"),
        ([], "pilotlight/ember", "is built in"),
        (["--revision=../../x"], NAME, "cannot have the revision '../../x'"),
    ],
)
def test_what_can_be_no_repository_is_refused_in_words(start, hub_server, arguments, name, cause):
    code, last = start(*arguments, name=name).end()
    assert (code, last["event"]) == (1, "failed")
    assert cause in last["cause"]
    assert last["advice"] or last["kind"] == "bad_repository"
    assert hub_server.requests == []
