"""The environment of the worker program: worker-protocol.md §2.1, vllm-worker.md §4.4 and §4.9."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotlight.engines.flags import translate
from pilotlight.engines.flags.variables import VARIABLES, Legal
from pilotlight.engines.repositories import repositories_needed
from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.config import WorkerConfig, engine_environment
from pilotlight.worker.errors import ConfigError
from pilotlight.worker.input_settings import StreamFormat
from pilotlight.worker.main import main

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
        ("MAX_CONCURRENCY", "2.7"),
        ("PILOTLIGHT_WORKER_RUN_DIR", "/" + "x" * 150),
    ],
)
def test_bad_values_name_the_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config(**{name: value})


def test_a_take_url_that_is_none_is_not_shown() -> None:
    """It holds the worker's credential; what other variables hold is shown without secrets."""
    with pytest.raises(ConfigError, match="RUNPOD_WEBHOOK_GET_JOB") as caught:
        config(RUNPOD_WEBHOOK_GET_JOB="host/S3CRET/job-take/$ID?x")
    assert "S3CRET" not in str(caught.value)
    with pytest.raises(ConfigError, match="WORKER_MODE") as caught:
        config(WORKER_MODE="http://u:S3CRET@h")
    assert "S3CRET" not in str(caught.value).upper()


def test_the_prefix_form_is_taken_off_once() -> None:
    """§4.9, dead names: whoever reads the worker's environment sees the plain names of options and aliases."""
    given = config(
        VLLM_RUNPOD_LORA_MODULES="a=org/a", VLLM_RUNPOD_MODEL_REVISION="v1", VLLM_RUNPOD_SEED="1", SEED="2",
        VLLM_RUNPOD_MAX_CONCURRENCY="3", VLLM_RUNPOD_LD_PRELOAD="/x",
    )  # fmt: skip
    assert (given.environment["LORA_MODULES"], given.environment["MODEL_REVISION"]) == ("a=org/a", "v1")
    assert given.environment["SEED"] == "2"
    assert (given.max_concurrency, "LD_PRELOAD" in given.environment) == (30, False)
    found = {one.name: one.revision for one in repositories_needed(given.environment)}
    assert found == {"org/model": "v1", "org/a": None}
    notes = translate(given.environment, None).notes
    assert sum("VLLM_RUNPOD_SEED" in note for note in notes) == 1
    assert not any("LORA_MODULES" in note for note in notes)


UNSET = (
    "VLLM_USE_DEEP_GEMM", "VLLM_IMAGE_FETCH_TIMEOUT", "PYTORCH_ALLOC_CONF", "HF_TOKEN", "RAYON_NUM_THREADS",
    "VLLM_LOGGING_LEVEL", "HF_HOME", "BASE_PATH", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE",
)  # fmt: skip


@pytest.mark.parametrize("text", ["", " ", "None", "null", "~"])
def test_the_engine_does_not_see_what_is_not_set(text: str) -> None:
    """§4.2: vLLM reads some of these as numbers, and ends at `None`."""
    own = dict.fromkeys(UNSET, text) | {"STRANGER": text}
    child = engine_environment(own, worker_id="w", engine_key="k", offline=False, platform="cuda")
    assert child.keys().isdisjoint(UNSET)
    assert child["STRANGER"] == text
    unknown = engine_environment(own, worker_id="w", engine_key="k", offline=True, platform="")
    assert (unknown["VLLM_CPU_KVCACHE_SPACE"], unknown["HF_HUB_OFFLINE"]) == ("1", "1")


STRIPPED = (
    "VLLM_API_KEY", "VLLM_PORT", "VLLM_EXTRA_ARGS", "VLLM_CONFIG_FILE", "VLLM_STARTUP_TIMEOUT", "VLLM_BASE_URL",
    "VLLM_VERSION", "VLLM_NIGHTLY", "VLLM_INTERNAL_PORT", "VLLM_ATTENTION_BACKEND", "VLLM_RUNPOD_SEED",
    "RUNPOD_AI_API_KEY", "RUNPOD_POD_ID", "RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID",
    "PILOTLIGHT_WORKER_STATE_URL", "PILOTLIGHT_API_KEY", "BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID",
    "BUCKET_SECRET_ACCESS_KEY", "DOCKERHUB_TOKEN",
)  # fmt: skip


def test_the_engine_sees_no_secret_and_no_strange_vllm_name() -> None:
    """§4.4, §10 point 8; the one exception is the engine's own random key."""
    own = dict.fromkeys(STRIPPED, "S3CRET") | {
        "MODEL_NAME": "org/model", "HF_TOKEN": "hf", "PATH": "/bin", "VLLM_USE_DEEP_GEMM": "1",
        "VLLM_IMAGE_FETCH_TIMEOUT": "9",
    }  # fmt: skip
    child = engine_environment(own, worker_id="w1", engine_key="random", offline=True, platform="cpu")
    assert child == {
        "MODEL_NAME": "org/model", "PATH": "/bin", "HF_TOKEN": "hf", "VLLM_USE_DEEP_GEMM": "1",
        "VLLM_IMAGE_FETCH_TIMEOUT": "9",
        "VLLM_API_KEY": "random", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1", "SPT_NOENV": "1", "PILOTLIGHT_WORKER_ID": "w1",
    }  # fmt: skip
    for port in ("5000", "tcp://10.0.0.1:80"):
        child = engine_environment(
            {"VLLM_PORT": port}, worker_id="w", engine_key="k", offline=False, platform="cuda"
        )
        assert child.keys().isdisjoint({"VLLM_PORT", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"})


def test_the_engine_keeps_models_where_the_contract_says() -> None:
    """§4.9, storage; §5.2."""
    own = {
        "BASE_PATH": "/data",
        "HF_HUB_ENABLE_HF_TRANSFER": "1",
        "HUGGING_FACE_HUB_TOKEN": "old",
        "HF_TOKEN": "",
    }
    child = engine_environment(own, worker_id="w", engine_key="k", offline=False, platform="cuda")
    assert child["HF_HOME"] == child["HF_HUB_CACHE"] == "/data/huggingface-cache/hub"
    assert (child["HF_TOKEN"], child["HF_XET_HIGH_PERFORMANCE"]) == ("old", "1")
    assert "HF_HUB_ENABLE_HF_TRANSFER" not in child


def test_the_model_may_come_from_an_image_or_a_file() -> None:
    """§4.1 step 6."""
    env = {name: text for name, text in BASE.items() if name != "MODEL_NAME"}
    given = WorkerConfig.from_environment(env, python="/p", fallback_model="org/baked")
    assert given.model_name == given.environment["MODEL_NAME"] == "org/baked"
    assert (
        WorkerConfig.from_environment(BASE, python="/p", fallback_model="org/baked").model_name == "org/model"
    )


@pytest.mark.parametrize(
    "name", sorted(row.name for row in VARIABLES.values() if row.legal is not Legal.TEXT or row.choices)
)
def test_what_the_worker_refuses_is_refused_before_it_starts(name: str) -> None:
    """`deploy` checks by the table what the worker program checks when it reads: the same values, refused by both."""
    row, extra = VARIABLES[name], {"WORKER_MODE": "http"} if name.startswith("PORT") else {}
    bad = ["perhaps", *([f"{row.minimum - 1:g}"] if row.legal is Legal.NUMBER else [])]
    good = [row.default, *row.words, *row.choices, *(["true", "0"] if row.legal is Legal.BOOLEAN else [])]
    if row.legal is Legal.NUMBER:
        good += [f"{row.minimum:g}", str(row.maximum)]
        bad += [f"{row.maximum + 1:d}", *([f"{row.minimum + 0.5:g}"] if row.whole else [])]
    for text in bad:
        assert [error.variable for error in translate({**extra, name: text}, None).errors] == [name]
        with pytest.raises(ConfigError, match=name):
            config(**extra, **{name: text})
    for text in good:
        assert translate({**extra, name: text}, None).errors == ()
        config(**extra, **{name: text})


def test_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "MODEL_NAME" in capsys.readouterr().out
    assert main(["extra"]) == main(["--json"]) == 2
    monkeypatch.delenv("MODEL_NAME", raising=False)
    assert main([]) == 1
    assert "MODEL_NAME" in capsys.readouterr().err
    for name, value in BASE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PILOTLIGHT_WORKER_RUN_DIR", "/" + "x" * 120)
    assert main([]) == 1
    assert "PILOTLIGHT_WORKER_RUN_DIR" in capsys.readouterr().err
