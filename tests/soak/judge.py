"""Whether an answer is right. What is not is `WrongError`, with the evidence."""

from __future__ import annotations

import json
from typing import Any

from .asks import COMPLETIONS, MESSAGES, Ask
from .wire import Head

_SHOWN = 600
"""Characters of an answer that go into a report."""


class WrongError(Exception):
    """An answer that nobody should get."""


def check_error(ask: Ask, data: bytes) -> None:
    """Return if this is an error object as clients of the route know it."""
    try:
        fields = json.loads(data)
        error = fields["error"]
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        if ask.route == MESSAGES:
            assert fields["type"] == "error"
        else:
            assert {"param", "code"} <= set(error)
    except (ValueError, LookupError, TypeError, AssertionError) as problem:
        raise WrongError(f"no error object ({problem!r}): {data[:_SHOWN]!r}") from problem
    if "internal server error" in error["message"]:
        raise WrongError(f"the gateway's own fault: {data[:_SHOWN]!r}")


def check_refusal(ask: Ask, head: Head, body: bytes) -> None:
    """Return if this is a proper answer of status 400 and above."""
    check_error(ask, body)
    gives_a_time = head.status == 429 or (head.status == 503 and b"asked to fail" not in body)
    if gives_a_time and not head.headers.get("retry-after", "").isdigit():
        raise WrongError(f"{head.status} without retry-after: {head.headers} {body[:_SHOWN]!r}")


def check_whole(ask: Ask, body: bytes) -> None:
    """Return if this is the whole answer to the request."""
    if ask.answer is None:
        if json.loads(body)["object"] != "list":
            raise WrongError(f"no list: {body[:_SHOWN]!r}")
        return
    expected = ask.answer
    try:
        said = json.loads(body)
        if ask.route == MESSAGES:
            texts = [part["text"] for part in said["content"]]
        else:
            choices = said["choices"]
            texts = [
                choice["text"] if ask.route == COMPLETIONS else choice["message"]["content"]
                for choice in choices
            ]
            reasons = {expected.reason}
            assert {choice["finish_reason"] for choice in choices} == reasons, "another end"
            assert [choice["index"] for choice in choices] == list(range(ask.sequences)), "other choices"
            _check_usage(ask, said["usage"])
    except (ValueError, LookupError, TypeError, AssertionError) as problem:
        raise WrongError(f"no answer ({problem!r}): {body[:_SHOWN]!r}") from problem
    if texts != [expected.text] * ask.sequences:
        raise WrongError(f"another text than {expected.text[:_SHOWN]!r}: {body[:_SHOWN]!r}")


def _check_usage(ask: Ask, usage: dict[str, int]) -> None:
    assert ask.answer is not None
    tokens_in, tokens_out = ask.answer.tokens_in, ask.answer.tokens_out
    found = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    assert found == (tokens_in, tokens_out, tokens_in + tokens_out), f"usage {found}"


class StreamJudge:
    """Follows a stream, event by event.

    Attributes:
        events: How many there were.
        end: `exact` or `error_event` once it has one; "" before.
    """

    def __init__(self, ask: Ask) -> None:
        assert ask.answer is not None
        self._ask = ask
        self._expected = ask.answer.text
        self._reason = ask.answer.reason
        self._rest = b""
        self._texts = [""] * ask.sequences
        self._ended: set[int] = set()
        self._identities: set[tuple[Any, ...]] = set()
        self._usage = False
        self._done = False
        self._last = b""
        self.events = 0
        self.end = ""

    def feed(self, data: bytes, *, chunk_end: bool) -> None:
        """Look at a piece. WrongError, as soon as it is not what it should be."""
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        if chunk_end and self._rest:
            raise WrongError(f"an event is torn apart by the end of a chunk: {self._rest[:_SHOWN]!r}")
        for block in blocks:
            self._last = block
            self._event(block)

    def finish(self) -> str:
        """How it ended. WrongError, if it did not."""
        if self._rest:
            raise WrongError(f"half an event at the end: {self._rest[:_SHOWN]!r}")
        if self.end == "error_event":
            return self.end
        whole = self._done and all(text == self._expected for text in self._texts)
        if not whole or (self._ask.usage and not self._usage):
            raise WrongError(
                f"cut without a word after {self.events} events, done {self._done}, usage {self._usage}: "
                f"{[text[-80:] for text in self._texts]}, last {self._last[:_SHOWN]!r}"
            )
        self.end = "exact"
        return self.end

    def _event(self, block: bytes) -> None:
        if not block or block.startswith(b":"):
            return
        if self._done:
            raise WrongError(f"an event behind the end: {block[:_SHOWN]!r}")
        lines = dict(line.split(b": ", 1) for line in block.split(b"\n") if b": " in line)
        data = lines.get(b"data", b"")
        if data == b"[DONE]":
            self._done = True
            return
        try:
            fields = json.loads(data)
        except ValueError as error:
            raise WrongError(f"no event: {block[:_SHOWN]!r}") from error
        if self.end:
            raise WrongError(f"an event behind an error: {block[:_SHOWN]!r}")
        if "error" in fields:
            check_error(self._ask, data)
            self.end = "error_event"
            return
        self.events += 1
        try:
            if self._ask.route == MESSAGES:
                self._message(fields, lines.get(b"event", b"").decode())
            else:
                self._chunk(fields)
        except (LookupError, TypeError, AssertionError, ValueError) as problem:
            raise WrongError(f"a wrong event ({problem!r}): {block[:_SHOWN]!r}") from problem

    def _message(self, fields: dict[str, Any], name: str) -> None:
        assert fields["type"] == name
        if name == "content_block_delta":
            self._say(0, fields["delta"]["text"])
        elif name == "message_stop":
            self._done = True

    def _chunk(self, fields: dict[str, Any]) -> None:
        self._identities.add((fields["id"], fields["object"], fields["created"], fields["model"]))
        assert len(self._identities) == 1, f"several streams: {self._identities}"
        if not fields["choices"]:
            assert self._ask.usage, "usage that nobody asked for"
            assert not self._usage, "usage again"
            assert len(self._ended) == self._ask.sequences, "usage before the end"
            self._usage = True
            _check_usage(self._ask, fields["usage"])
            return
        assert not fields.get("usage"), "usage that nobody asked for"
        (choice,) = fields["choices"]
        assert not choice.get("token_ids"), "tokens that nobody asked for"
        assert not fields.get("prompt_token_ids"), "tokens that nobody asked for"
        index = choice["index"]
        assert index not in self._ended, "more of a sequence that has ended"
        if self._ask.route == COMPLETIONS:
            text = choice["text"]
        else:
            text = choice["delta"].get("content") or ""
            if "role" in choice["delta"]:
                assert not self._texts[index], "a second beginning"
        self._say(index, text)
        if choice["finish_reason"] is not None:
            assert choice["finish_reason"] == self._reason
            assert self._texts[index] == self._expected, "an end before the end"
            self._ended.add(index)

    def _say(self, index: int, text: str) -> None:
        self._texts[index] += text
        so_far = self._texts[index]
        assert self._expected.startswith(so_far), f"{so_far[-120:]!r} is not how the answer goes"
