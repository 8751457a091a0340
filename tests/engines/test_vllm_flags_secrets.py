"""Secrets are hidden in whatever is shown (vllm-worker.md §4.1 step 7, §10 point 8)."""

from __future__ import annotations

import json

import pytest

from pilotlight.engines.flags import mask_secrets, mask_value, translate
from pilotlight.engines.manifest import EngineManifest


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"apiKey":"S3","n":3}', '{"apiKey":"***","n":3}'),
        ('{"auth":{"accessToken":"S3"}}', '{"auth":{"accessToken":"***"}}'),
        ('{"token":["S3","S3"]}', '{"token":"***"}'),
        ('{"api_keys":{"a":"S3"}}', '{"api_keys":"***"}'),
        ('{"token": 12345, "x": "a"}', '{"token":"***","x":"a"}'),
        ('[{"password":"S3"}]', '[{"password":"***"}]'),
        ('{"inner":"{\\"token\\":\\"S3\\"}"}', '{"inner":"{\\"token\\":\\"***\\"}"}'),
        ("token: 12345", "token: ***"),
        ("{token: [S3, S3], x: 1}", "{token: ***, x: 1}"),
        ("{'api_key': 'S3', 'x': 1}", "{'api_key': ***, 'x': 1}"),
        ('{"token": "S3', '{"token": ***'),
        ("Authorization: Bearer S3", "Authorization: ***"),
        ("https://h/p?api_key=S3&page=2", "https://h/p?api_key=***&page=2"),
        ("s3://u:S3@bucket/m", "s3://***@bucket/m"),
        ("s3://KEY:S3/S3@bucket/m", "s3://***@bucket/m"),
        ("http://u:p@S3@h/", "http://***@h/"),
        # Nothing of this is one.
        ('{ "num_speculative_tokens": 3 }', '{ "num_speculative_tokens": 3 }'),
        ('{"stop_token_ids": [1], "tokenizer": "t"}', '{"stop_token_ids": [1], "tokenizer": "t"}'),
        ("MAX_NUM_BATCHED_TOKENS=8", "MAX_NUM_BATCHED_TOKENS=8"),
        ("https://h/m@v1", "https://h/m@v1"),
        ("org/m@v1", "org/m@v1"),
    ],
)
def test_values(text: str, shown: str) -> None:
    assert mask_value(text) == shown


def test_command_lines() -> None:
    """Whole names, beginnings of names, and keys of JSON options."""
    argv = [
        "--hf-token", "S3", "--tokenizer", "t", "--api-key", "S3", "S3", "--seed", "1", "--x-token=S3", "--hf_tok", "S3",
        "--api-k=S3", "--kv-transfer-config.extra.token", "S3", "--kv-transfer-config.apiKey=S3", "--max-model-len", "7",
    ]  # fmt: skip
    assert mask_secrets(argv) == [
        "--hf-token", "***", "--tokenizer", "t", "--api-key", "***", "***", "--seed", "1", "--x-token=***", "--hf_tok",
        "***", "--api-k=***", "--kv-transfer-config.extra.token", "***", "--kv-transfer-config.apiKey=***",
        "--max-model-len", "7",
    ]  # fmt: skip


@pytest.mark.parametrize("with_manifest", [True, False])
def test_nothing_of_a_plan_that_people_see_holds_a_secret(
    manifest: EngineManifest, *, with_manifest: bool
) -> None:
    secret = "S3CRET"
    env = {
        "MODEL_LOADER_EXTRA_CONFIG": f"{{'aws_secret_access_key': '{secret}'}}",
        "KV_TRANSFER_CONFIG": json.dumps(
            {"apiKey": secret, "auth": {"accessToken": secret}, "token": [secret]}
        ),
        "HF_OVERRIDES": f"{{'api_key': '{secret}'}}",
        "OTLP_TRACES_ENDPOINT": f"https://c/?api_key={secret}",
        "TASK": f"http://u:{secret}@h",
        "MODEL_REVISION": f"s3://u:{secret}@h",
        "REVISION": "other",
        "VLLM_EXTRA_ARGS": f"--hf-tok {secret} --api-k {secret} --ec-transfer-config.x.token {secret}",
        "VLLM_RUNPOD_API_KEY": secret,
    }
    texts = {
        "/vllm_config.yaml": f"kv-events-config: {{apiKey: {secret}, token: 12345}}\nhf-token: {secret}\n"
    }
    plan = translate(env, manifest if with_manifest else None, texts=texts)
    shown = repr((plan.notes, plan.errors, plan.explanations, mask_secrets(plan.argv)))
    assert secret not in shown
    assert "12345" not in shown
    refused = {error.variable for error in plan.errors}
    assert {"VLLM_EXTRA_ARGS", "TASK"} <= refused
    assert ("HF_OVERRIDES" in refused) == with_manifest


def test_masking_leaves_the_sentences_alone(manifest: EngineManifest) -> None:
    """What is said of options that are named after secrets must stay readable."""
    texts = {"/vllm_config.yaml": "api-key: x"}
    (error,) = translate({"VLLM_EXTRA_ARGS": "--seed 1"}, manifest, texts=texts).errors
    assert error.message.endswith("must not hold api-key; the worker sets it itself")
    (error,) = translate({"VLLM_EXTRA_ARGS": "--hf-token=x"}, manifest).errors
    assert error.message.endswith("must not be given: it would show in process lists; set HF_TOKEN")
