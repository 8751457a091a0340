"""Deploying fetches everything that the engine will read, by the real client library (vllm-worker.md §4.8, §5.3)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pilotlight.engines.manifest import EngineManifest
from pilotlight.management.checks import FETCHES_MAX, cache_of
from pilotlight.models.cache import exclusive
from pilotlight.models.catalog import builtin_folder
from pilotlight.testing.hub_server import HubServer

URL = "/pilotlight/v1/endpoints"
FILES = {
    name: (builtin_folder() / name).read_bytes()
    for name in ("config.json", "model.safetensors", "tokenizer.json")
}
SETTINGS = {name: FILES[name] for name in ("config.json", "tokenizer.json")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.add("org/model", FILES)
        server.add("org/adapter", {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"x"})
        yield server


async def test_a_deployment_fetches_the_model_and_its_adapters(management, hub, tmp_path):
    """With progress for each, and the token of the endpoint; a second one asks the hub for nothing."""
    env = {"LORA_MODULES": "a=org/adapter", "HF_TOKEN": "hf_secret", "HF_HUB_CACHE": str(tmp_path / "hub")}
    answer = await management.http.post(
        URL, json={"model": "org/model", "env": env}, headers={"Accept": "application/x-ndjson"}
    )
    told = [json.loads(line) for line in answer.text.splitlines()]
    assert told[-1]["endpoint"]["model"] == "org/model", told[-1]
    fetched = {line["message"] for line in told if line.get("stage") == "downloading" and line.get("done")}
    assert fetched == {"weights of org/model", "weights of org/adapter"}
    for name in ("org/model", "org/adapter"):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
        assert (folder / hub.repositories[name].refs["main"]).is_dir()
        assert {one.token for one in hub.requests if name in one.path} == {"hf_secret"}
    hub.requests.clear()
    again = await management.http.post(URL, json={"model": "org/model", "env": env, "name": "again"})
    assert again.status_code == 201, again.text
    assert hub.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LORA_MODULES": "a=org/model"}, "org/model is no LoRA adapter"),
        ({"LORA_MODULES": "a=no/such"}, "the hub has no model no/such"),
        ({"EXTRA_REPOS": "a$b"}, "'a$b' is neither"),
    ],
)
async def test_what_is_missing_is_refused_before_anything_starts(management, hub, tmp_path, changes, message):
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), **changes}
    answer = await management.http.post(URL, json={"model": "org/model", "env": env})
    assert answer.status_code == 422
    assert message in answer.text
    assert next(iter(changes)) in answer.text, "the variable is named"
    assert await management.store.endpoints() == []


def with_formats(management, version: str, formats: tuple[str, ...]) -> EngineManifest:
    """The usual engine with other values for `LOAD_FORMAT`."""
    usual = management.surroundings["manifest"]
    flag = replace(usual.flags["LOAD_FORMAT"], choices=formats)
    return replace(usual, version=version, flags={**usual.flags, "LOAD_FORMAT": flag})


FORMATS = ("auto", "safetensors", "dummy", "pt", "tensorizer", "mistral")


def files_of(cache: Path, commit: str) -> set[str]:
    folder = cache / "models--org--model" / "snapshots" / commit
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


async def test_the_older_name_of_the_revision_counts_as_in_the_worker(management, hub, tmp_path):
    """§4.9 REVISION: what is checked and fetched is what the workers will look for."""
    repository = hub.repositories["org/model"]
    commit = repository.commit({**FILES, "tokenizer.json": b"{}"}, "v1")
    cache = tmp_path / "hub"
    await management.create(model="org/model", env={"HF_HUB_CACHE": str(cache), "REVISION": "v1"})
    assert files_of(cache, commit) == set(FILES)
    assert files_of(cache, repository.refs["main"]) == set()


async def test_weights_of_another_format_are_fetched_beside_those_that_are_there(management, hub, tmp_path):
    """§4.9 LOAD_FORMAT."""
    management.surroundings["manifest"] = with_formats(management, "0.32.0", FORMATS)
    commit = hub.add("org/model", {**FILES, "model.pt": bytes(5000)}).refs["main"]
    cache = tmp_path / "hub"
    await management.create(model="org/model", env={"HF_HUB_CACHE": str(cache)})
    assert files_of(cache, commit) == set(FILES)
    await management.create(
        model="org/model", name="b", env={"HF_HUB_CACHE": str(cache), "LOAD_FORMAT": "pt"}
    )
    assert files_of(cache, commit) == {*FILES, "model.pt"}


PARAMS = {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "max_seq_len": 2048}
MISTRAL = {
    "params.json": json.dumps(PARAMS).encode(),
    "consolidated.safetensors": FILES["model.safetensors"],
    "tekken.json": b"{}",
}


@pytest.mark.parametrize(
    ("files", "env"),
    [
        (SETTINGS, {"LOAD_FORMAT": "dummy"}),
        ({**SETTINGS, "model.tensors": bytes(5000)}, {"LOAD_FORMAT": "tensorizer"}),
        (MISTRAL, {"LOAD_FORMAT": "mistral", "CONFIG_FORMAT": "mistral", "TOKENIZER_MODE": "mistral"}),
        (MISTRAL, {}),
    ],
)
async def test_models_without_the_usual_weights_or_configuration_are_deployed(
    management, hub, tmp_path, files, env
):
    """§4.9: what the engine reads by these variables is asked for, and nothing else."""
    management.surroundings["manifest"] = with_formats(management, "0.32.0", FORMATS)
    commit = hub.add("org/model", files).refs["main"]
    cache = tmp_path / "hub"
    created = await management.create(model="org/model", env={"HF_HUB_CACHE": str(cache), **env})
    assert created["model"] == "org/model"
    assert files_of(cache, commit) == set(files)


async def test_a_folder_without_weights_is_deployed_where_none_are_read(management, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name, content in SETTINGS.items():
        (folder / name).write_bytes(content)
    body = {"model": str(folder), "env": {"LOAD_FORMAT": "dummy"}}
    created = await management.http.post(URL, json=body)
    assert created.status_code == 201, created.text
    refused = await management.http.post(URL, json={"model": str(folder)})
    assert refused.status_code == 422
    assert "holds no weights" in refused.text


async def test_an_endpoints_own_hub_is_asked_and_gets_no_token_of_the_gateway(
    management, hub, tmp_path, monkeypatch
):
    """§4.9 HF_ENDPOINT, as its workers do."""
    monkeypatch.setenv("HF_TOKEN", "hf_gateway")
    with HubServer() as own:
        own.add("org/own", FILES)
        env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": own.url}
        await management.create(model="org/own", env=env)
        assert {one.token for one in own.requests} == {""}
        await management.create(
            model="org/own", name="b", env={**env, "HF_TOKEN": "hf_own", "REVISION": "main"}
        )
    assert hub.requests == []
    await management.create(model="org/model", name="c", env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert {one.token for one in hub.requests} == {"hf_gateway"}


async def test_a_gateway_that_may_ask_no_hub_says_so(management, hub, tmp_path, monkeypatch):
    """What is in its cache is deployed all the same."""
    env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    await management.create(model="org/model", env=env)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    await management.create(model="org/model", name="again", env=env)
    hub.add("org/other", FILES)
    answer = await management.http.post(URL, json={"model": "org/other", "env": env})
    assert answer.status_code == 503
    assert "HF_HUB_OFFLINE is set" in answer.text
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a\\b", "a b", "x" * 300])
async def test_a_revision_that_is_a_path_is_refused(management, hub, tmp_path, revision):
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "MODEL_REVISION": revision}
    answer = await management.http.post(URL, json={"model": "org/model", "env": env})
    assert answer.status_code == 422
    assert "cannot have the revision" in answer.text
    assert "env.MODEL_REVISION" in answer.text
    assert hub.requests == []


async def test_a_deployment_that_waits_says_for_whom(management, hub, tmp_path):
    """About once per second and with how far the other is; it has the files as soon as they are there."""
    cache = tmp_path / "hub"
    told = asyncio.Event()
    messages: list[str] = []

    def progress(stage, message, done=None, total=None):
        if "waits for process" in message:
            assert done is not None
            messages.append(message)
            told.set()

    with exclusive(cache, "org/model"):
        env = {"HF_HUB_CACHE": str(cache)}
        task = asyncio.ensure_future(management.service.checker.check("org/model", env, None, progress))
        await told.wait()
    assert (await task).model == "org/model"
    assert f"waits for process {os.getpid()} on " in messages[0]


async def test_a_deployment_that_waits_for_its_turn_says_so(management, hub, tmp_path):
    hub.add("org/second", FILES)
    said: list[str] = []
    waits = asyncio.Event()

    def progress(stage, message, done=None, total=None):
        said.append(message)
        if "waits until" in message:
            waits.set()

    checker = management.service.checker
    async with contextlib.AsyncExitStack() as turns:
        for _ in range(FETCHES_MAX):
            await turns.enter_async_context(checker.fetching)
        env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
        task = asyncio.ensure_future(checker.check("org/second", env, None, progress))
        await waits.wait()
        assert "weights of org/second" not in said
    assert (await task).model == "org/second"


async def test_a_model_in_an_object_store_is_left_to_the_engine(management, hub):
    """Nothing of it is read here; what cannot read it is refused."""
    created = await management.http.post(URL, json={"model": "s3://bucket/model"})
    assert created.status_code == 201, created.text
    assert created.json()["model"] == "s3://bucket/model"
    answer = await management.http.post(
        URL, json={"model": "gs://bucket/model", "env": {"LOAD_FORMAT": "npcache"}}
    )
    assert answer.status_code == 422
    assert "LOAD_FORMAT=npcache cannot read from an object store" in answer.text
    assert hub.requests == []


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "/gateway/hub"),
        ({"BASE_PATH": "/volume"}, "/volume/huggingface-cache/hub"),
        ({"BASE_PATH": "/runpod-volume"}, "/gateway/hub"),
        ({"HF_HUB_CACHE": "/own"}, "/own"),
        ({"HF_HOME": "/own"}, "/own/hub"),
        ({"HF_HOME": "/own", "BASE_PATH": "/volume"}, "/own/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/own"}, "/own"),
        ({"DOWNLOAD_DIR": "/weights", "BASE_PATH": "/volume"}, "/weights"),
    ],
)
def test_an_endpoints_own_volume_goes_before_the_gateways_cache(env, expected, monkeypatch):
    """§5.2: the console's default `BASE_PATH` counts only where that volume is."""
    monkeypatch.setenv("HF_HUB_CACHE", "/gateway/hub")
    monkeypatch.setenv("DOWNLOAD_DIR", "/inherited/by/nobody")
    assert cache_of(env) == Path(expected)


async def test_the_flags_of_the_engine_that_was_asked_for_are_checked(management):
    """A value that only the usual version takes."""
    management.surroundings["0.31.0"] = with_formats(management, "0.31.0", ("auto",))
    env = {"LOAD_FORMAT": "safetensors"}
    assert (await management.create(env=env))["env"]["LOAD_FORMAT"] == "safetensors"
    body = {"model": str(management.model), "name": "old", "env": {**env, "ENGINE_VERSION": "0.31.0"}}
    answer = await management.http.post(URL, json=body)
    assert answer.status_code == 422
    assert "the engine (vLLM 0.31.0) would refuse" in answer.text


async def test_the_version_is_a_field_of_the_endpoint(management):
    created = await management.create(engine_version="0.31.0")
    assert (created["engine_version"], created["env"]["ENGINE_VERSION"]) == ("0.31.0", "0.31.0")
    url = f"{URL}/{created['id']}"
    renamed = await management.http.patch(url, json={"name": "other"})
    assert renamed.json()["engine_version"] == "0.31.0"
    usual = await management.http.patch(url, json={"engine_version": None})
    assert (usual.json()["engine_version"], usual.json()["version"]) == (None, 2)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"engine_version": "1", "env": {"ENGINE_VERSION": "2"}}, "send one"),
        ({"engine_version": "1", "engine_url": "http://127.0.0.1:9"}, "engine of this installation"),
        ({"engine_version": "1", "kind": "queue", "command": ["x"]}, "engine_version belongs to"),
    ],
)
async def test_a_version_that_contradicts_the_rest_is_refused(management, fields, problem):
    body = {} if "kind" in fields else {"model": "pilotlight/ember"}
    answer = await management.http.post(URL, json=body | fields)
    assert answer.status_code == 422
    assert problem in answer.text
