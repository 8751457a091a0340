"""Several engines side by side, chosen by version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pilotlight.engines.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from pilotlight.engines.versions import load_version
from pilotlight.errors import EngineEnvironmentError, InvalidInputError


@pytest.fixture
def install(tmp_path: Path) -> Callable[[str], Path]:
    """An engine environment that has no more than its version and its manifest."""

    def make(version: str) -> Path:
        home = tmp_path / f"vllm-{version}"
        package = home / "lib" / "python3.11" / "site-packages" / "vllm"
        package.mkdir(parents=True)
        (package / "_version.py").write_text(f"__version__ = version = '{version}'\n")
        (home / "bin").mkdir()
        (home / "bin" / "python").touch()
        manifest = {"format": MANIFEST_FORMAT, "vllm": version, "torch": "2.13.0", "platform": "cpu"}
        empty = {"flags": {}, "registered": {}, "architectures": []}
        (home / MANIFEST_NAME).write_text(json.dumps(manifest | empty))
        return home

    return make


def test_each_version_has_its_own_environment_and_flags(install):
    usual, older = install("0.32.0"), install("0.31.0")
    homes = {"0.31.0": older}
    for version, expected in ((None, "0.32.0"), ("0.32.0", "0.32.0"), ("0.31.0", "0.31.0")):
        assert load_version(usual, homes, version).version == expected


def test_a_version_that_is_not_installed_names_those_that_are(install, tmp_path):
    homes = {"0.31.0": install("0.31.0")}
    with pytest.raises(
        InvalidInputError, match=r"'0\.30\.0', but installed are 0\.32\.0, 0\.31\.0;"
    ) as caught:
        load_version(install("0.32.0"), homes, "0.30.0")
    assert caught.value.field == "env.ENGINE_VERSION"
    with pytest.raises(InvalidInputError, match="installed are none"):
        load_version(tmp_path / "nothing", {}, "0.30.0")


def test_an_environment_that_is_not_what_its_name_says(install):
    home = install("0.32.0")
    with pytest.raises(EngineEnvironmentError, match=r"for 0\.31\.0, but vLLM 0\.32\.0 is in it"):
        load_version(home, {"0.31.0": home}, "0.31.0")
