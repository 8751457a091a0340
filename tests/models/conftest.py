"""Folders that pass for models."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotlight.testing.hub_server import HubServer

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def safetensors(size: int) -> bytes:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return dict(TINY)


@pytest.fixture
def safetensors_bytes() -> Callable[[int], bytes]:
    return safetensors


@pytest.fixture
def make_model() -> Callable[..., Path]:
    def make(folder: Path, *, weights: bool = True, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(TINY | changes))
        if weights:
            (folder / "model.safetensors").write_bytes(safetensors(2048))
        return folder

    return make


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub of this test's own; the client library of this process asks it and no other."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def model_files(tiny_config: dict[str, Any]) -> dict[str, bytes]:
    """A repository as they are: two weight formats, other people's formats, small files."""
    return {
        "config.json": json.dumps(tiny_config).encode(),
        "model.safetensors": safetensors(40_000),
        "tokenizer.json": b"{}",
        "pytorch_model.bin": bytes(50_000),
        "tiny.Q4.gguf": bytes(50_000),
        "README.md": b"hello",
    }
