"""The images of `containers/`, built by Buildah on a local base, and run by real Podman.

The base has this machine's Python and a stand-in for vLLM, whose server is the project's fake engine: a real
engine's image is larger than everything else here together. Everything from our own Containerfiles is real.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tarfile

import httpx
import pytest

from pilotlight.testing.hub_server import HubServer

pytestmark = pytest.mark.timeout(600)
"""Images are made by whoever comes first."""

MODEL = "Org/Tiny"
TOKEN = "hf_" + "secretword" * 3
USER = "1000:1000"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 128, "vocab_size": 16,
}  # fmt: skip


def safetensors(size):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": safetensors(8192),
    "pytorch_model.bin": b"b" * 8192,
    "original/consolidated.00.pth": b"o" * 8192,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
}


def inspected(podman, image):
    return json.loads(podman.run("image", "inspect", image))[0]


def inside(podman, image, script):
    """What a shell of the image prints."""
    return podman.run("run", "--rm", "--entrypoint", "sh", image, "-c", script)


@pytest.fixture(scope="module")
def baked(podman):
    """A worker's image with a gated model inside; it is fetched once, with a token that a secret brings."""
    with HubServer() as hub:
        repository = hub.add(MODEL, FILES)
        repository.gated, repository.granted = True, {TOKEN}
        return podman.project_image(
            "worker", called="worker-baked", MODEL_NAME=MODEL, BASE_PATH="/models", RUN_AS=USER,
            HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
        )  # fmt: skip


@pytest.fixture
def contained(make_installation, podman, tmp_path):
    roots = json.dumps([str(tmp_path)])
    return make_installation(
        PILOTLIGHT_CONTAINERS__URL=podman.url, PILOTLIGHT_CONTAINERS__VOLUME_ROOTS=roots
    ).start()


def test_what_is_baked(podman, baked):
    """vllm-worker.md §5.3: one weight format and all that is no weight, and the record of it."""
    record = json.loads(inside(podman, baked, "cat /local_model_args.json"))
    folder = record["MODEL_NAME"]
    assert re.fullmatch(r"/models/huggingface-cache/hub/models--Org--Tiny/snapshots/[0-9a-f]{40}", folder)
    assert record == {
        "MODEL_NAME": folder, "TOKENIZER_NAME": folder, "QUANTIZATION": "", "MODEL_REVISION": "",
        "TOKENIZER_REVISION": "", "MODEL_ID": MODEL, "COMMIT": folder.rpartition("/")[2],
        "BYTES": record["BYTES"], "VLLM_VERSION": "0.32.0",
    }  # fmt: skip
    kept = set(FILES) - {"pytorch_model.bin", "original/consolidated.00.pth"}
    found = inside(podman, baked, f"cd {folder} && find . -type l -o -type f").split()
    assert {path.removeprefix("./") for path in found} == kept
    assert record["BYTES"] == sum(len(FILES[name]) for name in kept)


def test_the_token_is_nowhere_in_the_image(podman, baked, tmp_path):
    """vllm-worker.md §5.1: it never reaches a layer, ENV, the history or the record."""
    assert TOKEN not in podman.run("image", "inspect", baked)
    assert TOKEN not in podman.run("history", "--no-trunc", baked)
    podman.run("save", "--output", str(tmp_path / "image.tar"), baked)
    with tarfile.open(tmp_path / "image.tar") as archive:
        for entry in archive:
            if entry.name.endswith(".tar") and entry.isfile() and entry.size < 20 << 20:
                assert TOKEN.encode() not in archive.extractfile(entry).read(), entry.name


def test_what_the_image_says_of_itself(podman, baked):
    """vllm-worker.md §5.1, §5.2: arguments are ENV, the entry point is ours, health is asked, nobody is root."""
    found = inspected(podman, baked)
    config = found["Config"]
    env = dict(item.split("=", 1) for item in config["Env"])
    assert (env["MODEL_NAME"], env["BASE_PATH"], env["QUANTIZATION"], env["MODEL_REVISION"]) == (
        MODEL,
        "/models",
        "",
        "",
    )
    cache = "/models/huggingface-cache/hub"
    assert {env[name] for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")} == {cache}
    assert config["Entrypoint"][1:] == ["-m", "pilotlight.worker"]
    assert not config.get("Cmd")
    assert config["User"] == USER
    assert found["Labels"]["io.pilotlight.model"] == MODEL
    assert "pilotlight.worker.healthcheck" in found["Healthcheck"]["Test"]
    manifest = json.loads(inside(podman, baked, "cat $PILOTLIGHT_ENGINE_HOME/pilotlight-engine.json"))
    assert manifest["vllm"] == "0.32.0"
    assert "MAX_MODEL_LEN" in manifest["flags"]


def test_a_baked_model_answers_to_all_its_names(podman, baked, contained, tools, tmp_path):
    """vllm-worker.md §10 point 12: repository id, override and path; a mounted volume does not hide the model."""
    volume = tmp_path / "volume"
    volume.mkdir(mode=0o777)
    body = {
        "image": baked, "name": "baked", "idle_timeout_s": 600, "memory_bytes": 512 << 20,
        "volumes": [{"source": str(volume), "target": "/runpod-volume"}],
        "env": {"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "house-name", "HF_HUB_OFFLINE": "1"},
    }  # fmt: skip
    # The image's own list of flags is asked before anything is stored.
    wrong = body["env"] | {"MAX_MODEL_LEN": "many"}
    refused = contained.api.post("/pilotlight/v1/endpoints", json=body | {"env": wrong})
    assert (refused.status_code, "MAX_MODEL_LEN" in refused.text) == (422, True), refused.text
    made = contained.api.post("/pilotlight/v1/endpoints", json=body)
    assert made.status_code == 201, made.text
    endpoint = made.json()
    # Nobody named the model: the image does.
    assert (endpoint["model"], endpoint["served_names"]) == (MODEL, ["house-name", MODEL])
    path = json.loads(inside(podman, baked, "cat /local_model_args.json"))["MODEL_NAME"]
    for name in ("house-name", MODEL, MODEL.lower(), path):
        chat = {"model": name, "messages": [{"role": "user", "content": "hello there"}]}
        answer = contained.api.post(f"/v2/{endpoint['id']}/openai/v1/chat/completions", json=chat)
        assert answer.status_code == 200, (name, answer.text, contained.log.read_text()[-3000:])
        assert answer.json()["choices"][0]["message"]["content"] == "hello there"
    unknown = {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}
    answer = contained.api.post(f"/v2/{endpoint['id']}/openai/v1/chat/completions", json=unknown)
    assert answer.status_code == 404
    job = contained.api.post(f"/v2/{endpoint['id']}/runsync", json={"input": {"prompt": "count to 3"}}).json()
    assert job["status"] == "COMPLETED", job
    [container] = podman.containers(f"io.pilotlight.endpoint={endpoint['id']}")
    health = ("exec", container, "/opt/pilotlight/venv/bin/python", "-m", "pilotlight.worker.healthcheck")
    assert podman.run("exec", container, "id", "-u").strip() == USER.split(":", maxsplit=1)[0]
    run_folder = podman.run("exec", container, "sh", "-c", "echo $PILOTLIGHT_WORKER_RUN_DIR").strip()
    assert run_folder.startswith(str(contained.sockets))
    assert podman.run(*health) == ""
    assert contained.api.delete(f"/v2/serverless/{endpoint['id']}").status_code < 300
    tools.until(lambda: not podman.containers(f"io.pilotlight.endpoint={endpoint['id']}"), "it is gone")
    assert list(volume.iterdir()) == []


def test_an_image_without_a_model_needs_one_to_be_named(podman, contained):
    """vllm-worker.md §5.1: empty MODEL_NAME bakes nothing; BASE_PATH is where a volume is mounted."""
    image = podman.project_image("worker")
    assert (
        inside(podman, image, "ls /local_model_args.json 2>&1 || true")
        .strip()
        .endswith("No such file or directory")
    )
    answer = contained.api.post("/pilotlight/v1/endpoints", json={"image": image})
    assert answer.status_code == 422
    assert "model is needed" in answer.text
    made = contained.api.post("/pilotlight/v1/endpoints", json={"image": image, "model": "pilotlight/ember"})
    assert made.status_code == 201, made.text
    chat = {"model": "pilotlight/ember", "messages": [{"role": "user", "content": "hello"}]}
    answer = contained.api.post(f"/v2/{made.json()['id']}/openai/v1/chat/completions", json=chat)
    assert answer.status_code == 200, (answer.text, contained.log.read_text()[-3000:])


def test_a_model_that_cannot_be_had_fails_the_build(podman):
    """No image without weights is made by accident."""
    with HubServer() as hub, pytest.raises(AssertionError, match="no model was baked"):
        podman.project_image(
            "worker",
            called="worker-missing",
            MODEL_NAME="Org/Missing",
            BASE_PATH="/models",
            HF_ENDPOINT=hub.url,
        )


def test_the_gateway(podman, tools):
    """It serves as a user without rights, tells its health, and ends in time."""
    image = podman.project_image("gateway")
    found = inspected(podman, image)
    assert found["Config"]["User"] == "10001:10001"
    container = podman.run(
        "run",
        "--detach",
        "--env",
        "PILOTLIGHT_WORKERS__MEMORY_RESERVE_BYTES=0",
        image,
        "up",
        "--json",
        "--port",
        "0",
    ).strip()
    try:
        line = tools.until(lambda: podman.run("logs", container), "it is up").splitlines()[0]
        facts = json.loads(line)
        assert httpx.get(f"{facts['url']}/health", trust_env=False).status_code == 200
        check = found["Healthcheck"]["Test"]
        assert podman.run("exec", container, *check[1:]) == ""
        podman.run("stop", "--time", "10", container)
        assert podman.run("inspect", "--format", "{{.State.ExitCode}}", container).strip() == "0"
    finally:
        subprocess.run(
            ["podman", *podman.options, "rm", "--force", "--volumes", container],
            env=podman.environment,
            check=True,
        )
