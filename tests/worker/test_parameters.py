"""Sampling parameters of native jobs: vllm-worker.md §1.5 to §1.8, §10 points 10 and 11."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pilotlight.worker.errors import InputError
from pilotlight.worker.input_settings import InputSettings
from pilotlight.worker.inputs import plan_request
from pilotlight.worker.log import LogSink
from pilotlight.worker.notices import Notices
from pilotlight.worker.parameters import GUIDED, KNOWN, LIFTED, UNUSABLE, Ignored
from pilotlight.worker.upstream import UpstreamRequest

CONTRACT = Path(__file__).resolve().parents[2] / "docs" / "contract" / "vllm-worker.md"
CHAT = [{"role": "user", "content": "hi"}]


def plan(
    sampling: dict[str, Any], *, chat: bool = False, stream: bool = False, **settings: Any
) -> UpstreamRequest:
    source = {"messages": CHAT} if chat else {"prompt": "x"}
    job_input = {**source, "stream": stream, "sampling_params": sampling}
    return plan_request(job_input, InputSettings(**settings))


def refusal(sampling: dict[str, Any], *, chat: bool = False, **settings: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        plan(sampling, chat=chat, **settings)
    assert (caught.value.status, caught.value.error_type) == (400, "BadRequestError")
    assert caught.value.param is not None
    assert caught.value.param in caught.value.message
    return caught.value


def names_of_the_table() -> set[str]:
    """Every name in the first column of the table of §1.5."""
    section = CONTRACT.read_text().partition("### 1.5 ")[2].partition("### 1.6 ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_]+)`", cell)}


def test_every_name_of_the_table_is_lifted_from_beside_the_prompt_and_no_other() -> None:
    """§1.8."""
    assert names_of_the_table() == LIFTED


@pytest.mark.parametrize("name", sorted(LIFTED - UNUSABLE - GUIDED - {"use_beam_search", "early_stopping"}))
def test_each_name_counts_beside_the_prompt_at_lower_priority(name: str) -> None:
    """§1.6 rule 2, §1.8; the best of a number of sequences is told by n, a penalty counts for beams alone."""
    sent = "n" if name == "best_of" else name
    value = {"response_format": {"type": "text"}}.get(name, 3)
    job_input = {"prompt": "x", "use_beam_search": name == "length_penalty", name: value}
    assert (plan_request(job_input, InputSettings()).body or {})[sent] == value
    job_input["sampling_params"] = {name: 5}
    assert (plan_request(job_input, InputSettings()).body or {})[sent] == 5


def test_nulls_inside_do_not_hide_what_stands_beside() -> None:
    """§1.6 rule 3: a null counts as absent."""
    body = plan_request({"prompt": "x", "top_k": 5, "sampling_params": {"top_k": None}}, InputSettings()).body
    assert body is not None
    assert body["top_k"] == 5


def test_documented_defaults_are_sent_explicitly() -> None:
    """§1.6 rule 1, §8 A1, A6: vLLM would otherwise take the model's generation config."""
    documented = {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 16, "n": 1,
    }  # fmt: skip
    assert plan({}).body == {"prompt": "x", "stream": False, **documented}
    assert plan({}, chat=True).body == {"messages": CHAT, "stream": False, **documented}
    assert plan({}, documented_defaults=False).body == {
        "prompt": "x", "stream": False, "max_tokens": 16, "n": 1,
    }  # fmt: skip


def test_nulls() -> None:
    """§1.6 rule 3, and `n: null` means 1 (§1.5)."""
    sampling = dict.fromkeys(
        ["n", "top_k", "logprobs", "best_of", "max_tokens", "stop", "stop_token_ids", "seed"]
    )
    body = plan(sampling).body
    assert body is not None
    assert (body["n"], body["top_k"]) == (1, -1)
    assert {name: body[name] for name in ("max_tokens", "stop", "stop_token_ids", "seed")} == dict.fromkeys(
        ["max_tokens", "stop", "stop_token_ids", "seed"]
    )
    assert "logprobs" not in body
    assert "best_of" not in body


def test_no_limit_of_tokens_means_the_rest_of_the_context() -> None:
    """§1.5: the chat route does that by itself, the completions route would stop after 16."""
    assert plan({"max_tokens": None}).whole_context
    assert plan({}, max_tokens=None).whole_context
    assert not plan({"max_tokens": None}, chat=True).whole_context
    assert not plan({"max_tokens": 5}, max_tokens=None).whole_context


def test_the_newer_name_of_max_tokens() -> None:
    for chat in (False, True):
        body = plan({"max_completion_tokens": 7}, chat=chat).body
        assert body is not None
        assert body["max_tokens"] == 7
        assert "max_completion_tokens" not in body


@pytest.mark.parametrize("name", sorted(UNUSABLE))
def test_parameters_without_a_form_over_http_are_refused(name: str) -> None:
    assert refusal({name: 1}).param == name
    with pytest.raises(InputError, match=name):
        plan_request({"prompt": "x", name: 1}, InputSettings())
    assert plan({name: None}).body == plan({}).body


def test_unknown_names_are_forwarded_and_told() -> None:
    """§8 A14: G2 let any field ride inside `sampling_params`."""
    request = plan({"temprature": 0.2, "made_up": [1], "mm_payload": "none"})
    assert request.body is not None
    assert (request.body["temprature"], request.body["made_up"]) == (0.2, [1])
    assert {one.name: one.explain() for one in request.ignored} == {
        "temprature": "is not a parameter of the engine; did you mean temperature?",
        "made_up": "is not a parameter of the engine",
    }


def test_the_name_that_may_have_been_meant_is_looked_for_only_where_it_is_said(tmp_path: Path) -> None:
    """It takes long, and callers choose the names: once for each name that is said, for no other."""
    asked: list[str] = []

    class Counted(Ignored):
        def explain(self) -> str:
            asked.append(self.name)
            return self.reason

    log = LogSink((tmp_path / "log").open("wb"))
    notices = Notices(log)
    for number in (1, 2, 1):
        notices.say(Counted(f"name_{number}_{at}", "?", unknown=True) for at in range(400))
    log.close()
    assert len(asked) == len(set(asked)) == 500


def test_strict_parameters_refuse_unknown_names() -> None:
    error = refusal({"temprature": 0.2}, strict_parameters=True)
    assert "did you mean temperature?" in error.message
    assert plan(dict.fromkeys(KNOWN), strict_parameters=True).ignored == ()


def test_names_that_do_nothing_where_they_stand_are_told() -> None:
    assert [one.name for one in plan({"tools": [{}], "suffix": "x"}).ignored] == ["tools"]
    assert [one.name for one in plan({"tools": [{}], "suffix": "x"}, chat=True).ignored] == ["suffix"]
    beside = {"tools": [{}], "documents": [{}], "reasoning_effort": None}
    request = plan_request({"prompt": "x", **beside, "made_up": 1}, InputSettings())
    assert {one.name for one in request.ignored} == {"tools", "documents"}
    assert plan_request({"messages": CHAT, **beside}, InputSettings()).ignored == ()
    request = plan({"stream": True, "prompt": "y", "stream_options": {"a": 1}})
    assert request.body == plan({}).body
    assert {one.name for one in request.ignored} == {"stream", "prompt", "stream_options"}


@pytest.mark.parametrize(("given", "sent"), [(3, (True, 3)), (0, (True, 0)), (-1, (True, -1))])
def test_integer_logprobs_on_chat_are_translated(given: int, sent: tuple[bool, int]) -> None:
    """§1.5, §1.6 rule 4, §10 point 10."""
    body = plan({"logprobs": given}, chat=True).body
    assert body is not None
    assert (body["logprobs"], body["top_logprobs"]) == sent


def test_chat_logprobs_on_a_prompt_are_translated() -> None:
    assert (plan({"logprobs": 3}).body or {})["logprobs"] == 3
    assert (plan({"logprobs": True, "top_logprobs": 2}).body or {})["logprobs"] == 2
    assert (plan({"logprobs": True}).body or {})["logprobs"] == 0
    assert (plan({"top_logprobs": 5}).body or {})["logprobs"] == 5
    assert "logprobs" not in (plan({"logprobs": False}).body or {})
    assert "logprobs" not in (plan({"top_logprobs": 0}).body or {})


@pytest.mark.parametrize("logprobs", [False, 0, 3])
def test_a_number_of_logprobs_that_is_overruled_is_told(logprobs: Any) -> None:
    request = plan({"logprobs": logprobs, "top_logprobs": 5})
    assert [one.name for one in request.ignored] == ["top_logprobs"]
    assert "top_logprobs" not in (request.body or {})
    assert (request.body or {}).get("logprobs", False) is logprobs


@pytest.mark.parametrize("n", [2, 2.0, "2"])
@pytest.mark.parametrize("chat", [False, True])
def test_every_spelling_of_n_is_one_number(n: Any, chat: bool) -> None:
    """The engine reads all of them as 2, and the items of a stream have so many choices."""
    request = plan({"n": n}, chat=chat, stream=True)
    assert (request.choice_count, request.sequences_per_prompt) == (2, 2)
    assert type((request.body or {})["n"]) is int
    assert (plan({"n": "2", "best_of": 3}).selection or None) is not None


def test_watermarking_is_passed_on() -> None:
    """§1.5 calls it impossible over HTTP; vLLM has made it a field since (docs/decisions/0007)."""
    assert (plan({"watermarking": False}).body or {})["watermarking"] is False
    assert (plan({"watermarking": False, "use_beam_search": True}).body or {})["watermarking"] is False


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"guided_grammar": "root ::= x"}, {"grammar": "root ::= x"}),
        ({"guided_decoding": {"regex": "a"}}, {"regex": "a"}),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_guided_decoding_becomes_structured_outputs(old: Any, new: Any, chat: bool) -> None:
    """§1.7, §10 point 10."""
    body = plan(old, chat=chat).body
    assert body is not None
    assert body["structured_outputs"] == new
    assert GUIDED.isdisjoint(body)


def test_the_backend_of_guided_decoding_is_told_to_be_a_start_option() -> None:
    request = plan({"guided_regex": "a", "guided_decoding_backend": "outlines"})
    assert [one.name for one in request.ignored] == ["guided_decoding_backend"]


def test_beam_settings_without_beams_are_dropped_and_told() -> None:
    """§1.7: `length_penalty` and `early_stopping` have no effect then."""
    request = plan({"length_penalty": 0.8, "early_stopping": True, "use_beam_search": False})
    assert request.body == plan({}).body
    assert {one.name for one in request.ignored} == {"length_penalty", "early_stopping"}
    assert plan({"length_penalty": 1, "early_stopping": False}).ignored == ()


@pytest.mark.parametrize("early", [True, False, "never", None])
def test_beam_search_is_forwarded(early: Any) -> None:
    """§1.7: n is the width upstream; every value of `early_stopping` means exhaustive."""
    request = plan({"use_beam_search": True, "n": 2, "length_penalty": 0.8, "early_stopping": early})
    body = request.body
    assert body is not None
    assert (body["use_beam_search"], body["n"], body["length_penalty"]) == (True, 2, 0.8)
    assert not {"early_stopping", "best_of"} & body.keys()
    assert request.ignored == ()
    assert request.selection is None


@pytest.mark.parametrize("chat", [False, True])
def test_the_width_of_a_beam_search_is_best_of(chat: bool) -> None:
    request = plan({"use_beam_search": True, "n": 2, "best_of": 5}, chat=chat, stream=True)
    assert request.body is not None
    assert (request.body["n"], request.body["stream"], request.stream) == (5, False, False)
    assert "logprobs" not in request.body
    selection = request.selection
    assert selection is not None
    assert (selection.kept, selection.by_score, selection.streamed) == (2, False, True)
    assert request.choice_count == 2


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"stop": ["x"]}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"stop_token_ids": [1]}, "stop_token_ids"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"thinking_token_budget": 9}, "thinking_token_budget"),
        ({"repetition_detection": {"max_pattern_size": 2}}, "repetition_detection"),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
        ({"max_tokens": None}, "max_tokens"),
        ({"n": 11}, "n"),
        ({"best_of": 11}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"early_stopping": "soon"}, "early_stopping"),
    ],
)
def test_what_a_beam_search_cannot_honour_is_refused_before_the_call(sampling: Any, param: str) -> None:
    """§1.7 and §8 A22: upstream would ignore it, or refuse in other words."""
    assert refusal({"use_beam_search": True, **sampling}).param == param


def test_guided_decoding_is_refused_with_beams() -> None:
    error = refusal({"use_beam_search": True, "guided_regex": "a"})
    assert "use_beam_search" in error.message


def test_what_asks_for_nothing_goes_with_a_beam_search() -> None:
    sampling = {
        "stop": [], "stop_token_ids": None, "repetition_penalty": 1, "response_format": {"type": "text"},
        "temperature": 0, "top_k": 5, "seed": -1, "vllm_xargs": {}, "prompt_logprobs": None,
    }  # fmt: skip
    assert plan({"use_beam_search": True, **sampling}).body


def test_the_widest_beam_follows_the_engines_limit_of_logprobs() -> None:
    """§1.7: twice the width is at most MAX_LOGPROBS, which MAX_BEAM_WIDTH raises."""

    def widest(**variables: str) -> int | None:
        settings = InputSettings.from_environment(variables)
        for width in range(1, 100):
            try:
                plan_request({"prompt": "x", "use_beam_search": True, "n": width}, settings)
            except InputError:
                return width - 1
        return None

    assert widest() == 10
    assert widest(MAX_LOGPROBS="8") == 4
    assert widest(MAX_BEAM_WIDTH="16") == 16
    assert widest(MAX_BEAM_WIDTH="4") == 10
    assert widest(MAX_LOGPROBS="-1") is None


def test_other_values_are_left_to_the_engine() -> None:
    """§1.11: ranges are vLLM's to check, in its own words."""
    sampling = {"temperature": 9, "top_p": -1, "seed": -1, "truncate_prompt_tokens": -1, "n": 0, "top_k": 0.5}
    body = plan(sampling).body
    assert body is not None
    assert sampling.items() <= body.items()
