"""Whether a stream whose worker died can go on with another one, token for token, and how.

Pure. What makes it exact is that nothing is guessed from the text: a greedy stream asks its engine for the
ids of its tokens (`with_tokens`), which are blanked on the way out (`gateway.continuation`). When the worker
dies, the next one is given the ids of the prompt and of what was delivered, as the prompt of a completion,
and draws what the first one would have drawn. Neither the number of events (vLLM merges tokens into one event
whenever it falls behind) nor the text (tokens without text, several spellings of one text, half of a
character held back) would tell which tokens those were; and no chat template is applied a second time.

Steps: `plan_continuation` looks at the request and at the events that were delivered. If it can go on, the
next worker is asked for the limit that holds for the request (`limit_question`, `read_limit`), because a
model's configuration may set one that no request names; then it gets `Continuation.request`, and
`gateway.continuation.Splice` makes its answer the rest of the first one. What is in doubt is `Impossible`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

import msgspec

from pilotlight.core.openai_routes import STREAM_USAGE_ROUTES

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

_CARRIED: Final = frozenset(
    {
        *(
            "model",
            "logit_bias",
            "allowed_token_ids",
            "repetition_penalty",
            "top_p",
            "top_k",
            "min_p",
            "seed",
        ),
        *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "stream_interval"),
        *("skip_special_tokens", "spaces_between_special_tokens", "priority", "cache_salt", "session_id"),
    }
)
"""Fields that mean the same wherever a stream begins. Repetition penalties count prompt and output alike."""

_WITHOUT_EFFECT: Final = frozenset(
    {
        # They made the prompt, whose ids are known,
        *("messages", "prompt", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
        *("chat_template", "chat_template_kwargs", "documents", "reasoning_effort"),
        # or they say nothing about the tokens,
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"),
        *("parallel_tool_calls", "return_token_ids"),
        # or are set anew.
        *("stream", "temperature", "max_tokens", "max_completion_tokens", "min_tokens"),
    }
)

_HARMLESS: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "bad_words": ([],),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
    "include_reasoning": (True,),
    "watermarking": (False,),
}
"""Fields that may only have these values, or be null. Any other field may only be null."""

_NO_LIMIT: Final = 2**31 - 1
_LIMIT: Final = re.compile(rb"min_tokens must be less than or equal to max_tokens=(\d+)")
_ASK: Final = b'"return_token_ids":true,'


class Reason(StrEnum):
    """Why a stream cannot go on."""

    ROUTE = "route"
    BODY = "body"
    SAMPLED = "sampled"
    FIELD = "field"
    CONTENT = "content"
    NOTHING_DELIVERED = "nothing_delivered"
    EVENT = "event"
    NO_TOKENS = "no_tokens"
    LIMIT = "limit"


class Impossible(msgspec.Struct, frozen=True):
    """The stream ends here.

    Attributes:
        reason: Why.
        detail: Which field, or what about it; for the log, it holds nothing of prompt or answer.
    """

    reason: Reason
    detail: str = ""


class Ending(msgspec.Struct, frozen=True):
    """The answer was complete but for these last events."""

    data: bytes


class Identity(msgspec.Struct, frozen=True):
    """What is the same in every event of a stream.

    Attributes:
        id: The engine's name of the answer.
        created: When it began, seconds.
        model: As the engine calls it.
        chat: Whether it is a chat; else it is a completion.
    """

    id: str
    created: int
    model: str
    chat: bool

    def event(self, choices: list[dict[str, object]], **more: object) -> bytes:
        """One event of the stream, its members in the order of vLLM's."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        members = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return b"data: %b\n\n" % msgspec.json.encode({**members, "choices": choices, **more})


class Continuation(msgspec.Struct, frozen=True):
    """How a stream can go on.

    The second stream may begin a little before the end of the first: where half of a character or of a stop
    string was held back, only what came before can be cut cleanly.

    Attributes:
        identity: Of the first stream.
        prompt: Tokens of the prompt.
        kept: Delivered tokens that go along with it.
        replayed: Delivered tokens after those; the second stream makes them once more.
        text: Delivered text of the replayed tokens; the client has it.
        fields: Members of the request that go along, as they came.
        tokens_min: The least number of tokens of the answer.
    """

    identity: Identity
    prompt: list[int]
    kept: list[int]
    replayed: list[int]
    text: str
    fields: dict[str, msgspec.Raw]
    tokens_min: int

    def request(self, limit: int) -> bytes | Impossible:
        """The body to send to `/v1/completions` of the next worker.

        Args:
            limit: Most tokens that the whole answer may have.
        """
        left = limit - len(self.kept)
        if left <= len(self.replayed):
            return Impossible(Reason.LIMIT, f"limit of {limit} tokens, all delivered")
        return msgspec.json.encode(
            {
                **self.fields,
                "prompt": self.prompt + self.kept,
                "max_tokens": left,
                "min_tokens": max(0, self.tokens_min - len(self.kept)),
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
        )


class _Delta(msgspec.Struct, forbid_unknown_fields=True):
    content: str | None = None
    role: str | None = None


class _Choice(msgspec.Struct, forbid_unknown_fields=True):
    index: int
    delta: _Delta | None = None
    text: str | None = None
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: msgspec.Raw = msgspec.Raw(b"null")
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: None = None
    metrics: msgspec.Raw = msgspec.Raw(b"null")


class _Delivered(msgspec.Struct):
    """What the events say, taken together.

    Attributes:
        cuts: After each event of one token with text: tokens so far, characters so far.
    """

    identity: Identity
    prompt: list[int]
    tokens: list[int]
    text: str
    cuts: list[tuple[int, int]]
    finished: bool = False
    counted: bool = False


class _ImpossibleError(Exception):
    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.verdict = Impossible(reason, detail)


_events = msgspec.json.Decoder(_Event)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def is_greedy(temperature: bytes) -> bool:
    """Whether a body's `temperature`, raw JSON, asks for the likeliest token at each step."""
    try:
        return float(temperature) == 0
    except ValueError:
        return False


def with_tokens(body: bytes) -> bytes | None:
    """The body, asking for the ids of tokens; None where it says itself whether it wants them.

    Args:
        body: A JSON object with at least one member.
    """
    if b'"return_token_ids"' in body:
        return None
    brace = body.index(b"{") + 1
    return b"".join((body[:brace], _ASK, body[brace:]))


def plan_continuation(route: str, body: bytes, delivered: bytes) -> Continuation | Ending | Impossible:
    """How a stream can go on with another worker.

    Args:
        route: Path of the engine's route.
        body: The request as the client sent it.
        delivered: All whole events that the client has, with the ids of their tokens: as the engine sent
            them, and `Splice` after it. Without comments, and without the error of a dying engine.
    """
    try:
        if route not in STREAM_USAGE_ROUTES:
            raise _ImpossibleError(Reason.ROUTE)
        members = _read_request(body)
        found = _read_events(delivered, chat=route == CHAT)
    except _ImpossibleError as error:
        return error.verdict
    if found.finished:
        return Ending(_tail(found))
    stops = _value(members, "stop") or []
    held = max((len(stop) for stop in ([stops] if isinstance(stops, str) else stops)), default=1) - 1
    shown = not _value(members, "include_stop_str_in_output")
    tokens, chars = _cut(found, held=held, behind=held if shown else 0)
    return Continuation(
        identity=found.identity,
        prompt=found.prompt,
        kept=found.tokens[:tokens],
        replayed=found.tokens[tokens:],
        text=found.text[chars:],
        fields={name: value for name, value in members.items() if name in _CARRIED},
        tokens_min=_value(members, "min_tokens") or 0,
    )


def limit_question(body: bytes) -> bytes:
    """What to send to the request's own route of the next worker, to learn how long the answer may be.

    It asks for more tokens than there can be; vLLM refuses that with status 400 and names the limit, which it
    takes from the request, the length of the context, or the configuration of model and server.

    Args:
        body: The request as the client sent it; `plan_continuation` has found it good.
    """
    members = _members.decode(body)
    for name in ("stream", "stream_options"):
        members.pop(name, None)
    members["min_tokens"] = msgspec.Raw(b"%d" % _NO_LIMIT)
    return msgspec.json.encode(members)


def read_limit(answer: bytes) -> int | Impossible:
    """Most tokens that the answer may have.

    Args:
        answer: The body of the answer to `limit_question`.
    """
    found = _LIMIT.search(answer)
    return int(found[1]) if found else Impossible(Reason.LIMIT, "the engine did not name it")


def _read_request(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        members = _members.decode(body)
        for name, raw in members.items():
            if name in _CARRIED or name in _WITHOUT_EFFECT:
                continue
            value = msgspec.json.decode(raw)
            if value is not None and not any(_same(value, good) for good in _HARMLESS.get(name, ())):
                raise _ImpossibleError(Reason.FIELD, name[:64])
        if not is_greedy(bytes(members.get("temperature", b""))):
            raise _ImpossibleError(Reason.SAMPLED)
        _check_prompt(members)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _ImpossibleError(Reason.BODY, str(error)) from error
    return members


def _same(value: object, good: object) -> bool:
    # 1 and True are equal in Python, and different in JSON.
    return value == good and isinstance(value, bool) == isinstance(good, bool)


def _check_prompt(members: Mapping[str, msgspec.Raw]) -> None:
    """Only one prompt, and only of text: what else there is in it has no ids that could go along."""
    prompt = _value(members, "prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise _ImpossibleError(Reason.FIELD, "prompt")
    for message in _value(members, "messages") or ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(
            not isinstance(part, dict) or part.get("type") != "text" for part in content
        ):
            raise _ImpossibleError(Reason.CONTENT)


def _value(members: Mapping[str, msgspec.Raw], name: str) -> Any:
    return msgspec.json.decode(members.get(name, b"null"))


def _read_events(delivered: bytes, *, chat: bool) -> _Delivered:
    found: _Delivered | None = None
    for block in delivered.split(b"\n\n"):
        if not block or block == b"data: [DONE]":
            continue
        try:
            event = _events.decode(block.removeprefix(b"data: "))
        except msgspec.DecodeError as error:
            raise _ImpossibleError(Reason.EVENT) from error
        if found is None:
            identity = Identity(event.id, event.created, event.model, chat)
            found = _Delivered(identity, [], [], "", [])
        _add(found, event)
    if found is None:
        raise _ImpossibleError(Reason.NOTHING_DELIVERED)
    if not found.prompt:
        raise _ImpossibleError(Reason.NO_TOKENS)
    return found


def _add(found: _Delivered, event: _Event) -> None:
    if not event.choices:
        found.counted = True
        return
    (choice, *others) = event.choices
    counts = bytes(event.usage) != b"null"
    if others or choice.index or counts or found.finished:
        raise _ImpossibleError(Reason.EVENT)
    found.prompt = found.prompt or event.prompt_token_ids or choice.prompt_token_ids or []
    text = choice.text if choice.delta is None else choice.delta.content
    if text is None:
        # A parser of reasoning or tools has kept a token back: what the client gets is not what is drawn.
        raise _ImpossibleError(Reason.EVENT)
    opening = choice.delta is not None and choice.delta.role is not None
    if choice.token_ids is None and not (opening and not text and choice.finish_reason is None):
        raise _ImpossibleError(Reason.NO_TOKENS)
    found.tokens += choice.token_ids or ()
    found.text += text
    if text and choice.token_ids is not None and len(choice.token_ids) == 1:
        found.cuts.append((len(found.tokens), len(found.text)))
    found.finished = choice.finish_reason is not None


def _cut(found: _Delivered, *, held: int, behind: int) -> tuple[int, int]:
    """Where to cut: tokens before it, and characters in the text of these.

    After an event of one token with text, no half of a character is held back; of several tokens, the last
    one may be such a half. While stop strings are to be left out, the text lags `behind` the tokens by one
    character less than the longest of them. Where they are shown, it does not, but one may have begun in the
    last `held` characters, and is found only by who sees all of it.
    """
    for tokens, chars in reversed(found.cuts):
        if chars <= len(found.text) - held:
            return tokens, chars + behind
    return 0, 0


def _tail(found: _Delivered) -> bytes:
    end = b"data: [DONE]\n\n"
    if found.counted:
        return end
    prompt, tokens = len(found.prompt), len(found.tokens)
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}
    return found.identity.event([], usage=usage) + end
