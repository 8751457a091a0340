"""What vLLM dropped and the worker still honours, against the real engine's numbers (vllm-worker.md §1.7, §10 point 10).

The engine's own answers to plain requests are the yardstick: `best_of` is compared with all its candidates,
the beam search with every continuation there is.
"""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

PROMPT = "one two"
SUM = [{"role": "user", "content": "What is 2 plus 3?"}]
LOGPROBS_MAX = 20
"""vLLM's own bound on `logprobs`; a beam search needs twice its width."""


def score(choice):
    """The sum of the logprobs of the tokens that were drawn."""
    logprobs = choice["logprobs"]
    return sum(logprobs.get("token_logprobs") or [token["logprob"] for token in logprobs["content"]])


# --- best_of


@pytest.mark.parametrize("road", ["native text", "native chat", "data path", "openai job"])
def test_best_of_keeps_the_likeliest_of_all_candidates(ember, road):
    chat = road in {"native chat", "openai job"}
    route = "/v1/chat/completions" if chat else "/v1/completions"
    content = {"messages": SUM} if chat else {"prompt": PROMPT}
    sampling = {"temperature": 1.5, "seed": 3, "max_tokens": 6}
    asked = {"logprobs": True} if chat else {"logprobs": 0}
    everything = ember.openai(route, {**content, **sampling, **asked, "n": 5})
    ranked = sorted(everything["choices"], key=score, reverse=True)
    wanted = {**sampling, "n": 2, "best_of": 5}
    if road.startswith("native"):
        (answer,) = ember.job({**content, "sampling_params": wanted})["output"]
    elif road == "data path":
        answer = ember.openai(route, {**content, **wanted})
    else:
        (answer,) = ember.job({"openai_route": route, "openai_input": {**content, **wanted}})["output"]

    def texts(choices):
        return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]

    assert texts(answer["choices"]) == texts(ranked[:2])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == everything["usage"]["completion_tokens"]
    assert 0 < answer["usage"]["kept_tokens"] < answer["usage"]["completion_tokens"]


def test_best_of_streams_as_one_item(ember):
    sampling = {"best_of": 3, "max_tokens": 5, "seed": 1}
    job = ember.job({"prompt": PROMPT, "stream": True, "sampling_params": sampling})
    (item,) = job["output"]
    assert len(item["choices"]) == 1
    assert "".join(item["choices"][0]["tokens"])


@pytest.mark.parametrize(
    "sampling", [{"best_of": 2, "n": 3}, {"best_of": 2, "temperature": 0}, {"logits_processors": ["x"]}]
)
def test_what_cannot_be_done_is_refused_by_name(ember, sampling):
    error = ember.refusal({"prompt": PROMPT, "sampling_params": sampling})
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert next(iter(sampling)) in error["message"]


# --- beam search


def beams(ember, prompt, **sampling):
    body = {"use_beam_search": True, "temperature": 1, **sampling}
    return ember.native(prompt, sampling_params=body)["choices"]


def tokens_of(ember, text):
    (answer,) = ember.job({"route": "/tokenize", "body": {"prompt": text}})["output"]
    return answer["tokens"]


def text_of(ember, tokens):
    (answer,) = ember.job({"route": "/detokenize", "body": {"tokens": tokens}})["output"]
    return answer["prompt"]


def next_logprobs(ember, tokens):
    """The likeliest next tokens and their logprobs."""
    body = {
        "prompt": tokens, "max_tokens": 1, "temperature": 1, "logprobs": LOGPROBS_MAX,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    (choice,) = ember.openai("/v1/completions", body)["choices"]
    (found,) = choice["logprobs"]["top_logprobs"]
    return {int(name.removeprefix("token_id:")): value for name, value in found.items()}


def test_beams_are_the_best_of_all_continuations(ember):
    """Every continuation by two of the twenty likeliest tokens is scored; the search finds the best of them."""
    prompt = tokens_of(ember, PROMPT)
    scores = {}
    for first, before in next_logprobs(ember, prompt).items():
        for second, after in next_logprobs(ember, [*prompt, first]).items():
            scores[first, second] = before + after
    best = sorted(scores, key=scores.__getitem__, reverse=True)
    found = beams(ember, PROMPT, n=2, best_of=8, max_tokens=2, ignore_eos=True)
    assert [choice["text"] for choice in found] == [
        text_of(ember, [*prompt, *pair]).removeprefix(text_of(ember, prompt)) for pair in best[:2]
    ]


def test_length_penalty_decides_between_short_and_long(ember):
    """Scores are sums of logprobs over length to the penalty: the greater it is, the more a long beam counts."""

    def tokens(penalty):
        (choice, *_) = beams(ember, SUM, n=4, max_tokens=6, length_penalty=penalty)
        return len(tokens_of(ember, choice["message"]["content"]))

    assert beams(ember, SUM, n=4, max_tokens=6)[0]["message"]["content"] == "5"
    assert tokens(-60.0) <= tokens(0.0) < tokens(60.0)


def test_every_early_stopping_gives_the_same_beams(ember):
    answers = [beams(ember, SUM, n=2, max_tokens=4, early_stopping=value) for value in (False, True, "never")]
    texts = [[choice["message"]["content"] for choice in answer] for answer in answers]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 2


def test_a_streamed_beam_search_is_one_item(ember):
    sampling = {"use_beam_search": True, "n": 2, "max_tokens": 4}
    (item,) = ember.job({"prompt": PROMPT, "stream": True, "sampling_params": sampling})["output"]
    assert [bool("".join(choice["tokens"])) for choice in item["choices"]] == [True, True]


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"n": LOGPROBS_MAX // 2 + 1}, "width 11"),
        ({"n": 2, "stop": ["."]}, "stop"),
        ({"n": 2, "max_tokens": None}, "max_tokens"),
    ],
)
def test_limits_of_the_beam_search_are_told_before_the_call(ember, sampling, named):
    error = ember.refusal({"prompt": PROMPT, "sampling_params": {"use_beam_search": True, **sampling}})
    assert error["code"] == 400
    assert named in error["message"]
