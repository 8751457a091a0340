"""What lies in a hub cache, and who may change it (vllm-worker.md §5.2)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pilotlight.domain.repository import Repository, RepositoryKind
from pilotlight.errors import InvalidInputError
from pilotlight.models import cache as hub_cache
from pilotlight.models.cache import (
    exclusive,
    exclusive_now,
    find_snapshot,
    find_whole,
    list_snapshots,
    problem_of,
)

MODEL = Repository(name="org/model")


def snapshot_of(cache: Path, commit: str, *, name: str = "org/model", ref: str | None = None) -> Path:
    home = cache / hub_cache.folder_name(name)
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True)
    if ref is not None:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return folder


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"DOWNLOAD_DIR": "/d", "HF_HUB_CACHE": "/c"}, "/d"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}, "/old"),
        ({"HF_HUB_CACHE": "/c", "HUGGINGFACE_HUB_CACHE": "/old"}, "/c"),
        ({"BASE_PATH": "/models"}, "/models/huggingface-cache/hub"),
        ({"BASE_PATH": "/models", "HF_HUB_CACHE": "/c"}, "/c"),
        ({"DOWNLOAD_DIR": "None", "HF_HUB_CACHE": "~", "HF_HOME": "/h", "BASE_PATH": "None"}, "/h/hub"),
        ({"HF_HOME": "None", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/d/huggingface-cache/hub"}, "/d/huggingface-cache/hub"),
    ],
)
def test_where_the_cache_is(env, expected):
    """§5.2, rows BASE_PATH to HUGGINGFACE_HUB_CACHE and DOWNLOAD_DIR of §4.9."""
    assert hub_cache.hub_cache(env) == Path(expected)


def test_a_missing_shard_that_the_index_names_is_a_miss(make_model, safetensors_bytes, tmp_path):
    folder = make_model(snapshot_of(tmp_path, "c1", ref="main"), weights=False)
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1.safetensors").write_bytes(safetensors_bytes(100))
    assert "model-2.safetensors" in str(problem_of(folder, MODEL))
    assert find_whole(tmp_path, MODEL) is None
    assert find_snapshot(tmp_path, "org/model", None) == folder
    (folder / "model-2.safetensors").write_bytes(safetensors_bytes(100)[:-1])
    assert "promises" in str(problem_of(folder, MODEL)), "a cut file is a miss as well"
    (folder / "model-2.safetensors").write_bytes(safetensors_bytes(100))
    assert find_whole(tmp_path, MODEL) == folder


def test_the_commit_is_chosen_through_the_ref_else_the_only_one(make_model, tmp_path):
    first = make_model(snapshot_of(tmp_path, "c1"))
    assert find_whole(tmp_path, MODEL) == first
    assert find_whole(tmp_path, Repository(name="org/model", revision="main")) == first
    assert find_whole(tmp_path, Repository(name="org/model", revision="v1")) is None
    second = make_model(snapshot_of(tmp_path, "c2"))
    assert find_whole(tmp_path, MODEL) is None, "nobody can say which of two is meant"
    snapshot_of(tmp_path, "c3", ref="main")
    assert find_whole(tmp_path, MODEL) is None, "the ref leads to an incomplete one"
    (tmp_path / "models--org--model" / "refs" / "v1").write_text("c2")
    assert find_whole(tmp_path, Repository(name="org/model", revision="v1")) == second
    assert find_whole(tmp_path, Repository(name="org/model", revision="c1")) == first


def test_a_whole_copy_in_lower_case_is_preferred_to_an_incomplete_one(make_model, tmp_path):
    snapshot_of(tmp_path, "c1", name="Org/Model", ref="main")
    whole = make_model(snapshot_of(tmp_path, "c1", name="org/model", ref="main"))
    assert find_whole(tmp_path, Repository(name="Org/Model")) == whole


@pytest.mark.parametrize(
    ("files", "kind", "variable", "problem"),
    [
        (["adapter_config.json", "adapter_model.bin"], RepositoryKind.ADAPTER, "A", None),
        (["adapter_config.json"], RepositoryKind.ADAPTER, "A", "has no adapter_model.safetensors"),
        (["adapter_model.bin"], RepositoryKind.ADAPTER, "A", "no LoRA adapter"),
        (["tokenizer.json"], RepositoryKind.CONFIG, "TOKENIZER", None),
        (["config.json"], RepositoryKind.CONFIG, "TOKENIZER", "lacks a tokenizer"),
        (["config.json"], RepositoryKind.CONFIG, "HF_CONFIG_PATH", None),
        (["tokenizer.json"], RepositoryKind.CONFIG, "HF_CONFIG_PATH", "lacks a configuration"),
        (["config.json", "vocab.txt"], RepositoryKind.CONFIG, "MODEL_NAME", None),
        (["config.json"], RepositoryKind.CONFIG, "MODEL_NAME", "lacks a tokenizer"),
        (["config.json", "model.py"], RepositoryKind.CONFIG, "TRUST_REMOTE_CODE", None),
        (["config.json"], RepositoryKind.CONFIG, "TRUST_REMOTE_CODE", "lacks code"),
        (["README.md"], RepositoryKind.EXTRA, "EXTRA_REPOS", None),
        ([], RepositoryKind.EXTRA, "EXTRA_REPOS", "is empty"),
    ],
)
def test_what_makes_other_repositories_whole(tmp_path, files, kind, problem, variable):
    folder = snapshot_of(tmp_path, "c1")
    for file in files:
        (folder / file).write_text("{}")
    found = problem_of(folder, Repository(name="org/model", kind=kind, variable=variable))
    assert (found is None) if problem is None else (problem in str(found))


def test_the_list_of_what_is_there(make_model, tmp_path):
    """Sizes count a blob that two links share once; what is incomplete says why."""
    assert list_snapshots(tmp_path / "no") == []
    model = make_model(snapshot_of(tmp_path, "c1", ref="main"))
    blob = tmp_path / "models--org--model" / "blobs" / "x"
    blob.parent.mkdir()
    blob.write_bytes(bytes(1000))
    for name in ("a.txt", "b.txt"):
        (model / name).symlink_to(blob)
    snapshot_of(tmp_path, "c2", name="gpt2")
    (tmp_path / ".locks").mkdir()
    (tmp_path / "datasets--x--y").mkdir()
    second, first = list_snapshots(tmp_path)
    assert (first.repository, first.commit, first.refs, first.problem) == ("org/model", "c1", ("main",), None)
    assert first.size_bytes == 1000 + sum(
        (model / name).stat().st_size for name in ("config.json", "model.safetensors")
    )
    assert (second.repository, second.refs) == ("gpt2", ())
    assert "is empty" in str(second.problem)
    assert [one.repository for one in list_snapshots(tmp_path, "ORG/Model")] == ["org/model"]
    assert hub_cache.stored_bytes(tmp_path, "org/model") == 1000


def test_a_lock_says_whether_it_keeps_others_out(tmp_path, monkeypatch):
    """Some network file systems grant one to everybody, others know none at all."""
    with exclusive(tmp_path, "org/model") as alone:
        assert alone
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with exclusive(tmp_path, "org/model") as alone:
        assert not alone

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path, "org/model") as alone:
        assert not alone


def test_waiting_is_told_of_once_in_so_many_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_cache, "LOCK_POLL_S", 0.001)
    looks = 0
    told: list[int] = []
    lock = hub_cache._try_lock

    def count(file) -> bool:
        nonlocal looks
        looks += 1
        return lock(file)

    stop = threading.Event()

    def on_wait(_holder: str) -> None:
        told.append(looks)
        if len(told) == 3:
            stop.set()

    with exclusive(tmp_path, "org/model"):
        monkeypatch.setattr(hub_cache, "_try_lock", count)
        with (
            pytest.raises(hub_cache.FetchCancelledError),
            exclusive(tmp_path, "org/model", on_wait=on_wait, stop=stop),
        ):
            raise AssertionError("it was not free")
    assert told == [1, 1 + hub_cache.LOOKS_PER_WORD, 1 + 2 * hub_cache.LOOKS_PER_WORD]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"../../x", b"", b"/etc"])
def test_a_ref_that_holds_no_commit_leads_nowhere(make_model, tmp_path, content):
    make_model(snapshot_of(tmp_path, "c1"))
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "v1").write_bytes(content)
    assert find_whole(tmp_path, Repository(name="org/model", revision="v1")) is None
    assert [one.commit for one in list_snapshots(tmp_path)] == ["c1"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "feature/x-y", "0" * 40])
def test_branches_tags_and_commits_are_revisions(revision):
    assert Repository(name="org/model", revision=revision).revision == revision


@pytest.mark.parametrize(
    "revision", ["", "..", "../x", "a/../b", "/a", "a/", "a//b", ".a", "a\0", "a\\b", "x" * 201]
)
def test_paths_are_no_revisions(revision):
    with pytest.raises(InvalidInputError, match="cannot have the revision") as caught:
        Repository(name="org/model", revision=revision, variable="SPECULATIVE_MODEL")
    assert caught.value.field == "env.SPECULATIVE_MODEL"


def test_one_at_a_time_whatever_the_case(tmp_path):
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with exclusive(tmp_path, "ORG/model", on_wait=lambda _holder: waiting.set()):
            order.append("second")

    with exclusive(tmp_path, "org/model"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(20)
        with exclusive_now(tmp_path, "org/model") as holder:
            assert holder is not None
            assert f"process {os.getpid()} on " in holder
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with exclusive_now(tmp_path, "org/model") as holder:
        assert holder is None


def test_the_kernel_gives_back_the_lock_of_a_killed_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from pilotlight.models.cache import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'org/model'): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with exclusive_now(tmp_path, "org/model") as holder:
        assert f"process {process.pid} " in str(holder)
    process.kill()
    process.communicate()
    with exclusive_now(tmp_path, "org/model") as holder:
        assert holder is None
