"""Hubs that lie, storages that refuse, disks that do not keep their word (vllm-worker.md §5.2, §5.3)."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pilotlight.domain.repository import Repository, RepositoryKind
from pilotlight.models import blobs, hub
from pilotlight.models import cache as hub_cache
from pilotlight.models.blobs import IDLE_S
from pilotlight.models.catalog import CONFIG_BYTES_MAX, resolve_model
from pilotlight.models.listing import FILES_MAX
from pilotlight.models.problems import HubRefusedError, HubUnreachableError
from pilotlight.testing.hub_server import SIGNATURE, HubServer

NAME = "org/model"
MODEL = Repository(name=NAME)
EXTRA = Repository(name=NAME, kind=RepositoryKind.EXTRA)
LARGE = 25_000_000


@pytest.fixture
def repository(hub_server, model_files):
    return hub_server.add(NAME, model_files)


@pytest.fixture
def large(hub_server, model_files, safetensors_bytes):
    return hub_server.add(NAME, model_files | {"model.safetensors": safetensors_bytes(LARGE)})


def weights_of(repository) -> bytes:
    return repository.commits[repository.refs["main"]]["model.safetensors"]


def blobs_of(cache: Path) -> Path:
    return cache / hub_cache.folder_name(NAME) / "blobs"


def said_of(path: str, **changes):
    """A lie about one file of the listing."""

    def change(about) -> None:
        next(one for one in about["siblings"] if one["rfilename"] == path).update(changes)

    return change


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda about: about.update(sha="../../../../escaped"), r"the commit '\.\./\.\./"),
        (lambda about: about.update(sha="v1"), "the commit 'v1'; expected 40 digits"),
        (
            said_of("model.safetensors", lfs={"sha256": "../../../pwned", "size": 5, "pointerSize": 1}),
            "the hash '../../../pwned'",
        ),
        (
            said_of("model.safetensors", lfs={"sha256": "/tmp/pwned", "size": 5, "pointerSize": 1}),
            "the hash '/tmp/pwned'",
        ),
        (said_of("tokenizer.json", blobId="../x"), "the hash '../x'"),
        (said_of("tokenizer.json", blobId=None), "the hash None"),
        (said_of("tokenizer.json", size=-1), "the size -1"),
        (said_of("tokenizer.json", rfilename="../../../../dangling"), "a file '../../../../dangling'"),
        (said_of("tokenizer.json", rfilename="/etc/x"), "a file '/etc/x'"),
        (said_of("tokenizer.json", rfilename="a/../b"), "a file 'a/../b'"),
        (said_of("tokenizer.json", rfilename="a//b"), "a file 'a//b'"),
        (said_of("tokenizer.json", rfilename=""), "a file ''"),
        (said_of("tokenizer.json", rfilename="..\\x"), r"a file '..\\\\x'"),
        (said_of("tokenizer.json", rfilename="a\0b"), r"a file 'a\\x00b'"),
        (said_of("tokenizer.json", rfilename="n" * 300), "expected a path within the repository"),
        (lambda about: about.update(siblings=about["siblings"] * FILES_MAX), "files; expected at most 20000"),
    ],
)
def test_what_a_hub_says_becomes_no_path_unseen(repository, hub_server, tmp_path, lie, message):
    """Nothing is asked for and nothing is written."""
    hub_server.listed = lie
    for ask in (
        lambda: hub.fetch(MODEL, cache=tmp_path / "hub"),
        lambda: resolve_model(MODEL, cache=tmp_path / "hub"),
    ):
        with pytest.raises(HubRefusedError, match=message) as caught:
            ask()
        assert caught.value.kind == "bad_repository"
    assert list(tmp_path.iterdir()) == []
    assert not any("/resolve/" in one.path for one in hub_server.requests)


@pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json"])
def test_content_that_is_not_what_was_listed_is_not_put_in_place(repository, hub_server, tmp_path, path):
    content = repository.commits[repository.refs["main"]][path]
    hub_server.sent[path] = content[:-1] + b"X"
    with pytest.raises(HubUnreachableError, match=f"{path} came out wrong"):
        hub.fetch(MODEL, cache=tmp_path)
    assert hub_cache.find_whole(tmp_path, EXTRA) is None
    hub_server.sent.clear()
    assert (hub.fetch(MODEL, cache=tmp_path) / path).read_bytes() == content


def test_a_file_that_does_not_end_is_cut_off(repository, hub_server, tmp_path):
    hub_server.sent["model.safetensors"] = bytes(30_000_000)
    with pytest.raises(HubUnreachableError, match=r"more than the .* bytes that it lists"):
        hub.fetch(MODEL, cache=tmp_path)
    assert all(path.stat().st_size < 100_000 for path in blobs_of(tmp_path).iterdir())


def test_a_listed_file_that_is_not_there_leaves_nothing_that_passes_for_whole(
    repository, hub_server, tmp_path
):
    """The hub is reached, so it is no matter of trying again."""
    files = repository.commits[repository.refs["main"]]
    tokenizer = files.pop("tokenizer.json")

    def add(about) -> None:
        blob = hashlib.sha1(b"blob 2\0" + tokenizer, usedforsecurity=False).hexdigest()
        about["siblings"].append({"rfilename": "tokenizer.json", "size": 2, "blobId": blob})

    hub_server.listed = add
    for wanted in (MODEL, EXTRA, Repository(name=NAME, kind=RepositoryKind.CONFIG)):
        with pytest.raises(HubRefusedError, match=r"lists tokenizer\.json, but the hub does not have it"):
            hub.fetch(wanted, cache=tmp_path)
        assert hub_cache.find_whole(tmp_path, wanted) is None
    assert not any(path.name.startswith(".pilotlight-c") for path in tmp_path.rglob("*"))


def test_a_configuration_that_is_too_large_is_not_read(repository, hub_server, tmp_path):
    hub_server.listed = said_of("config.json", size=CONFIG_BYTES_MAX + 1)
    with pytest.raises(HubRefusedError, match=r"config\.json of org/model on the hub has 8388609 bytes"):
        resolve_model(MODEL, cache=tmp_path)


def test_a_look_at_a_model_leaves_the_cache_as_it_was(repository, tmp_path):
    """§5.2: a lone config.json would pass for a tokenizer."""
    assert resolve_model(MODEL, cache=tmp_path / "hub").weight_bytes
    assert list(tmp_path.iterdir()) == []


def test_without_locks_each_writes_a_file_of_its_own(large, hub_server, tmp_path, monkeypatch):
    """§5.2. Some network file systems grant a lock to everybody. 1. The first is held half-way. 2. The second
    downloads the whole. 3. The first ends."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    hold = hub_server.hold("model.safetensors")
    results: list[Path] = []
    first = threading.Thread(target=lambda: results.append(hub.fetch(MODEL, cache=tmp_path)))
    first.start()
    assert hold.reached.wait(20)
    second = hub.fetch(MODEL, cache=tmp_path)
    assert (second / "model.safetensors").read_bytes() == weights_of(large)
    hold.release.set()
    first.join()
    assert results == [second]
    assert (second / "model.safetensors").read_bytes() == weights_of(large)
    assert hub_cache.find_whole(tmp_path, MODEL) == second
    assert list(blobs_of(tmp_path).glob("*.incomplete")) == []


@pytest.mark.parametrize("name", ["{}.incomplete", "{}.other-host-7-1.incomplete"])
def test_what_another_attempt_has_left_is_taken_over(large, hub_server, tmp_path, name):
    """Of this release and of the one before."""
    content = weights_of(large)
    left = blobs_of(tmp_path) / name.format(hashlib.sha256(content).hexdigest())
    left.parent.mkdir(parents=True)
    left.write_bytes(content[:1_000_000])
    folder = hub.fetch(MODEL, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == content
    assert [one.first for one in hub_server.downloads("model.safetensors")] == [1_000_000]
    assert not left.exists()


def test_leftovers_are_removed_unless_another_program_may_be_writing_them(repository, tmp_path):
    """The client library's own attempts have names of their own and are never taken up again."""
    blobs = blobs_of(tmp_path)
    blobs.mkdir(parents=True)
    old, new, ours = (
        blobs / f"{'0' * 64}.{part}.incomplete" for part in ("12345678", "87654321", "host-1-1")
    )
    for path in (old, new, ours):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    hub.fetch(MODEL, cache=tmp_path)
    assert [path.exists() for path in (old, new, ours)] == [False, True, False]
    assert IDLE_S > 60


def test_a_storage_elsewhere_gets_no_token_and_its_signatures_stay_out_of_words(
    large, hub_server, tmp_path, caplog
):
    """1. Large files come from another host. 2. It breaks off, then refuses. 3. It works again."""
    with HubServer() as storage:
        storage.add(NAME, large.commits[large.refs["main"]])
        hub_server.storage = storage.url.replace("127.0.0.1", "localhost")
        storage.status = 403
        with (
            caplog.at_level(logging.INFO),
            pytest.raises(
                HubUnreachableError, match=r"localhost:\d+, to which that leads, answers 403"
            ) as caught,
        ):
            hub.fetch(MODEL, cache=tmp_path, token="hf_secret")
        asked = [one for one in storage.requests if one.path.endswith("model.safetensors")]
        assert len(asked) == 2, "the hub is asked once more for the way"
        storage.status = 200
        storage.cut["model.safetensors"] = [LARGE // 2]
        folder = hub.fetch(MODEL, cache=tmp_path, token="hf_secret")
        assert (folder / "model.safetensors").read_bytes() == weights_of(large)
        assert {one.token for one in storage.requests} == {""}
        logged = [record.getMessage() for record in caplog.records if record.name.startswith("huggingface")]
        assert any("Trying to resume" in line for line in logged)
        assert SIGNATURE not in str(caught.value) + "".join(logged)
    assert {one.token for one in hub_server.requests} == {"hf_secret"}


@pytest.mark.parametrize("below", ["file/hub", "file"])
def test_a_cache_that_cannot_be_used_is_not_the_hubs_fault(repository, tmp_path, below):
    (tmp_path / "file").write_text("x")
    cache = tmp_path / below
    with pytest.raises(
        HubRefusedError, match=f"the model cache {cache} cannot be used: {tmp_path}.*: "
    ) as caught:
        hub.fetch(MODEL, cache=cache)
    assert caught.value.kind == "cache_unusable"
    assert "HF_HUB_CACHE" in caught.value.advice


def test_a_disk_without_links_keeps_plain_files(repository, tmp_path, monkeypatch):
    def refuse(*_args: object, **_more: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    folder = hub.fetch(MODEL, cache=tmp_path)
    assert not (folder / "model.safetensors").is_symlink()
    assert (folder / "model.safetensors").read_bytes() == weights_of(repository)
    assert list(blobs_of(tmp_path).iterdir()) == []
    assert hub.fetch(MODEL, cache=tmp_path) == folder


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_who_may_not_ask_the_hub_says_so(repository, hub_server, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    for ask in (lambda: hub.fetch(MODEL, cache=tmp_path), lambda: resolve_model(MODEL, cache=tmp_path)):
        with pytest.raises(HubUnreachableError, match=f"not complete in the cache, and {variable} is set"):
            ask()
    assert hub_server.requests == []
    monkeypatch.delenv(variable)
    folder = hub.fetch(MODEL, cache=tmp_path)
    monkeypatch.setenv(variable, "1")
    hub_server.requests.clear()
    assert hub.fetch(MODEL, cache=tmp_path) == folder, "what is there is there"
    assert hub_server.requests == []


def test_files_in_xet_storage_come_by_plain_http(large, hub_server, tmp_path):
    """Nothing but plain requests, which can be cancelled, resumed and checked."""
    hub_server.xet = True
    folder = hub.fetch(MODEL, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == weights_of(large)
    assert {one.method for one in hub_server.requests} == {"GET"}


@pytest.fixture
def xet(hub_server, monkeypatch):
    """Xet's own way is asked for; its client is replaced by what the test appends, one for each call."""
    calls: list[Callable[[Path], None]] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_XET_HIGH_PERFORMANCE", True)
    monkeypatch.setattr(blobs, "is_xet_available", lambda: True)
    monkeypatch.setattr(blobs, "xet_get", lambda *, incomplete_path, **_: calls.pop(0)(incomplete_path))
    hub_server.xet = True
    return calls


def test_xets_own_way_is_taken_where_it_is_asked_for_and_checked_like_any(large, xet, hub_server, tmp_path):
    content = weights_of(large)
    xet += [
        lambda path: path.write_bytes(content[:-1] + b"X") and None,
        lambda path: path.write_bytes(content) and None,
    ]
    with pytest.raises(HubUnreachableError, match="came out wrong"):
        hub.fetch(MODEL, cache=tmp_path)
    folder = hub.fetch(MODEL, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == content
    assert hub_server.downloads("model.safetensors") == []
    assert list(blobs_of(tmp_path).glob("*.incomplete")) == []


def test_xets_own_way_ends_when_the_download_is_cancelled(large, xet, tmp_path, monkeypatch):
    """What its progress raises does not reach its client, so that its session is ended."""
    stop, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(blobs, "abort_xet_session", ended.set)

    def run(path: Path) -> None:
        path.write_bytes(b"x")
        stop.set()
        assert ended.wait(30)
        raise RuntimeError("ended")

    xet.append(run)
    with pytest.raises(hub_cache.FetchCancelledError):
        hub.fetch(MODEL, cache=tmp_path, cancelled=stop)
    assert list(blobs_of(tmp_path).glob("*.xet.incomplete")) == []


def test_a_token_that_the_client_library_has_stored_is_not_used(
    repository, hub_server, tmp_path, monkeypatch
):
    """§4.4: who reads what is said by HF_TOKEN and by nothing else."""
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.fetch(MODEL, cache=tmp_path / "hub")
    assert {one.token for one in hub_server.requests} == {""}


def test_a_copy_without_some_files_is_whole_only_for_who_ignores_them(repository, tmp_path):
    """§4.9 IGNORE_PATTERNS: what was left out is fetched when somebody wants it."""
    sparing = Repository(name=NAME, ignore=("tokenizer*",))
    folder = hub.fetch(sparing, cache=tmp_path)
    assert not (folder / "tokenizer.json").exists()
    assert hub_cache.find_whole(tmp_path, sparing) == folder
    assert hub_cache.find_whole(tmp_path, MODEL) is None
    assert [one.problem for one in hub_cache.list_snapshots(tmp_path)] == [None]
    assert hub.fetch(MODEL, cache=tmp_path) == folder
    hub.fetch(sparing, cache=tmp_path)
    assert hub_cache.find_whole(tmp_path, MODEL) == folder


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"config.json": b"{}", "data.txt": b"x"}, EXTRA),
        (
            {"config.json": b"{}", "model.tensors": b"x" * 6000},
            Repository(name=NAME, patterns=("*.tensors",)),
        ),
    ],
)
def test_a_copy_is_complete_as_what_it_was_fetched_for(hub_server, tmp_path, files, wanted):
    hub_server.add(NAME, files)
    folder = hub.fetch(wanted, cache=tmp_path)
    assert [one.problem for one in hub_cache.list_snapshots(tmp_path)] == [None]
    (folder / "config.json").unlink()
    assert "config.json is gone" in str(hub_cache.list_snapshots(tmp_path)[0].problem)


def test_a_marker_of_an_earlier_release_counts(repository, tmp_path):
    folder = hub.fetch(MODEL, cache=tmp_path)
    hub_cache.marker(folder).write_text("")
    assert hub_cache.find_whole(tmp_path, MODEL) == folder
    assert resolve_model(MODEL, cache=tmp_path).path == folder
    hub_cache.marker(folder).write_text(json.dumps({"files": []}))
    assert hub_cache.find_whole(tmp_path, MODEL) == folder, "a broken one says nothing"
