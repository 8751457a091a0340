"""The environment of the worker program: worker-protocol.md §2.1, vllm-worker.md §4.4 and §4.9."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.config import WorkerConfig, engine_environment
from pilotlight.worker.errors import ConfigError
from pilotlight.worker.inputs import StreamFormat
from pilotlight.worker.main import main
from pilotlight.worker.model import ModelMissingError, resolve_model

BASE = {
    "MODEL_NAME": "org/model",
    "RUNPOD_WEBHOOK_GET_JOB": "http://h/v2/ep/job-take/$ID?gpu=x",
    "RUNPOD_WEBHOOK_POST_OUTPUT": "http://h/v2/ep/job-done/$RUNPOD_POD_ID/$ID?gpu=x",
    "RUNPOD_WEBHOOK_POST_STREAM": "http://h/v2/ep/job-stream/$RUNPOD_POD_ID/$ID?gpu=x",
    "RUNPOD_WEBHOOK_PING": "http://h/v2/ep/ping/$RUNPOD_POD_ID?gpu=x",
    "RUNPOD_AI_API_KEY": "secret",
    "RUNPOD_POD_ID": "w1",
}


def config(**changes: str) -> WorkerConfig:
    return WorkerConfig.from_environment(BASE | changes, python="/usr/bin/python3")


def test_urls_are_substituted_and_derived() -> None:
    urls = config().urls
    assert urls.take == "http://h/v2/ep/job-take/w1?gpu=x"
    assert urls.batch == "http://h/v2/ep/job-take-batch/w1?gpu=x"
    assert urls.stop == "http://h/v2/ep/job-stop/w1?gpu=x"
    assert urls.output == "http://h/v2/ep/job-done/w1/$ID?gpu=x"
    assert urls.stream == "http://h/v2/ep/job-stream/w1/$ID?gpu=x"
    assert urls.ping == "http://h/v2/ep/ping/w1?gpu=x"


def test_a_take_url_without_its_marker_has_no_stop_channel() -> None:
    assert config(RUNPOD_WEBHOOK_GET_JOB="http://h/x/$ID?g=1").urls.stop is None


def test_without_a_key_there_are_no_heartbeats() -> None:
    assert config(RUNPOD_AI_API_KEY="").urls.ping is None


def test_defaults() -> None:
    given = config()
    assert (given.max_concurrency, given.drain_seconds, given.startup_seconds) == (30, 30, 1200)
    assert (given.request_seconds, given.ping_seconds, given.platform_lost_seconds) == (3600, 2, 60)
    assert given.inputs.batch == BatchSizes(50, 1, 3)
    assert given.inputs.max_tokens == 16
    assert given.state_url is None
    assert given.engine_python == "/usr/bin/python3"
    assert "secret" not in repr(given)


def test_own_variables() -> None:
    given = config(
        MAX_CONCURRENCY="4", DEFAULT_BATCH_SIZE="10", MIN_BATCH_SIZE="2", DEFAULT_BATCH_SIZE_GROWTH_FACTOR="1.5",
        DEFAULT_MAX_TOKENS="auto", NATIVE_STREAM_FORMAT="SSE", PILOTLIGHT_ENGINE_HOME="/e", RUNPOD_PING_INTERVAL="500",
    )  # fmt: skip
    assert given.max_concurrency == 4
    assert given.inputs.batch == BatchSizes(10, 2, 1.5)
    assert given.inputs.max_tokens is None
    assert given.inputs.native_stream_format is StreamFormat.SSE
    assert (given.engine_python, given.engine_home) == ("/e/bin/python", Path("/e"))
    assert given.ping_seconds == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL_NAME", ""),
        ("MODEL_NAME", "None"),
        ("RUNPOD_WEBHOOK_GET_JOB", ""),
        ("RUNPOD_WEBHOOK_GET_JOB", "ftp://x"),
        ("MAX_CONCURRENCY", "0"),
        ("MAX_CONCURRENCY", "many"),
        ("DRAIN_TIMEOUT", "-1"),
        ("RUNPOD_PING_INTERVAL", "ten"),
        ("NATIVE_STREAM_FORMAT", "xml"),
        ("NATIVE_SAMPLING_DEFAULTS", "mine"),
        ("RAW_OPENAI_OUTPUT", "perhaps"),
        ("DEFAULT_MAX_TOKENS", "0"),
        ("PILOTLIGHT_ENGINE_COMMAND", "vllm serve"),
        ("PILOTLIGHT_ENGINE_COMMAND", "[]"),
    ],
)
def test_bad_values_name_the_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config(**{name: value})


def test_the_engine_sees_no_secret_and_no_strange_vllm_name() -> None:
    """§4.4, §10 item 8."""
    own = BASE | {
        "PILOTLIGHT_WORKER_STATE_URL": "x", "PILOTLIGHT_API_KEY": "x", "VLLM_API_KEY": "users", "VLLM_PORT": "tcp://1",
        "VLLM_EXTRA_ARGS": "x", "VLLM_CONFIG_FILE": "x", "VLLM_STARTUP_TIMEOUT": "5", "HF_TOKEN": "hf", "PATH": "/bin",
        "VLLM_USE_DEEP_GEMM": "1", "BUCKET_SECRET_ACCESS_KEY": "x",
    }  # fmt: skip
    child = engine_environment(own, worker_id="w1", engine_key="random", offline=True, platform="cpu")
    assert child == {
        "MODEL_NAME": "org/model", "PATH": "/bin", "HF_TOKEN": "hf", "VLLM_USE_DEEP_GEMM": "1",
        "VLLM_API_KEY": "random", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "SPT_NOENV": "1",
        "PILOTLIGHT_WORKER_ID": "w1",
    }  # fmt: skip
    child = engine_environment(
        {"VLLM_PORT": "5000"}, worker_id="w", engine_key="k", offline=False, platform="cuda"
    )
    assert child["VLLM_PORT"] == "5000"
    assert "VLLM_CPU_KVCACHE_SPACE" not in child
    assert "HF_HUB_OFFLINE" not in child


def test_models(tmp_path: Path) -> None:
    """vllm-worker.md §5.4: the repository id first, then other spellings, the path last."""
    hub = resolve_model("Org/Name")
    assert (hub.source, hub.names, hub.local) == ("Org/Name", ("Org/Name", "org/name"), False)
    folder = tmp_path / "models--Org--Name" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    with pytest.raises(ModelMissingError, match=r"no config\.json"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    local = resolve_model(str(folder))
    assert local.names == ("Org/Name", "org/name", str(folder))
    assert local.local
    with pytest.raises(ModelMissingError, match="does not exist"):
        resolve_model(str(tmp_path / "nothing"))


def test_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "MODEL_NAME" in capsys.readouterr().out
    assert main(["extra"]) == 2
    monkeypatch.delenv("MODEL_NAME", raising=False)
    assert main([]) == 2
    assert "MODEL_NAME" in capsys.readouterr().err
    for name, value in BASE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PILOTLIGHT_WORKER_RUN_DIR", "/" + "x" * 120)
    assert main([]) == 2
    assert "PILOTLIGHT_WORKER_RUN_DIR" in capsys.readouterr().err
