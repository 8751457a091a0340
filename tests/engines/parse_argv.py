"""Asks vLLM's own parser about command lines; run by the engine's Python, which has nothing of ours.

Reads a JSON object of argument lists on stdin, writes what was refused, by name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys


def load(*names: str):
    for name in names:
        module, attribute = name.split(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    sys.exit("no parser found")


def main() -> None:
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
    cases = json.load(sys.stdin)
    refused = {}
    with contextlib.redirect_stdout(sys.stderr):
        parser = load(
            "vllm.utils.argparse_utils:FlexibleArgumentParser", "vllm.utils:FlexibleArgumentParser"
        )(prog="vllm")
        load(
            "vllm.entrypoints.launchers.cli_args:make_arg_parser",
            "vllm.entrypoints.openai.cli_args:make_arg_parser",
        )(parser)
        validate = load(
            "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args",
            "vllm.entrypoints.openai.cli_args:validate_parsed_serve_args",
        )
        for name, argv in cases.items():
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    validate(parser.parse_args(argv))
            except SystemExit:
                refused[name] = (said.getvalue().strip().splitlines() or ["it ended without a word"])[-1]
            except (ValueError, TypeError, OSError, KeyError) as error:
                refused[name] = repr(error)
    json.dump(refused, sys.stdout)


if __name__ == "__main__":
    main()
