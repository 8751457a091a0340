"""What `translate` makes is accepted by the installed vLLM's own parser (vllm-worker.md §10 points 5 and 6)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pilotlight.engines.flags import translate
from pilotlight.engines.install import default_engine_home
from pilotlight.engines.manifest import load_manifest
from pilotlight.errors import EngineEnvironmentError

MENDED = {
    "outputs without requests": {"ENABLE_LOG_OUTPUTS": "true", "DISABLE_LOG_REQUESTS": "true"},
    "tool choice without parser": {"ENABLE_AUTO_TOOL_CHOICE": "true"},
    "names with blanks": {"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "My Model, other"},
    "one name with a dash elsewhere": {"SERVED_MODEL_NAME": "a-b"},
    "sizes": {"MAX_MODEL_LEN": "1.5k", "KV_CACHE_MEMORY_BYTES": "1G"},
    "sizes in JSON": {"STRUCTURED_OUTPUTS_CONFIG": "{}", "GUIDED_DECODING_BACKEND": "xgrammar"},
    "adapters": {"LORA_MODULES": '[{"name":"a","path":"/a","base_model_name":"m"},{"name":"b","path":"/b"}]'},
    "raw": {"VLLM_EXTRA_ARGS": "--compilation-config.mode 0 --gpu-mem 0.5 -tp 1 --seed -1"},
}
REFUSED = {
    "no value": ["--seed"],
    "a value for a switch": ["--enforce-eager=false"],
    "outputs": ["--enable-log-outputs", "--no-enable-log-requests"],
    "tool choice": ["--enable-auto-tool-choice"],
    "ambiguous": ["--max-num-s", "5"],
    "help": ["-h"],
}
"""What the parser refuses, and `translate` before it."""

SCRIPT = Path(__file__).with_name("parse_argv.py")


@pytest.mark.engine
@pytest.mark.timeout(180)
def test_the_real_parser_accepts_forms_and_every_variable(
    forms: Mapping[str, Mapping[str, str]], samples: Mapping[str, Mapping[str, str]], tmp_path: Path
) -> None:
    """Both forms with all their defaults, and each variable of §4.9 for itself.

    One process answers for all of them, and it does refuse what is wrong.
    """
    home = default_engine_home(Path(sys.prefix))
    try:
        manifest = load_manifest(home)
    except EngineEnvironmentError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    config = tmp_path / "vllm.yaml"
    config.write_text("max-num-seqs: 8\n")
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages }}")
    environments = {**{f"form {name}": form for name, form in forms.items()}, **samples}
    cases: dict[str, list[str]] = {}
    for name, raw in environments.items():
        env = {variable: text.replace("$CONFIG", str(config)) for variable, text in raw.items()}
        texts = {str(config): config.read_text()}
        plan = translate(env, manifest, run_folder=str(tmp_path), texts=texts, served_names=("org/m", "/m"))
        assert not plan.errors, (name, plan.errors)
        cases[name] = ["--model", "org/m", *plan.argv]
    for name, env in MENDED.items():
        plan = translate(env, manifest, run_folder=str(tmp_path), texts={}, served_names=("org/m",))
        assert not plan.errors, (name, plan.errors)
        cases[name] = ["--model", "org/m", *plan.argv]
    for name, argv in REFUSED.items():
        assert translate({"VLLM_EXTRA_ARGS": shlex.join(argv)}, manifest).errors, name
        cases[name] = ["--model", "org/m", *argv]
    cases["refused"] = ["--model", "org/m", "--max-num-seqs", "many"]
    answer = subprocess.run(
        [home / "bin" / "python", "-I", SCRIPT],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    refused = json.loads(answer.stdout)
    assert refused.pop("refused")
    assert refused.keys() == REFUSED.keys()
