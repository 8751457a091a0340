"""Every variable of vllm-worker.md §4.9, and both historic console forms (§5.5), with all options of vLLM 0.32.0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from pilotlight.engines.flags import FlagPlan, Source, clean_value, mask_secrets, translate
from pilotlight.engines.flags.variables import VARIABLES, Kind, describe
from pilotlight.engines.manifest import EngineManifest

CONTRACT = Path(__file__).parents[2] / "docs" / "contract" / "vllm-worker.md"
CONFIG = "/etc/vllm.yaml"


def contract_names() -> set[str]:
    """The names in the tables of §4.9, and in its paragraphs."""
    text = CONTRACT.read_text(encoding="utf-8")
    section = text[text.index("### 4.9") : text.index("### 4.10")]
    names: set[str] = set()
    for line in section.splitlines():
        where = line.split("|")[1] if line.startswith("|") else line
        names.update(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", where))
    return names


def plan(env: Mapping[str, str], manifest: EngineManifest) -> FlagPlan:
    env = {name: text.replace("$CONFIG", CONFIG) for name, text in env.items()}
    return translate(env, manifest, run_folder="/run/w", texts={CONFIG: "max-num-seqs: 8\n"})


def test_each_variable_of_the_contract_has_a_sample(samples: Mapping[str, Mapping[str, str]]) -> None:
    assert len(contract_names()) > 200
    assert contract_names() <= samples.keys()


def test_each_variable_works_or_is_named_once_as_obsolete(
    samples: Mapping[str, Mapping[str, str]], manifest: EngineManifest
) -> None:
    """§10 point 5: mapped, read by somebody, or exactly one sentence that names it and what to do instead."""
    for name, env in samples.items():
        result = plan(env, manifest)
        assert not result.errors, (name, result.errors)
        lines = [line for line in result.explanations if line.variable == name]
        assert lines, f"{name} is not explained"
        row = describe(name)
        if row is not None and row.kind in {Kind.OBSOLETE, Kind.IGNORED}:
            (note,) = result.notes
            assert re.match(rf"{name} (has no effect|is ignored): .{{8,}}", note), note
            assert [line.flag for line in lines] == [""]
            continue
        assert not any(f"{name} has no effect" in note for note in result.notes)
        mapped = any(line.flag for line in lines)
        read = all(
            line.source in {Source.WORKER, Source.ENGINE, Source.STORAGE}
            or (line.source is Source.IGNORED and line.note)
            for line in lines
        )
        assert mapped or read, (name, lines)


def test_options_and_aliases_of_the_contract_become_flags(
    samples: Mapping[str, Mapping[str, str]], manifest: EngineManifest
) -> None:
    """All but those that say what vLLM does anyway, or ask for what is not installed here."""
    without = {
        name
        for name, env in samples.items()
        if name in VARIABLES
        and VARIABLES[name].kind in {Kind.OPTION, Kind.ALIAS, Kind.PART}
        and not any(line.flag for line in plan(env, manifest).explanations if line.variable == name)
    }
    assert without == {"WORKER_USE_RAY", "TENSOR_PARALLEL_AUTO"}


@pytest.mark.parametrize(("form", "count"), [("g2", 60), ("g1", 82)])
def test_console_forms_with_all_their_defaults(
    form: str,
    count: int,
    forms: Mapping[str, Mapping[str, str]],
    manifest: EngineManifest,
    cuda: EngineManifest,
) -> None:
    """§5.5, §10 point 6: no errors, no unexplained name, and notes only about what is obsolete."""
    env = forms[form]
    assert len(env) == count
    for built_for in (manifest, cuda):
        result = translate(env, built_for, served_names=("facebook/opt-125m",), texts={}, gpus=1)
        assert result.errors == ()
        assert env.keys() == {line.variable for line in result.explanations if line.variable}
        assert all(describe(note.split()[0]).kind is Kind.OBSOLETE for note in result.notes)
        empty = {name for name, text in env.items() if clean_value(text) is None}
        assert empty == {line.variable for line in result.explanations if line.source is Source.UNSET}


def test_the_form_of_today_makes_no_notes(
    forms: Mapping[str, Mapping[str, str]], manifest: EngineManifest
) -> None:
    """§5.5: the form sends its defaults, so presence is not intent."""
    assert translate(forms["g2"], manifest, texts={}).notes == ()


def test_every_option_of_vllm_can_be_set_by_its_name(manifest: EngineManifest) -> None:
    """§4.9, last paragraph: each of the 317 options, minus those of §4.4."""
    assert len(manifest.flags) == 317
    values = {"integer": "2", "number": "0.5", "size": "2k", "json": "{}", "text": "x"}
    unmapped = set()
    for name, flag in manifest.flags.items():
        text = flag.choices[0] if flag.choices else values[flag.value]
        text = min(manifest.registered[name]) if name in manifest.registered else text
        if flag.kind in {"pair", "switch"}:
            text = "true"
        if name in {"HF_OVERRIDES", "SPECULATIVE_CONFIG", "LIMIT_MM_PER_PROMPT"}:
            text = "{}"
        if name == "LORA_MODULES":
            text = "a=b"
        env = (
            {name: text, "TOOL_CALL_PARSER": "hermes"} if name == "ENABLE_AUTO_TOOL_CHOICE" else {name: text}
        )
        result = translate(env, manifest)
        assert not result.errors, (name, text, result.errors)
        if not any(argument.partition("=")[0] == flag.flag for argument in result.argv):
            unmapped.add(name)
    assert unmapped == {
        # §4.4: owned, colliding, secret
        "HOST", "PORT", "UDS", "API_KEY", "MODEL", "CONFIG", "HEADLESS", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK",
        "NNODES", "LOG_LEVEL", "ROOT_PATH", "MIDDLEWARE", "GRPC", "GRPC_PORT", "ENABLE_SSL_REFRESH",
        "LOGGING_CONFIG", "LOG_CONFIG_FILE", "TOKENS_ONLY", "HF_TOKEN", "SSL_CA_CERTS", "SSL_CERTFILE",
        "SSL_CERT_REQS", "SSL_CIPHERS", "SSL_KEYFILE",
        # vLLM ignores it
        "MAX_PARALLEL_LOADING_WORKERS",
    }  # fmt: skip
    assert not any(
        line.flag
        for name in unmapped
        for line in translate({name: "1"}, manifest).explanations
        if line.variable == name
    )


def test_neither_arguments_nor_explanations_hold_a_secret(
    samples: Mapping[str, Mapping[str, str]], manifest: EngineManifest
) -> None:
    """§10 point 8: no token on the command line, and none in anything that is printed."""
    tokens = {name: text for sample in samples.values() for name, text in sample.items() if "S3CRET" in text}
    assert tokens.keys() == {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_API_KEY", "DOCKERHUB_TOKEN"}
    tokens |= {
        "RUNPOD_AI_API_KEY": "S3CRET",
        "RUNPOD_WEBHOOK_GET_JOB": "http://h/S3CRET",
        "BUCKET_SECRET_ACCESS_KEY": "S3CRET",
    }
    result = translate({**tokens, "SEED": "1"}, manifest)
    assert result.argv == ("--seed", "1")
    assert tokens.keys() < {line.variable for line in result.explanations}
    assert "S3CRET" not in repr((result.explanations, result.notes, result.errors))
    within = {
        "MODEL_LOADER_EXTRA_CONFIG": '{"aws_secret":"S3CRET","concurrency":8}',
        "OTLP_TRACES_ENDPOINT": "http://user:S3CRET@collector",
        "VLLM_EXTRA_ARGS": """--kv-transfer-config '{"api_key": "S3CRET"}' --model-impl=auto""",
        "KV_TRANSFER_CONFIG": '{"kv_connector_extra_config":{"password":"S3CRET"}}',
        "ENFORCE_EAGER": "http://user:S3CRET@x",
    }
    unclosed = {"VLLM_EXTRA_ARGS": """--kv-transfer-config '{"api_key": "S3CRET"}' --unclosed 'S3CRET"""}
    for more, refused in (({}, {"ENFORCE_EAGER"}), (unclosed, {"VLLM_EXTRA_ARGS", "ENFORCE_EAGER"})):
        both = translate({**tokens, **within, **more}, manifest)
        assert {error.variable for error in both.errors} == refused
        assert "concurrency" in repr(both.explanations)
        assert "S3CRET" not in repr((both.explanations, both.notes, both.errors))
        assert ("S3CRET" in repr(both.argv), "S3CRET" in repr(mask_secrets(both.argv))) == (True, False)
