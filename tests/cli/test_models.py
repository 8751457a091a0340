"""`pilotlight models`: the model cache and what the engine can serve, against a hub on loopback."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotlight.engines.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from pilotlight.models.cache import exclusive, folder_name
from pilotlight.models.catalog import builtin_folder
from pilotlight.testing.hub_server import HubServer

NAME = "org/model"
LARGE = 45_000_000


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def environment(environment: dict[str, str], hub: HubServer, cache: Path) -> dict[str, str]:
    return environment | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_TOKEN": ""}


@pytest.fixture
def repository(hub: HubServer):
    files = ("config.json", "model.safetensors", "tokenizer.json")
    return hub.add(NAME, {name: (builtin_folder() / name).read_bytes() for name in files})


@pytest.fixture
def pulled(repository, cli, cache) -> Path:
    result = cli("models", "pull", NAME)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


def test_pull_prints_where_the_model_is_and_tells_of_progress(repository, cli, cache):
    result = cli("models", "pull", NAME)
    commit = repository.refs["main"]
    assert result.stdout == f"{cache / folder_name(NAME) / 'snapshots' / commit}\n"
    assert "downloading org/model: " in result.stderr
    again = json.loads(cli("models", "pull", NAME, "--json").stdout)
    assert (again["name"], again["commit"], again["refs"], again["complete"]) == (
        NAME,
        commit,
        ["main"],
        True,
    )
    assert again["size_bytes"] == sum(map(len, repository.commits[commit].values()))


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["no/such"], 1, "the hub has no model no/such"),
        ([NAME, "--revision", "v9"], 1, "has no revision 'v9'"),
        (["org/gated"], 1, "is gated: accept its terms at http"),
        (["a b"], 1, "neither pilotlight/ember"),
        (["pilotlight/ember"], 1, "is built in: there is nothing to download"),
        ([NAME, "--revision", "../../x"], 1, "cannot have the revision '../../x'"),
        ([NAME, "--kind", "adapter"], 1, "is no LoRA adapter"),
        ([NAME, "--kind", "other"], 2, "'other'"),
        ([], 2, "MODEL"),
    ],
)
def test_pull_says_what_is_wrong(repository, hub, cli, arguments, exit_code, message):
    hub.add("org/gated", repository.commits[repository.refs["main"]]).gated = True
    result = cli("models", "pull", *arguments)
    assert result.exit_code == exit_code
    assert message in result.output
    as_json = cli("models", "pull", *arguments, "--json")
    assert as_json.exit_code == exit_code
    assert message in json.loads(as_json.stderr.splitlines()[-1])["error"]


def test_pull_fills_the_cache_that_endpoints_without_settings_use(repository, cli, tmp_path):
    """§5.2: the gateway's cache, by either of its names; `DOWNLOAD_DIR` is an endpoint's own."""
    old = tmp_path / "old"
    variables = {"HUGGINGFACE_HUB_CACHE": str(old), "HF_HUB_CACHE": "", "DOWNLOAD_DIR": str(tmp_path / "no")}
    result = cli("models", "pull", NAME, **variables)
    assert result.stdout.startswith(f"{old / folder_name(NAME)}/"), result.output


def test_pull_asks_no_hub_where_that_is_forbidden(repository, hub, cli):
    result = cli("models", "pull", NAME, HF_HUB_OFFLINE="1")
    assert result.exit_code == 1
    assert "HF_HUB_OFFLINE is set" in result.output
    assert hub.requests == []


def test_a_cache_that_cannot_be_used_is_named(repository, pulled, cli, cache):
    """Without a traceback."""
    for path in (cache / ".locks").iterdir():
        path.unlink()
    (cache / ".locks").rmdir()
    (cache / ".locks").write_text("x")
    for arguments in (["rm", NAME, "--yes"], ["pull", NAME]):
        result = cli("models", *arguments)
        assert result.exit_code == 1
        assert f"the model cache {cache} cannot be used: {cache / '.locks'}" in result.output
    assert pulled.is_dir()


def test_what_was_pulled_as_something_else_is_complete(hub, cli):
    """A repository with a configuration and no weights is whole as what it was fetched for."""
    hub.add("org/extra", {"config.json": b"{}", "data.txt": b"x"})
    pulled = json.loads(cli("models", "pull", "org/extra", "--kind", "extra", "--json").stdout)
    assert (pulled["complete"], pulled["problem"]) == (True, None)
    result = cli("models", "verify", "org/extra")
    assert (result.exit_code, result.stdout) == (
        0,
        f"org/extra {pulled['commit'][:8]}: 2 files are good\n",
    )


def test_a_ref_that_holds_rubbish_stops_nobody(pulled, cli, cache):
    (cache / folder_name(NAME) / "refs" / "bad").write_bytes(b"\xff\xfe../..")
    assert NAME in cli("models", "ls").stdout
    assert cli("models", "rm", NAME, "--yes").exit_code == 0


def test_ctrl_c_ends_a_download_and_the_next_goes_on(hub, spawn, cache):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [LARGE // 2], "data_offsets": [0, LARGE]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(LARGE)
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": weights})
    hold = hub.hold("model.safetensors")
    process = spawn("models", "pull", NAME)
    assert hold.reached.wait(30)
    process.send_signal(signal.SIGINT)
    hold.release.set()
    process.communicate(timeout=30)
    assert process.returncode == 130
    result = spawn("models", "pull", NAME, "--json")
    out, err = result.communicate(timeout=30)
    assert result.returncode == 0, err
    assert (Path(json.loads(out)["path"]) / "model.safetensors").stat().st_size == len(weights)


def test_ls_shows_the_built_in_model_the_cache_and_who_uses_it(pulled, cli, gateway, cache):
    """An incomplete one says what it lacks."""
    gateway.add("alpha", model=NAME)
    gateway.add("beta", env={"LORA_MODULES": "a=Org/Model"})
    (cache / "models--gpt2" / "snapshots" / "c1").mkdir(parents=True)
    result = cli("models", "ls")
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "alpha, beta" in rows[NAME]
    assert "complete" in rows[NAME]
    assert pulled.name[:8] in rows[NAME]
    assert "beta" in rows["pilotlight/ember"]
    assert "incomplete" in rows["gpt2"]
    assert "gpt2: " in result.stderr
    found = {one["name"]: one for one in json.loads(cli("models", "ls", "--json").stdout)}
    assert set(found) == {"pilotlight/ember", NAME, "gpt2"}
    assert found[NAME]["used_by"] == ["alpha", "beta"]
    assert (found["gpt2"]["complete"], found["gpt2"]["used_by"]) == (False, [])
    assert [one["name"] for one in json.loads(cli("models", "ls", "ORG/MODEL", "--json").stdout)] == [NAME]


def test_ls_needs_no_gateway_and_no_cache(cli, cache):
    result = cli("models", "ls", "--json", PILOTLIGHT_URL="http://127.0.0.1:9")
    (built_in,) = json.loads(result.stdout)
    assert "used_by" not in built_in
    nothing = cli("models", "ls", NAME)
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert f"pilotlight models pull {NAME}" in nothing.stderr


def test_rm_removes_one_revision_or_all(repository, pulled, cli, cache):
    old = pulled.name
    files = repository.commits[old]
    new = repository.commit(files | {"tokenizer.json": b"{}"}, "main")
    cli("models", "pull", NAME)
    removed = json.loads(cli("models", "rm", NAME, "--revision", old[:8], "--yes", "--json").stdout)
    assert (removed["model"], removed["commits"]) == (NAME, [old])
    assert len(files["tokenizer.json"]) <= removed["freed_bytes"] < len(files["model.safetensors"])
    home = cache / folder_name(NAME)
    assert [path.name for path in (home / "snapshots").iterdir()] == [new]
    assert cli("models", "verify", NAME).exit_code == 0, "blobs that another revision needs are kept"
    result = cli("models", "rm", NAME, "--yes")
    assert "are free again" in result.stderr
    assert not home.exists()


def test_rm_asks_and_refuses(pulled, cli, cache):
    nobody = cli("models", "rm", NAME)
    assert (nobody.exit_code, pulled.is_dir()) == (2, True)
    assert "--yes" in nobody.output
    with exclusive(cache, NAME):
        busy = cli("models", "rm", NAME, "--yes")
    assert busy.exit_code == 1
    assert f"is being downloaded by process {os.getpid()}" in busy.output
    for arguments, message in (
        (["no/such"], "holds no no/such"),
        (["pilotlight/ember"], "is part of Pilotlight"),
        ([NAME, "--revision", "v9"], "holds no revision 'v9' of org/model; it has main"),
        ([NAME, "--revision", ""], "holds no revision ''"),
    ):
        result = cli("models", "rm", *arguments, "--yes")
        assert result.exit_code == 1
        assert message in result.output
    assert pulled.is_dir()


def test_verify_names_the_damaged_file(pulled, cli):
    """Large files are checked by their sha256, small ones by git's hash; no network is needed."""
    good = cli("models", "verify", HF_ENDPOINT="http://127.0.0.1:9")
    assert good.exit_code == 0
    assert good.stdout == f"{NAME} {pulled.name[:8]}: 3 files are good\n"
    for name in ("model.safetensors", "config.json"):
        blob = (pulled / name).resolve()
        content = blob.read_bytes()
        blob.write_bytes(content[:-3] + b" \n}" if name == "config.json" else content[:-1] + b"\xff")
        bad = cli("models", "verify", NAME)
        assert bad.exit_code == 1
        assert f"{name} is damaged" in bad.stdout
        report = json.loads(cli("models", "verify", NAME, "--json").stdout)
        assert report["ok"] is False
        (snapshot,) = report["snapshots"]
        assert {file["path"] for file in snapshot["files"] if file["condition"] == "damaged"} == {name}
        blob.write_bytes(content)
    (pulled / "tokenizer.json").resolve().unlink()
    assert "tokenizer.json is missing" in cli("models", "verify", NAME).stdout
    assert cli("models", "verify", "--revision", "main").exit_code == 2


def test_verify_says_which_files_nobody_can_check(cli, cache):
    """Plain files of other tools carry no hash."""
    folder = cache / folder_name(NAME) / "snapshots" / "c1"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((builtin_folder() / name).read_bytes())
    result = cli("models", "verify", NAME)
    assert (result.exit_code, result.stdout) == (0, f"{NAME} c1: 0 files are good, 2 without a known hash\n")


def test_architectures_come_from_the_installed_engine(cli, tmp_path):
    home = tmp_path / "engine"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").touch()
    content = {
        "format": MANIFEST_FORMAT,
        "vllm": "0.32.0",
        "torch": "2.13.0+cpu",
        "platform": "cpu",
        "flags": {},
        "registered": {},
        "architectures": ["Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM"],
    }
    (home / MANIFEST_NAME).write_text(json.dumps(content))
    engine = {"PILOTLIGHT_ENGINE__HOME": str(home)}
    all_of_them = cli("models", "architectures", **engine)
    assert all_of_them.stdout.split() == sorted(content["architectures"])
    assert "3 of 3 architectures of vLLM 0.32.0" in all_of_them.stderr
    some = json.loads(cli("models", "architectures", "qwen3", "--json", **engine).stdout)
    assert some == {
        "engine": "vllm 0.32.0",
        "platform": "cpu",
        "architectures": ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"],
    }
    none = cli("models", "architectures", "LlamaForCasualLM", **engine)
    assert none.exit_code == 1
    assert "the nearest is LlamaForCausalLM" in none.output
    missing = cli("models", "architectures", PILOTLIGHT_ENGINE__HOME=str(tmp_path / "no"))
    assert missing.exit_code == 1
    assert "no engine at" in missing.output
