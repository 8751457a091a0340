"""`pilotlight chat`: streaming, waiting, and every way an answer can end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from pilotlight.cli import progress

QUIET_S = progress.QUIET_S
WORDS = [
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
    b'data: {"choices": [{"delta": {"content": "Par"}}]}\n\ndata: {"choices": [{"del',
    b'ta": {"content": "is\xe2\x80\xa8."}, "finish_reason": "stop"}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\n',
]
DONE = b"data: [DONE]\n\n"
ANSWER = "Paris\u2028.\n"


@pytest.fixture
def alpha(gateway, monkeypatch):
    # A busy machine may be slow to answer; nothing is to be said of that where it is not what is tested.
    monkeypatch.setattr(progress, "QUIET_S", 60.0)
    gateway.chat_events = [*WORDS, DONE]
    return gateway.add("alpha")


def test_an_answer_is_printed_as_it_comes(cli, gateway, alpha):
    """Events may be torn anywhere, and U+2028 inside one ends no line."""
    result = cli("chat", "alpha", "Capital of France?", "--system", "Be brief.", "--temperature", "0")
    assert (result.exit_code, result.stdout) == (0, ANSWER)
    (sent,) = gateway.sent("POST", f"/v2/{alpha['id']}/openai/v1/chat/completions")
    assert sent.body == {
        "model": "pilotlight/ember",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Capital of France?"},
        ],
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_json_gives_one_object_with_text_and_usage(cli, alpha):
    shown = json.loads(cli("chat", "alpha", "Hi", "--json").stdout)
    assert shown["content"] == "Paris\u2028."
    assert shown["usage"] == {"prompt_tokens": 9, "completion_tokens": 2}
    assert shown["finish_reason"] == "stop"


def test_a_message_may_be_piped_in(cli, gateway, alpha):
    cli("chat", "alpha", input="from a pipe\n")
    cli("chat", "alpha", "-", input="again")
    bodies = [
        one.body["messages"][0]["content"] for one in gateway.requests if one.path.endswith("completions")
    ]
    assert bodies == ["from a pipe\n", "again"]


def test_a_stream_that_ends_with_an_error_event_keeps_the_words_and_fails(cli, gateway, alpha):
    gateway.chat_events = [
        *WORDS[:3],
        b'data: {"error": {"message": "the engine died", "code": 500}}\n\n',
        DONE,
    ]
    result = cli("chat", "alpha", "Hi")
    assert (result.exit_code, result.stdout) == (1, ANSWER)
    assert result.stderr == "error: the engine died\n"


def test_a_stream_that_is_cut_is_a_failure(cli, gateway, alpha):
    gateway.chat_events = WORDS[:3]
    result = cli("chat", "alpha", "Hi", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert json.loads(result.stderr) == {"error": "the stream ended before the answer was complete"}


def test_a_refusal_shows_the_gateways_reason_and_when_to_try_again(cli, gateway, alpha):
    gateway.chat_status = 429
    result = cli("chat", "alpha", "Hi")
    assert (result.exit_code, result.stderr) == (1, "error: the queue is full (try again in 7 s)\n")


def test_a_sleeping_endpoint_says_what_the_wait_is_for(cli, gateway, alpha, a_worker, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_S", QUIET_S)
    gateway.workers[alpha["id"]] = [a_worker("starting", "importing")]
    gateway.chat_waits_for_polls = 2
    result = cli("chat", "alpha", "Hi")
    assert (result.exit_code, result.stdout) == (0, ANSWER)
    assert result.stderr == "starting: importing\n"


def test_ctrl_c_during_an_answer_ends_with_130_and_no_traceback(spawn, gateway, alpha):
    """1. The answer has begun and stalls. 2. SIGINT. 3. The connection is closed, the words stay, the code is 130."""
    gateway.chat_events = WORDS[:3]
    gateway.chat_blocks = True
    process = spawn("chat", "alpha", "Hi")
    assert process.stdout.read(3) == "Par"
    assert gateway.chat_started.wait(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    # The first is said where the answer was slow to begin.
    assert set(err.split("\n")) <= {"waiting for a worker", "Aborted!", ""}
    assert gateway.client_gone.wait(20)


def test_ctrl_c_while_the_endpoint_wakes_ends_with_130(spawn, gateway, alpha, a_worker):
    gateway.workers[alpha["id"]] = [a_worker("starting", "importing")]
    gateway.chat_waits_for_polls = 1_000
    process = spawn("chat", "alpha", "Hi")
    assert process.stderr.readline() == "starting: importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    for _ in range(1_000):
        gateway.polled.release()


def test_a_reader_that_goes_away_ends_chat_quietly(spawn, gateway, alpha):
    gateway.chat_blocks = True
    gateway.chat_events = WORDS[:2]
    gateway.chat_rest = [*WORDS[2:], DONE]
    process = spawn("chat", "alpha", "Hi")
    assert process.stdout.read(3) == "Par"
    process.stdout.close()
    gateway.release.set()
    assert process.wait(timeout=20) == 141
    assert "Traceback" not in process.stderr.read()


class Terminal:
    """The command on a pseudo-terminal; `expect` reads until a text has appeared."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.end, inner = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from pilotlight.cli import main; main()", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, **environment, "TERM": "xterm"},
        )
        os.close(inner)

    def expect(self, text: str) -> str:
        while text not in self.shown:
            try:
                data = os.read(self.end, 4096)
            except OSError:  # Linux reports the closed other end as EIO
                data = b""
            assert data, f"{text!r} did not come; there was: {self.shown!r}"
            self.shown += data.decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.end)


@pytest.fixture
def terminal(environment):
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(environment, *arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_conversation_remembers_and_can_be_cleared(terminal, gateway, alpha):
    shell = terminal("chat", "alpha", "--system", "Be brief.")
    for line in ("one", "two", "/clear", "three"):
        shell.expect("> ")
        shell.type(f"{line}\n")
        if line != "/clear":
            shell.expect("Paris")
    shell.expect("> ")
    shell.type("\x04")
    assert shell.process.wait(timeout=20) == 0
    roles = [
        [(one["role"], one["content"]) for one in request.body["messages"]]
        for request in gateway.requests
        if request.path.endswith("completions")
    ]
    system, answer = ("system", "Be brief."), ("assistant", ANSWER.removesuffix("\n"))
    assert roles == [
        [system, ("user", "one")],
        [system, ("user", "one"), answer, ("user", "two")],
        [system, ("user", "three")],
    ]


def test_ctrl_c_in_a_conversation_stops_the_answer_and_then_the_conversation(terminal, gateway, alpha):
    """1. SIGINT during an answer: back to the prompt. 2. SIGINT at the prompt: the end, 130."""
    gateway.chat_blocks = True
    gateway.chat_events = WORDS[:2]
    shell = terminal("chat", "alpha")
    shell.expect("> ")
    shell.type("one\n")
    shell.expect("Par")
    shell.process.send_signal(signal.SIGINT)
    shell.expect("stopped")
    assert gateway.client_gone.wait(20)
    shell.expect("> ")
    for _ in range(20):
        # Between its prompt and its wait for a line, readline takes note of a signal and goes on waiting.
        shell.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            shell.process.wait(timeout=1)
            break
    assert shell.process.returncode == 130


def test_an_error_in_a_conversation_does_not_end_it(terminal, gateway, alpha):
    gateway.chat_status = 429
    shell = terminal("chat", "alpha")
    shell.expect("> ")
    shell.type("one\n")
    shell.expect("error: the queue is full")
    shell.expect("> ")
    shell.type("/exit\n")
    assert shell.process.wait(timeout=20) == 0


def test_a_terminal_shows_the_stage_with_seconds_and_no_control_characters_of_the_model(
    terminal, gateway, alpha, a_worker
):
    gateway.workers[alpha["id"]] = [a_worker("starting", "importing")]
    gateway.chat_waits_for_polls = 2
    gateway.chat_events = [
        b'data: {"choices": [{"delta": {"content": "a\\u001b]0;title\\u0007b"}}]}\n\n',
        DONE,
    ]
    shell = terminal("chat", "alpha", "Hi")
    shell.expect("starting: importing (")
    answer = shell.expect("b\r\n")
    assert "]0;title" in answer
    assert "\x1b]0" not in answer
    assert shell.process.wait(timeout=20) == 0
