"""Making, changing, reading and deleting endpoints through `/pilotlight/v1` and REST v2."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pilotlight.domain.endpoint import RESERVED_ENDPOINT_IDS
from pilotlight.domain.worker import Failure, WorkerState
from pilotlight.errors import EngineEnvironmentError
from pilotlight.ports.fleet import Health

URL = "/pilotlight/v1/endpoints"


async def test_an_endpoint_has_the_documented_defaults(management):
    created = await management.create()
    stored = (await management.store.endpoints())[0]
    kv_bytes = 256 * 128 * (4 * 2 * 2 * 64) * 2
    assert created == {
        "id": stored.id,
        "name": "tiny",
        "status": "idle",
        "model": str(management.model),
        "version": 1,
        "kind": "vllm",
        "command": [],
        "image": None,
        "volumes": [],
        "shm_bytes": 0,
        "registry_user": "",
        "memory_bytes": stored.revision.memory_bytes,
        "url": f"http://127.0.0.1:8400/v2/{stored.id}",
        "openai_url": f"http://127.0.0.1:8400/v2/{stored.id}/openai/v1",
        "served_names": [str(management.model)],
        "min": 0,
        "max": 3,
        "idle_timeout_s": 60,
        "concurrency": 30,
        "flashboot": True,
        "routing": "auto",
        "scaler": "QUEUE_DELAY",
        "scaler_value": 4.0,
        "execution_timeout_ms": 600_000,
        "env": {
            "ENFORCE_EAGER": "true",
            "KV_CACHE_MEMORY_BYTES": str(kv_bytes),
            "MODEL_NAME": str(management.model),
        },
        "engine_url": None,
        "engine_version": None,
        "gpu_count": 0,
        "created_at": "2026-05-28T20:26:40Z",
        "updated_at": "2026-05-28T20:26:40Z",
        "workers": {},
        "failure": None,
        "retry_at": None,
        "next_rung": "cold",
        "start_estimate_ms": {"frozen": None, "launchable": None, "cold": None, "plain": None},
    }
    assert (
        stored.revision.memory_bytes
        == kv_bytes + 2_200_000_000 + management.model.joinpath("model.safetensors").stat().st_size
    )
    assert management.directory.endpoint(stored.id) == stored
    assert management.wakes == [stored.id]


async def test_reserved_ids_are_never_given(management, monkeypatch):
    """serverless-api.md §1, §13 item 16: chance may not make an endpoint of a word that REST v2 has."""
    drawn = iter([bytes([number] * 14) for number in (1, 2, 3)])
    monkeypatch.setattr(management.service, "_entropy", lambda _: next(drawn))
    reserved = RESERVED_ENDPOINT_IDS | {"1" * 14, "2" * 14}
    monkeypatch.setattr("pilotlight.management.service.RESERVED_ENDPOINT_IDS", reserved)
    assert (await management.create())["id"] == "3" * 14
    assert [endpoint.id for endpoint in await management.store.endpoints()] == ["3" * 14]


async def test_an_id_in_use_is_not_given_again(management, monkeypatch):
    """serverless-api.md §1."""
    drawn = iter([bytes([number] * 14) for number in (1, 1, 2)])
    monkeypatch.setattr(management.service, "_entropy", lambda _: next(drawn))
    assert [(await management.create())["id"] for _ in range(2)] == ["1" * 14, "2" * 14]


def test_reserved_ids_are_those_of_the_contract():
    """serverless-api.md §1."""
    assert {
        "serverless", "pods", "templates", "network-volumes", "registries", "catalog", "billing", "clusters",
        "account", "openapi.json", "docs", "health", "graphql", "batch",
    } == RESERVED_ENDPOINT_IDS  # fmt: skip


async def test_every_setting_is_stored(management):
    created = await management.create(
        name="my model",
        min=1,
        max=5,
        idle_timeout_s=3600,
        concurrency=7,
        flashboot=False,
        routing="session",
        env={"MAX_MODEL_LEN": "1k", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "a,b"},
        scaler="REQUEST_COUNT",
        scaler_value=2,
        execution_timeout_ms=5000,
        gpu_count=0,
    )
    for name, value in {
        "name": "my model",
        "min": 1,
        "max": 5,
        "idle_timeout_s": 3600,
        "concurrency": 7,
        "flashboot": False,
        "routing": "session",
        "scaler": "REQUEST_COUNT",
        "scaler_value": 2.0,
        "execution_timeout_ms": 5000,
        "served_names": ["a", "b", str(management.model)],
    }.items():
        assert created[name] == value
    listed = (await management.http.get(URL)).json()
    assert listed == {"endpoints": [created]}
    assert (await management.http.get(f"{URL}/{created['id']}")).json() == created


async def test_a_default_name_is_numbered_and_a_chosen_one_must_be_free(management):
    first, second = await management.create(), await management.create()
    assert (first["name"], second["name"]) == ("tiny", "tiny-2")
    answer = await management.http.post(URL, json={"model": str(management.model), "name": "tiny"})
    assert answer.status_code == 409
    assert first["id"] in answer.json()["detail"]
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({"KV_CACHE_MEMORY_BYTES": "2G"}, set()),
        ({"VLLM_CPU_KVCACHE_SPACE": "1"}, {"KV_CACHE_MEMORY_BYTES"}),
        ({"GPU_MEMORY_UTILIZATION": "0.3"}, {"KV_CACHE_MEMORY_BYTES"}),
        ({"GPU_MEMORY_UTILIZATION": "0.95"}, set()),
        ({"VLLM_RUNPOD_ENFORCE_EAGER": "false"}, {"ENFORCE_EAGER"}),
        ({"VLLM_RUNPOD_KV_CACHE_MEMORY_BYTES": "2G"}, {"KV_CACHE_MEMORY_BYTES"}),
        ({"VLLM_CONFIG_FILE": "/on/the/worker.yaml"}, {"ENFORCE_EAGER", "KV_CACHE_MEMORY_BYTES"}),
        ({"ENFORCE_EAGER": "false"}, set()),
        ({"VLLM_EXTRA_ARGS": "--enforce-eager"}, {"ENFORCE_EAGER"}),
    ],
)
async def test_cpu_defaults_yield_to_what_the_owner_says(management, env, missing):
    shown = (await management.create(env=env))["env"]
    assert env.items() <= shown.items()
    assert {"ENFORCE_EAGER", "KV_CACHE_MEMORY_BYTES"} - set(shown) == missing


async def test_a_block_override_gets_exactly_its_bytes(management):
    """Without them vLLM claims most of the host's memory, override or not."""
    shown = (await management.create(env={"NUM_GPU_BLOCKS_OVERRIDE": "64"}))["env"]
    assert shown["KV_CACHE_MEMORY_BYTES"] == str(64 * 128 * (4 * 2 * 2 * 64) * 2)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"bogus": 1}, "$: additional properties 'bogus' not allowed"),
        ({"min": -1}, "$.min: Input should be greater than or equal to 0 (got -1)"),
        ({"min": "1"}, "$.min: Input should be a valid integer (got '1')"),
        ({"min": True}, "$.min: Input should be a valid integer"),
        ({"min": 4}, "$: min is 4, but must not be above max, which is 3"),
        ({"idle_timeout_s": 0}, "greater than or equal to 1"),
        ({"idle_timeout_s": 3601}, "less than or equal to 3600"),
        ({"concurrency": 1001}, "less than or equal to 1000"),
        ({"scaler": "MAGIC"}, "'QUEUE_DELAY' or 'REQUEST_COUNT'"),
        ({"routing": "fastest"}, "'auto', 'least_loaded', 'session' or 'prefix'"),
        ({"scaler_value": 0.1}, "QUEUE_DELAY takes seconds, at least 0.5"),
        ({"scaler": "REQUEST_COUNT", "scaler_value": 1.5}, "takes a whole number"),
        ({"execution_timeout_ms": 4999}, "greater than or equal to 5000"),
        ({"execution_timeout_ms": 604_800_001}, "less than or equal to 604800000"),
        ({"name": "x" * 192}, "at most 191"),
        ({"name": " x"}, "blanks"),
        ({"name": "a\nb"}, "control characters"),
        ({"env": {"lower": "x"}}, "'lower' is no variable's name"),
        ({"env": {"A": 1}}, "$.env.A: Input should be a valid string"),
        ({"env": {"A": "x" * 32_769}}, "A has 32769 bytes"),
        ({"env": {f"A{number}": "" for number in range(201)}}, "201 variables"),
        ({"env": {"RUNPOD_AI_API_KEY": "x"}}, "RUNPOD_AI_API_KEY is set by the platform"),
        ({"env": {"PILOTLIGHT_HOME": "x"}}, "PILOTLIGHT_HOME is set by the platform"),
        ({"env": {"VLLM_API_KEY": "x"}}, "VLLM_API_KEY is set by the platform"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "CUDA_VISIBLE_DEVICES is set by the platform"),
        ({"env": {"A": "a\0b"}}, "zero byte"),
        ({"engine_url": "ftp://host"}, "http://host:port"),
        ({"engine_url": "http://u:geheim@host"}, "user name or password"),
        ({"engine_url": "http://host/v1"}, "without path"),
        ({"engine_url": "http://host:99999"}, "http://host:port"),
        ({"engine_url": "unix:/run/x"}, "http://host:port"),
        ({"gpu_count": 65}, "less than or equal to 64"),
        ({"model": ""}, "at least 1 character"),
    ],
)
async def test_a_bad_body_is_refused_with_the_field_its_value_and_what_is_legal(management, body, sentence):
    answer = await management.http.post(URL, json={"model": str(management.model), **body})
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["title"] in {"Unprocessable Entity", "Unprocessable Content"}
    assert problem["detail"] == "Request validation failed."
    assert any(sentence in error for error in problem["errors"]), problem
    assert "geheim" not in answer.text
    assert await management.store.endpoints() == []


async def test_a_body_without_model_and_engine_is_refused(management):
    answer = await management.http.post(URL, json={})
    assert answer.json()["errors"] == ["$: one of model, image and engine_url is needed"]


async def test_malformed_json_is_400_and_a_form_content_type_is_read_as_json(management):
    answer = await management.http.post(URL, content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("the body is not valid JSON")
    answer = await management.http.post(
        URL,
        content=json.dumps({"model": str(management.model)}).encode(),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert answer.status_code == 201


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/no/such/folder", ["/no/such/folder does not exist"]),
        ("no such name!", ["neither pilotlight/ember", "'no such name!'"]),
        ("a/b/c", ["neither"]),
    ],
)
async def test_an_unknown_model_is_named(management, model, words):
    answer = await management.http.post(URL, json={"model": model})
    assert answer.status_code == 422
    for word in words:
        assert word in answer.json()["detail"]


async def test_an_unknown_architecture_is_refused_with_the_nearest(management, make_model, tmp_path):
    folder = make_model(tmp_path / "strange", architectures=["LlamaForCasualLM"])
    answer = await management.http.post(URL, json={"model": str(folder)})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert "LlamaForCasualLM" in detail
    assert "vLLM 0.32.0 does not know; the nearest it knows: LlamaForCausalLM" in detail
    answer = await management.http.post(
        URL, json={"model": str(folder), "env": {"MODEL_IMPL": "transformers"}}
    )
    assert answer.status_code == 201


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"quant_method": "gptq", "bits": 8},
            ("form gptq 8-bit", "vLLM 0.32.0 cannot run here: no kernel for 8 bits; use", "gptq 4-bit"),
        ),
        ({"quant_method": "hqq"}, ("form hqq", "it does not know that method")),
        ({"quant_method": "gptq", "bits": 4}, ()),
        # Nothing is known of it, so the engine decides.
        ({"quant_method": "awq", "bits": 4}, ()),
    ],
)
async def test_weights_that_the_engine_cannot_run_are_refused_before_a_start(
    management, make_model, tmp_path, config, words
):
    folder = make_model(tmp_path / "quantized", quantization_config=config)
    answer = await management.http.post(URL, json={"model": str(folder)})
    assert answer.status_code == (422 if words else 201)
    for word in words:
        assert word in answer.json()["detail"]


async def test_all_bad_flags_are_named_at_once(management):
    env = {"LOAD_FORMAT": "floppy", "ENFORCE_EAGER": "perhaps"}
    answer = await management.http.post(URL, json={"model": str(management.model), "env": env})
    assert answer.status_code == 422
    errors = answer.json()["errors"]
    assert {error.split(":")[0] for error in errors} == {"$.env.LOAD_FORMAT", "$.env.ENFORCE_EAGER"}
    assert "floppy" in answer.json()["detail"]
    assert "safetensors" in answer.json()["detail"]


async def test_a_context_longer_than_the_models_is_refused_with_both_numbers(management):
    answer = await management.http.post(
        URL, json={"model": str(management.model), "env": {"MAX_MODEL_LEN": "4096"}}
    )
    assert answer.status_code == 422
    assert "4096" in answer.json()["detail"]
    assert "2048" in answer.json()["detail"]


async def test_a_model_that_does_not_fit_is_refused_with_needed_and_available_bytes(management):
    management.surroundings["host"] = replace(
        management.surroundings["host"],
        memory_bytes_total=3_000_000_000,
        memory_bytes_available=2_500_000_000,
    )
    answer = await management.http.post(URL, json={"model": str(management.model)})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert "needs 2" in detail
    assert "3000000000 bytes" in detail
    assert "2500000000 available now" in detail


async def test_a_missing_engine_is_503_with_the_command(management):
    management.surroundings["manifest"] = EngineEnvironmentError("no engine at /x")
    answer = await management.http.post(URL, json={"model": str(management.model)})
    assert answer.status_code == 503
    assert "`make setup`" in answer.json()["detail"]
    assert answer.headers["retry-after"] == "5"


async def test_a_worker_that_serves_http_itself_is_of_another_kind(management):
    """vllm-worker.md §7.1: it would take no jobs, and listen without a key."""
    body = {"model": str(management.model), "env": {"WORKER_MODE": "HTTP"}}
    refused = await management.http.post(URL, json=body)
    assert refused.status_code == 422
    assert "load-balancer" in refused.text
    await management.create(env={"WORKER_MODE": "queue"})


async def test_model_name_in_the_environment_must_agree(management):
    good = await management.create(env={"MODEL_NAME": str(management.model)})
    assert good["env"]["MODEL_NAME"] == str(management.model)
    answer = await management.http.post(
        URL, json={"model": str(management.model), "env": {"MODEL_NAME": "other/model"}}
    )
    assert answer.status_code == 422
    assert "leave the variable out" in answer.json()["detail"]


async def test_gpus_are_counted_from_the_environment(management, gpu_engine, gpu_host):
    cpu = await management.http.post(URL, json={"model": str(management.model), "gpu_count": 1})
    assert "built for CPUs" in cpu.json()["detail"]
    management.surroundings.update(manifest=gpu_engine, host=gpu_host)
    created = await management.create()
    assert created["gpu_count"] == 1
    assert set(created["env"]) == {"MODEL_NAME"}
    both = await management.create(env={"TENSOR_PARALLEL_SIZE": "2"})
    assert both["gpu_count"] == 2
    for body, words in (
        ({"env": {"TENSOR_PARALLEL_SIZE": "3"}}, "must divide the 4 attention heads"),
        ({"env": {"TENSOR_PARALLEL_SIZE": "4"}}, "needs 4 GPUs, but this host has 2"),
        ({"env": {"TENSOR_PARALLEL_SIZE": "2"}, "gpu_count": 1}, "2 parallel ranks"),
        ({"gpu_count": 0}, "built for GPUs"),
    ):
        answer = await management.http.post(URL, json={"model": str(management.model), **body})
        assert answer.status_code == 422
        assert words in answer.json()["detail"]


async def test_settings_change_in_place(management):
    created = await management.create()
    management.clock.ms += 5000
    answer = await management.http.patch(
        f"{URL}/{created['id']}", json={"max": 9, "name": "renamed", "routing": "prefix"}
    )
    assert answer.status_code == 200
    changed = answer.json()
    expected = created | {
        "max": 9,
        "name": "renamed",
        "routing": "prefix",
        "updated_at": "2026-05-28T20:26:45Z",
    }
    assert changed == expected
    assert management.wakes == [created["id"]] * 2


async def test_model_and_environment_make_a_new_revision(management, make_model, tmp_path):
    created = await management.create(env={"MAX_MODEL_LEN": "1024"})
    other = make_model(tmp_path / "other")
    url = f"{URL}/{created['id']}"
    moved = (await management.http.patch(url, json={"model": str(other)})).json()
    assert (moved["version"], moved["model"]) == (2, str(other))
    assert moved["env"]["MAX_MODEL_LEN"] == "1024"
    assert moved["env"]["MODEL_NAME"] == str(other)
    emptied = (await management.http.patch(url, json={"env": {}})).json()
    assert emptied["version"] == 3
    assert "MAX_MODEL_LEN" not in emptied["env"]
    again = (await management.http.patch(url, json={"model": str(other)})).json()
    assert again["version"] == 4, "its files may have changed"
    same = (await management.http.patch(url, json={"env": {}})).json()
    assert same["version"] == 4, "the same environment restarts nothing"
    revisions = await management.store.revisions(created["id"])
    assert [revision.version for revision in revisions] == [4, 3, 2, 1]


async def test_another_model_gets_defaults_of_its_own(management, make_model, tmp_path):
    created = await management.create()
    longer = make_model(tmp_path / "longer", max_position_embeddings=131_072)
    url = f"{URL}/{created['id']}"
    moved = (await management.http.patch(url, json={"model": str(longer)})).json()
    assert int(moved["env"]["KV_CACHE_MEMORY_BYTES"]) == 1025 * 128 * (4 * 2 * 2 * 64) * 2
    chosen = await management.create(env={"KV_CACHE_MEMORY_BYTES": "100M"})
    refused = await management.http.patch(f"{URL}/{chosen['id']}", json={"model": str(longer)})
    assert refused.status_code == 422
    assert "KV_CACHE_MEMORY_BYTES=100M" in refused.json()["detail"]


async def test_a_bad_revision_changes_nothing(management):
    created = await management.create()
    url = f"{URL}/{created['id']}"
    await management.create(name="taken")
    for body, status in (
        ({"min": 4}, 422),
        ({"scaler": "REQUEST_COUNT", "scaler_value": 0.5}, 422),
        ({"name": "taken"}, 409),
        ({"model": "/no/such/folder", "max": 8}, 422),
        ({"min": None}, 422),
        ({"engine_url": "http://127.0.0.1:9", "gpu_count": 2}, 422),
        ({"bogus": 1}, 422),
    ):
        answer = await management.http.patch(url, json=body)
        assert answer.status_code == status, answer.text
    assert (await management.http.get(url)).json() == created
    assert (await management.http.patch(f"{URL}/unknown", json={})).status_code == 404


async def test_secrets_are_masked_and_survive_a_round_trip(management):
    secret = "hf_" + "s" * 30
    created = await management.create(
        env={"HF_TOKEN": secret, "MY_API_KEY": secret, "DB_PASSWORD": secret, "TOKENIZER_MODE": "auto"}
    )
    shown = created["env"]
    assert shown["HF_TOKEN"] == shown["MY_API_KEY"] == shown["DB_PASSWORD"] == "********"
    assert shown["TOKENIZER_MODE"] == "auto"
    url = f"{URL}/{created['id']}"
    changed = await management.http.patch(url, json={"env": {**shown, "MAX_MODEL_LEN": "1024"}})
    assert changed.status_code == 200, changed.text
    stored = management.directory.endpoint(created["id"]).revision
    assert stored.version == 2
    assert stored.env["HF_TOKEN"] == secret
    for answer in (
        changed,
        await management.http.get(URL),
        await management.http.get("/v2/serverless"),
        await management.http.get(f"/v2/serverless/{created['id']}"),
    ):
        assert secret not in answer.text
    unknown = await management.http.patch(url, json={"env": {"OTHER_TOKEN": "********"}})
    assert unknown.status_code == 422
    new = await management.http.post(
        URL, json={"model": str(management.model), "env": {"HF_TOKEN": "********"}}
    )
    assert "holds the mask" in new.json()["detail"]


async def test_a_failing_endpoint_says_why(management):
    created = await management.create()
    failure = Failure(kind="out_of_memory", cause="std::bad_alloc", advice="use less")
    management.fleet.healths[created["id"]] = Health(
        failures=3, failure=failure, retry_ms=management.clock.ms + 30_000
    )
    shown = (await management.http.get(f"{URL}/{created['id']}")).json()
    assert shown["status"] == "unhealthy"
    assert shown["failure"] == {"kind": "out_of_memory", "cause": "std::bad_alloc", "advice": "use less"}
    assert shown["retry_at"] == "2026-05-28T20:27:10Z"


async def test_status_follows_the_workers(management):
    created = await management.create()
    url = f"{URL}/{created['id']}"
    management.fleet.add("w1", created["id"], WorkerState.STARTING)
    assert (await management.http.get(url)).json()["status"] == "starting"
    management.fleet.add("w2", created["id"], WorkerState.READY)
    shown = (await management.http.get(url)).json()
    assert (shown["status"], shown["workers"]) == ("ready", {"starting": 1, "ready": 1})
    paused = (await management.http.patch(url, json={"max": 0})).json()
    assert paused["status"] == "paused"


async def test_deleting_ends_what_the_endpoint_has(management):
    created = await management.create()
    url = f"/v2/serverless/{created['id']}"
    answer = await management.http.delete(url)
    assert (answer.status_code, answer.content) == (204, b"")
    assert management.deleted == [created["id"]]
    assert management.directory.endpoints() == []
    assert (await management.http.delete(url)).status_code == 404
    assert (await management.http.get(f"{URL}/{created['id']}")).status_code == 404
    again = await management.create()
    assert again["name"] == "tiny", "the name is free again"


@pytest.fixture
def engine_server():
    """An OpenAI-compatible server that lists one model."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"object": "list", "data": [{"id": "served/model"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_an_endpoint_of_a_fixed_engine_asks_it_for_its_model(management, engine_server):
    answer = await management.http.post(URL, json={"engine_url": engine_server + "/"})
    created = answer.json()
    assert answer.status_code == 201, created
    assert (created["kind"], created["status"]) == ("engine_url", "ready")
    assert created["engine_url"] == engine_server
    assert created["model"] == "served/model"
    assert created["name"] == "model"
    assert created["env"] == {"MODEL_NAME": "served/model"}
    v2 = (await management.http.get(f"/v2/serverless/{created['id']}")).json()
    assert v2["image"] == "pilotlight/engine-url"
    back = await management.http.patch(f"{URL}/{created['id']}", json={"engine_url": None})
    assert back.status_code == 422
    assert "model is needed" in back.json()["detail"]
    back = await management.http.patch(
        f"{URL}/{created['id']}", json={"engine_url": None, "model": str(management.model)}
    )
    assert (back.json()["kind"], back.json()["version"]) == ("vllm", 2)


async def test_a_fixed_engine_that_does_not_answer_needs_a_model(management, engine_server):
    nowhere = "http://127.0.0.1:9"
    answer = await management.http.post(URL, json={"engine_url": nowhere})
    assert answer.status_code == 503
    assert "send model too" in answer.json()["detail"]
    answer = await management.http.post(URL, json={"engine_url": nowhere, "model": "any/name"})
    assert answer.status_code == 201
