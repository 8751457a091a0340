"""What a model's name means, and what is wrong with its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotlight.domain.repository import Repository
from pilotlight.errors import InvalidInputError
from pilotlight.models import catalog
from pilotlight.models.cache import hub_cache
from pilotlight.models.catalog import ModelFacts, facts_of, read_folder, resolve_model, weight_bytes


def facts(config):
    return facts_of(config, name="m", kind="folder", path=None, weight_bytes=0)


def test_a_folders_facts(make_model, tmp_path):
    folder = make_model(tmp_path / "tiny")
    assert resolve_model(Repository(name=str(folder)), cache=tmp_path) == ModelFacts(
        name=str(folder),
        kind="folder",
        path=folder,
        architectures=("LlamaForCausalLM",),
        model_type="llama",
        max_context=2048,
        num_attention_heads=4,
        num_kv_heads=2,
        hidden_size=256,
        layers=4,
        dtype="bfloat16",
        weight_bytes=(folder / "model.safetensors").stat().st_size,
        kv_values_per_token=4 * 2 * 2 * 64,
        full_attention=True,
    )


def test_a_relative_folder_gets_its_absolute_name(make_model, tmp_path, monkeypatch):
    make_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(Repository(name="./tiny"), cache=tmp_path).name == str(tmp_path / "tiny")


def test_the_builtin_model_lies_in_the_package(make_model, tmp_path, monkeypatch):
    assert catalog.builtin_folder().parent.name == "models"
    folder = make_model(tmp_path / "ember")
    monkeypatch.setattr(catalog, "builtin_folder", lambda: folder)
    found = resolve_model(Repository(name="pilotlight/ember"), cache=tmp_path)
    assert (found.name, found.kind, found.path) == ("pilotlight/ember", "builtin", folder)


@pytest.mark.parametrize(
    "name", ["", "a b", "a/b/c", "-a/b", "a/..", "a--b/c", "a/b.git", "ä/b", "x" * 97, "a/"]
)
def test_names_that_can_be_no_hub_model(name, tmp_path):
    with pytest.raises(InvalidInputError, match="neither pilotlight/ember"):
        resolve_model(Repository(name=name), cache=tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B_x"])
def test_names_that_could_be_hub_models(name):
    catalog.check_hub_name(name)


def test_each_missing_thing_is_named(make_model, tmp_path, safetensors_bytes):
    def message(folder):
        with pytest.raises(InvalidInputError) as caught:
            read_folder(folder, Repository(name="m"), kind="folder")
        assert caught.value.field == "model"
        return str(caught.value)

    missing = tmp_path / "missing"
    assert message(missing) == f"model folder {missing} does not exist"
    file = tmp_path / "file"
    file.write_text("")
    assert message(file) == f"model {file} is not a folder"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in message(empty)
    (empty / "config.json").write_text("{")
    assert f"{empty / 'config.json'} is not valid JSON" in message(empty)
    (empty / "config.json").write_text("[]")
    assert "holds a JSON list; expected an object" in message(empty)
    bare = make_model(tmp_path / "bare", weights=False)
    assert f"model folder {bare} holds no weights" in message(bare)
    (bare / "model.gguf").write_bytes(b"x")
    assert "holds no weights" in message(bare)
    (bare / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    (bare / "model-1.safetensors").write_bytes(safetensors_bytes(64))
    assert "1 of 2 weight files" in message(bare)
    assert "(model-2.safetensors)" in message(bare)
    (bare / "model-2.safetensors").write_bytes(safetensors_bytes(64)[:-1])
    assert "model-2.safetensors has" in message(bare)
    (bare / "model-2.safetensors").write_bytes(b"\xff" * 9)
    assert "is not a complete safetensors file" in message(bare)
    (bare / "model-2.safetensors").write_bytes(b"")
    assert "is not a complete safetensors file" in message(bare)
    (bare / "model-2.safetensors").write_bytes(safetensors_bytes(64))
    assert weight_bytes(bare) == 2 * len(safetensors_bytes(64))
    (bare / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}))
    assert "outside its folder" in message(bare)


def test_only_one_weight_format_is_counted(make_model, tmp_path):
    folder = make_model(tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(bytes(5000))
    assert weight_bytes(folder) == (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").unlink()
    assert weight_bytes(folder) == 5000


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 2048),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"seq_length": 512}, 512),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 4096),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": None}, 0),
    ],
)
def test_the_longest_context_is_vllms(tiny_config, changes, longest):
    assert facts(tiny_config | changes).max_context == longest


def test_nested_and_unusual_configurations(tiny_config):
    nested = facts({"architectures": ["X"], "model_type": "vlm", "text_config": tiny_config})
    assert (nested.architectures, nested.layers, nested.max_context) == (("X",), 4, 2048)
    gpt2 = facts({"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024})
    assert gpt2.kv_values_per_token == 12 * 2 * 12 * 64
    latent = facts(tiny_config | {"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert latent.kv_values_per_token == 4 * (512 + 64)
    quantized = facts(tiny_config | {"quantization_config": {"quant_method": "awq"}, "auto_map": {}})
    assert (quantized.quantization, quantized.custom_code) == ("awq", True)
    assert not facts(tiny_config | {"sliding_window": 128}).full_attention
    assert not facts(tiny_config | {"layer_types": ["full_attention", "linear_attention"]}).full_attention
    assert facts(tiny_config | {"sliding_window": 128, "use_sliding_window": False}).full_attention
    hostile = facts({"architectures": "x", "num_attention_heads": "4", "hidden_size": True, "head_dim": -1})
    assert (hostile.architectures, hostile.num_attention_heads, hostile.kv_values_per_token) == ((), 0, 0)


def test_the_hub_cache_is_the_client_librarys():
    assert hub_cache({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")
    assert hub_cache({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}) == Path("/h/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache({}) == Path.home() / ".cache/huggingface/hub"


def test_the_index_of_a_model_with_many_experts_is_read(make_model, safetensors_bytes, tmp_path):
    """A line per tensor: such indexes are larger than any configuration."""
    folder = make_model(tmp_path / "m", weights=False)
    shards = {f"{number:0200d}": "a.safetensors" for number in range(50_000)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (folder / "a.safetensors").write_bytes(safetensors_bytes(64))
    assert index.stat().st_size > catalog.CONFIG_BYTES_MAX
    assert weight_bytes(folder) == len(safetensors_bytes(64))


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "MistralForCausalLM"),
        ({"moe": {"num_experts": 8}}, "MixtralForCausalLM"),
        ({"moe": {"num_shared_experts": 1}}, "MistralLarge3ForCausalLM"),
        ({"vision_encoder": {"hidden_size": 64}}, "PixtralForConditionalGeneration"),
        ({"multimodal": {"vision_encoder_args": {"x": 1}}}, "PixtralForConditionalGeneration"),
        ({"multimodal": {"whisper_model_args": {"encoder_args": {}}}}, "VoxtralForConditionalGeneration"),
        (
            {"multimodal": {"whisper_model_args": {"encoder_args": {"causal": True}}}},
            "VoxtralRealtimeGeneration",
        ),
        ({"model_type": "mamba"}, "Mamba2ForCausalLM"),
    ],
)
def test_a_model_in_mistrals_own_format_has_facts_too(safetensors_bytes, tmp_path, changes, architecture):
    """§4.9 CONFIG_FORMAT: what vLLM makes of params.json."""
    params = {"dim": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32}
    (tmp_path / "params.json").write_text(json.dumps(params | changes))
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors_bytes(640))
    wanted = Repository(name=str(tmp_path), patterns=("consolidated*.safetensors",))
    facts = resolve_model(wanted, cache=tmp_path)
    assert facts.architectures == (architecture,)
    assert (facts.hidden_size, facts.layers, facts.max_context) == (256, 4, 128_000)
    assert (facts.num_attention_heads, facts.num_kv_heads) == (8, 2)
    assert facts.kv_values_per_token == 4 * 2 * 2 * 32
    assert facts.weight_bytes == len(safetensors_bytes(640))
