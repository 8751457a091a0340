"""The bytes of a stream that may have to go on with another worker.

`hide_tokens` takes out what was asked for on its account (`core.continuation`); `failure_at` finds the error
by which vLLM's server ends its streams when its engine dies; `Splice` makes the second stream the rest of the
first. The data path calls them.
"""

from __future__ import annotations

import re

import msgspec

from pilotlight.core.continuation import Continuation

_TOKENS = re.compile(rb'token_ids":\[[\d,]*\]')
_FAILURE = re.compile(rb'^data: \{"error": ?\{.*"code": ?5\d\d\}\}\r?$', re.MULTILINE)
_REST_MAX = 4 * 1024 * 1024
"""Longest unfinished event; vLLM's are a few hundred bytes."""


class SpliceError(Exception):
    """The second stream is not the rest of the first one, as far as that can be seen."""


class _Choice(msgspec.Struct):
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] | msgspec.UnsetType = msgspec.UNSET
    usage: _Usage | None = None
    system_fingerprint: str | None = None


_events = msgspec.json.Decoder(_Event)


def hide_tokens(events: bytes) -> bytes:
    """Whole events as they come from an engine that was not asked for the ids of tokens.

    No text can look like what is replaced: its quotation marks are escaped.
    """
    return _TOKENS.sub(b'token_ids":null', events)


def failure_at(events: bytes) -> int:
    """Where among these whole events the engine reports that it has failed; -1 if it does not."""
    if b'data: {"error"' not in events:
        return -1
    found = _FAILURE.search(events)
    return found.start() if found else -1


class Splice:
    """Turns the stream of a continued completion into the rest of the stream that it continues.

    What it gives has the form that the first engine would have given it, with ids of tokens and one event of
    usage, and is to be handled like that: counted, kept for the next death, hidden where not asked for.

    Args:
        plan: What the second stream was asked with.
    """

    def __init__(self, plan: Continuation) -> None:
        self._plan = plan
        self._rest = b""
        self._replayed = plan.replayed
        self._text = plan.text
        self._begun: tuple[str, list[int]] = ("", [])

    def feed(self, data: bytes) -> bytes:
        """The events of the first stream that these bytes complete; b"" for none.

        Raises:
            SpliceError: They are not what follows.
        """
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > _REST_MAX:
            raise SpliceError(f"an event of more than {_REST_MAX} bytes")
        return b"".join([self._translate(block) for block in blocks])

    def _translate(self, block: bytes) -> bytes:
        if block == b"data: [DONE]" or block.startswith(b'data: {"error"'):
            return block + b"\n\n"
        try:
            event = _events.decode(block.removeprefix(b"data: "))
        except msgspec.DecodeError as error:
            raise SpliceError(f"an unknown event: {error}") from error
        if event.choices is msgspec.UNSET or len(event.choices) > 1:
            raise SpliceError("an unknown event: not one choice")
        if event.choices:
            return self._rest_of(event.choices[0], event.system_fingerprint)
        if event.usage is None:
            raise SpliceError("an unknown event: neither choice nor usage")
        return self._usage(event.usage, event.system_fingerprint)

    def _rest_of(self, choice: _Choice, fingerprint: str | None) -> bytes:
        """The event without what the client has already."""
        again, known = min(len(self._replayed), len(choice.token_ids)), min(len(self._text), len(choice.text))
        if choice.token_ids[:again] != self._replayed[:again] or choice.text[:known] != self._text[:known]:
            raise SpliceError("other tokens than those that were delivered")
        self._replayed, self._text = self._replayed[again:], self._text[known:]
        begun_text, begun_tokens = self._begun
        text, tokens = begun_text + choice.text[known:], begun_tokens + choice.token_ids[again:]
        self._begun = ("", [])
        reason = choice.finish_reason
        if reason is not None and (self._replayed or self._text):
            raise SpliceError("an end before the end of what was delivered")
        if reason is None and (again or known):
            # What remains of an event waits for the next one. By itself it might look like an event of one
            # token, and the next continuation takes these for what they are in an engine's own stream.
            self._begun = (text, tokens)
            return b""
        # As vLLM has it: a chat's choice tells why it stopped only when it has.
        end: dict[str, object] = {"logprobs": None, "finish_reason": reason}
        identity = self._plan.identity
        if not identity.chat or reason is not None:
            end["stop_reason"] = choice.stop_reason
        if not identity.chat:
            end["prompt_token_ids"] = None
        said: dict[str, object] = {"delta": {"content": text}} if identity.chat else {"text": text}
        more = {} if fingerprint is None else {"system_fingerprint": fingerprint}
        return identity.event([{"index": 0, **said, **end, "token_ids": tokens}], **more)

    def _usage(self, usage: _Usage, fingerprint: str | None) -> bytes:
        """The usage of both streams: the prompt of the first, the answer of both."""
        prompt, tokens = len(self._plan.prompt), len(self._plan.kept) + usage.completion_tokens
        counts = {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}
        more = {} if fingerprint is None else {"system_fingerprint": fingerprint}
        return self._plan.identity.event([], usage=counts, **more)
