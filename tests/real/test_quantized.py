"""Quantised copies of the built-in model, served by this CPU engine: AWQ, GPTQ, compressed-tensors.

The copies are made by formulas (`tools/make_variants.py`); the unquantised model answers 98 % of the held-out
questions, so an error in a layout or a kernel would show at once.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import EMBER

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

RIGHT_MIN = 0.95
COUNT = {"role": "user", "content": "Count from 3 to 12."}
COUNTED = "3, 4, 5, 6, 7, 8, 9, 10, 11, 12"


def check_answers(served):
    """At least 95 % of the held-out questions are answered word for word."""
    lines = (EMBER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]

    def ask(question):
        return served.chat(question["question"], max_tokens=64)["message"]["content"] == question["answer"]

    with ThreadPoolExecutor(8) as threads:
        right = sum(threads.map(ask, questions))
    assert right >= RIGHT_MIN * len(questions), f"{right} of {len(questions)}"


def test_awq_with_ngram_speculation(serve, variants):
    """Right answers from the AWQ copy; drafts are made and accepted (vllm-worker.md §4.7), answers unchanged."""
    served = serve(
        variants / "awq",
        "awq",
        SPECULATIVE_METHOD="ngram",
        NUM_SPECULATIVE_TOKENS="3",
        NGRAM_PROMPT_LOOKUP_MAX="3",
        SPECULATIVE_DISABLE_BY_BATCH_SIZE="0",
    )
    check_answers(served)
    assert served.metric("vllm:spec_decode_num_draft_tokens_total") > 0
    assert served.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    item = served.native([COUNT], sampling_params={"temperature": 0, "max_tokens": 64})
    assert item["choices"][0]["tokens"] == [COUNTED]


def test_gptq_with_a_reasoning_parser(serve, variants):
    """Right answers from the GPTQ copy; thoughts come apart from answers (vllm-worker.md §3.4, §3.5, §8 A7)."""
    served = serve(
        variants / "gptq",
        "gptq",
        REASONING_PARSER="granite",
        ENABLE_REASONING="true",
        STRUCTURED_OUTPUTS_CONFIG='{"enable_in_reasoning": true}',
    )
    check_answers(served)
    # The model has never thought; a grammar makes it write what this parser takes apart.
    shape = "Here is my thought process: [a-z]{3,6} Here is my response: (yes|no)"
    message = served.chat("Well?", max_tokens=64, structured_outputs={"regex": shape})["message"]
    assert message["reasoning"].strip().isalpha()
    assert message["content"].strip() in {"yes", "no"}

    asked = [{"role": "user", "content": "Well?"}]
    sampling = {"temperature": 0, "max_tokens": 64, "structured_outputs": {"regex": shape}}
    (choice,) = served.native(asked, sampling_params=sampling)["choices"]
    assert choice["tokens"] == [message["content"]]
    assert choice["message"]["reasoning"] == message["reasoning"]

    streamed = served.job({"messages": asked, "stream": True, "sampling_params": sampling})["output"]
    choices = [item["choices"][0] for item in streamed]
    assert "".join(piece for each in choices for piece in each["tokens"]).strip() in {"yes", "no"}
    assert any(each.get("reasoning") for each in choices)
    assert "thought" not in "".join(piece for each in choices for piece in each["tokens"])


def test_compressed_tensors(serve, variants):
    """Right answers from the copy in eight bits, weights and activations."""
    check_answers(serve(variants / "int8", "int8"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 8}, "gptq 8-bit"),
        ({"sym": False}, "Unsupported quantization config: bits=4, sym=False"),
        ({"desc_act": True}, "desc_act=True"),
        ({"quant_method": "hqq"}, "does not know that method"),
        ({"quant_method": "torchao"}, "Please install torchao"),
    ],
    ids=str,
)
def test_what_this_engine_cannot_run_is_refused_before_a_start(
    installation, variants, tmp_path, change, reason
):
    """The reason is the engine's own, found out once when it was installed; nothing is started for it."""
    folder = tmp_path / "changed"
    shutil.copytree(variants / "gptq", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    answer = installation.api.post("/pilotlight/v1/endpoints", json={"model": str(folder), "name": "refused"})
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    assert "gptq 4-bit" in answer.json()["detail"]
