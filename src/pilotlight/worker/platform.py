"""The worker's side of the worker protocol: takes, stops, pings, results, chunks and state reports.

One HTTP client (`worker.http`) for all. Every method is one exchange (or one bounded series of tries) and
returns what the platform said; `jobs` decides what to do about it. Rules: `worker-protocol.md` §3, §8 and §9.
Where the reference SDK loses a result on a broken connection, this client tries again: `POST_SECONDS` spans a
restart of the platform.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import msgspec

import pilotlight
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.http import AnswerTimeoutError, HttpClient
from pilotlight.worker.log import LogSink
from pilotlight.worker.results import ResultPoster

POLL_SECONDS: Final = 90.0
"""Client limit of a take or stop poll (`worker-protocol.md` §1 rule 6)."""

POST_SECONDS: Final = 60.0
"""How long a result or chunk is offered before it is given up as lost."""

_ATTEMPT_SECONDS: Final = 60.0
_PAUSE_429_SECONDS: Final = 5.0
_OUTAGE_STEP_SECONDS: Final = 10.0
_TAKEN: Final = frozenset({200, 204, 400})
"""Answers to a take: jobs, or none for now (§3.1)."""


class _Named(msgspec.Struct):
    id: str


_raws = msgspec.json.Decoder(list[msgspec.Raw])
_ids = msgspec.json.Decoder(_Named)
_jitter = random.Random()  # noqa: S311 - jitter is no secret


class Backoff:
    """Growing pauses with jitter, so that many workers do not return in step.

    Args:
        first: Shortest pause in seconds.
        limit: Longest pause in seconds.
        rng: Source of the jitter.
    """

    def __init__(self, first: float, limit: float, rng: random.Random | None = None) -> None:
        self._first = first
        self._limit = limit
        self._rng = rng if rng is not None else _jitter
        self._tries = 0

    def next_delay(self) -> float:
        """The next pause: doubles from `first` to `limit`, of which a random half to whole is used."""
        delay = min(self._limit, self._first * 2.0 ** min(self._tries, 16))
        self._tries += 1
        return delay * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Back to the shortest pause."""
        self._tries = 0


@dataclass(frozen=True, slots=True)
class TakenJob:
    """A job as handed out.

    Attributes:
        id: Of the job.
        payload: The whole object, of which `input` may be absent.
        unreadable: Why it cannot be run: its JSON is beyond what can be read here. None for all others.
    """

    id: str
    payload: dict[str, Any]
    unreadable: str | None = None


@dataclass(frozen=True, slots=True)
class TakeAnswer:
    """What a take poll brought.

    Attributes:
        jobs: Jobs to run.
        failed: The platform could not be reached, or refused: pause before asking again.
        pause_seconds: Pause that the platform asked for (429).
    """

    jobs: tuple[TakenJob, ...] = ()
    failed: bool = False
    pause_seconds: float = 0.0


class Platform:
    """The HTTP client of one worker.

    Args:
        config: URLs, key and worker id.
        log: Where trouble is said.
        on_recovered: Called when the platform answers again after it could not be reached.
    """

    def __init__(self, config: WorkerConfig, log: LogSink, on_recovered: Callable[[], None]) -> None:
        self._urls = config.urls
        self._state_url = config.state_url
        self._ping_seconds = config.ping_seconds
        self._log = log
        self._on_recovered = on_recovered
        version = pilotlight.__version__
        self._http = HttpClient(
            {"Authorization": config.platform_key, "User-Agent": f"Pilotlight-Worker/{version}"}
        )
        self._batch_url = _batch_url(self._urls.output)
        post_many = self._post_batch if self._batch_url is not None else None
        self._results = ResultPoster(self._post_result, post_many, log)
        self._version = quote(f"pilotlight-{version}")
        self._takes_batches = True
        self._last_failure: float | None = None
        self.outage_seconds = 0.0

    async def close(self) -> None:
        """Closes all connections."""
        await self._results.close()
        await self._http.close()

    async def take(self, slots: int, *, busy: bool) -> TakeAnswer:
        """One long poll for up to `slots` jobs (§3.1, §3.2); for one where the platform knows no batches."""
        progress = f"job_in_progress={int(busy)}"
        single = _with_query(self._urls.take, progress)
        if slots > 1 and self._takes_batches:
            batch = _with_query(self._urls.batch, f"batch_size={slots}&{progress}")
            status, body = await self._get(batch, POLL_SECONDS)
            if status == 404:
                status, body = await self._get(single, POLL_SECONDS)
                if status in _TAKEN:
                    self._takes_batches = False
                    self._log.event("platform.no_batches")
        else:
            status, body = await self._get(single, POLL_SECONDS)
        return self._taken(status, body)

    def _taken(self, status: int | None, body: bytes) -> TakeAnswer:
        if status == 429:
            return TakeAnswer(pause_seconds=_PAUSE_429_SECONDS)
        if status == 0:
            return TakeAnswer()
        if status not in _TAKEN:
            if status is not None:
                self._log.event("platform.take_refused", status=status)
            return TakeAnswer(failed=True)
        return TakeAnswer(self._jobs(body) if status == 200 else ())

    def take_with_results(self, room: Callable[[int], int], accept: Callable[[TakenJob], None]) -> None:
        """Ask for jobs with results, too, where the platform knows how.

        Args:
            room: How many jobs may come with the answer to so many results.
            accept: Called with each that came, before `post_result` returns for those results.
        """

        def taken(jobs: bytes) -> None:
            for job in self._jobs(jobs):
                accept(job)

        self._results.room, self._results.taken = room, taken

    async def stop_requests(self) -> tuple[str, ...] | None:
        """Ids of jobs to stop, from one long poll; None if the poll failed (§3.3)."""
        if self._urls.stop is None:
            return None
        status, body = await self._get(self._urls.stop, POLL_SECONDS)
        if status in {0, 204}:
            return ()
        if status != 200:
            return None
        answer = _load(body)
        ids = answer.get("jobsToStop") if isinstance(answer, dict) else None
        return tuple(str(item) for item in ids) if isinstance(ids, list) else ()

    @property
    def can_be_stopped(self) -> bool:
        """Whether there is a stop channel."""
        return self._urls.stop is not None

    @property
    def pings(self) -> bool:
        """Whether heartbeats are wanted."""
        return self._urls.ping is not None

    async def ping(self, job_ids: list[str]) -> None:
        """One heartbeat naming the jobs in hand (§3.6); failures are left to the next one."""
        if self._urls.ping is None:
            return
        query = f"runpod_version={self._version}"
        if job_ids:
            query = f"job_id={quote(','.join(job_ids), safe='')[: 64 * 1024]}&{query}"
        await self._get(_with_query(self._urls.ping, query), 2 * self._ping_seconds)

    async def post_result(self, job_id: str, body: bytes) -> bool:
        """Hands in the final result, together with others where that is possible (`ResultPoster`).

        Returns:
            True once the platform has it (§3.4).
        """
        return await self._results.post(job_id, body)

    async def post_chunk(self, job_id: str, number: int, body: bytes) -> bool:
        """Hands in one item of a running job (§3.5).

        Args:
            job_id: The job.
            number: Its items counted from 0, sent as `seq` so that a repetition can be told from a new item.
            body: `{"output": item}`.
        """
        return await self._post(self._urls.stream, job_id, body, f"isStream=false&seq={number}")

    async def report_state(self, body: bytes) -> int | None:
        """Sends one state report; the HTTP status, or None if the platform could not be reached."""
        assert self._state_url is not None
        status, _ = await self._send(self._state_url, body, content_type="application/json", seconds=10)
        return status

    async def _post_result(self, job_id: str, body: bytes) -> bool:
        return await self._post(self._urls.output, job_id, body, "isStream=true")

    async def _post_batch(self, body: bytes, wanted: int) -> tuple[int | None, bytes]:
        assert self._batch_url is not None
        first = _with_query(self._batch_url, f"take={wanted}") if wanted else self._batch_url
        return await self._offer(self._batch_url, body, job_id="several", first_url=first)

    async def _post(self, template: str | None, job_id: str, body: bytes, query: str) -> bool:
        if template is None:
            return False
        url = _with_query(template.replace("$ID", quote(job_id, safe="")), query)
        status, _ = await self._offer(url, body, job_id=job_id)
        if status is not None and status >= 400:
            self._log.event("platform.post_refused", job=job_id, status=status)
        return status is not None and status < 400

    async def _offer(
        self, url: str, body: bytes, *, job_id: str, first_url: str | None = None
    ) -> tuple[int | None, bytes]:
        """Post until there is an answer that stands; status None when it was given up.

        Args:
            url: Where to.
            body: What.
            job_id: For the log.
            first_url: Where to at the first try, which may ask for more than the repetitions do.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + POST_SECONDS
        backoff: Backoff | None = None
        while True:
            # The reference SDK labels its JSON this way and platforms parse the bytes (§1 rule 9).
            status, answer = await self._send(
                first_url or url, body, content_type="application/x-www-form-urlencoded"
            )
            if status is not None and status < 500 and status not in {408, 429}:
                return status, answer
            first_url = None
            backoff = backoff or Backoff(0.2, 5.0)
            delay = backoff.next_delay()
            if clock() + delay > deadline:
                self._log.event("platform.post_lost", job=job_id, status=status)
                return None, b""
            await asyncio.sleep(delay)

    async def _send(
        self, url: str, body: bytes, *, content_type: str, seconds: float = _ATTEMPT_SECONDS
    ) -> tuple[int | None, bytes]:
        try:
            status, answer = await self._http.request(
                "POST", url, body=body, content_type=content_type, seconds=seconds
            )
        except (AnswerTimeoutError, OSError) as error:
            self._note_failure(error)
            return None, b""
        self._note_success()
        return status, answer

    async def _get(self, url: str, seconds: float) -> tuple[int | None, bytes]:
        """Status and body; status 0 when the time ran out on an open connection, None when it broke."""
        try:
            status, body = await self._http.request(
                "GET", url, content_type="application/json", seconds=seconds
            )
        except AnswerTimeoutError:
            return 0, b""
        except OSError as error:
            self._note_failure(error)
            return None, b""
        self._note_success()
        return status, body

    def _note_success(self) -> None:
        if self._last_failure is not None:
            self._last_failure = None
            self.outage_seconds = 0.0
            # It may be another one now.
            self._takes_batches = True
            self._log.event("platform.recovered")
            self._on_recovered()

    def _note_failure(self, error: Exception) -> None:
        """Adds up the time without an answer. A pause of the whole process (a freeze) must not count."""
        now = asyncio.get_running_loop().time()
        if self._last_failure is None:
            self._log.event("platform.unreachable", error=type(error).__name__)
        else:
            self.outage_seconds += min(now - self._last_failure, _OUTAGE_STEP_SECONDS)
        self._last_failure = now

    def _jobs(self, body: bytes) -> tuple[TakenJob, ...]:
        jobs = []
        for item in read_jobs(body):
            if isinstance(item, TakenJob):
                jobs.append(item)
            else:
                self._log.event("platform.bad_job", kind=item)
        return tuple(jobs)


def read_jobs(body: bytes) -> list[TakenJob | str]:
    """The jobs of a take answer, each read alone: one that cannot be read does no harm to the others.

    Returns:
        For each job itself, or the type of what came in its place.
    """
    body = body.strip()
    try:
        raws = _raws.decode(body) if body.startswith(b"[") else [msgspec.Raw(body)]
    except (msgspec.DecodeError, RecursionError):
        # Half characters somewhere hide where one job ends and the next begins.
        try:
            answer = mended(body)
        except (ValueError, RecursionError):
            return ["unreadable"]
        return [_checked_job(item) for item in (answer if isinstance(answer, list) else [answer])]
    return [_read_job(bytes(raw)) for raw in raws]


def _read_job(raw: bytes) -> TakenJob | str:
    try:
        return _checked_job(msgspec.json.decode(raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return _checked_job(mended(raw))
    except (ValueError, RecursionError) as error:
        reason = str(error)
    try:
        job_id = _ids.decode(raw).id
    except (msgspec.DecodeError, RecursionError):
        return "unreadable"
    return TakenJob(job_id, {}, unreadable=f"the job cannot be read: {reason[:200]}")


def _checked_job(item: Any) -> TakenJob | str:
    if isinstance(item, dict) and isinstance(item.get("id"), str) and item["id"]:
        return TakenJob(item["id"], item)
    return type(item).__name__


def mended(raw: bytes) -> Any:
    """JSON as Python reads it; half characters, which could not be sent on, are replaced.

    Raises:
        ValueError: Python cannot read it either.
        RecursionError: It is nested too deeply.
    """
    text = json.dumps(json.loads(raw.decode(errors="replace")), ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _batch_url(output: str | None) -> str | None:
    """Where many results go at once, by the address for single ones; None when that has another form."""
    if output is None:
        return None
    path, mark, query = output.partition("?")
    if "/job-done/" not in path or not path.endswith("/$ID"):
        return None
    return path.removesuffix("/$ID").replace("/job-done/", "/job-done-batch/") + mark + query


def _with_query(url: str, query: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{query}"


def _load(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
