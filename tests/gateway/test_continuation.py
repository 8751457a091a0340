"""Two streams become one: against an engine that merges tokens, holds text back and is cut anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.continuation import (
    CHAT,
    COMPLETIONS,
    Continuation,
    Ending,
    Identity,
    limit_question,
    plan_continuation,
    read_limit,
)
from pilotlight.gateway.continuation import Splice, SpliceError, failure_at, hide_tokens

PIECES = [b"a", b"b", b"ab", b" c", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82", b"", b"<end>"]
"""What the tokens mean: letters, halves of characters, one without text, and the last one."""
END = len(PIECES) - 1
CONTEXT = 60


class Engine:
    """Draws each token by all before it, as a greedy model does, and streams like vLLM 0.32."""

    def answer(self, body: dict, name: str, merges: Iterable[int]) -> Iterator[bytes]:
        """The events, each with as many tokens as `merges` says."""
        chat = "messages" in body
        prompt = [len(body["messages"][0]["content"])] if chat else body["prompt"]
        limit = self.limit(body, len(prompt))
        identity = Identity(name, 7, "m", chat)
        if chat:
            role = {"role": "assistant", "content": ""}
            opening = [{"index": 0, "delta": role, "logprobs": None, "finish_reason": None}]
            yield identity.event(opening, prompt_token_ids=prompt, prompt_text=None)
        writer = _Writer(body)
        made: list[int] = []
        pending, sizes = 0, iter(merges)
        size = next(sizes, 1)
        while writer.reason is None:
            token = _draw(prompt + made)
            made.append(token)
            pending += 1
            writer.write(token, len(made), limit)
            if pending == size or writer.reason is not None:
                yield identity.event([self._choice(chat, writer, made[-pending:], prompt)])
                pending, size = 0, next(sizes, 1)
        usage = {"prompt_tokens": len(prompt), "total_tokens": 0, "completion_tokens": len(made)}
        usage["total_tokens"] = len(prompt) + len(made)
        yield identity.event([], usage=usage)
        yield b"data: [DONE]\n\n"

    def limit(self, body: dict, prompt: int) -> int:
        return min(body.get("max_tokens") or CONTEXT, CONTEXT - prompt)

    def refusal(self, body: dict) -> bytes:
        """What vLLM says when more tokens are wanted than may be."""
        limit = self.limit(body, 1 if "messages" in body else len(body["prompt"]))
        assert body["min_tokens"] > limit
        message = f"min_tokens must be less than or equal to max_tokens={limit}, got {body['min_tokens']}."
        return json.dumps({"error": {"message": message, "code": 400}}).encode()

    def _choice(self, chat: bool, writer: _Writer, tokens: list[int], prompt: list[int]) -> dict:
        text = writer.take()
        end: dict[str, object] = {"logprobs": None, "finish_reason": writer.reason}
        if chat:
            stop = {} if writer.reason is None else {"stop_reason": writer.stop}
            return {"index": 0, "delta": {"content": text}, **end, **stop, "token_ids": tokens}
        known = {"stop_reason": writer.stop, "prompt_token_ids": None if writer.begun else prompt}
        writer.begun = True
        return {"index": 0, "text": text, **end, **known, "token_ids": tokens}


class _Writer:
    """Makes text of tokens: whole characters only, and while `stop` may still come, not the last ones."""

    def __init__(self, body: dict) -> None:
        self._stops: list[str] = body.get("stop") or []
        self._shown: bool = body.get("include_stop_str_in_output", False)
        self._tokens_min: int = body.get("min_tokens", 0)
        self._ignores_end: bool = body.get("ignore_eos", False)
        longest = max((len(stop) for stop in self._stops), default=1)
        self._held = 0 if self._shown else longest - 1
        self._bytes = b""
        self._text = ""
        self._given = 0
        self.begun = False
        self.reason: str | None = None
        self.stop: str | None = None

    def write(self, token: int, count: int, limit: int) -> None:
        before = len(self._text)
        if token != END:
            self._bytes += PIECES[token]
            text = self._bytes.decode("utf-8", "replace")
            if not text.endswith("\ufffd"):
                self._text, self._bytes = self._text + text, b""
        elif not self._ignores_end and count >= self._tokens_min:
            self.reason = "stop"
            return
        for stop in self._stops if count > self._tokens_min else ():
            at = self._text.find(stop, max(0, before + 1 - len(stop)))
            if at >= 0:
                self.reason, self.stop = "stop", stop
                self._text = self._text[: at + len(stop) if self._shown else at]
                return
        if count == limit:
            self.reason = "length"

    def take(self) -> str:
        end = len(self._text) if self.reason else max(self._given, len(self._text) - self._held)
        text, self._given = self._text[self._given : end], end
        return text


def _draw(tokens: list[int]) -> int:
    state = 17
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return END if state % 23 == 0 else state % END


def summary(events: Iterable[bytes]) -> dict:
    """What a client makes of a stream."""
    blocks = b"".join(events).split(b"\n\n")
    assert blocks[-2:] == [b"data: [DONE]", b""]
    parsed = [json.loads(block.removeprefix(b"data: ")) for block in blocks[:-2]]
    choices = [event["choices"][0] for event in parsed if event["choices"]]
    deltas = [choice.get("delta") or {"content": choice["text"]} for choice in choices]
    return {
        "names": {(event["id"], event["object"], event["created"], event["model"]) for event in parsed},
        "roles": [delta["role"] for delta in deltas if "role" in delta],
        "text": "".join(delta["content"] for delta in deltas),
        "tokens": [token for choice in choices for token in choice.get("token_ids") or ()],
        "ends": [(c["finish_reason"], c["stop_reason"]) for c in choices if c["finish_reason"]],
        "usage": [event["usage"] for event in parsed if "usage" in event],
    }


bodies = st.fixed_dictionaries(
    {"temperature": st.just(0), "stream": st.just(True)},
    optional={
        "max_tokens": st.integers(1, 40),
        "min_tokens": st.integers(0, 20),
        "ignore_eos": st.booleans(),
        "stop": st.lists(st.text("ab cé", min_size=1, max_size=4), min_size=1, max_size=2),
        "include_stop_str_in_output": st.booleans(),
    },
)
prompts = st.one_of(
    st.fixed_dictionaries({"prompt": st.lists(st.integers(0, 8), min_size=1, max_size=4)}),
    st.text("xyz", max_size=9).map(lambda text: {"messages": [{"role": "user", "content": text}]}),
)
sizes = st.lists(st.integers(1, 4), max_size=40)


@given(bodies, prompts, sizes, sizes, st.lists(st.integers(0, 60), max_size=3), st.integers(1, 900))
def test_a_stream_that_is_cut_again_and_again_is_the_undisturbed_one(
    body, prompt, merges, other_merges, cuts, piece
):
    """Wherever workers die, and however tokens are merged: the same text, tokens, end, and usage."""
    body = {**body, **prompt}
    route, raw = CHAT if "messages" in body else COMPLETIONS, json.dumps(body).encode()
    undisturbed = list(Engine().answer(body, "first", merges))
    delivered = b"".join(undisturbed[: 1 + (cuts[0] if cuts else 0) % len(undisturbed)])
    for number, cut in enumerate([*cuts[1:], 1000]):
        if delivered.endswith(b"[DONE]\n\n"):
            break
        plan = plan_continuation(route, raw, delivered)
        if isinstance(plan, Ending):
            delivered += plan.data
            break
        assert isinstance(plan, Continuation)
        limit = read_limit(Engine().refusal(json.loads(limit_question(raw))))
        assert isinstance(limit, int)
        request = plan.request(limit)
        assert isinstance(request, bytes)
        second = list(Engine().answer(json.loads(request), f"next-{number}", other_merges))
        data = b"".join(second[: 1 + cut])
        splice = Splice(plan)
        delivered += b"".join(splice.feed(data[at : at + piece]) for at in range(0, len(data), piece))
    assert summary([delivered]) == summary(undisturbed)


def continuation(**changes: object) -> Continuation:
    made = {"identity": Identity("c-1", 7, "m", chat=True), "prompt": [1, 2], "kept": [3], "replayed": [4, 5]}
    return Continuation(**{**made, "text": "xy", "fields": {}, "tokens_min": 0, **changes})


def event(text: str, tokens: list[int] | None, reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason, "stop_reason": None, "token_ids": tokens}
    return Identity("cmpl-2", 9, "m", chat=False).event([choice])


def test_the_events_have_the_form_of_the_first_stream():
    splice = Splice(continuation(replayed=[], text=""))
    first, last = splice.feed(event("é", [4]) + event("", [5], "stop")).removesuffix(b"\n\n").split(b"\n\n")
    head = (
        '{"id":"c-1","object":"chat.completion.chunk","created":7,"model":"m","choices":[{"index":0,"delta":'
    )
    assert first.decode() == (
        "data: " + head + '{"content":"é"},"logprobs":null,"finish_reason":null,"token_ids":[4]}]}'
    )
    assert last.decode() == (
        "data: " + head + '{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null,'
        '"token_ids":[5]}]}'
    )


def test_nothing_is_said_twice():
    splice = Splice(continuation())
    assert splice.feed(event("", [4])) == b""
    assert splice.feed(event("xyz", [5, 6])) == b"", "it would look like an event of one token"
    said = json.loads(splice.feed(event("!", [7])).removeprefix(b"data: "))
    assert (said["choices"][0]["delta"], said["choices"][0]["token_ids"]) == ({"content": "z!"}, [6, 7])


@pytest.mark.parametrize(
    "data",
    [
        event("x", [9]),
        event("z", [4]),
        event("xy", [4], "stop"),
        event("x", None),
        b"data: {\n\n",
        b"data: {}\n\n",
        b'data: {"choices":[]}\n\n',
        b": comment\n\n",
        b"data: " + b" " * (4 * 1024 * 1024),
    ],
)
def test_what_is_not_the_rest_of_the_stream(data):
    with pytest.raises(SpliceError):
        Splice(continuation()).feed(data)


def test_an_error_of_the_second_engine_is_passed_on_for_whoever_looks_for_it():
    error = (
        b'data: {"error": {"message": "no", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
    )
    end = b"data: [DONE]\n\n"
    assert Splice(continuation()).feed(error + end) == error + end
    assert failure_at(event("a", [1]) + error + end) == len(event("a", [1]))


@pytest.mark.parametrize(
    "events",
    [
        event('data: {"error": {"code": 500}}', [1]),
        b'data: {"error": {"message": "bad", "type": "BadRequestError", "param": null, "code": 400}}\n\n',
        b"data: [DONE]\n\n",
    ],
)
def test_no_failure_of_the_engine(events):
    assert failure_at(events) == -1


def test_tokens_are_hidden_and_text_is_not():
    told = b'{"text":"\\"token_ids\\":[1,2]","prompt_token_ids":[1,23],"token_ids":[]}\n\n'
    hidden = b'{"text":"\\"token_ids\\":[1,2]","prompt_token_ids":null,"token_ids":null}\n\n'
    assert hide_tokens(told * 2) == hidden * 2
    assert hide_tokens(hidden) == hidden
