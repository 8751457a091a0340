"""Fetching from a hub: the real client library against a hub on loopback (vllm-worker.md §5.2)."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from pilotlight.domain.repository import Repository, RepositoryKind
from pilotlight.errors import InvalidInputError
from pilotlight.models import cache as hub_cache
from pilotlight.models import catalog, hub
from pilotlight.models.blobs import READ_BYTES
from pilotlight.models.listing import select_files
from pilotlight.models.problems import HubRefusedError, HubUnreachableError

NAME = "Some-Org/Tiny.Model"
MODEL = Repository(name=NAME)
NOBODY = "http://127.0.0.1:9"
LARGE = 25_000_000
"""Many reads from the network, 1 MiB each."""


@pytest.fixture
def repository(hub_server, model_files):
    return hub_server.add(NAME, model_files)


@pytest.fixture
def large(hub_server, model_files, safetensors_bytes):
    """A repository whose weights come in several reads."""
    return hub_server.add(NAME, model_files | {"model.safetensors": safetensors_bytes(LARGE)})


def resolve(cache: Path, *, revision: str | None = None, **changes):
    return catalog.resolve_model(Repository(name=NAME, revision=revision), cache=cache, **changes)


def weights_of(repository) -> bytes:
    return repository.commits[repository.refs["main"]]["model.safetensors"]


def test_a_model_is_described_then_fetched_then_known_offline(repository, hub_server, tmp_path, monkeypatch):
    """1. Facts without weights. 2. Weights with progress. 3. The hub is gone; the cache answers."""
    cache = tmp_path / "hub"
    facts = resolve(cache, token="hf_secret")
    assert (facts.kind, facts.path, facts.max_context) == ("hub", None, 2048)
    assert facts.weight_bytes == len(weights_of(repository))
    assert {one.token for one in hub_server.requests if "Some-Org" in one.path} == {"hf_secret"}
    progress: list[tuple[int, int]] = []
    folder = hub.fetch(MODEL, cache=cache, on_progress=lambda *step: progress.append(step))
    wanted = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == wanted
    files = repository.commits[folder.name]
    total = sum(len(files[name]) for name in wanted)
    assert progress[-1] == (total, total)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert (folder.parent.parent / "refs" / "main").read_text() == folder.name
    assert not hub_cache.pending(folder).exists()
    hub_server.requests.clear()
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    known = resolve(cache)
    assert (known.path, known.weight_bytes) == (folder, facts.weight_bytes)
    assert hub_server.requests == []


def test_a_cache_filled_by_other_tools_is_found_whatever_its_case(make_model, tmp_path, monkeypatch):
    """§5.2: caches of other platforms have names in lower case; an incomplete snapshot is a miss."""
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    snapshot = make_model(tmp_path / "models--some-org--tiny.model" / "snapshots" / ("0" * 40))
    assert hub_cache.find_snapshot(tmp_path, NAME, None) == snapshot
    assert hub_cache.find_whole(tmp_path, MODEL) == snapshot
    assert resolve(tmp_path).path == snapshot
    (snapshot / "model.safetensors").unlink()
    assert hub_cache.find_whole(tmp_path, MODEL) is None
    with pytest.raises(HubUnreachableError, match=r"127\.0\.0\.1:9"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, r"is gated: accept its terms at http.*Tiny\.Model, then set HF_TOKEN in the endpoint"),
        ("hf_wrong", r"the hub refuses Some-Org/Tiny\.Model to this HF_TOKEN \(401\)"),
        ("hf_other", r"is gated: accept its terms at .* with the account of this HF_TOKEN"),
    ],
)
def test_a_gated_model_says_what_it_needs(repository, hub_server, tmp_path, token, message):
    repository.gated = True
    repository.granted = {"hf_right"}
    hub_server.known_tokens = {"hf_right", "hf_other"}
    for ask in (
        lambda: resolve(tmp_path, token=token),
        lambda: hub.fetch(MODEL, cache=tmp_path, token=token),
    ):
        with pytest.raises(HubRefusedError, match=message) as caught:
            ask()
        assert (caught.value.kind, caught.value.field) == ("unauthorized", "model")
    assert hub.fetch(MODEL, cache=tmp_path, token="hf_right").is_dir()


@pytest.mark.parametrize(
    ("token", "kind", "message"),
    [
        (None, "model_not_found", r"the hub has no model .*: if it is private, set HF_TOKEN"),
        ("hf_other", "model_not_found", r"the hub has no model .*: or this HF_TOKEN may not see it"),
        ("hf_wrong", "unauthorized", r"refuses .* to this HF_TOKEN \(401\): see that the token is right"),
    ],
)
def test_a_private_model_looks_like_none(repository, hub_server, tmp_path, token, kind, message):
    repository.private = True
    repository.granted = {"hf_right"}
    hub_server.known_tokens = {"hf_right", "hf_other"}
    with pytest.raises(HubRefusedError, match=message) as caught:
        resolve(tmp_path, token=token)
    assert caught.value.kind == kind
    assert resolve(tmp_path, token="hf_right").path is None


def test_unknown_names_and_revisions(repository, tmp_path):
    with pytest.raises(InvalidInputError, match="the hub has no model no/such"):
        catalog.resolve_model(Repository(name="no/such"), cache=tmp_path)
    with pytest.raises(InvalidInputError, match="has no revision 'v9'") as caught:
        resolve(tmp_path, revision="v9")
    assert caught.value.field == "env.MODEL_REVISION"


@pytest.mark.parametrize(("status", "error"), [(403, HubRefusedError), (500, HubUnreachableError)])
def test_a_hub_that_does_not_answer_is_told_from_one_that_refuses(
    repository, hub_server, tmp_path, status, error
):
    hub_server.status = status
    with pytest.raises(error, match=NAME):
        resolve(tmp_path)


def test_a_repository_without_weights_or_configuration(repository, tmp_path):
    files = repository.commits[repository.refs["main"]]
    for name in ("model.safetensors", "pytorch_model.bin"):
        del files[name]
    with pytest.raises(InvalidInputError, match="has no weights"):
        resolve(tmp_path)
    del files["config.json"]
    with pytest.raises(InvalidInputError, match=r"has no config\.json"):
        resolve(tmp_path)


def test_a_full_disk_is_noticed_before_the_download(repository, hub_server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "DISK_RESERVE_BYTES", 1 << 62)
    with pytest.raises(HubRefusedError, match="more bytes on the disk") as caught:
        hub.fetch(MODEL, cache=tmp_path)
    assert caught.value.kind == "disk_full"
    assert not any("/resolve/" in one.path for one in hub_server.requests)


def test_a_disk_that_fills_up_meanwhile_is_named(repository, tmp_path):
    """The file that an earlier attempt has left is a device that is always full."""
    blob = hashlib.sha256(weights_of(repository)).hexdigest()
    partial = tmp_path / hub_cache.folder_name(NAME) / "blobs" / f"{blob}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(HubRefusedError, match=r"the disk of .* filled up during the download") as caught:
        hub.fetch(MODEL, cache=tmp_path)
    assert caught.value.kind == "disk_full"
    for left in partial.parent.glob("*.incomplete"):
        left.unlink()
    assert hub.fetch(MODEL, cache=tmp_path).is_dir()


def test_a_connection_that_is_cut_is_taken_up_again(large, hub_server, tmp_path):
    hub_server.cut["model.safetensors"] = [LARGE // 2]
    folder = hub.fetch(MODEL, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == weights_of(large)
    first, second = hub_server.downloads("model.safetensors")
    assert first.first == 0
    assert LARGE // 2 - READ_BYTES <= second.first <= LARGE // 2


def cancelled_fetch(repository, cache: Path) -> Path:
    """A download that is given up once the first part of the weights is here; gives the file with that part.

    Small files may be unfinished then as well.
    """
    stop = threading.Event()

    def on_progress(done: int, total: int) -> None:
        if done > 10_000_000:
            stop.set()

    with pytest.raises(hub_cache.FetchCancelledError):
        hub.fetch(MODEL, cache=cache, on_progress=on_progress, cancelled=stop)
    blob = hashlib.sha256(weights_of(repository)).hexdigest()
    (partial,) = (cache / hub_cache.folder_name(NAME) / "blobs").glob(f"{blob}.*.incomplete")
    return partial


def test_a_download_that_was_given_up_goes_on_where_it_stopped(large, hub_server, tmp_path):
    there = cancelled_fetch(large, tmp_path).stat().st_size
    assert there > 0
    assert hub_cache.find_whole(tmp_path, MODEL) is None
    (unfinished,) = hub_cache.list_snapshots(tmp_path)
    assert "not finished" in str(unfinished.problem)
    progress: list[int] = []
    folder = hub.fetch(MODEL, cache=tmp_path, on_progress=lambda done, _total: progress.append(done))
    assert (folder / "model.safetensors").read_bytes() == weights_of(large)
    assert hub_server.downloads("model.safetensors")[-1].first == there
    assert next(done for done in progress if done) >= there
    assert hub_cache.find_whole(tmp_path, MODEL) == folder


def test_parts_that_do_not_fit_together_are_thrown_away(large, hub_server, tmp_path):
    """The same call then fetches the file anew."""
    partial = cancelled_fetch(large, tmp_path)
    content = partial.read_bytes()
    partial.write_bytes(b"x" * 100 + content[100:])
    hub_server.requests.clear()
    folder = hub.fetch(MODEL, cache=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == weights_of(large)
    assert [one.first for one in hub_server.downloads("model.safetensors")] == [len(content), 0]


def test_a_link_that_leads_nowhere_is_fetched_again(repository, tmp_path):
    folder = hub.fetch(MODEL, cache=tmp_path)
    (folder / "tokenizer.json").resolve().unlink()
    assert "tokenizer.json is gone" in str(hub_cache.problem_of(folder, MODEL))
    assert hub_cache.find_whole(tmp_path, MODEL) is None
    assert hub.fetch(MODEL, cache=tmp_path) == folder
    assert (folder / "tokenizer.json").read_bytes() == b"{}"


def test_revisions_by_branch_tag_and_commit(repository, hub_server, model_files, tmp_path, monkeypatch):
    """A branch that has moved on is followed at the next fetch, and not before the new files are here."""
    old = repository.refs["main"]
    repository.refs["v1"] = old
    first = hub.fetch(Repository(name=NAME, revision="v1"), cache=tmp_path)
    assert first.name == old
    assert hub.fetch(MODEL, cache=tmp_path) == first
    new = repository.commit(model_files | {"tokenizer.json": b'{"new": 1}'}, "main")
    assert hub_cache.find_whole(tmp_path, MODEL) == first
    hub_server.cut["tokenizer.json"] = [0] * 10
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    with pytest.raises(HubUnreachableError):
        hub.fetch(MODEL, cache=tmp_path)
    assert hub_cache.find_whole(tmp_path, MODEL) == first
    hub_server.cut.clear()
    assert hub.fetch(MODEL, cache=tmp_path).name == new
    for revision, commit in (("v1", old), (old, old), (new, new), (None, new)):
        found = hub_cache.find_whole(tmp_path, Repository(name=NAME, revision=revision))
        assert found is not None
        assert found.name == commit
    assert hub_cache.find_whole(tmp_path, Repository(name=NAME, revision="v2")) is None


def test_who_comes_second_waits_and_downloads_nothing(large, hub_server, tmp_path):
    """1. The first is held half-way. 2. The second says whom it waits for, and how far that one is."""
    hold = hub_server.hold("model.safetensors")
    waiting = threading.Event()
    holders: list[str] = []
    results: list[Path] = []
    seen: list[int] = []

    def on_progress(done: int, _: int | None) -> None:
        seen.append(done)
        waiting.set()

    first = threading.Thread(target=lambda: results.append(hub.fetch(MODEL, cache=tmp_path)))
    first.start()
    assert hold.reached.wait(20)
    second = threading.Thread(
        target=lambda: results.append(
            hub.fetch(MODEL, cache=tmp_path, on_wait=holders.append, on_progress=on_progress)
        )
    )
    second.start()
    assert waiting.wait(20)
    hold.release.set()
    first.join()
    second.join()
    assert results[0] == results[1]
    assert len(hub_server.downloads("model.safetensors")) == 1
    assert "process " in holders[0]
    assert seen[0] < seen[-1]


def test_waiting_can_be_given_up(repository, tmp_path):
    stop = threading.Event()
    with (
        hub_cache.exclusive(tmp_path, NAME.lower()),
        pytest.raises(hub_cache.FetchCancelledError, match="waiting for the download"),
    ):
        hub.fetch(MODEL, cache=tmp_path, on_wait=lambda _holder: stop.set(), cancelled=stop)


@pytest.mark.parametrize(
    ("kind", "files", "expected"),
    [
        (RepositoryKind.CONFIG, ["tokenizer.json", "model.safetensors"], ["tokenizer.json"]),
        (
            RepositoryKind.ADAPTER,
            ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"],
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        (RepositoryKind.EXTRA, ["data.txt", "x.bin"], ["data.txt", "x.bin"]),
    ],
)
def test_other_repositories_than_models(hub_server, tmp_path, kind, files, expected):
    """§4.8, §5.3: adapters, tokenizers and extra repositories are fetched by the same code."""
    hub_server.add("org/other", dict.fromkeys(files, b"{}"))
    wanted = Repository(name="org/other", kind=kind, variable="X")
    assert hub_cache.find_whole(tmp_path, wanted) is None
    folder = hub.fetch(wanted, cache=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert hub_cache.find_whole(tmp_path, wanted) == folder
    assert hub_cache.find_whole(tmp_path, Repository(name="org/other")) is None


def test_what_is_no_adapter_is_refused_by_the_variable_that_names_it(repository, tmp_path):
    wanted = Repository(name=NAME, kind=RepositoryKind.ADAPTER, variable="LORA_MODULES")
    with pytest.raises(HubRefusedError, match="is no LoRA adapter") as caught:
        hub.fetch(wanted, cache=tmp_path)
    assert caught.value.field == "env.LORA_MODULES"


def test_a_tokenizer_alone_does_not_pass_for_the_model(repository, tmp_path):
    """The weights are fetched as well once the same repository is wanted as a model."""
    hub.fetch(Repository(name=NAME, kind=RepositoryKind.CONFIG), cache=tmp_path)
    assert hub_cache.find_whole(tmp_path, MODEL) is None
    folder = hub.fetch(MODEL, cache=tmp_path)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["a.safetensors", "a.bin", "t.json"], ["a.safetensors", "t.json"]),
        (["a.bin", "b.pt", "t.json"], ["a.bin", "t.json"]),
        (["b.pt", "t.json"], ["b.pt", "t.json"]),
        (["model-1.safetensors", "consolidated.safetensors"], ["model-1.safetensors"]),
        (["consolidated.safetensors", "params.json"], ["consolidated.safetensors", "params.json"]),
        (["original/a.safetensors", "m.onnx", "x.gguf", "code.py"], ["code.py"]),
        (["a.safetensors", "sub/b.safetensors", "sub/c.json"], ["a.safetensors", "sub/c.json"]),
        (["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"], ["2_Dense/model.safetensors"]),
    ],
)
def test_one_weight_format_is_chosen(files, chosen):
    """§5.3: one weight format, and every file that is not a weight."""
    assert list(select_files(dict.fromkeys(files, 1))) == chosen


def test_a_load_format_and_ignored_patterns_decide_what_is_chosen():
    """§4.9 LOAD_FORMAT, IGNORE_PATTERNS."""
    files = dict.fromkeys(["consolidated.safetensors", "model.safetensors", "model.bin", "a/b.md"], 1)
    assert list(select_files(files, patterns=["consolidated*.safetensors"], ignore=["a/*"])) == [
        "consolidated.safetensors"
    ]
    assert list(select_files(files, patterns=())) == ["a/b.md"]
