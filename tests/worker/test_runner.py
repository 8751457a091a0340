"""Jobs against an engine process, without a platform: vllm-worker.md §1.4, §1.7, §1.10, §1.11, §2.4, §3.7, §10."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.worker.old_inputs import OldInput, load_old_inputs

from pilotlight.worker import runner as runner_module
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.engine import Engine, spawn
from pilotlight.worker.log import LogSink
from pilotlight.worker.notices import Notices
from pilotlight.worker.platform import TakenJob
from pilotlight.worker.runner import JobFailedError, JobRunner

CHAT = [{"role": "user", "content": "one two three"}]
OLD = load_old_inputs("org/model")


class Bench:
    """An engine process, and what a worker does with it."""

    def __init__(self, engine: Engine, record: Path, log: Path) -> None:
        self.engine = engine
        self._record = record
        self._log_path = log
        self._sink = LogSink(log.open("wb"))
        self.fatal = asyncio.Event()

    def runner(self, **variables: str) -> JobRunner:
        environment = {
            "MODEL_NAME": "org/model",
            "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/take",
            **variables,
        }
        config = WorkerConfig.from_environment(environment, python=sys.executable)
        return JobRunner(config, self.engine, Notices(self._sink), self.fatal.set)

    async def run(
        self, job_input: Any, post: Callable[[Any], Awaitable[None]] | None = None, **variables: str
    ) -> Any:
        """The output of one job."""
        return await self.items(self.runner(**variables), job_input, post)

    async def items(
        self, runner: JobRunner, job_input: Any, post: Callable[[Any], Awaitable[None]] | None = None
    ) -> Any:
        async def drop(item: Any) -> None:
            pass

        items = await runner.run(TakenJob("j1", {"id": "j1", "input": job_input}), post or drop)
        return msgspec.json.decode(msgspec.json.encode(items))

    async def failure(self, job_input: Any, **variables: str) -> dict[str, Any]:
        with pytest.raises(JobFailedError) as caught:
            await self.run(job_input, **variables)
        error: dict[str, Any] = json.loads(caught.value.text)["error"]
        return error

    def seen(self, path: str) -> list[dict[str, Any]]:
        """Bodies that the engine got."""
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        entries = [json.loads(line) for line in lines]
        return [entry["body"] for entry in entries if entry["what"] == "request" and entry["path"] == path]

    def headers(self, path: str) -> list[dict[str, str]]:
        """Headers that the engine got."""
        entries = [json.loads(line) for line in self._record.read_text().splitlines()]
        return [entry["headers"] for entry in entries if entry["what"] == "request" and entry["path"] == path]

    def aborted(self) -> bool:
        return '"aborted"' in self._record.read_text()

    def logged(self) -> list[dict[str, Any]]:
        self._sink.close()
        return [json.loads(line) for line in self._log_path.read_text().splitlines()]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Bench]]]:
    """Starts an engine process with the given variables."""
    started: list[Engine] = []
    folder = Path(tempfile.mkdtemp(prefix="pl-"))

    async def start(**variables: str) -> Bench:
        record = tmp_path / "engine.jsonl"
        # Its own: the end of an engine is the end of every process that carries its key.
        key = uuid.uuid4().hex
        environment = {
            **os.environ, "VLLM_API_KEY": key, "FAKE_ENGINE_RECORD": str(record), **variables,
        }  # fmt: skip
        path = folder / "engine.sock"
        command = [sys.executable, "-m", "pilotlight.testing.fake_engine", "--model", "org/model"]
        command += ["--uds", str(path)]
        engine = Engine(command=command, socket_path=path, key=key, on_line=lambda _: None)
        started.append(engine)
        await engine.start(partial(spawn, command, environment))
        async with asyncio.timeout(20):
            while not await engine.healthy():
                await asyncio.sleep(0.01)
        return Bench(engine, record, tmp_path / "worker.log")

    yield start
    for engine in started:
        await engine.stop(term_seconds=0)
    shutil.rmtree(folder, ignore_errors=True)


Start = Callable[..., Awaitable[Bench]]


async def test_the_older_workers_own_inputs_are_answered(bench: Start) -> None:
    """Both documented styles, unchanged, streaming and not; the engine knows no `/v1/responses`."""
    it = await bench()
    for old in OLD:
        if "responses" in old.input.get("openai_route", ""):
            continue
        output = await it.run(old.input)
        assert output, old.name
        assert _words(old, output), old.name


def _words(old: OldInput, output: list[Any]) -> Any:
    """What its reader of the time finds."""
    if old.style == "native":
        return "".join("".join(item["choices"][0]["tokens"]) for item in output)
    if old.streamed:
        assert "".join(output).endswith("data: [DONE]\n\n")
        return "".join(output)
    (answer,) = output
    if "data" in answer:
        return answer["data"]
    if "content" in answer:
        return answer["content"]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("split", ["1", "3", "7"])
async def test_streams_in_small_pieces_with_comments_come_out_whole(bench: Start, split: str) -> None:
    """§10 point 4, through a socket."""
    it = await bench(FAKE_ENGINE_SPLIT_BYTES=split, FAKE_ENGINE_NO_DONE="1")
    text = "größe 漢字 🎈 x"
    output = await it.run({"messages": [{"role": "user", "content": text}], "stream": True})
    assert "".join("".join(item["choices"][0]["tokens"]) for item in output) == text
    body = {"messages": [{"role": "user", "content": text}], "stream": True}
    joined = "".join(await it.run({"openai_input": body}))
    assert "keep-alive" not in joined
    assert "[DONE]" not in joined
    chunks = [json.loads(event[6:]) for event in joined.split("\n\n") if event]
    assert "".join(choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]) == text


async def test_an_item_that_waits_is_flushed_when_the_stream_pauses(bench: Start, tmp_path: Path) -> None:
    """§2.4: off the schedule only when time passes without tokens."""
    hold = tmp_path / "go"
    it = await bench(FAKE_ENGINE_HOLD_FILE=str(hold))
    got: list[Any] = []

    async def post(item: Any) -> None:
        got.append(item)
        # The stream is held after its first event: only the flush can have brought this.
        hold.touch()

    job_input = {"prompt": "count to 6", "stream": True, "min_batch_size": 2}
    output = await it.run(job_input, post, STREAM_FLUSH_INTERVAL_MS="20")
    assert len(output[0]["choices"][0]["tokens"]) == 1
    assert "".join("".join(item["choices"][0]["tokens"]) for item in output) == " 1 2 3 4 5 6"
    assert len(got) == len(output)


async def test_best_of_and_beams_against_an_engine(bench: Start) -> None:
    """§1.7: the best is the likeliest; the engine's words are less likely the longer they are."""
    it = await bench()
    prompt = "pick one aaaa b ccc"
    best = await it.run({"prompt": prompt, "stream": True, "sampling_params": {"n": 2, "best_of": 3}})
    assert [choice["tokens"] for item in best for choice in item["choices"]] == [["b"], ["ccc"]]
    assert best[0]["usage"]["kept_tokens"] == 2
    assert best[0]["usage"]["output"] == 3
    chat = await it.run({"openai_input": {"messages": [{"role": "user", "content": prompt}], "best_of": 3}})
    assert chat[0]["choices"][0]["message"]["content"] == "b"
    beams = await it.run({"prompt": prompt, "use_beam_search": True, "best_of": 3, "stream": True})
    assert [choice["tokens"] for item in beams for choice in item["choices"]] == [["b"]]
    assert [body["n"] for body in it.seen("/v1/completions")] == [3, 3]
    assert it.seen("/v1/chat/completions")[0]["n"] == 3


async def test_raw_chats_go_through_the_template_alone(bench: Start) -> None:
    """§1.4, §8 A7."""
    it = await bench()
    output = await it.run({"messages": CHAT, "sampling_params": {"max_tokens": None}}, NATIVE_CHAT_MODE="raw")
    assert output[0]["object"] == "chat.completion"
    assert output[0]["choices"][0]["message"] == {"role": "assistant", "content": "one two three"}
    assert output[0]["choices"][0]["tokens"] == ["one two three"]
    assert it.seen("/tokenize")[-1] == {"messages": CHAT}
    (body,) = it.seen("/v1/completions")
    assert len(body["prompt"]) == 3
    assert body["max_tokens"] == 1024
    streamed = await it.run({"messages": CHAT, "stream": True}, NATIVE_CHAT_MODE="raw")
    assert "".join("".join(item["choices"][0]["tokens"]) for item in streamed) == "one two three"


async def test_no_limit_of_tokens_means_the_whole_context(bench: Start) -> None:
    """§1.6 rule 3: the completions route itself would stop after 16 tokens. Asked of the engine once."""
    it = await bench()
    runner = it.runner(DEFAULT_MAX_TOKENS="auto")
    for _ in range(2):
        output = await it.items(runner, {"prompt": "count to 40"})
        assert output[0]["usage"]["output"] == 40
    assert [body["max_tokens"] for body in it.seen("/v1/completions")] == [1024, 1024]


async def test_answers_that_are_not_json(bench: Start) -> None:
    """§1.10 rule 6."""
    it = await bench()
    assert await it.run({"route": "/health"}) == [{}]
    assert "vllm:num_requests_running" in (await it.run({"openai_route": "/metrics"}))[0]


async def test_a_file_is_sent_as_a_form(bench: Start) -> None:
    """§1.10 rule 5."""
    it = await bench()
    file = {"filename": "a.wav", "content_base64": "AAAA", "content_type": "audio/wav"}
    body = {"file": file, "language": "de", "timestamp_granularities": ["word"]}
    (answer,) = await it.run({"route": "/v1/audio/transcriptions", "body": body})
    assert json.loads(answer["text"]) == {
        "filename": "a.wav", "type": "audio/wav", "bytes": 3,
        "fields": [["language", "de"], ["timestamp_granularities[]", "word"]],
    }  # fmt: skip
    error = await it.failure({"route": "/v1/audio/transcriptions", "body": {"file": "x"}})
    assert (error["code"], error["param"]) == (400, "file")


async def test_refusals_of_the_engine_keep_their_words(bench: Start) -> None:
    """§1.11."""
    it = await bench()
    error = await it.failure({"prompt": "x", "sampling_params": {"max_tokens": 2000}})
    assert (error["code"], error["type"], error["retryable"]) == (400, "BadRequestError", False)
    assert "max_model_len=1024" in error["message"]
    error = await it.failure({"prompt": "x", "model": "other"})
    assert (error["code"], error["type"]) == (404, "NotFoundError")


async def test_a_failure_inside_a_stream_ends_the_job_after_what_was_said(bench: Start) -> None:
    """§3.7, §10 point 4."""
    it = await bench(FAKE_ENGINE_ERROR_AFTER_EVENTS="2")
    got: list[Any] = []

    async def post(item: Any) -> None:
        got.append(msgspec.json.decode(item))

    with pytest.raises(JobFailedError, match="boom"):
        await it.run({"prompt": "a b c d", "stream": True, "min_batch_size": 3}, post)
    assert [item["choices"][0]["tokens"] for item in got] == [["a", " b"]]
    got.clear()
    with pytest.raises(JobFailedError, match="boom"):
        await it.run({"openai_input": {"messages": CHAT, "stream": True}}, post)
    assert "".join(got).endswith("data: [DONE]\n\n")
    assert '"boom"' in "".join(got)


@pytest.mark.parametrize(
    ("said", "fatal"),
    [("EngineCore encountered an issue. See stack trace (above) for the root cause.", True), ("boom", False)],
)
async def test_an_engine_that_reports_its_death_inside_a_stream_asks_for_another_worker(
    bench: Start, said: str, fatal: bool
) -> None:
    """§7 fatal texts: the status of such a stream was 200, the failure is a 500 all the same."""
    it = await bench(FAKE_ENGINE_ERROR_AFTER_EVENTS="2", FAKE_ENGINE_ERROR_TEXT=said)
    for job_input in (
        {"prompt": "a b c d", "stream": True},
        {"openai_input": {"messages": CHAT, "stream": True}},
    ):
        it.fatal.clear()
        error = await it.failure(job_input)
        assert (error["code"], error["retryable"]) == ((503, True) if fatal else (500, False))
        assert it.fatal.is_set() is fatal


async def test_headers_are_never_taken_from_the_job(bench: Start) -> None:
    """§1.10 rule 2."""
    it = await bench()
    given = {"Authorization": "Bearer theirs", "X-Own": "1"}
    for job_input in (
        {"route": "/v1/completions", "body": {"prompt": "x", "headers": given}, "headers": given},
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "x"}, "headers": given},
        {"prompt": "x", "headers": given, "sampling_params": {"headers": given, "extra_headers": given}},
    ):
        assert await it.run(job_input)
    seen = it.headers("/v1/completions")
    assert len(seen) == 3
    for headers in seen:
        assert "X-Own" not in headers
        assert headers["Authorization"] == f"Bearer {it.engine.key}"


async def test_an_engine_that_dies_inside_a_stream_asks_for_another_worker(bench: Start) -> None:
    """§1.11, §7."""
    it = await bench(FAKE_ENGINE_EXIT_AFTER_EVENTS="2")
    error = await it.failure({"prompt": "a b c d", "stream": True})
    assert (error["code"], error["type"], error["retryable"]) == (503, "ServiceUnavailable", True)
    error = await it.failure({"prompt": "a b c d"})
    assert (error["code"], error["retryable"]) == (503, True)


async def test_a_request_that_runs_too_long_is_aborted(bench: Start, tmp_path: Path) -> None:
    """§1.11, §7: 504, and the sequence is freed."""
    it = await bench(FAKE_ENGINE_HOLD_WHOLE_FILE=str(tmp_path / "never"))
    error = await it.failure({"prompt": "x y"}, REQUEST_TIMEOUT="1")
    assert (error["code"], error["type"], error["retryable"]) == (504, "TimeoutError", False)
    async with asyncio.timeout(10):
        while not it.aborted():
            await asyncio.sleep(0.01)


async def test_results_over_the_limit_are_a_413(bench: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """§1.11, §3.1."""
    it = await bench()
    monkeypatch.setattr(runner_module, "RESULT_BYTES_MAX", 600)
    for job_input in ({"prompt": "count to 300", "max_tokens": 300},
                      {"prompt": "count to 300", "max_tokens": 300, "stream": True}):  # fmt: skip
        error = await it.failure(job_input)
        assert (error["code"], error["type"]) == (413, "PayloadTooLarge")
        assert "600 bytes" in error["message"]


async def test_a_long_answer_that_was_not_streamed_is_in_the_result_only(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """§3.1: a chunk may have 1 MB, a result 20."""
    it = await bench()
    monkeypatch.setattr(runner_module, "CHUNK_BYTES_MAX", 600)
    got: list[Any] = []

    async def post(item: Any) -> None:
        got.append(item)

    output = await it.run({"prompt": "count to 300", "max_tokens": 300}, post)
    assert (len(output), got) == (1, [])
    await it.run({"prompt": "x"}, post)
    assert len(got) == 1


async def test_an_item_of_a_stream_is_cut_where_that_is_possible_and_refused_where_not(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """§3.1, §1.11: an item of 1 MB at most, whatever the job asked for."""
    it = await bench()
    monkeypatch.setattr(runner_module, "CHUNK_BYTES_MAX", 1000)
    got: list[Any] = []

    async def post(item: Any) -> None:
        got.append(item)

    many = {"max_batch_size": 1e8, "min_batch_size": 1e8, "stream": True}
    output = await it.run({"prompt": "count to 300", "max_tokens": 300, **many}, post)
    assert len(got) == len(output) > 1
    assert all(len(bytes(item)) <= 1000 for item in got)
    assert "".join("".join(item["choices"][0]["tokens"]) for item in output).split()[-1] == "300"
    for job_input in (
        {"prompt": "y" * 1000, **many},
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "y" * 1000, "stream": True}},
        {"prompt": ["x"] * 100, **many},
    ):
        error = await it.failure(job_input)
        assert (error["code"], error["type"]) == (413, "PayloadTooLarge")
        assert "cannot be cut to 1000" in error["message"]


async def test_a_buffered_stream_reaches_its_readers_whatever_its_size(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """§1.7, §3.1: more than one item where one would be too large."""
    it = await bench()
    monkeypatch.setattr(runner_module, "CHUNK_BYTES_MAX", 600)
    got: list[Any] = []

    async def post(item: Any) -> None:
        got.append(msgspec.json.decode(item))

    prompt = "pick one " + " ".join(letter * 200 for letter in "abcd")
    body = {"prompt": prompt, "best_of": 4, "n": 3, "stream": True}
    output = await it.run({"openai_route": "/v1/completions", "openai_input": body}, post)
    assert got == output
    assert len(got) == 3
    assert got[-1].endswith("data: [DONE]\n\n")


async def test_an_input_that_is_nested_too_deeply_is_a_400(bench: Start) -> None:
    it = await bench()
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for job_input in (
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "x", "deep": deep}},
        {"prompt": "x", "sampling_params": {"vllm_xargs": {"a": deep}}},
    ):
        error = await it.failure(job_input)
        assert (error["code"], error["type"]) == (400, "BadRequestError")
        assert "nested too deeply" in error["message"]


async def test_parameters_without_effect_are_said_once_per_worker(bench: Start) -> None:
    """§8 A14: neither values nor long names get into the log."""
    it = await bench()
    runner = it.runner()
    for value in ("secret one", "secret two"):
        sampling = {"made_up": value, "x" * 5000: 1, "length_penalty": 0.5}
        assert await it.items(runner, {"prompt": "x", "sampling_params": sampling})
    notices = [line for line in it.logged() if line["event"] == "job.parameter_ignored"]
    assert [line["parameter"] for line in notices] == ["made_up", "x" * 80, "length_penalty"]
    assert "secret" not in json.dumps(notices)


async def test_bad_inputs_never_reach_the_engine(bench: Start) -> None:
    it = await bench()
    for job_input in (None, {}, {"prompt": ""}, {"route": "//h"}, {"prompt": "x", "logits_processors": []}):
        assert (await it.failure(job_input))["code"] == 400
    assert (await it.failure({"prompt": "x", "sampling_params": {"mine": 1}}, STRICT_PARAMS="1"))[
        "param"
    ] == "mine"
    error = await it.failure({"openai_route": "/v1/messages", "openai_input": {"a": 1}, "max_batch_size": -1})
    assert error == {
        "type": "BadRequestError", "code": 400, "retryable": False,
        "message": "max_batch_size must be a number that is not negative, not -1",
    }  # fmt: skip
    assert it.seen("/v1/completions") == []
