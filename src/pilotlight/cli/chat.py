"""`pilotlight chat`: ask an endpoint's model, once or in a conversation.

The main thread holds the request, so that Ctrl-C closes its connection, which ends the generation in the
engine.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from pilotlight.cli.output import (
    EndpointArgument,
    JsonOption,
    connect,
    duration,
    note,
    print_json,
    read_stdin,
    write,
)
from pilotlight.cli.progress import watch_start
from pilotlight.cli.targets import find_endpoint
from pilotlight.client import AccessError, PilotlightClient
from pilotlight.errors import NotFoundError, PilotlightError

STDIN_CHARS_MAX = 16 * 1024 * 1024
"""Longest message read from a pipe; the gateway takes bodies of up to 20 MB."""

HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an answer."


@dataclass(slots=True)
class Answer:
    """What one request gave.

    Attributes:
        text: The model's words.
        finish_reason: Why it stopped, as the engine says.
        usage: Token counts, where the engine gave them.
        first_token_s: From the request to the first word; None without one.
        total_s: From the request to the end.
    """

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    first_token_s: float | None = None
    total_s: float = 0.0


@dataclass(slots=True)
class Conversation:
    """Messages so far, and how the next answer is asked for."""

    client: PilotlightClient
    endpoint_id: str
    options: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, message: str, *, show: bool) -> Answer:
        """The model's answer to the next message; both are remembered only if it comes to its end.

        Args:
            message: The user's words.
            show: Write the answer to standard output while it comes.
        """
        asked = {"role": "user", "content": message}
        body = {
            **self.options,
            "messages": [*self.messages, asked],
            "stream_options": {"include_usage": True},
        }
        answer = Answer()
        began = time.monotonic()
        try:
            for text in self._stream(body, answer):
                if answer.first_token_s is None:
                    answer.first_token_s = time.monotonic() - began
                answer.text += text
                if show:
                    write(text)
        finally:
            if show and answer.text and not answer.text.endswith("\n"):
                with contextlib.suppress(BrokenPipeError):
                    write("\n")
        answer.total_s = time.monotonic() - began
        self.messages += [asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _stream(self, body: dict[str, Any], answer: Answer) -> Iterator[str]:
        with (
            watch_start(self.client, self.endpoint_id) as stop_watching,
            self.client.chat(self.endpoint_id, body) as events,
        ):
            for event in events:
                # From now on the answer itself shows that something happens.
                stop_watching()
                answer.usage = event.get("usage") or answer.usage
                for choice in event.get("choices") or []:
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    if text := (choice.get("delta") or {}).get("content"):
                        yield text


def chat_command(
    endpoint: EndpointArgument,
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="MESSAGE", help="What to ask; - reads it from standard input.", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 gives the likeliest words.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model.  [default: the endpoint's first]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to an endpoint's model.

    With a MESSAGE, or one piped in, prints the answer and ends; otherwise holds a conversation. An endpoint
    without workers is woken, and standard error says what the wait is for.

    Examples:
      pilotlight chat qwen "What is 2 plus 3?"
      pilotlight chat qwen --system "Answer in French."
      git diff | pilotlight chat qwen --system "Review this change." -
    """
    interactive = message is None and sys.stdin.isatty()
    if interactive and as_json:
        raise typer.BadParameter("a conversation has no end to print; give a MESSAGE", param_hint="--json")
    if not interactive and message in {None, "-"}:
        message = read_stdin(STDIN_CHARS_MAX, param_hint="MESSAGE")
    if not interactive and not (message or "").strip():
        raise typer.BadParameter("it is empty", param_hint="MESSAGE")
    with connect() as client:
        endpoint_id, served = _find(client, endpoint)
        given = {"model": model or served, "max_tokens": max_tokens, "temperature": temperature}
        options = {name: value for name, value in given.items() if value is not None}
        conversation = Conversation(client, endpoint_id, options, _opening(system))
        if message is None:
            _converse(conversation, _opening(system))
            return
        answer = conversation.ask(message, show=not as_json)
    if as_json:
        print_json(
            {
                "endpoint_id": endpoint_id,
                "model": options["model"],
                "content": answer.text,
                "finish_reason": answer.finish_reason,
                "usage": answer.usage,
                "first_token_ms": None
                if answer.first_token_s is None
                else round(answer.first_token_s * 1000),
                "total_ms": round(answer.total_s * 1000),
            }
        )
    elif answer.finish_reason == "length":
        note("(the answer was cut at the token limit)")


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _find(client: PilotlightClient, reference: str) -> tuple[str, str]:
    """Id of the endpoint and the model name to ask for; a run-only key may not list endpoints, but models."""
    try:
        found = find_endpoint(client, reference)
    except AccessError:
        names = client.model_names(reference)
        if not names:
            raise NotFoundError(f"the endpoint {reference!r} names no model; give one with --model") from None
        return reference, names[0]
    return found["id"], next(iter(found.get("served_names") or [found.get("model", "")]))


def _converse(conversation: Conversation, opening: list[dict[str, str]]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - gives input() a history and line editing

    note(HELP)
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            write("\n")
            return
        if message in {"/exit", "/quit"}:
            return
        if message == "/clear":
            conversation.messages = list(opening)
        elif message in {"/help", "/?"}:
            note(HELP)
        elif message:
            _exchange(conversation, message)


def _exchange(conversation: Conversation, message: str) -> None:
    """One question within a conversation: neither an error nor Ctrl-C ends the conversation."""
    try:
        answer = conversation.ask(message, show=True)
    except PilotlightError as error:
        note(f"error: {error}")
    except KeyboardInterrupt:
        note("(stopped; this exchange is forgotten)")
    else:
        if answer.finish_reason == "length":
            note("(the answer was cut at the token limit)")
        if answer.first_token_s is not None and answer.first_token_s >= 1:
            note(f"(first word after {duration(answer.first_token_s)})")
