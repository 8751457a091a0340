"""The manifest of an engine: what is read back, and what is said when it cannot be (vllm-worker.md §4.3)."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from pilotlight.engines.install import default_engine_home
from pilotlight.engines.manifest import MANIFEST_NAME, EngineFlag, installed_version, load_manifest
from pilotlight.errors import EngineEnvironmentError

CONTENT = {
    "format": 2,
    "vllm": "0.32.0",
    "torch": "2.13.0+cpu",
    "platform": "cpu",
    "flags": {
        "MAX_MODEL_LEN": {
            "flag": "--max-model-len", "kind": "value", "value": "size", "short": [], "multi": False, "choices": None,
        },
        "ENFORCE_EAGER": {
            "flag": "--enforce-eager", "kind": "pair", "value": "text", "short": [], "multi": False, "choices": None,
        },
        "DTYPE": {
            "flag": "--dtype", "kind": "value", "value": "text", "short": [], "multi": False,
            "choices": ["auto", "bfloat16"],
        },
    },
    "architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"],
    "registered": {"QUANTIZATION": ["awq", "gptq"]},
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An engine environment with a manifest, a Python and vLLM's version file."""
    package = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm"
    package.mkdir(parents=True)
    (package / "_version.py").write_text("version: str\n__version__ = version = '0.32.0'\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(CONTENT))
    return tmp_path


def test_everything_is_read_back(home):
    manifest = load_manifest(home)
    assert (manifest.version, manifest.torch_version, manifest.platform) == ("0.32.0", "2.13.0+cpu", "cpu")
    assert manifest.flags["DTYPE"] == EngineFlag(
        "--dtype", "value", multi=False, choices=("auto", "bfloat16")
    )
    assert manifest.supports("LlamaForCausalLM")
    assert not manifest.supports("llamaforcausallm")


def test_forms_of_weights_are_read_back_and_may_be_missing(home):
    assert load_manifest(home).quantizations == {}
    found = {"gptq 4-bit": "", "gptq 8-bit": "no kernel"}
    (home / MANIFEST_NAME).write_text(json.dumps(CONTENT | {"quantizations": found}))
    assert load_manifest(home).quantizations == found


def test_a_manifest_cannot_be_changed(home):
    manifest = load_manifest(home)
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.version = "0.33.0"
    with pytest.raises(TypeError):
        manifest.flags["X"] = manifest.flags["DTYPE"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("MAX_MODEL_LENGHT", "MAX_MODEL_LEN"),
        ("--enforce-eagre", "--enforce-eager"),
        ("LlamaForCasualLM", "LlamaForCausalLM"),
        ("COMPLETELY_DIFFERENT", None),
    ],
)
def test_the_suggestion_has_the_form_of_the_question(home, name, answer):
    assert load_manifest(home).suggest(name) == answer


def test_no_engine_names_the_place_and_the_command(tmp_path):
    with pytest.raises(
        EngineEnvironmentError, match=r"no engine at .*nowhere.*pilotlight\.engines\.install --into"
    ):
        load_manifest(tmp_path / "nowhere")


def test_no_manifest_names_the_file_and_the_command(home):
    (home / MANIFEST_NAME).unlink()
    with pytest.raises(EngineEnvironmentError, match=rf"{MANIFEST_NAME} does not exist.*probe\.py --output"):
        load_manifest(home)


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**CONTENT, "platform": "tpu"}),
        json.dumps({**CONTENT, "flags": {"X": 1}}),
        json.dumps({**CONTENT, "flags": []}),
        json.dumps({**CONTENT, "architectures": None}),
    ],
)
def test_a_damaged_manifest_names_the_file_and_the_command(home, damage):
    (home / MANIFEST_NAME).write_text(damage)
    with pytest.raises(EngineEnvironmentError, match=rf"{MANIFEST_NAME} is damaged.*probe\.py --output"):
        load_manifest(home)


def test_another_vllm_than_the_described_one_is_noticed(home):
    """Somebody upgrades vLLM in the environment; the old list of options must not be trusted any more."""
    version = home / "lib" / "python3.11" / "site-packages" / "vllm" / "_version.py"
    version.write_text("__version__ = version = '0.33.1'\n")
    assert installed_version(home) == "0.33.1"
    with pytest.raises(EngineEnvironmentError, match=r"describes vLLM 0\.32\.0, but 0\.33\.1 is installed"):
        load_manifest(home)


@pytest.mark.engine
def test_the_real_engine_is_described():
    home = default_engine_home(Path(sys.prefix))
    try:
        manifest = load_manifest(home)
    except EngineEnvironmentError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert len(manifest.flags) >= 300
    assert manifest.flags["ENFORCE_EAGER"].kind == "pair"
    assert manifest.flags["SERVED_MODEL_NAME"].multi
    assert "bfloat16" in manifest.flags["DTYPE"].choices
    assert manifest.supports("LlamaForCausalLM")
    assert manifest.quantizations["gptq 4-bit"] == ""
    assert installed_version(home) == manifest.version
