"""What clients of a soak ask, and what is a right answer to it.

The stand-in engine's answer is a function of the request, and every request of a soak has a name of its own in
it: an answer that belongs to another request, or lacks a piece, is known for what it is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pilotlight.testing.fake_tokens import prompt_tokens

MODEL = "pilotlight/ember"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
BODY_MAX = 256 * 1024
"""`limits.body_bytes` of a soak: small, so that more than that is soon sent."""

SILENCE_S = 5
"""`limits.upstream_read_s` of a soak."""

Ends = frozenset[str]
NEVER: Ends = frozenset()
EXACT: Ends = frozenset({"exact"})
CUT_SHORT: Ends = frozenset({"exact", "error_event"})
"""A stream whose engine fails it goes on elsewhere, exactly, or says what happened."""


@dataclass(frozen=True)
class Answer:
    """What a whole answer says.

    Attributes:
        text: Of each sequence.
        tokens_in: Of the prompt.
        tokens_out: Of all sequences together.
        reason: Why it ends there.
    """

    text: str
    tokens_in: int
    tokens_out: int
    reason: str = "stop"


@dataclass
class Ask:
    """One request.

    Attributes:
        kind: For the counts.
        body: What is sent.
        answer: What is said to it; None where it is never served.
        route: Below `/openai`.
        stream: Whether the answer comes in events.
        usage: Whether a stream ends with its usage.
        sequences: How many choices there are.
        ends: How it may end where nobody disturbs it: `exact`, `error_event`, `cut` (visibly incomplete), or an
            HTTP status.
        headers: More of them.
        chunked: Whether the body goes without a length.
        pieces: In how many pieces the body goes.
        method: Of HTTP.
    """

    kind: str
    body: bytes
    answer: Answer | None = None
    route: str = CHAT
    stream: bool = False
    usage: bool = False
    sequences: int = 1
    ends: Ends = EXACT
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    pieces: int = 1
    method: str = "POST"

    def request(self, host: str, path: str, key: str, request_id: str) -> list[bytes]:
        """The bytes to send, in pieces.

        Args:
            host: Where.
            path: Of the endpoint's OpenAI routes.
            key: The caller's.
            request_id: The caller's name of the request.
        """
        lines = {
            "Host": host,
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            "X-Request-Id": request_id,
            **self.headers,
        }
        size = -(-len(self.body) // self.pieces) or 1
        parts = [self.body[start : start + size] for start in range(0, len(self.body), size)]
        if self.chunked:
            lines["Transfer-Encoding"] = "chunked"
            parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
        else:
            lines.setdefault("Content-Length", str(len(self.body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        first = f"{self.method} {path}{self.route} HTTP/1.1\r\n{head}\r\n".encode()
        if self.pieces == 1 and not self.chunked:
            return [first + self.body]
        return [first, *parts]


def counted(name: str, words: int, limit: int | None = None) -> tuple[str, Answer]:
    """A prompt, and the stand-in's answer to it.

    Args:
        name: Which nobody else has.
        words: Of the answer.
        limit: Most words that are asked for.
    """
    prompt = f"count {name} to {words}"
    said = [f" {name}-{number}" for number in range(1, words + 1)][:limit]
    return prompt, Answer("".join(said), len(prompt_tokens(prompt)), len(said))


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def plain(choice: random.Random, name: str, *, words: int | None = None, **more: Any) -> Ask:
    """A chat or a completion, whole or as a stream, greedy or not, of one or two sequences."""
    words = choice.randint(1, 40) if words is None else words
    limit = choice.randint(1, words) if choice.random() < 0.3 else None
    chat, stream, greedy = choice.random() < 0.7, choice.random() < 0.6, choice.random() < 0.6
    prompt, answer = counted(name, words, limit)
    body: dict[str, Any] = {"model": MODEL, "stream": stream, **more}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    # A completion that names no limit gets the engine's sixteen.
    body["max_tokens"] = limit or words if limit or not chat else None
    body["temperature"] = 0 if greedy else 0.7
    sequences = 1
    if not greedy and choice.random() < 0.2:
        sequences = body["n"] = 2
        answer = Answer(answer.text, answer.tokens_in, answer.tokens_out * 2)
    usage = stream and choice.random() < 0.4
    if usage:
        body["stream_options"] = {"include_usage": True}
    if choice.random() < 0.2:
        body["user"] = f"user-{choice.randint(1, 9)}"
    kind = "stream" if stream else "whole"
    return Ask(
        f"{kind}{'_greedy' if greedy else ''}",
        _json(body),
        answer,
        route=CHAT if chat else COMPLETIONS,
        stream=stream,
        usage=usage,
        sequences=sequences,
        chunked=choice.random() < 0.1,
        pieces=choice.choice((1, 1, 1, 1, 3)),
        headers={"X-Session-Id": f"s{choice.randint(1, 20)}"} if choice.random() < 0.1 else {},
    )


def large(choice: random.Random, name: str) -> Ask:
    """A stream or an answer of some hundred kilobytes: more than fits between engine and a slow client."""
    prompt, answer = counted(f"{name}{'x' * 3000}", choice.randint(60, 150))
    stream = choice.random() < 0.6
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": stream,
        "temperature": choice.choice((0, 1)),
    }  # fmt: skip
    return Ask("large", _json(body), answer, stream=stream)


def messages(choice: random.Random, name: str) -> Ask:
    """Anthropic's form."""
    words = choice.randint(1, 30)
    prompt, answer = counted(name, words)
    stream = choice.random() < 0.5
    body = {
        "model": MODEL, "max_tokens": words, "messages": [{"role": "user", "content": prompt}], "stream": stream,
    }  # fmt: skip
    return Ask("messages", _json(body), answer, route=MESSAGES, stream=stream)


def models(_: random.Random, __: str) -> Ask:
    """The list of models, which needs no worker."""
    return Ask("models", b"", route="/v1/models", method="GET", ends=frozenset({"200"}))


def troubled(choice: random.Random, name: str) -> Ask:
    """A request in which the engine misbehaves."""
    words = choice.randint(5, 30)
    prompt, answer = counted(name, words)
    stream = choice.random() < 0.7
    at = choice.randint(0, words) if stream else 0
    what = choice.choice(
        ("fail 500", "fail 503", "garbage", "short", f"hang {at}", f"cut {at}", f"cut {at}", f"error {at}")
    )
    stream = stream and what != "short"
    late = what.startswith("hang") and choice.random() < 0.5
    greedy = choice.random() < 0.6
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": stream,
        "temperature": 0 if greedy else 0.7, "metadata": {"fake_engine": what},
    }  # fmt: skip
    begun = stream and at > 0
    if what.startswith("fail"):
        ends = frozenset({what.removeprefix("fail ")})
    elif what == "garbage":
        ends = frozenset({"502"})
    elif what == "short":
        ends = frozenset({"502", "cut"})
    elif what.startswith("error"):
        ends = CUT_SHORT if begun else EXACT
    elif late:
        # Where it looks as if a worker came too late, it is refused at once.
        ends = (CUT_SHORT if begun else NEVER) | {"504", "429"}
    else:
        ends = CUT_SHORT if begun else frozenset({"502"})
    headers = {"X-Request-Timeout": "1"} if late else {}
    return Ask("trouble", _json(body), answer, stream=stream, ends=ends, headers=headers)


def refused(choice: random.Random, name: str) -> Ask:
    """A request that is never served, by whoever is asked."""
    prompt, _ = counted(name, 3)
    good = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
    make: Callable[[], Ask] = choice.choice(
        (
            lambda: Ask("refused", b'{"messages": [', ends=frozenset({"400"})),
            lambda: Ask("refused", b"[1, 2]", ends=frozenset({"400"})),
            lambda: Ask("refused", _json({**good, "model": "nobody"}), ends=frozenset({"404"})),
            lambda: Ask("refused", _json({**good, "max_tokens": 10**7}), ends=frozenset({"400"})),
            lambda: Ask("refused", _json(good), route="/v1/nothing", ends=frozenset({"404", "403"})),
            lambda: Ask("refused", b"", method="GET", ends=frozenset({"405"})),
            lambda: Ask(
                "refused", _json(good), ends=frozenset({"400"}), headers={"X-Request-Timeout": "soon"}
            ),
            lambda: Ask("oversized", b" " * (BODY_MAX + 1), ends=frozenset({"413"}), pieces=4),
            lambda: Ask("oversized", b" " * (BODY_MAX + 1), ends=frozenset({"413"}), pieces=9, chunked=True),
        )
    )
    return make()


GARBAGE_ID = "nosuch"
"""The endpoint that garbage names."""

_GARBAGE_CALL = f"POST /v2/{GARBAGE_ID}/openai{CHAT} HTTP/1.1\r\nHost: h\r\n".encode()
GARBAGE = (
    b"\0\1\2\3\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    _GARBAGE_CALL + b"Transfer-Encoding: nothing\r\n\r\n",
    _GARBAGE_CALL + b"Content-Length: -1\r\n\r\n",
    _GARBAGE_CALL + b"no colon here\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)
"""What is no request. Where the head is one, a stranger's, it leaves a row."""
