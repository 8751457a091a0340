"""Several engines side by side: an endpoint's `ENGINE_VERSION` chooses the environment and the flag list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE
from pilotlight.engines.manifest import EngineManifest, installed_version, load_manifest
from pilotlight.errors import EngineEnvironmentError, InvalidInputError


def load_version(home: Path, homes: Mapping[str, Path], version: str | None) -> EngineManifest:
    """What the engine of this version understands.

    Args:
        home: The environment of the engine that is used where no version is asked for.
        homes: Environments of further ones, by version.
        version: As an endpoint asks for it; None takes the usual one.

    Raises:
        InvalidInputError: No such version is installed; names those that are.
        EngineEnvironmentError: It is broken, or another version than its name says.
    """
    if version is None:
        return load_manifest(home)
    if version in homes:
        manifest = load_manifest(homes[version])
        if manifest.version != version:
            msg = f"engine.homes names {homes[version]} for {version}, but vLLM {manifest.version} is in it"
            raise EngineEnvironmentError(msg)
        return manifest
    usual = installed_version(home)
    if version == usual:
        return load_manifest(home)
    known = ", ".join(dict.fromkeys([*([usual] if usual else []), *homes])) or "none"
    msg = (
        f"{ENGINE_VERSION_VARIABLE} is {version!r}, but installed are {known}; "
        "the setting engine.homes names further environments by version"
    )
    raise InvalidInputError(msg, field=f"env.{ENGINE_VERSION_VARIABLE}")
