"""`pilotlight worker --explain`, and what the worker sees around it (vllm-worker.md §4.1, §4.6)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pilotlight.engines.flags import Source
from pilotlight.engines.manifest import MANIFEST_NAME
from pilotlight.worker.command import attention_heads, fallback_model, plan_command, read_texts
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.explain import explain_environment, render_json, render_text
from pilotlight.worker.main import main

DATA = Path(__file__).parents[1] / "engines" / "data"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An engine's environment as far as it is looked at."""
    home = tmp_path / "engine"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").touch()
    (home / MANIFEST_NAME).write_bytes((DATA / "manifest-0.32.0.json").read_bytes())
    return home


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 12, "num_key_value_heads": 4}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def run(
    env: Mapping[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[int, str]:
    with monkeypatch.context() as patch:
        for name in list(os.environ):
            if name not in {"PATH", "HOME", "PYTHONPATH"}:
                patch.delenv(name)
        for name, text in env.items():
            patch.setenv(name, text)
        code = main(["--explain", *more])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("form", ["g1", "g2"])
def test_both_console_forms_have_no_unexplained_name(form: str, home: Path, capsys, monkeypatch) -> None:
    """Each of the 60 and 82 names stands in the table; what is empty as well."""
    env = json.loads((DATA / f"form-{form}.json").read_text())
    env |= {"MODEL_NAME": "pilotlight/ember", "PILOTLIGHT_ENGINE_HOME": str(home), "BASE_PATH": str(home)}
    code, text = run(env, capsys, monkeypatch, "--json")
    report = json.loads(text)
    assert (code, report["errors"]) == (0, [])
    lines = report["variables"]
    assert env.keys() <= {line["variable"] for line in lines}
    assert all(line["flag"] or line["note"] for line in lines)
    _, table = run(env, capsys, monkeypatch)
    assert all(f"\n{name} " in table for name in env)


def test_the_table_says_variable_flag_value_and_source(home: Path, model: Path, capsys, monkeypatch) -> None:
    config = home / "vllm.yaml"
    config.write_text("seed: 3\nmax-num-seqs: 9\n")
    env = {
        "MODEL_NAME": str(model), "PILOTLIGHT_ENGINE_HOME": str(home), "RUNPOD_AI_API_KEY": "S3CRET",
        "RUNPOD_WEBHOOK_GET_JOB": "http://h/S3CRET/job-take/$ID?x", "HF_TOKEN": "S3CRET", "MAX_NUM_SEQS": "4",
        "TOKENIZER_NAME": str(model), "VLLM_CONFIG_FILE": str(config), "VLLM_EXTRA_ARGS": "--api-server-count 1",
        "SWAP_SPACE": "4", "MAX_MODEL_LENGHT": "5", "BATCH_SIZE": "2", "DRAIN_TIMEOUT": "7", "UNRELATED": "x",
        "PILOTLIGHT_WORKER_RUN_DIR": "/run/w",
    }  # fmt: skip
    code, text = run(env, capsys, monkeypatch, "--json")
    assert code == 0
    report = json.loads(text)
    found = {
        (line["variable"], line["flag"]): (line["value"], line["source"]) for line in report["variables"]
    }
    assert found["MODEL_NAME", "--model"] == (str(model), "variable")
    assert found["MAX_NUM_SEQS", "--max-num-seqs"] == ("4", "variable")
    assert found["TOKENIZER_NAME", "--tokenizer"] == (str(model), "alias")
    assert found["VLLM_CONFIG_FILE", "--seed"] == ("3", "config file")
    assert found["VLLM_EXTRA_ARGS", "--api-server-count"] == ("1", "extra args")
    assert found["", "--served-model-name"] == (str(model), "worker-owned")
    assert found["", "--uds"] == ("/run/w/engine.sock", "worker-owned")
    assert found["", "--shutdown-timeout"] == ("7", "default")
    assert found["", "--disable-uvicorn-access-log"] == ("", "default")
    assert found["HF_TOKEN", ""] == ("***", "engine")
    assert found["SWAP_SPACE", ""] == ("4", "obsolete")
    assert found["BATCH_SIZE", ""] == ("2", "ignored")
    assert found["DRAIN_TIMEOUT", ""] == ("7", "worker")
    assert found["RUNPOD_AI_API_KEY", ""] == ("***", "platform")
    assert not any(variable in {"UNRELATED", "PATH", "HOME"} for variable, _ in found)
    assert report["argv"][:5] == [
        f"{home}/bin/python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
    ]
    assert report["argv"][-2:] == ["--uds", "/run/w/engine.sock"]
    assert any("did you mean MAX_MODEL_LEN?" in note for note in report["notes"])
    code, table = run(env, capsys, monkeypatch)
    assert "can start a worker" in table
    assert "S3CRET" not in text + table


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({}, "MODEL_NAME is not set"),
        ({"MODEL_NAME": "/nowhere"}, "/nowhere does not exist"),
        ({"MODEL_NAME": "pilotlight/ember", "DTYPE": "float7"}, "DTYPE='float7' must be one of"),
        (
            {"MODEL_NAME": "pilotlight/ember", "MAX_CONCURRENCY": "none at all"},
            "MAX_CONCURRENCY='none at all'",
        ),
        (
            {"MODEL_NAME": "pilotlight/ember", "HEALTH_CHECK_PATH": "ping", "WORKER_MODE": "http"},
            "HEALTH_CHECK_PATH",
        ),
        ({"MODEL_NAME": "pilotlight/ember", "ENGINE_VERSION": "9.9"}, "ENGINE_VERSION is 9.9, but"),
        (
            {"MODEL_NAME": "pilotlight/ember", "PILOTLIGHT_WORKER_RUN_DIR": "/" + "x" * 150},
            "PILOTLIGHT_WORKER_RUN_DIR is too long",
        ),
        ({"MODEL_NAME": "s3://b/k", "LOAD_FORMAT": "safetensors"}, "LOAD_FORMAT=safetensors cannot read"),
        ({"MODEL_NAME": "x" * 5000}, "MODEL_NAME: model 'xxx"),
        ({"MODEL_NAME": "org/a\nb"}, "MODEL_NAME: model 'org/a"),
        ({"MODEL_NAME": "pilotlight/ember", "LORA_MODULES": "a=" + "x" * 5000}, "LORA_MODULES: model 'xxx"),
        ({"MODEL_NAME": "pilotlight/ember", "MAX_LORA_RANK": "²"}, "MAX_LORA_RANK='²' must be one of"),
        ({"MODEL_NAME": "pilotlight/ember", "HF_OVERRIDES": "[" * 5000}, "HF_OVERRIDES='[["),
    ],
)
def test_what_would_be_refused_ends_with_1(
    env: dict[str, str], problem: str, home: Path, capsys, monkeypatch
) -> None:
    env |= {"PILOTLIGHT_ENGINE_HOME": str(home)}
    code, text = run(env, capsys, monkeypatch)
    assert code == 1
    assert problem in text
    assert "cannot start a worker" in text
    errors = text[text.index("errors:") :]
    assert problem in errors
    code, text = run(env, capsys, monkeypatch, "--json")
    assert (code, len(json.loads(text)["errors"])) == (1, 1)


def test_an_image_and_a_configuration_file_can_name_the_model(
    home: Path, model: Path, tmp_path: Path
) -> None:
    """§4.1, last paragraph, and step 6."""
    python = str(home / "bin" / "python")
    config = tmp_path / "vllm.yaml"
    config.write_text(f"model: {model}\n")
    report = explain_environment({"VLLM_CONFIG_FILE": str(config)}, python=python, root=tmp_path)
    assert (report.model, report.errors) == (str(model), ())
    assert any(line.flag == "--model" and line.source is Source.CONFIG_FILE for line in report.variables)
    assert fallback_model({"VLLM_CONFIG_FILE": str(config)}) == str(model)
    assert fallback_model({}) is None
    (tmp_path / "local_model_args.json").write_text(
        json.dumps({"MODEL_NAME": str(model), "MODEL_ID": "org/m", "QUANTIZATION": "gptq"})
    )
    asked = {"MODEL_NAME": "org/other", "QUANTIZATION": "awq", "MODEL_REVISION": "v1"}
    report = explain_environment(asked, python=python, root=tmp_path)
    assert (report.model, report.errors) == (str(model), ())
    sources = {line.variable: line.source for line in report.variables if line.flag}
    assert sources["MODEL_NAME"] is sources["QUANTIZATION"] is Source.BAKED
    assert any("QUANTIZATION=awq is ignored" in note for note in report.notes)
    assert "gptq" in report.argv
    assert "--revision" not in report.argv
    assert json.loads(render_json(report))["model"] == str(model)
    assert "baked" in render_text(report)


def test_what_is_not_here_is_not_fetched(home: Path, tmp_path: Path) -> None:
    env = {"MODEL_NAME": "org/far", "LORA_MODULES": "a=org/a", "HF_HUB_CACHE": str(tmp_path / "empty")}
    report = explain_environment(env, python=str(home / "bin" / "python"), root=tmp_path)
    assert report.errors == ()
    assert sum("would be downloaded first" in note for note in report.notes) == 2
    assert not (tmp_path / "empty").exists()


def test_it_works_without_an_engine(tmp_path: Path, model: Path) -> None:
    report = explain_environment(
        {"MODEL_NAME": str(model), "SEED": "1"}, python=str(tmp_path / "bin/python"), root=tmp_path
    )
    assert report.engine is None
    assert "unknown vLLM" in render_text(report)
    assert any("only aliases" in note for note in report.notes)


def test_the_command_line_starts_nothing(home: Path, model: Path) -> None:
    """The command itself; a missing --explain is wrong usage."""
    env = {"MODEL_NAME": str(model), "PILOTLIGHT_ENGINE_HOME": str(home), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "pilotlight", "worker"]
    shown = subprocess.run([*command, "--explain"], env=env, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--model" in shown.stdout
    assert subprocess.run([*command, "--json"], env=env, capture_output=True, check=False).returncode == 2


def test_nothing_that_is_shown_holds_a_secret(home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """§4.1 step 7: the table, the notes, the errors and the command line, also of the model itself."""
    config = tmp_path / "c.yaml"
    config.write_text("kv-transfer-config: {apiKey: S3CRET, nested: {token: [S3CRET]}}\nhf-token: S3CRET\n")
    for env in (
        {"MODEL_NAME": "s3://u:S3CRET@h/m"},
        {"MODEL_NAME": "s3://u:S3CRET@h/m", "LOAD_FORMAT": "pt"},
        {"MODEL_NAME": "https://u:S3CRET@h/m"},
        {"MODEL_NAME": "pilotlight/ember", "RUNPOD_WEBHOOK_GET_JOB": "host/S3CRET"},
        {"MODEL_NAME": "pilotlight/ember", "VLLM_CONFIG_FILE": str(config)},
        {"MODEL_NAME": "pilotlight/ember", "EXTRA_REPOS": "https://u:S3CRET@h/x"},
        {
            "MODEL_NAME": "pilotlight/ember",
            "VLLM_EXTRA_ARGS": "--hf-tok S3CRET --ec-transfer-config.token S3CRET",
        },
        {"MODEL_NAME": "pilotlight/ember", "HF_OVERRIDES": "{'token': 'S3CRET'}"},
    ):
        for more in ((), ("--json",)):
            _, text = run(env | {"PILOTLIGHT_ENGINE_HOME": str(home)}, capsys, monkeypatch, *more)
            assert "--served-model-name" in text or "cannot start" in text or '"errors": [' in text
            assert "S3CRET" not in text, env


def test_the_prefix_form_is_explained_by_its_own_name(home: Path, model: Path, tmp_path: Path) -> None:
    env = {"MODEL_NAME": str(model), "VLLM_RUNPOD_SEED": "1"}
    report = explain_environment(env, python=str(home / "bin" / "python"), root=tmp_path)
    (line,) = [line for line in report.variables if line.flag == "--seed"]
    assert (line.variable, line.source) == ("VLLM_RUNPOD_SEED", Source.ALIAS)
    assert not any("SEED" in note for note in report.notes)
    assert report.argv.count("--seed") == 1


@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_variables_with_any_bytes_are_shown(home: Path, model: Path, coding: str, more: list[str]) -> None:
    env = {
        b"MODEL_NAME": os.fsencode(model), b"PILOTLIGHT_ENGINE_HOME": os.fsencode(home), b"PYTHONUTF8": b"0",
        b"SERVED_MODEL_NAME": "日".encode() + b"\xff", b"PATH": os.fsencode(os.environ["PATH"]),
        b"PYTHONIOENCODING": f"{coding}:strict".encode(),
    }  # fmt: skip
    command = [sys.executable, "-m", "pilotlight.worker", "--explain", *more]
    shown = subprocess.run(command, env=env, capture_output=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"\\udcff" in shown.stdout


def test_the_version_asked_for_says_which_engine_is_explained(tmp_path: Path, model: Path) -> None:
    """The command as the installation has it; ENGINE_VERSION picks among `engine.homes`."""
    homes = {}
    for version in ("0.32.0", "0.31.0"):
        homes[version] = tmp_path / version
        (homes[version] / "bin").mkdir(parents=True)
        (homes[version] / "bin" / "python").touch()
        manifest = (
            (DATA / "manifest-0.32.0.json").read_text().replace('"vllm":"0.32.0"', f'"vllm":"{version}"')
        )
        (homes[version] / MANIFEST_NAME).write_text(manifest)
    settings = tmp_path / "pilotlight.toml"
    settings.write_text(
        f'[engine]\nhome = "{homes["0.32.0"]}"\nhomes = {{ "0.31.0" = "{homes["0.31.0"]}" }}\n'
    )
    env = {"MODEL_NAME": str(model), "PILOTLIGHT_CONFIG": str(settings), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "pilotlight", "worker", "--explain", "--json"]
    for wanted, found in ((None, "0.32.0"), ("None", "0.32.0"), ("0.31.0", "0.31.0")):
        asked = env if wanted is None else env | {"ENGINE_VERSION": wanted}
        shown = subprocess.run(command, env=asked, capture_output=True, text=True, check=False)
        assert json.loads(shown.stdout)["errors"] == []
        assert (shown.returncode, shown.stderr) == (0, "")
        assert json.loads(shown.stdout)["engine"]["vllm"] == found


# What the worker sees around it


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, (32, 8)),
        ({"num_attention_heads": 12}, (12, 12)),
        ({"n_head": 12}, (12, 12)),
        (
            {"text_config": {"num_attention_heads": 40, "num_key_value_heads": 8}, "num_attention_heads": 7},
            (40, 8),
        ),
        ({"text_config": {}, "num_attention_heads": 7}, (7, 7)),
        ({"num_attention_heads": [4, 8]}, (None, None)),
        ([], (None, None)),
        ({}, (None, None)),
    ],
)
def test_attention_heads(tmp_path: Path, config: object, heads: tuple[int | None, int | None]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert attention_heads(tmp_path) == heads
    assert attention_heads(tmp_path / "nothing") == (None, None)


def test_only_small_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    paths = [str(tmp_path / name) for name in ("a", "b", "c")] + [str(tmp_path), "\0"]
    assert read_texts(paths) == {str(tmp_path / "a"): "x"}


def test_gpus_are_counted_for_builds_that_use_them(home: Path, model: Path, tmp_path: Path) -> None:
    """§4.6 in one piece: two visible GPUs, 12 heads, the console's 1."""
    from dataclasses import replace

    from pilotlight.engines.manifest import load_manifest

    env = {"MODEL_NAME": str(model), "RUNPOD_WEBHOOK_GET_JOB": "http://h/job-take/$ID?x", "TENSOR_PARALLEL_SIZE": "1",
           "CUDA_VISIBLE_DEVICES": "0,1"}  # fmt: skip
    config = WorkerConfig.from_environment(env, python="/p")
    manifest = load_manifest(home)
    for platform, size in (("cuda", "2"), ("cpu", "1")):
        built = replace(manifest, platform=platform)
        argv = plan_command(config, env, built, source=str(model), folder=tmp_path).argv
        assert argv[argv.index("--tensor-parallel-size") + 1] == size
