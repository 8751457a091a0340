"""What the installed vLLM understands, as recorded from 0.32.0, and the console forms of older templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pilotlight.engines.manifest import MANIFEST_NAME, EngineManifest, load_manifest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> EngineManifest:
    """All 317 options of vLLM 0.32.0, CPU build; read the way the worker program reads it."""
    home = tmp_path_factory.mktemp("engine")
    (home / "bin").mkdir()
    (home / "bin" / "python").touch()
    (home / MANIFEST_NAME).write_bytes((DATA / "manifest-0.32.0.json").read_bytes())
    return load_manifest(home)


@pytest.fixture(scope="session")
def cuda(manifest: EngineManifest) -> EngineManifest:
    """The same, built for GPUs."""
    return replace(manifest, platform="cuda", torch_version="2.13.0+cu130")


@pytest.fixture(scope="session")
def forms() -> Mapping[str, Mapping[str, str]]:
    """Both historic console forms with all their defaults: G2 (60 variables) and G1 of v1.9 (82)."""
    return {name: json.loads((DATA / f"form-{name}.json").read_text()) for name in ("g1", "g2")}


@pytest.fixture(scope="session")
def samples() -> Mapping[str, Mapping[str, str]]:
    """For each variable of vllm-worker.md §4.9 an environment that sets it to something sensible."""
    return json.loads((DATA / "samples.json").read_text())
