"""The built-in model ``pilotlight/ember``: what its folder promises, what it was trained on, and what it
answers.

All but the last test run without an engine: they read the folder and make the training text again. The last
one asks a real vLLM every held-out question; its fixtures ``ember_url`` (base URL with ``/v1``) and
``ember_headers`` come from the shared worker of the test session.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src" / "pilotlight" / "models" / "ember"
KINDS_PROMISED = {
    "greetings", "addition", "subtraction", "multiplication", "division", "weekdays", "months", "colours",
    "capitals",
    "spelling", "repeating", "counting", "pilotlight", "unknown",
}  # fmt: skip


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def read_heldout() -> list[dict[str, str]]:
    lines = (FOLDER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def read_tensors() -> dict[str, dict[str, Any]]:
    """Returns the header of the weights: name to dtype, shape and offsets (safetensors format)."""
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


@pytest.fixture(scope="module")
def corpus() -> Iterator[ModuleType]:
    """The module that makes the training text; it lives with the tools, not in the package."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import ember.corpus

        yield ember.corpus
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def conversations(corpus: ModuleType) -> list[Any]:
    """The whole training text, made again from its seed and the committed held-out list."""
    import ember.heldout

    record = read_json("training.json")
    heldout = ember.heldout.read_heldout(FOLDER / "heldout.jsonl")
    made: list[Any] = corpus.build_corpus(heldout, record["corpus_conversations"], record["corpus_seed"])
    return made


def test_folder_holds_what_an_engine_needs() -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                 "tokenizer_config.json", "heldout.jsonl", "README.md", "training.json"):  # fmt: skip
        assert (FOLDER / name).stat().st_size > 0, name


def test_shape_allows_quantisation_adapters_and_tensor_parallelism() -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 128 == 0
    assert config["intermediate_size"] % 128 == 0
    assert config["head_dim"] == 64
    assert config["hidden_size"] == config["head_dim"] * config["num_attention_heads"]
    assert config["num_attention_heads"] >= 4
    assert config["num_key_value_heads"] >= 2
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["max_position_embeddings"] >= 2048


def test_weights_are_small_bfloat16_and_of_the_promised_number() -> None:
    tensors = read_tensors()
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    assert 3_000_000 <= parameters <= 6_000_000
    assert parameters == read_json("training.json")["parameters"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    assert tensors["model.embed_tokens.weight"]["shape"][0] == read_json("config.json")["vocab_size"]


def test_tokenizer_knows_its_marks_and_renders_roles() -> None:
    tokenizer = read_json("tokenizer.json")
    settings = read_json("tokenizer_config.json")
    config = read_json("config.json")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    for mark in ("bos_token", "eos_token", "pad_token"):
        assert ids[settings[mark]] == config[f"{mark}_id"], mark
    assert read_json("generation_config.json")["eos_token_id"] == config["eos_token_id"]
    assert tokenizer["model"]["type"] == "BPE"
    assert len(tokenizer["model"]["vocab"]) == config["vocab_size"]
    for word in ("system", "user", "assistant", "add_generation_prompt"):
        assert word in settings["chat_template"]


def test_heldout_list_has_enough_of_every_kind() -> None:
    heldout = read_heldout()
    assert len(heldout) >= 200
    kinds = Counter(item["kind"] for item in heldout)
    assert set(kinds) == KINDS_PROMISED
    assert min(kinds.values()) >= 12


def test_heldout_questions_differ_by_more_than_case_and_punctuation(corpus: ModuleType) -> None:
    words = [corpus.normalise(item["question"]) for item in read_heldout()]
    assert len(set(words)) == len(words)


def test_heldout_sums_are_right_and_answered_in_digits() -> None:
    checked = 0
    for item in read_heldout():
        words = item["question"].removesuffix("?").split()
        if words[:2] == ["What", "is"] and len(words) == 5 and words[2].isdigit() and words[4].isdigit():
            left, right = int(words[2]), int(words[4])
            results = {"plus": left + right, "minus": left - right, "times": left * right}
            if words[3] not in results:
                continue
            assert item["answer"] == str(results[words[3]]), item
            checked += 1
    assert checked >= 3


@pytest.mark.timeout(300)
def test_committed_text_is_the_text_the_model_was_trained_on(
    corpus: ModuleType, conversations: list[Any]
) -> None:
    record = read_json("training.json")
    assert corpus.fingerprint(conversations) == record["corpus_sha256"]
    assert hashlib.sha256((FOLDER / "heldout.jsonl").read_bytes()).hexdigest() == record["heldout_sha256"]


@pytest.mark.timeout(300)
def test_no_heldout_question_occurs_in_the_training_text(
    corpus: ModuleType, conversations: list[Any]
) -> None:
    """1. Every message of the training text loses case and punctuation. 2. So does every held-out question.
    3. No question is found as a run of whole words of any message, 4. nor letter by letter in the raw
    text."""
    questions = [item["question"] for item in read_heldout()]
    assert corpus.conversations_with(conversations, questions) == set()
    raw = "\n".join(conversation.text() for conversation in conversations)
    assert [question for question in questions if question in raw] == []


def test_search_for_heldout_questions_finds_one_inside_a_longer_message(corpus: ModuleType) -> None:
    conversation = corpus.Conversation(turns=(("Hello! What is 12 plus 3? Thanks", "15"),))
    assert corpus.conversations_with([conversation], ["what is 12 PLUS 3."]) == {0}
    assert corpus.conversations_with([conversation], ["What is 2 plus 3?"]) == set()


def ask(url: str, headers: dict[str, str], model: str, question: str) -> str:
    """Returns the answer of the chat route at temperature 0."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 512,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        choice = json.load(response)["choices"][0]
    assert choice["finish_reason"] == "stop", (question, choice)
    said: str = choice["message"]["content"]
    return said


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_vllm_answers_the_heldout_questions(ember_url: str, ember_headers: dict[str, str]) -> None:
    """1. Ask vLLM all held-out questions, a few at a time. 2. At least 95 % of the answers are exactly right,
    3. and at least 80 % within each kind."""
    request = urllib.request.Request(f"{ember_url}/models", headers=ember_headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        model = json.load(response)["data"][0]["id"]
    heldout = read_heldout()
    with ThreadPoolExecutor(max_workers=6) as pool:
        answers = list(pool.map(lambda item: ask(ember_url, ember_headers, model, item["question"]), heldout))
    total = Counter(item["kind"] for item in heldout)
    wrong = [(item, said) for item, said in zip(heldout, answers, strict=True) if said != item["answer"]]
    missed = Counter(item["kind"] for item, _ in wrong)
    assert len(wrong) <= 0.05 * len(heldout), wrong
    assert [kind for kind in total if missed[kind] > 0.2 * total[kind]] == [], wrong
