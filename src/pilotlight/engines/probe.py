"""Asks an installed vLLM what it understands, and prints the answer as JSON.

This is the one file of Pilotlight that imports vLLM, and it is never imported by the rest: the *engine's*
Python runs it as a script (`<engine>/bin/python -I probe.py [--output FILE]`), once, after an installation.
`manifest` reads the result. Nothing but the standard library and vLLM may be imported here.

Method and costs: vllm-worker.md §4.3 (10 s, 570 MB; which is why the answer is stored).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PARSER_FACTORIES = (
    "vllm.entrypoints.launchers.cli_args:make_arg_parser",  # 0.29 and later
    "vllm.entrypoints.openai.cli_args:make_arg_parser",  # 0.28 and earlier
)
PARSER_CLASSES = (
    "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "vllm.utils:FlexibleArgumentParser",
)
KINDS = {"BooleanOptionalAction": "pair", "_StoreTrueAction": "switch", "_AppendAction": "repeat"}


def load(*names: str) -> Any:
    """The first of the named attributes ("module:attribute") that this vLLM has."""
    for name in names:
        module, attribute = name.split(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    sys.exit("this vLLM has none of " + ", ".join(names) + "; pilotlight does not know this version")


def describe_flags(parser: argparse.ArgumentParser) -> dict[str, dict[str, object]]:
    """Every long option of the parser, by its upper-case name."""
    flags: dict[str, dict[str, object]] = {}
    for action in parser._actions:  # noqa: SLF001  argparse has no public way to list options
        for option in action.option_strings:
            if option.startswith("--") and not option.startswith("--no-"):
                flags[option[2:].replace("-", "_").upper()] = {
                    "flag": option,
                    "kind": KINDS.get(type(action).__name__, "value"),
                    "multi": action.nargs in {"+", "*"},
                    "choices": [str(choice) for choice in action.choices] if action.choices else None,
                }
    return flags


def probe() -> dict[str, object]:
    """What the vLLM of this Python is and accepts; takes about ten seconds, most of them its import."""
    vllm = importlib.import_module("vllm")
    torch = importlib.import_module("torch")
    parser = load(*PARSER_CLASSES)(prog="vllm serve", add_help=False)
    load(*PARSER_FACTORIES)(parser)
    registry = importlib.import_module("vllm.model_executor.models").ModelRegistry
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "platform": "cuda" if torch.version.cuda else "cpu",
        "flags": describe_flags(parser),
        "architectures": sorted(registry.get_supported_archs()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the manifest, or write it to `--output` in one step; vLLM's own messages go to stderr."""
    options = argparse.ArgumentParser(prog="probe.py", description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, help="file to replace with the manifest (default: print it)")
    output: Path | None = options.parse_args(arguments).output
    # Nothing is reported home or fetched, and the log stays empty unless something is wrong.
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        text = json.dumps(probe(), sort_keys=True, indent=1) + "\n"
    if output is None:
        sys.stdout.write(text)
        return 0
    descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
