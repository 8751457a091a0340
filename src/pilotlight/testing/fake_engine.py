"""A small program that stands in for vLLM's API server and misbehaves on request.

`python -m pilotlight.testing.fake_engine --uds PATH [--model M] [--served-model-name N…]` takes the arguments
of the real one (the rest is ignored), asks for `VLLM_API_KEY` under `/v1`, prints the log lines by which the
stages of a start are recognised, and answers by repeating what it is told, one word per token. A prompt
`count to N` is answered with N words, `count NAME to N` with N words in which the name is, `pick one A B …`
with one of the words, each sequence with another. The longer a word, the less likely it is. Answers depend on
the request alone. A stream tells its tokens where it is asked to (`return_token_ids`), and goes on from where
another one ended when it is given the tokens of its prompt and of its words (`fake_tokens`).

With `VLLM_SERVER_DEV_MODE=1` it sleeps and wakes up as vLLM does: what is asked while it sleeps waits, and
weights that it gave up (level 2) are nonsense until they are read again.

Misbehaviour by request: see `fake_trouble`. By environment:

| variable | effect |
|---|---|
| `FAKE_ENGINE_FAIL_TEXT` | prints this text and exits 1 while "loading" |
| `FAKE_ENGINE_LOAD_FILE` | loading lasts until this file exists |
| `FAKE_ENGINE_START_SECONDS` | loading lasts so long |
| `FAKE_ENGINE_HOLD_FILE` | a stream stops after its first event until this file exists |
| `FAKE_ENGINE_HOLD_WHOLE_FILE` | other answers wait until this file exists (one token: at once) |
| `FAKE_ENGINE_EVENT_SECONDS` | pause between two events of a stream |
| `FAKE_ENGINE_SPLIT_BYTES` | a stream comes in pieces of so many bytes, a comment before each event |
| `FAKE_ENGINE_NO_DONE` | a stream ends without `[DONE]` |
| `FAKE_ENGINE_EXIT_AFTER_EVENTS` | dies in the middle of a stream after so many events |
| `FAKE_ENGINE_ERROR_AFTER_EVENTS` | reports an error inside the stream after so many events |
| `FAKE_ENGINE_ERROR_TEXT` | in these words |
| `FAKE_ENGINE_FATAL_TEXT` | answers every request but those for one token with a 500 that holds this text |
| `FAKE_ENGINE_WARM_UP` | requests for one token: `hang` = no answer, `die` = no answer, and it ends |
| `FAKE_ENGINE_HEALTH_HANGS` | does not answer questions for its health |
| `FAKE_ENGINE_SICK_FILE` | is not healthy while this file exists |
| `FAKE_ENGINE_FITS_AT` | with this `--gpu-memory-utilization` `FAKE_ENGINE_FAIL_TEXT` has no effect |
| `FAKE_ENGINE_CONCURRENCY` | says that it has memory for so many requests of full length |
| `FAKE_ENGINE_IGNORE_SIGTERM` | does not end on SIGTERM |
| `FAKE_ENGINE_STRAY_FILE` | starts a child in a session of its own and writes its pid there |
| `FAKE_ENGINE_SLEEPLESS` | fails to fall asleep |
| `FAKE_ENGINE_RECORD` | appends one JSON line per happening to this file |
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from pilotlight.testing.fake_tokens import answer_tokens, prompt_tokens, read_prompt
from pilotlight.testing.fake_trouble import Trouble

VERSION = "0.32.0"


def main(argv: list[str]) -> int:
    """The exit code of one life."""
    parser = argparse.ArgumentParser(prog="fake_engine", allow_abbrev=False)
    parser.add_argument("--uds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="fake/model")
    parser.add_argument("--served-model-name", nargs="+", default=[])
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", default="")
    options, _ = parser.parse_known_args(argv)
    return asyncio.run(FakeEngine(options).serve())


class FakeEngine:
    """The server; `options` are the parsed arguments."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._names: list[str] = options.served_model_name or [options.model]
        self._key = os.environ.get("VLLM_API_KEY", "")
        self._record_path = os.environ.get("FAKE_ENGINE_RECORD")
        self._running = 0
        self._stop = asyncio.Event()
        self._asleep: set[str] = set()
        self._awake = asyncio.Event()
        self._awake.set()
        self._forgotten = False

    async def serve(self) -> int:
        """Starts, serves until SIGTERM, ends."""
        loop = asyncio.get_running_loop()
        ignore = bool(os.environ.get("FAKE_ENGINE_IGNORE_SIGTERM"))
        loop.add_signal_handler(signal.SIGTERM, self._on_term, ignore)
        self._record("start", argv=sys.argv[1:], environment=sorted(os.environ))
        _log("APIServer", f"[api_utils.py:347] version {VERSION}")
        if not await self._load():
            return 1
        app = web.Application(client_max_size=64 * 1024 * 1024, middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/audio/transcriptions", self._transcribe)
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            app.router.add_post("/sleep", self._sleep)
            app.router.add_post("/wake_up", self._wake_up)
            app.router.add_get("/is_sleeping", self._is_sleeping)
            app.router.add_post("/collective_rpc", self._collective_rpc)
            app.router.add_post("/reset_prefix_cache", self._reset_prefix_cache)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=5)
        await runner.setup()
        if self._options.uds:
            site: web.BaseSite = web.UnixSite(runner, self._options.uds)
        else:
            site = web.TCPSite(runner, self._options.host, self._options.port)
        _log("APIServer", f"[entry.py:140] Starting vLLM server on {self._options.uds}")
        await site.start()
        _say("INFO:     Application startup complete.")
        await self._stop.wait()
        await runner.cleanup()
        return 0

    def _on_term(self, ignore: bool) -> None:
        self._record("sigterm")
        if not ignore:
            self._stop.set()

    async def _load(self) -> bool:
        """Plays the start of a real engine; False if it fails."""
        _log("Worker", "[cpu_model_runner.py:68] Starting to load model x...")
        if stray_file := os.environ.get("FAKE_ENGINE_STRAY_FILE"):
            command = [sys.executable, "-c", "import time; time.sleep(600)"]
            child = subprocess.Popen(command, start_new_session=True)  # noqa: ASYNC220
            _write(stray_file, str(child.pid))
        await asyncio.sleep(float(os.environ.get("FAKE_ENGINE_START_SECONDS", "0")))
        await _until_exists(os.environ.get("FAKE_ENGINE_LOAD_FILE"))
        fits = self._options.gpu_memory_utilization == os.environ.get("FAKE_ENGINE_FITS_AT", "nowhere")
        if not fits and (text := os.environ.get("FAKE_ENGINE_FAIL_TEXT")):
            _say(text)
            return False
        _log("Worker", "[default_loader.py:501] Loading weights took 0.00 seconds")
        if concurrency := os.environ.get("FAKE_ENGINE_CONCURRENCY"):
            text = f"Maximum concurrency for 1,024 tokens per request: {float(concurrency):.2f}x"
            _log("EngineCore", f"[kv_cache_utils.py:2327] CPU KV cache size: 8,192 tokens, {text}")
        return True

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Asks for the key only where vLLM does: under some prefixes."""
        guarded = request.path.startswith(("/v1", "/v2"))
        if guarded and self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _health(self, _: web.Request) -> web.Response:
        if os.environ.get("FAKE_ENGINE_HEALTH_HANGS"):
            self._record("health")
            await asyncio.Event().wait()
        sick = os.path.exists(os.environ.get("FAKE_ENGINE_SICK_FILE", ""))  # noqa: ASYNC240, PTH110 - for tests
        return web.Response(status=503 if sick else 200)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=f"vllm:num_requests_running {self._running}\n")

    async def _models(self, _: web.Request) -> web.Response:
        data = [
            {
                "id": name, "object": "model", "owned_by": "vllm", "root": self._options.model,
                "max_model_len": self._options.max_model_len,
            }
            for name in self._names
        ]  # fmt: skip
        return web.json_response({"object": "list", "data": data})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._record("request", path=request.path, body=body)
        tokens = prompt_tokens(_chat_text(body) if "messages" in body else str(body.get("prompt", "")))
        limit = self._options.max_model_len
        return web.json_response({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

    async def _transcribe(self, request: web.Request) -> web.Response:
        """Tells what it was sent."""
        form = await request.post()
        file = form["file"]
        assert isinstance(file, web.FileField)
        fields = [[name, value] for name, value in form.items() if name != "file"]
        about = {"filename": file.filename, "type": file.content_type, "bytes": len(file.file.read())}
        return web.json_response({"text": json.dumps({**about, "fields": fields})})

    async def _sleep(self, request: web.Request) -> web.Response:
        level = int(request.query.get("level", "1"))
        self._record("sleep", level=level)
        if os.environ.get("FAKE_ENGINE_SLEEPLESS"):
            return _error(500, "no memory to keep the weights in", kind="InternalServerError")
        self._awake.clear()
        self._asleep = {"weights", "kv_cache"}
        self._forgotten = level == 2
        return web.json_response({"status": "sleeping", "level": level})

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = request.query.getall("tags", [])
        self._record("wake_up", tags=tags)
        self._asleep -= set(tags or self._asleep)
        if not self._asleep:
            self._awake.set()
        return web.json_response({"status": "sleeping" if self._asleep else "awake", "tags": tags or None})

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": bool(self._asleep)})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        method = (await request.json())["method"]
        self._record("collective_rpc", method=method)
        if method != "reload_weights" or "weights" in self._asleep:
            return _error(500, f"{method} failed", kind="InternalServerError")
        self._forgotten = False
        return web.json_response({"results": [None]})

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        self._record("reset_prefix_cache")
        return web.json_response({"success": True})

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        """Anthropic's form, named events when streaming."""
        body = await request.json()
        self._record("request", path=request.path, body=body)
        words = _reply(_chat_text(body))[: body.get("max_tokens") or None]
        message = {"id": _id("msg", body), "type": "message", "role": "assistant", "model": self._names[0]}
        if not body.get("stream"):
            return web.json_response({**message, "content": [{"type": "text", "text": "".join(words)}]})
        response = await _open_stream(request)
        events = [("message_start", {"type": "message_start", "message": message})]
        events += [
            ("content_block_delta", {"type": "content_block_delta", "delta": {"text": word}})
            for word in words
        ]
        for name, data in [*events, ("message_stop", {"type": "message_stop"})]:
            await response.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
        await response.write_eof()
        return response

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
        except ValueError:
            return _error(400, "JSON decode error")
        self._record("request", path=request.path, body=body, headers=dict(request.headers))
        chat = request.path.endswith("/chat/completions")
        if body.get("max_tokens") == 1:
            await self._warm_up(request, os.environ.get("FAKE_ENGINE_WARM_UP"))
        if (text := os.environ.get("FAKE_ENGINE_FATAL_TEXT")) and body.get("max_tokens") != 1:
            return _error(500, text, kind="InternalServerError")
        problem = self._problem(body, chat=chat)
        if problem is not None:
            return problem
        self._running += 1
        try:
            await self._awake.wait()
            trouble = Trouble.of(body)
            if (answer := await trouble.before(request)) is not None:
                return answer
            if body.get("stream"):
                return await self._stream(request, body, trouble, chat=chat)
            # A request for one token is a worker warming up.
            if body.get("max_tokens") != 1:
                await _until_exists(os.environ.get("FAKE_ENGINE_HOLD_WHOLE_FILE"))
            return web.json_response(self._answer(body, chat=chat))
        except asyncio.CancelledError:
            self._record("aborted", request_id=body.get("request_id"))
            raise
        finally:
            self._running -= 1

    def _problem(self, body: dict[str, Any], *, chat: bool) -> web.Response | None:
        model = body.get("model")
        if model is not None and model not in self._names:
            return _error(404, f"The model `{model}` does not exist.", kind="NotFoundError")
        if chat and not isinstance(body.get("messages"), list):
            return _error(400, "messages must be a list")
        problem = _sampling_problem(body, chat=chat)
        if problem:
            return _error(400, problem)
        longest = self._options.max_model_len
        if (body.get("max_tokens") or 0) > longest:
            return _error(
                400, f"max_tokens={body['max_tokens']} cannot be greater than max_model_len={longest}."
            )
        limit, least = _limit(body, chat=chat) or longest, body.get("min_tokens") or 0
        if least > limit:
            return _error(400, f"min_tokens must be less than or equal to max_tokens={limit}, got {least}.")
        try:
            self._sequences(body, chat=chat)
        except ValueError as error:
            return _error(400, str(error))
        return None

    def _sequences(self, body: dict[str, Any], *, chat: bool) -> tuple[list[list[int]], list[list[str]]]:
        """Tokens of the prompts, and the words of every sequence, prompt-major.

        Raises:
            ValueError: A prompt is no beginning of anything.
        """
        prompt = _chat_text(body) if chat else body.get("prompt", "")
        parts = prompt if isinstance(prompt, list) else [prompt]
        if parts and all(isinstance(part, int) for part in parts):
            parts = [parts]
        prompts = [part if isinstance(part, list) else prompt_tokens(str(part)) for part in parts]
        limit = _limit(body, chat=chat)
        n = body.get("n") or 1
        if self._forgotten:
            return prompts, [["!"] for _ in prompts for _ in range(n)]
        sequences = []
        for part in parts:
            text, done = read_prompt(part) if isinstance(part, list) else (str(part), 0)
            group = [_reply(text, index)[done:][:limit] for index in range(n)]
            sequences += sorted(group, key=_score, reverse=True) if body.get("use_beam_search") else group
        return prompts, sequences

    def _answer(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        prompts, sequences = self._sequences(body, chat=chat)
        choices = []
        # On the completions route 0 asks for the sampled tokens' own.
        asked = body.get("logprobs") if chat else body.get("logprobs") is not None
        for index, words in enumerate(sequences):
            text = "".join(words)
            content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            logprobs = _logprobs(words, chat=chat) if asked else None
            choices.append(
                {
                    "index": index,
                    **content,
                    "logprobs": logprobs,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            )
        head = self._head(body, "chat.completion" if chat else "text_completion")
        return {**head, "choices": choices, "usage": _usage(prompts, sequences)}

    def _head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        model = body.get("model") or self._names[0]
        return {"id": _id("cmpl", body), "object": kind, "created": 1_700_000_000, "model": model}

    async def _warm_up(self, request: web.Request, misbehaviour: str | None) -> None:
        if misbehaviour == "hang":
            await asyncio.Event().wait()
        if misbehaviour == "die":
            # As a large process dies: its connections break before it is gone.
            _say(
                "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device"
            )
            Path(self._options.uds).unlink()  # noqa: ASYNC240 - for tests
            assert request.transport is not None
            request.transport.abort()
            asyncio.get_running_loop().call_later(0.2, os._exit, 1)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], trouble: Trouble, *, chat: bool
    ) -> web.StreamResponse:
        response = await _open_stream(request)
        exit_after = int(os.environ.get("FAKE_ENGINE_EXIT_AFTER_EVENTS", "0"))
        error_after = int(os.environ.get("FAKE_ENGINE_ERROR_AFTER_EVENTS", "0"))
        count = 0
        with contextlib.suppress(ConnectionResetError):
            async for event in self._events(body, chat=chat):
                await _write_event(response, event)
                count += 1
                if count == 1:
                    await _until_exists(os.environ.get("FAKE_ENGINE_HOLD_FILE"))
                if count == exit_after:
                    await asyncio.sleep(0.05)  # let the bytes leave
                    os._exit(7)
                if await trouble.at(count, request) or count == error_after:
                    failure = {
                        "error": {
                            "message": os.environ.get("FAKE_ENGINE_ERROR_TEXT", "boom"),
                            "type": "InternalServerError",
                            "param": None,
                            "code": 500,
                        }
                    }
                    await response.write(b"data: " + json.dumps(failure).encode() + b"\n\n")
                    break
                await asyncio.sleep(float(os.environ.get("FAKE_ENGINE_EVENT_SECONDS", "0")))
            if not os.environ.get("FAKE_ENGINE_NO_DONE"):
                await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
        return response

    async def _events(self, body: dict[str, Any], *, chat: bool) -> AsyncIterator[dict[str, Any]]:
        """Chunks of all sequences in turn, with usage as far as the request asks for it."""
        prompts, sequences = self._sequences(body, chat=chat)
        head = self._head(body, "chat.completion.chunk" if chat else "text_completion")
        wanted = body.get("stream_options") or {}
        per_prompt = body.get("n") or 1
        told = bool(body.get("return_token_ids"))
        begun = read_prompt(prompts[0])[1] if told else 0
        of_prompt = {"prompt_token_ids": prompts[0]} if told else {}
        for index in range(len(sequences)) if chat else ():
            delta = {"role": "assistant", "content": ""}
            yield {**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}], **of_prompt}
        for step in range(max(map(len, sequences), default=0)):
            for index, words in enumerate(sequences):
                if step >= len(words):
                    continue
                last = step == len(words) - 1
                content = {"delta": {"content": words[step]}} if chat else {"text": words[step]}
                choice: dict[str, Any] = {
                    "index": index,
                    **content,
                    "finish_reason": "stop" if last else None,
                }
                if told:
                    choice["token_ids"] = answer_tokens(begun + step, 1)
                    choice |= of_prompt if not (chat or step) else {}
                event: dict[str, Any] = {**head, "choices": [choice]}
                if wanted.get("continuous_usage_stats"):
                    event["usage"] = _usage([prompts[index // per_prompt]], [words[: step + 1]])
                yield event
        if wanted.get("include_usage"):
            yield {**head, "choices": [], "usage": _usage(prompts, sequences)}

    def _record(self, what: str, **fields: Any) -> None:
        if self._record_path:
            with open(self._record_path, "a", encoding="utf-8") as file:  # noqa: PTH123 - appended, line by line
                file.write(json.dumps({"what": what, "pid": os.getpid(), **fields}) + "\n")


def _reply(text: str, index: int = 0) -> list[str]:
    words = text.split()
    if words[:2] == ["pick", "one"] and len(words) > 2:
        return [words[2 + index % (len(words) - 2)]]
    if words[:1] == ["count"] and words[2:3] == ["to"] and words[3:] and words[3].isdigit():
        return [f" {words[1]}-{number}" for number in range(1, int(words[3]) + 1)]
    if words[:2] == ["count", "to"] and words[-1].isdigit():
        return [f" {number}" for number in range(1, int(words[-1]) + 1)]
    return [f" {word}" if position else word for position, word in enumerate(words)] or [""]


def _score(words: list[str]) -> float:
    return sum(-len(word) / 10 for word in words)


def _logprobs(words: list[str], *, chat: bool) -> dict[str, Any]:
    if chat:
        return {
            "content": [{"token": word, "logprob": -len(word) / 10, "top_logprobs": []} for word in words]
        }
    return {"tokens": words, "token_logprobs": [-len(word) / 10 for word in words]}


def _sampling_problem(body: dict[str, Any], *, chat: bool) -> str:
    """Why vLLM would refuse the parameters, or nothing."""
    n = body.get("n") or 1
    if body.get("use_beam_search"):
        if body.get("stream") and not chat:
            return "Streaming is not currently supported with beam search"
        return (
            f"Requested sample logprobs of {2 * n}, which is greater than max allowed: 20" if n > 10 else ""
        )
    if n > 1 and body.get("temperature") == 0:
        return f"n must be 1 when using greedy sampling, got {n}."
    if chat and not isinstance(body.get("logprobs"), bool | None):
        return "logprobs must be a boolean"
    return ""


def _chat_text(body: dict[str, Any]) -> str:
    messages = body.get("messages") or [{}]
    content = messages[-1].get("content")
    return content if isinstance(content, str) else json.dumps(content)


def _limit(body: dict[str, Any], *, chat: bool) -> int | None:
    """Most words of an answer."""
    return body.get("max_tokens") or (None if chat else 16)


def _usage(prompts: list[list[int]], sequences: list[list[str]]) -> dict[str, int]:
    prompt = sum(map(len, prompts))
    completion = sum(len(words) for words in sequences)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _id(prefix: str, body: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return f"{prefix}-{body.get('request_id') or digest[:16]}"


def _error(status: int, message: str, *, kind: str = "BadRequestError") -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


async def _open_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def _write_event(response: web.StreamResponse, event: dict[str, Any]) -> None:
    """As vLLM writes it: without spaces."""
    size = int(os.environ.get("FAKE_ENGINE_SPLIT_BYTES", "0"))
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    data = (b": keep-alive\n\n" if size else b"") + f"data: {text}\n\n".encode()
    for start in range(0, len(data), size or len(data)):
        await response.write(data[start : start + size] if size else data)
        if size:
            await asyncio.sleep(0)


async def _until_exists(path: str | None) -> None:
    while path and not os.path.exists(path):  # noqa: ASYNC110, ASYNC240, PTH110 - a file is all a test can set
        await asyncio.sleep(0.01)


def _write(path: str, text: str) -> None:
    temporary = Path(f"{path}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def _log(process: str, message: str) -> None:
    """One line in the form of vLLM's log."""
    _say(f"({process} pid={os.getpid()}) INFO 01-01 00:00:00 {message}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
