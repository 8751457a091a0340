"""The model at a worker's start: baked, a folder, the cache, a download (vllm-worker.md §5.2 to §5.4, §4.8)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotlight.domain.worker import WORKER_COOKIE
from pilotlight.models.cache import exclusive_now
from pilotlight.models.catalog import builtin_folder
from pilotlight.testing.hub_server import HubServer
from pilotlight.worker.errors import ModelMissingError
from pilotlight.worker.fetch import fetch_environment
from pilotlight.worker.model import look_for_model, prepare_model, read_baked

NAME = "Some-Org/Model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 45_000_000

Prepare = Callable[..., Any]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def prepare(hub: HubServer, cache: Path, tmp_path: Path) -> Prepare:
    """Prepares the model of an environment; keeps what was told meanwhile in `prepare.progress`."""

    async def run(**variables: str) -> Any:
        environment = {
            "PATH": os.environ["PATH"],
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(cache),
            "MODEL_NAME": NAME,
            **variables,
        }
        return await prepare_model(
            environment,
            on_progress=lambda done, total: run.progress.append((done, total)),
            root=tmp_path / "root",
        )

    run.progress = []  # type: ignore[attr-defined]
    return run


@pytest.fixture
def files() -> dict[str, bytes]:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return {name: (builtin_folder() / name).read_bytes() for name in names}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def cached(cache: Path, files: dict[str, bytes], name: str = NAME) -> Path:
    return write(cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT, files)


def bake(tmp_path: Path, **record: Any) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "local_model_args.json").write_text(json.dumps(record))


async def test_a_folder_is_served_under_its_name(
    prepare: Prepare, files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", files)
    model = await prepare(MODEL_NAME=str(folder))
    assert (model.source, model.names, model.local) == (str(folder), (str(folder),), True)
    assert model.environment["MODEL_NAME"] == str(folder)


async def test_the_built_in_model_is_always_here(prepare: Prepare, hub: HubServer) -> None:
    model = await prepare(MODEL_NAME="pilotlight/ember")
    assert (model.source, model.names[0]) == (str(builtin_folder()), "pilotlight/ember")
    assert hub.requests == []


async def test_the_cache_is_used_without_asking_anybody(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes]
) -> None:
    """§5.4: the id stays the served name in its own case, then in lower case, the path last."""
    folder = cached(cache, files, NAME.lower())
    model = await prepare(MODEL_REVISION="main")
    assert model.source == str(folder)
    assert model.names == (NAME, NAME.lower(), str(folder))
    assert model.local
    assert "MODEL_REVISION" not in model.environment
    assert hub.requests == []


async def test_an_incomplete_snapshot_is_downloaded(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes]
) -> None:
    hub.add(NAME, files)
    cached(cache, {"config.json": files["config.json"]})
    model = await prepare(HF_TOKEN="hf_secret")
    assert Path(model.source).name == hub.repositories[NAME].refs["main"]
    assert (Path(model.source) / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert model.names == (NAME, NAME.lower(), model.source)
    assert prepare.progress[-1][0] == prepare.progress[-1][1] == sum(map(len, files.values()))  # type: ignore[attr-defined]
    assert {one.token for one in hub.requests if NAME in one.path} == {"hf_secret"}


async def test_everything_else_is_fetched_too_so_that_the_engine_needs_no_hub(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes]
) -> None:
    """§4.8, §5.3: adapter, draft model, tokenizer and extra repository."""
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    cached(cache, files)
    hub.add("org/adapter", adapter)
    hub.add("org/draft", files)
    hub.add("org/tokenizer", {"tokenizer.json": b"{}", "model.safetensors": b"never fetched"})
    hub.add("org/extra", {"data.txt": b"x"})
    model = await prepare(
        LORA_MODULES="a=org/adapter",
        SPECULATIVE_MODEL="org/draft",
        TOKENIZER="org/tokenizer",
        EXTRA_REPOS="org/extra@main",
    )
    environment = model.environment
    (entry,) = json.loads(environment["LORA_MODULES"])
    for folder in (entry["path"], environment["SPECULATIVE_MODEL"], environment["TOKENIZER"]):
        assert str(cache) in folder
        assert Path(folder).is_dir()
    assert not (Path(environment["TOKENIZER"]) / "model.safetensors").exists()
    assert (cache / "models--org--extra" / "refs" / "main").is_file()
    assert model.local
    hub.requests.clear()
    offline = await prepare(LORA_MODULES="a=org/adapter", HF_HUB_OFFLINE="1")
    assert json.loads(offline.environment["LORA_MODULES"]) == [entry]
    assert hub.requests == []


async def test_code_of_other_repositories_is_fetched_where_it_may_run(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes]
) -> None:
    """TRUST_REMOTE_CODE: `auto_map` may name classes of a repository that is not the model's."""
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoConfig": "org/code--configuration.Config"}}
    tokenizer = {"auto_map": {"AutoTokenizer": ["org/slow--tokenizer.Slow", None]}}
    cached(
        cache,
        files
        | {
            "config.json": json.dumps(config).encode(),
            "tokenizer_config.json": json.dumps(tokenizer).encode(),
        },
    )
    for name in ("org/code", "org/slow"):
        hub.add(name, {"configuration.py": b"", "model.safetensors": b"x"})
    await prepare()
    assert hub.requests == []
    await prepare(TRUST_REMOTE_CODE="true")
    for name in ("org--code", "org--slow"):
        (snapshot,) = (cache / f"models--{name}" / "snapshots").iterdir()
        assert [path.name for path in snapshot.iterdir()] == ["configuration.py"]
        assert (cache / f"models--{name}" / "refs" / "main").is_file()
    hub.requests.clear()
    assert (await prepare(TRUST_REMOTE_CODE="true")).local
    assert hub.requests == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
async def test_offline_is_obeyed_and_says_what_is_missing(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes], variable: str
) -> None:
    cached(cache, files)
    with pytest.raises(
        ModelMissingError, match=rf"org/a \(LORA_MODULES\) is not complete in .*{variable}"
    ) as error:
        await prepare(LORA_MODULES="a=org/a", **{variable: "1"})
    assert "pilotlight models pull" in error.value.failure.advice
    assert hub.requests == []


@pytest.mark.parametrize(
    ("variables", "kind", "cause"),
    [
        ({"MODEL_NAME": "/no/such"}, "model_not_found", "model folder /no/such does not exist"),
        ({"MODEL_NAME": "no/such"}, "model_not_found", "the hub has no model no/such"),
        ({"MODEL_NAME": "org/gated"}, "unauthorized", "model org/gated is gated"),
        ({"MODEL_NAME": "org/gated", "HF_TOKEN": "x"}, "unauthorized", "model org/gated is gated"),
        ({"MODEL_NAME": "a b"}, "model_not_found", "neither pilotlight/ember"),
        ({"LORA_MODULES": "a=org/plain"}, "model_not_found", "is no LoRA adapter"),
        ({"MODEL_REVISION": "v9"}, "model_not_found", "has no revision 'v9'"),
        ({"MODEL_REVISION": "../../x"}, "bad_flag", "cannot have the revision '../../x'"),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9", "MODEL_NAME": "a/b"},
            "hub_unreachable",
            "cannot be read from",
        ),
    ],
)
async def test_what_cannot_be_had_is_named_with_its_class(
    prepare: Prepare,
    hub: HubServer,
    files: dict[str, bytes],
    variables: dict[str, str],
    kind: str,
    cause: str,
) -> None:
    """§10 point 13: missing model, gated repository; the class and what to do."""
    hub.add(NAME, files)
    hub.add("org/gated", files).gated = True
    hub.add("org/plain", files)
    with pytest.raises(ModelMissingError) as error:
        await prepare(**variables)
    assert error.value.failure.kind == kind
    assert cause in error.value.failure.cause
    assert error.value.failure.advice


async def test_who_cancels_the_start_ends_the_download(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes]
) -> None:
    """The process is gone when the cancellation returns, and its lock with it."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [LARGE // 2], "data_offsets": [0, LARGE]}}).encode()
    hub.add(NAME, files | {"model.safetensors": len(header).to_bytes(8, "little") + header + bytes(LARGE)})
    hold = hub.hold("model.safetensors")
    preparing = asyncio.create_task(prepare())
    assert await asyncio.to_thread(hold.reached.wait, 30)
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing
    with exclusive_now(cache, NAME) as holder:
        assert holder is None


def test_a_download_sees_no_secret_but_the_hubs_token() -> None:
    """§4.4: the platform's key and the user's own keys stay with the worker."""
    secret = {
        "RUNPOD_AI_API_KEY": "x",
        "VLLM_API_KEY": "x",
        "BUCKET_SECRET_ACCESS_KEY": "x",
        "MY_PASSWORD": "x",
    }
    passed = {"HF_TOKEN": "t", "PATH": "/bin", "https_proxy": "p", "HF_ENDPOINT": "e", WORKER_COOKIE: "w"}
    assert fetch_environment(secret | passed) == passed


async def test_a_baked_model_is_served_by_its_id(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    """§10 point 12: repository id, lower case and path are accepted; nobody is asked."""
    folder = cached(tmp_path / "models", files)
    bake(
        tmp_path,
        MODEL_NAME=str(folder),
        TOKENIZER_NAME=str(folder),
        MODEL_ID=NAME,
        QUANTIZATION="awq",
        COMMIT=COMMIT,
    )
    model = await prepare(MODEL_REVISION="main", QUANTIZATION="None", TOKENIZER_NAME=NAME)
    assert model.source == str(folder)
    assert model.names == (NAME, NAME.lower(), str(folder))
    assert (model.environment["QUANTIZATION"], model.environment["TOKENIZER_NAME"]) == ("awq", str(folder))
    assert model.local
    assert model.notes == ()
    assert hub.requests == []


async def test_an_image_of_older_workers_is_known_by_its_snapshot(
    prepare: Prepare, files: dict[str, bytes], tmp_path: Path
) -> None:
    """§5.3: no MODEL_ID in G1 and G2; 0.2 and 0.3 had two text files."""
    folder = cached(tmp_path / "models", files)
    bake(tmp_path, MODEL_NAME=str(folder), TOKENIZER_NAME=str(folder))
    first = await prepare(MODEL_NAME="other/model")
    assert first.names == (NAME, NAME.lower(), str(folder))
    assert first.notes == (f"MODEL_NAME=other/model is ignored: this image has {NAME} inside",)
    root = tmp_path / "root"
    (root / "local_model_args.json").unlink()
    (root / "local_model_path.txt").write_text(f"{folder}\n")
    (root / "local_tokenizer_path.txt").write_text(str(folder))
    second = await prepare()
    assert second.names == first.names
    assert second.environment["TOKENIZER_NAME"] == str(folder)


def test_an_image_may_say_more_than_we_know_and_have_paths_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"m\xff")
    folder.mkdir()
    bake(tmp_path, MODEL_NAME=str(tmp_path), FILES=["a"], EXTRA={})
    found = read_baked(tmp_path / "root", {})
    assert found is not None
    assert found.variables["MODEL_NAME"] == str(tmp_path)
    (tmp_path / "root" / "local_model_args.json").unlink()
    (tmp_path / "root" / "local_model_path.txt").write_bytes(os.fsencode(folder) + b"\n")
    found = read_baked(tmp_path / "root", {})
    assert found is not None
    assert found.variables["MODEL_NAME"] == str(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "org/" + "y" * 300, "https://u:S3CRET@h/m"])
async def test_what_can_be_no_repository_is_refused_by_name(prepare: Prepare, name: str) -> None:
    """Also names that are too long for a file."""
    for variables in ({"MODEL_NAME": name}, {"MODEL_NAME": "pilotlight/ember", "LORA_MODULES": f"a={name}"}):
        with pytest.raises(ModelMissingError) as caught:
            await prepare(**variables)
        with pytest.raises(ModelMissingError):
            look_for_model(variables)
        assert caught.value.failure.cause.startswith(list(variables)[-1])
        assert "S3CRET" not in caught.value.failure.cause


@pytest.mark.parametrize("asked", [{}, {"TOKENIZER_NAME": "{folder}"}, {"LORA_MODULES": "a=/l/a"}])
async def test_a_baked_model_needs_no_hub(
    prepare: Prepare, files: dict[str, bytes], tmp_path: Path, asked: dict[str, str]
) -> None:
    """§8 A24: offline with baked weights, as long as nothing must come from the hub."""
    folder = cached(tmp_path / "models", files)
    bake(tmp_path, MODEL_NAME=str(folder), MODEL_ID=NAME)
    variables = {name: text.replace("{folder}", str(folder)) for name, text in asked.items()}
    assert (await prepare(**variables)).local
    assert not (await prepare(**variables, VLLM_EXTRA_ARGS="--spec-model org/d")).local


async def test_another_tokenizer_than_the_baked_one_is_fetched(
    prepare: Prepare, hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    """§5.3, §8 A24: baked weights do not forbid the hub where something else must come from it."""
    folder = cached(tmp_path / "models", files)
    bake(tmp_path, MODEL_NAME=str(folder), TOKENIZER_NAME=str(folder), MODEL_ID=NAME)
    hub.add("org/tokenizer", {"tokenizer.json": b"{}"})
    model = await prepare(TOKENIZER_NAME="org/tokenizer")
    assert (Path(model.environment["TOKENIZER"]) / "tokenizer.json").is_file()
    assert "TOKENIZER_NAME" not in model.environment


async def test_a_baked_model_that_a_volume_hides_is_looked_for_elsewhere(
    prepare: Prepare, hub: HubServer, cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    bake(tmp_path, MODEL_NAME="/runpod-volume/gone", MODEL_ID=NAME, MODEL_REVISION=COMMIT)
    folder = cached(cache, files)
    model = await prepare()
    assert model.source == str(folder)
    assert "does a volume hide it?" in model.notes[0]
    (tmp_path / "root" / "local_model_args.json").write_text('{"MODEL_NAME": "/runpod-volume/gone"}')
    with pytest.raises(ModelMissingError, match="does a volume hide it") as error:
        await prepare()
    assert "BASE_PATH=/models" in error.value.failure.advice
    (tmp_path / "root" / "local_model_args.json").write_text("{")
    with pytest.raises(ModelMissingError, match="cannot be read"):
        await prepare()


async def test_object_stores_are_for_the_engine(prepare: Prepare, hub: HubServer) -> None:
    model = await prepare(MODEL_NAME="s3://bucket/model")
    assert (model.source, model.names) == ("s3://bucket/model", ("s3://bucket/model",))
    with pytest.raises(
        ModelMissingError, match="LOAD_FORMAT=npcache cannot read from an object store"
    ) as error:
        await prepare(MODEL_NAME="gs://bucket/model", LOAD_FORMAT="npcache")
    assert error.value.failure.kind == "bad_flag"
    assert hub.requests == []


async def test_a_folder_with_a_shard_missing_is_told_before_the_engine_starts(
    prepare: Prepare, files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", {"config.json": files["config.json"]})
    with pytest.raises(ModelMissingError, match="holds no weights"):
        await prepare(MODEL_NAME=str(folder))
    assert (await prepare(MODEL_NAME=str(folder), LOAD_FORMAT="dummy")).source == str(folder)


def test_looking_downloads_nothing(
    hub: HubServer, cache: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    cached(cache, files)
    env = {"MODEL_NAME": NAME, "HF_HUB_CACHE": str(cache), "LORA_MODULES": "a=org/a", "HF_ENDPOINT": hub.url}
    model, missing = look_for_model(env, root=tmp_path)
    assert model.names[0] == NAME
    assert [one.name for one in missing] == ["org/a"]
    assert hub.requests == []


def test_the_worker_program_never_loads_the_hubs_client_library() -> None:
    """It must stay below 60 MB; downloads run in a process of their own."""
    program = "import sys, pilotlight.worker.main; sys.exit('huggingface_hub' in sys.modules or 'tqdm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
