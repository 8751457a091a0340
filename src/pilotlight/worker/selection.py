"""`best_of` and beam search, which vLLM dropped or does without streaming (`vllm-worker.md` §1.7).

Pure. `plan_selection` asks the engine for more sequences than are wanted, `select` keeps the best of its
answer, `stream_events` plays that answer as the stream that was asked for. Shared by jobs and the listener.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from pilotlight.worker.errors import InputError
from pilotlight.worker.fields import is_integer, kind_of, read_boolean
from pilotlight.worker.parameters import Ignored

_GREEDY_BELOW: Final = 1e-5
"""Temperatures below this are greedy to vLLM; all candidates would be the same sequence."""

_IDLE_IN_BEAMS: Final[Mapping[str, tuple[Any, ...]]] = {
    "stop": ("", [], None),
    "stop_token_ids": ([], None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_tokens": (0, None),
    "bad_words": ([], None),
    "allowed_token_ids": ([], None),
    "logit_bias": ({}, None),
    "prompt_logprobs": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "vllm_xargs": ({}, None),
    "structured_outputs": (None,),
    "response_format": ({"type": "text"}, None),
}
"""Parameters that upstream's beam search overlooks, with the values by which they ask for nothing."""


_IN_CHUNKS: Final = frozenset({"id", "created", "model", "object", "choices", "usage"})
"""Fields of an answer that are in its stream's chunks anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What to keep of an answer with more sequences than were asked for.

    Attributes:
        kept: Sequences per prompt that the caller gets.
        candidates: Sequences per prompt that the answer has; its choices come prompt by prompt.
        chat: The answer is a chat completion.
        by_score: Keep those with the greatest sum of logprobs, best first; otherwise the first ones.
        keep_logprobs: The caller asked for logprobs himself.
        keep_prompt_logprobs: He asked for those of the prompt, which come with others when it is echoed.
        echo: The logprobs begin with those of the prompt.
        streamed: The caller asked for a stream.
        include_usage: The stream ends with an event of usage.
    """

    kept: int
    candidates: int
    chat: bool
    by_score: bool
    keep_logprobs: bool
    keep_prompt_logprobs: bool
    echo: bool
    streamed: bool
    include_usage: bool


def plan_selection(
    body: dict[str, Any], *, chat: bool, streamed: bool
) -> tuple[dict[str, Any], Selection | None]:
    """The body without `best_of`, and what to keep of the answer to it; None where that is all of it.

    Args:
        body: A request body in OpenAI's form. Not changed.
        chat: It goes to the chat route.
        streamed: The caller wants a stream.

    Raises:
        InputError: `best_of` is no number, less than `n`, or asks for several greedy sequences; or
            `use_beam_search` is no truth value.
    """
    if "best_of" not in body:
        return body, None
    rest = {key: value for key, value in body.items() if key != "best_of"}
    if body["best_of"] is None:
        return rest, None
    kept, candidates = _count(body, "n"), _count(body, "best_of")
    if candidates < kept:
        raise InputError(f"best_of must be at least n, which is {kept}; it is {candidates}", param="best_of")
    beam = read_boolean(body, "use_beam_search")
    if candidates == kept and not (beam and streamed):
        return rest, None
    options = rest.pop("stream_options", None)
    logprobs = rest.get("logprobs")
    asked = bool(logprobs) if chat else logprobs is not None
    if not beam:
        temperature = rest.get("temperature")
        if isinstance(temperature, (int, float)) and temperature < _GREEDY_BELOW:
            raise InputError(
                f"best_of must be 1 with temperature {temperature}, which always gives the same sequence;"
                f" it is {candidates}",
                param="best_of",
            )
        if not asked:
            rest["logprobs"] = True if chat else 0
    rest |= {"n": candidates, "stream": False}
    return rest, Selection(
        kept=kept,
        candidates=candidates,
        chat=chat,
        by_score=not beam,
        keep_logprobs=asked,
        keep_prompt_logprobs=asked or rest.get("prompt_logprobs") is not None,
        echo=not chat and bool(rest.get("echo")),
        streamed=streamed,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def settle_beams(body: dict[str, Any], *, max_logprobs: int | None) -> tuple[dict[str, Any], list[Ignored]]:
    """A native body with `use_beam_search` checked and its companions settled; `best_of` is then its width.

    Args:
        body: Sampling parameters. Not changed.
        max_logprobs: The engine's `--max-logprobs`; None = no bound.

    Returns:
        The body, and parameters that have no effect because there is no beam search.

    Raises:
        InputError: The search could not be done, or something asked for would silently be left out (§8 A22).
    """
    body = dict(body)
    early = body.pop("early_stopping", None)
    if early not in (None, True, False, "never"):
        raise InputError(
            f"early_stopping must be true, false or 'never', not {early!r:.80}", param="early_stopping"
        )
    if not read_boolean(body, "use_beam_search"):
        body.pop("use_beam_search", None)
        ignored = [Ignored("early_stopping", "has no effect without use_beam_search")] if early else []
        if body.pop("length_penalty", 1) not in (1, None):
            ignored.append(Ignored("length_penalty", "has no effect without use_beam_search"))
        return body, ignored
    body["use_beam_search"] = True
    # Upstream's search always runs every live beam to its end; no value of early_stopping changes that.
    body.setdefault("best_of", body.get("n", 1))
    width = _count(body, "best_of")
    if max_logprobs is not None and 2 * width > max_logprobs:
        raise InputError(
            f"a beam search of width {width} needs {2 * width} logprobs per token, and the engine gives"
            f" {max_logprobs}; use best_of (or n) of at most {max_logprobs // 2}, or raise MAX_BEAM_WIDTH",
            param="best_of" if width != body.get("n") else "n",
        )
    if body.get("max_tokens") is None:
        raise InputError("use_beam_search needs max_tokens: the search runs that far", param="max_tokens")
    for name, idle in _IDLE_IN_BEAMS.items():
        if name in body and body[name] not in idle:
            raise InputError(f"{name} has no effect with use_beam_search; send one of the two", param=name)
    return body, []


def count_prompts(prompt: object) -> int:
    """How many prompts a completion's `prompt` holds: a list of token ids is one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        return len(prompt)
    return 1


def select(answer: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """The answer with only the sequences to be kept, numbered anew; its usage counts their tokens.

    Raises:
        InputError: The engine gave no logprobs to choose by.
    """
    choices = sorted(answer.get("choices") or [], key=lambda choice: choice.get("index") or 0)
    kept: list[dict[str, Any]] = []
    tokens = 0
    for start in range(0, len(choices), selection.candidates):
        group = choices[start : start + selection.candidates]
        if selection.by_score:
            scores = [_logprobs(choice, selection) for choice in group]
            order = sorted(range(len(group)), key=lambda at: -sum(scores[at]))
            group = [group[at] for at in order]
            tokens += sum(len(scores[at]) for at in order[: selection.kept])
        kept += group[: selection.kept]
    # What was asked for only to choose by it; an echoed prompt brings its own with it.
    keeps = {"logprobs": selection.keep_logprobs, "prompt_logprobs": selection.keep_prompt_logprobs}
    dropped = [name for name, keep in keeps.items() if selection.by_score and not keep]
    kept = [
        {**choice, **{name: None for name in dropped if name in choice}, "index": index}
        for index, choice in enumerate(kept)
    ]
    answer = {**answer, **{name: None for name in dropped if name in answer}}
    usage = dict(answer.get("usage") or {})
    if selection.by_score:
        prompt_tokens = usage.get("prompt_tokens") or 0
        usage["kept_tokens"] = tokens - (selection.kept * prompt_tokens if selection.echo else 0)
    return {**answer, "choices": kept, "usage": usage}


def stream_chunks(answer: dict[str, Any], *, chat: bool, include_usage: bool) -> list[dict[str, Any]]:
    """A whole answer as the chunks of a stream: finished choices, then usage where asked for.

    What the answer says beside its choices comes with the first chunk, its fingerprint with the last.
    """
    head: dict[str, Any] = {key: answer[key] for key in ("id", "created", "model") if key in answer}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    chunks: list[dict[str, Any]] = []
    for choice in answer["choices"]:
        fields = {key: value for key, value in choice.items() if value is not None}
        fields.setdefault("finish_reason", None)
        if chat:
            delta = {key: value for key, value in fields.pop("message", {}).items() if value}
            announced = {"role": delta.pop("role", "assistant"), "content": ""}
            opening = {"index": fields["index"], "delta": announced, "finish_reason": None}
            chunks.append({**head, "choices": [opening]})
            if "tool_calls" in delta:
                delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(delta["tool_calls"])]
            fields["delta"] = delta
        chunks.append({**head, "choices": [fields]})
    if include_usage:
        chunks.append({**head, "choices": [], "usage": answer["usage"]})
    about = {key: value for key, value in answer.items() if value is not None and key not in _IN_CHUNKS}
    last = {key: about.pop(key) for key in ("system_fingerprint",) if key in about}
    if chunks:
        chunks[0] |= about
        chunks[-1] |= last
    return chunks


def event_texts(chunks: list[dict[str, Any]]) -> list[str]:
    """Chunks as server-sent events, and the one that ends a stream."""
    return [f"data: {msgspec.json.encode(chunk).decode()}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]


def _count(body: Mapping[str, Any], key: str) -> int:
    value = body.get(key)
    if value is None:
        return 1
    if not is_integer(value) or value < 1:
        text = repr(value) if isinstance(value, (int, float, str)) else kind_of(value)
        raise InputError(f"{key} must be a whole number of at least 1, not {text:.80}", param=key)
    number: int = value
    return number


def _logprobs(choice: Mapping[str, Any], selection: Selection) -> list[float]:
    """Logprobs of the sampled tokens; the first token of an echoed prompt has none."""
    given = choice.get("logprobs")
    if not isinstance(given, dict):
        raise InputError(
            "best_of cannot choose: the engine gave no logprobs (include_reasoning: false hides them)",
            param="best_of",
        )
    if selection.chat:
        return [token["logprob"] for token in given.get("content") or []]
    return [value if value is not None else 0.0 for value in given.get("token_logprobs") or []]
