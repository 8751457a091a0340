"""Fetching from a hub: a small server on loopback that speaks the routes which the client library uses."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pilotlight.errors import InvalidInputError
from pilotlight.models import catalog, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "Some-Org/Tiny.Model"


@dataclass
class FakeHub:
    """Repositories by name; each a dictionary of file contents."""

    files: dict[str, bytes]
    url: str = ""
    status: int = 200
    gated: bool = False
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    on_file: threading.Event | None = None

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if self.status != 200:
            return self.status, {}, b"{}"
        api = f"/api/models/{REPOSITORY}"
        if path in {api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"}:
            siblings = [{"rfilename": name, "size": len(body)} for name, body in self.files.items()]
            return 200, {}, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
        if path.startswith(f"{api}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if path == f"{api}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": f"{index:040x}"}
                for index, (name, body) in enumerate(self.files.items())
            ]
            return 200, {}, json.dumps(tree).encode()
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self.files:
            name = path.removeprefix(prefix)
            etag = f'"{list(self.files).index(name):040x}"'
            return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, self.files[name]
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture
def fake_hub(safetensors_bytes, tiny_config, monkeypatch):
    config = json.dumps(tiny_config).encode()
    fake = FakeHub(
        {
            "config.json": config,
            "model.safetensors": safetensors_bytes(40_000),
            "tokenizer.json": b"{}",
            "pytorch_model.bin": bytes(50_000),
            "tiny.Q4.gguf": bytes(50_000),
            "README.md": b"hello",
        }
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self, *, body_wanted: bool) -> None:
            path = urlsplit(self.path).path
            fake.requests.append(path)
            fake.tokens.add(self.headers.get("Authorization", ""))
            status, headers, body = fake.answer(path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if body_wanted:
                self.wfile.write(body)

        def do_GET(self) -> None:
            self.handle_one(body_wanted=True)

        def do_HEAD(self) -> None:
            self.handle_one(body_wanted=False)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(cache: Path, **changes):
    return catalog.resolve_model(REPOSITORY, cache=cache, **changes)


def test_a_model_is_described_then_fetched_then_known_offline(fake_hub, tmp_path, monkeypatch):
    """1. Facts without weights. 2. Weights with progress. 3. The hub is gone; the cache answers."""
    cache = tmp_path / "hub"
    facts = resolve(cache, token="hf_secret")
    assert (facts.kind, facts.path, facts.max_context) == ("hub", None, 2048)
    assert facts.weight_bytes == len(fake_hub.files["model.safetensors"])
    assert fake_hub.tokens == {"Bearer hf_secret"}
    progress: list[tuple[int, int]] = []
    folder = hub.fetch(REPOSITORY, cache=cache, on_progress=lambda *step: progress.append(step))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    total = sum(len(fake_hub.files[name]) for name in ("config.json", "model.safetensors", "tokenizer.json"))
    assert progress[-1] == (total + 5, total + 5)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert (folder.parent.parent / "refs" / "main").read_text() == COMMIT
    fake_hub.requests.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    known = resolve(cache)
    assert (known.path, known.weight_bytes) == (folder, facts.weight_bytes)
    assert fake_hub.requests == []


def test_a_cache_filled_by_other_tools_is_found_whatever_its_case(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    snapshot = make_model(tmp_path / "models--some-org--tiny.model" / "snapshots" / COMMIT)
    assert hub.find_snapshot(tmp_path, REPOSITORY, None) == snapshot
    assert resolve(tmp_path).path == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(hub.HubUnreachableError, match=r"127\.0\.0\.1:9"):
        resolve(tmp_path)


def test_a_gated_model_asks_for_a_token(fake_hub, tmp_path):
    fake_hub.gated = True
    with pytest.raises(InvalidInputError, match=r"is gated: accept its terms at .*set HF_TOKEN"):
        resolve(tmp_path)


def test_unknown_names_and_revisions(fake_hub, tmp_path):
    with pytest.raises(InvalidInputError, match="the hub has no model no/such"):
        catalog.resolve_model("no/such", cache=tmp_path)
    with pytest.raises(InvalidInputError, match="has no revision 'v9'") as caught:
        resolve(tmp_path, revision="v9")
    assert caught.value.field == "env.MODEL_REVISION"


def test_a_broken_hub_is_unreachable(fake_hub, tmp_path):
    fake_hub.status = 500
    with pytest.raises(hub.HubUnreachableError, match=REPOSITORY):
        resolve(tmp_path)


def test_a_repository_without_weights_or_configuration(fake_hub, tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        del fake_hub.files[name]
    with pytest.raises(InvalidInputError, match="has no weights"):
        resolve(tmp_path)
    del fake_hub.files["config.json"]
    with pytest.raises(InvalidInputError, match=r"has no config\.json"):
        resolve(tmp_path)


def test_a_full_disk_is_noticed_before_the_download(fake_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "DISK_RESERVE_BYTES", 1 << 62)
    with pytest.raises(InvalidInputError, match="more bytes on the disk"):
        hub.fetch(REPOSITORY, cache=tmp_path)
    assert not any("/resolve/" in path for path in fake_hub.requests)


def test_a_cancelled_download_ends_and_leaves_no_marker(fake_hub, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(hub.FetchCancelledError):
        hub.fetch(REPOSITORY, cache=tmp_path, cancelled=stop)
    assert not list(tmp_path.rglob(".pilotlight-complete-*"))
    assert hub.fetch(REPOSITORY, cache=tmp_path).is_dir()


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
    ],
)
def test_one_weight_format_is_chosen(files, chosen):
    assert list(hub.select_files(dict.fromkeys(files, 1))) == chosen
