"""The bake step of an image (`vllm-worker.md` §5.3), and what a worker makes of its record."""

from __future__ import annotations

import json
import os
import socket
import threading

import pytest

from pilotlight.errors import PilotlightError
from pilotlight.testing.hub_server import HubServer
from pilotlight.worker.bake import bake
from pilotlight.worker.healthcheck import problem_of
from pilotlight.worker.model import look_for_model

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()
WEIGHTS = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"


def environment(tmp_path, **more):
    return {"HF_HUB_CACHE": str(tmp_path / "models"), "VLLM_VERSION": "v0.32.0", **more}


@pytest.fixture
def hub(monkeypatch):
    """A hub of this test's own; the client library of this process asks it and no other."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_nothing_to_bake(tmp_path):
    """Empty MODEL_NAME: the image has no weights and no record."""
    assert bake(environment(tmp_path, MODEL_NAME=""), root=tmp_path) is None
    assert not (tmp_path / "local_model_args.json").exists()


def test_the_built_in_model_is_there_already(tmp_path):
    record = bake(environment(tmp_path, MODEL_NAME="pilotlight/ember", QUANTIZATION="fp8"), root=tmp_path)
    assert (record["MODEL_ID"], record["QUANTIZATION"], record["VLLM_VERSION"]) == (
        "pilotlight/ember",
        "fp8",
        "v0.32.0",
    )
    assert json.loads((tmp_path / "local_model_args.json").read_text()) == record
    assert record["TOKENIZER_NAME"] == record["MODEL_NAME"]


def test_below_a_volume_weights_would_be_hidden(tmp_path):
    """§5.1: BASE_PATH is another one when baking; the program's own model lies elsewhere anyway."""
    env = {"MODEL_NAME": "org/model", "HF_HUB_CACHE": "/runpod-volume/huggingface-cache/hub"}
    with pytest.raises(PilotlightError, match="BASE_PATH=/models"):
        bake(env, root=tmp_path)
    assert bake(env | {"MODEL_NAME": "pilotlight/ember"}, root=tmp_path)["MODEL_ID"] == "pilotlight/ember"


def test_a_folder_that_the_image_has_not(tmp_path):
    with pytest.raises(PilotlightError, match="is no folder of the image"):
        bake(environment(tmp_path, MODEL_NAME="/no/such/folder"), root=tmp_path)


def test_a_tokenizer_and_extra_repositories_come_along(tmp_path, hub):
    hub.add("org/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"})
    hub.add("org/tokenizer", {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"})
    hub.add("org/extra", {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS})
    env = environment(
        tmp_path, MODEL_NAME="org/model", TOKENIZER_NAME="org/tokenizer", EXTRA_REPOS="org/extra"
    )
    record = bake(env, root=tmp_path)
    assert "models--org--model/snapshots/" in record["MODEL_NAME"]
    assert "models--org--tokenizer/snapshots/" in record["TOKENIZER_NAME"]
    assert (tmp_path / "models" / "models--org--extra").is_dir()
    # What the worker finds at its start needs nothing more (§5.2 step 1).
    model, missing = look_for_model(environment(tmp_path, MODEL_NAME="org/model"), root=tmp_path)
    assert missing == ()
    assert model.source == record["MODEL_NAME"]
    assert model.names == ("org/model", record["MODEL_NAME"])
    assert model.environment["TOKENIZER_NAME"] == record["TOKENIZER_NAME"]


class TestHealthcheck:
    @pytest.mark.parametrize(
        ("status", "problem"),
        [(b"200 OK", None), (b"503 No", "the engine answered 503"), (b"", "answered nothing")],
    )
    def test_the_engine_is_asked_at_its_socket(self, tmp_path, status, problem):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "engine.sock"))
            server.listen()

            def answer():
                connection, _ = server.accept()
                with connection:
                    assert connection.recv(1000).startswith(b"GET /health ")
                    connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n" if status else b"")

            thread = threading.Thread(target=answer)
            thread.start()
            found = problem_of(tmp_path)
            thread.join()
        assert found is None if problem is None else problem in found

    def test_no_engine(self, tmp_path):
        assert "does not answer" in problem_of(tmp_path)
