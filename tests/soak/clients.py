"""Clients of a soak: they ask, over fresh and used connections, read fast or slowly, leave at any moment."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping

import h11

from .asks import GARBAGE, MESSAGES, Ask, models
from .judge import StreamJudge, WrongError, check_refusal, check_whole
from .site import Key, Sent, Site, Target
from .wire import BrokenAnswerError, Connection

Maker = Callable[[random.Random, str], Ask]

_IDLE_S = 30.0
"""A connection that was idle for longer is not used again: the gateway may be closing it at this moment."""


class _LeftError(Exception):
    """The client has gone, as it meant to."""


class Client:
    """Asks one thing after another until the soak is over.

    Args:
        site: Who is asked.
        seed: Chooses all that it does.
        mix: What it asks, each with its weight, for endpoints with faults (True) and without.
        pause_s: Mean pause between two requests.
        leaves: Share of requests that it leaves.

    Attributes:
        choice: Its own.
    """

    def __init__(
        self,
        site: Site,
        seed: str,
        mix: Mapping[bool, Mapping[Maker, float]],
        *,
        pause_s: float,
        leaves: float = 0.06,
    ) -> None:
        self._site = site
        self.choice = random.Random(seed)
        self._mix = mix
        self._pause_s = pause_s
        self._leaves = leaves
        self._kept: Connection | None = None
        self._kept_s = 0.0

    async def run(self) -> None:
        """All of its life."""
        while await self._site.pause(self.choice.expovariate(1 / self._pause_s)):
            flowing = [target for target in self._site.targets if target.flowing.is_set()]
            if not flowing:
                continue
            target = self.choice.choice(flowing)
            draw = self.choice.random()
            if draw < 0.03:
                await self._send_garbage()
            elif draw < 0.05:
                await self._pipeline(target)
            else:
                await self.ask(target, self.choice.choice(target.keys), self._make(target))
        self.close()

    def close(self) -> None:
        """Close the connection that was kept."""
        if self._kept is not None:
            self._kept.close()

    def _make(self, target: Target) -> tuple[str, Ask]:
        mix = self._mix[target.disturbed]
        (maker,) = self.choice.choices([*mix], [*mix.values()])
        name = self._site.name()
        return name, maker(self.choice, name)

    async def ask(self, target: Target, key: Key, asked: tuple[str, Ask]) -> str:
        """Ask and judge; how it ended."""
        choice, (name, ask) = self.choice, asked
        leaves = (
            choice.choice(("body", "answer", "events", "reset")) if choice.random() < self._leaves else ""
        )
        slow = choice.random() < (0.5 if ask.kind == "large" else 0.03)
        connection = await self._connection(slow=slow)
        visit = Visit(self._site, connection, choice, ask, leaves=leaves, slow=slow)
        began_s = time.monotonic()
        try:
            end = await visit.make(target, key, name)
            self._judge(target, key, ask, end, began_s)
        except _LeftError:
            end = "left_early" if leaves == "reset" else "left"
        except (WrongError, BrokenAnswerError, h11.RemoteProtocolError) as error:
            end = "wrong"
            took_s = time.monotonic() - began_s
            self._site.report(
                f"{target.name} {target.id} {name} {ask.kind} {ask.route} after {took_s:.2f} s, status "
                f"{visit.status}: {type(error).__name__} {error}; {ask.body[:300]!r} {ask.headers}"
            )
        if end in {"left", "left_early", "wrong", "cut"} or not connection.usable or slow:
            connection.close()
        elif self._kept is None:
            self._kept, self._kept_s = connection, time.monotonic()
        else:
            connection.close()
        self._site.sent[name] = visit.sent(target, end)
        self._site.counts[f"{target.name}.{end}"] += 1
        self._site.counts[f"asked.{ask.kind}"] += 1
        if key.per_minute and visit.counted:
            self._site.counts[f"served.{key.id}"] += 1
        self._site.counts["events"] += visit.events
        return end

    async def _connection(self, *, slow: bool) -> Connection:
        kept, self._kept = self._kept, None
        fit = kept is not None and not slow and time.monotonic() - self._kept_s < _IDLE_S
        if kept is not None and fit and self.choice.random() < 0.8:
            self._site.counts["connections.kept"] += 1
            return kept
        if kept is not None:
            kept.close()
        self._site.counts["connections.fresh"] += 1
        return await Connection.open(self._site.port, receive_bytes=4096 if slow else 0)

    def _judge(self, target: Target, key: Key, ask: Ask, end: str, began_s: float) -> None:
        also, only = target.may_end(began_s, time.monotonic())
        allowed = also if only else ask.ends | also
        if end not in allowed | key.ends:
            raise WrongError(f"{end} where only {sorted(allowed | key.ends)} can be")

    async def _send_garbage(self) -> None:
        """What is no request is refused, and the connection closed."""
        connection = await Connection.open(self._site.port)
        garbage = self.choice.choice(GARBAGE)
        try:
            await connection.send(garbage)
            head = await connection.head()
            if not 400 <= head.status < 500 or head.status == 404:
                self._site.report(f"{garbage[:80]!r} was answered {head.status}")
            self._site.counts["garbage.refused"] += 1
        except (BrokenAnswerError, h11.RemoteProtocolError) as error:
            # To nobody who speaks HTTP, closing is answer enough.
            self._site.counts["garbage.closed"] += 1
            if "silence" in str(error):
                self._site.report(f"{garbage[:80]!r} got silence")
        finally:
            connection.close()

    async def _pipeline(self, target: Target) -> None:
        """Three requests at once on one connection; the answers come in their order."""
        connection = await Connection.open(self._site.port)
        key = target.keys[0]
        visits = []
        for _ in range(3):
            name, ask = self._make(target)
            while ask.pieces > 1 or ask.chunked or ask.ends != frozenset({"exact"}):
                name, ask = self._make(target)
            visits.append((name, ask, Visit(self._site, connection, self.choice, ask)))
        began_s = time.monotonic()
        await connection.send(
            b"".join(b"".join(visit.request(target, key, name)) for name, _, visit in visits)
        )
        broken = False
        for name, ask, visit in visits:
            end = "left_early"
            try:
                if not broken:
                    end = await visit.read()
                    self._judge(target, key, ask, end, began_s)
                    broken = not connection.usable
            except (WrongError, BrokenAnswerError, h11.RemoteProtocolError) as error:
                self._site.report(f"pipelined: {target.name} {name} {ask.kind}: {error}; {ask.body[:300]!r}")
                end, broken = "wrong", True
            self._site.sent[name] = visit.sent(target, end)
            self._site.counts[f"{target.name}.{end}"] += 1
            self._site.counts["asked.pipelined"] += 1
        connection.close()


class Visit:
    """One request on its way, and its answer.

    Attributes:
        status: That came; 0 before.
        events: Of its stream.
        counted: Whether the limit on the requests of its key counted it.
    """

    def __init__(
        self,
        site: Site,
        connection: Connection,
        choice: random.Random,
        ask: Ask,
        *,
        leaves: str = "",
        slow: bool = False,
    ) -> None:
        self._site = site
        self._connection = connection
        self._choice = choice
        self._ask = ask
        self._leaves = leaves
        self._slow = slow
        self.status = 0
        self.events = 0
        self.counted = False

    def request(self, target: Target, key: Key, name: str) -> list[bytes]:
        """The bytes to send."""
        self._name = name
        return self._ask.request(self._site.host, f"/v2/{target.id}/openai", key.secret, name)

    def sent(self, target: Target, end: str) -> Sent:
        """What is remembered of it."""
        answer = self._ask.answer
        # The stand-in counts no tokens of Anthropic's form.
        known = answer is not None and end == "exact" and self._ask.route != MESSAGES
        usage = (answer.tokens_in, answer.tokens_out) if answer is not None and known else None
        return Sent(target.id, end, self.status, usage)

    async def make(self, target: Target, key: Key, name: str) -> str:
        """Send and read; how it ended.

        Raises:
            WrongError: Not as it may.
            BrokenAnswerError: The same.
        """
        pieces = self.request(target, key, name)
        if self._leaves == "body" and self._ask.body:
            whole = b"".join(pieces)
            await self._connection.send(whole[: len(whole) - self._choice.randint(1, len(self._ask.body))])
            raise _LeftError
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(self._choice.random() * 0.01)
            await self._connection.send(piece)
        if self._leaves in {"answer", "reset"}:
            await asyncio.sleep(self._choice.choice((0, 0.01, 0.1, 0.5)) * self._choice.random())
            if self._leaves == "reset":
                self._connection.reset()
            raise _LeftError
        return await self.read()

    async def read(self) -> str:
        """Read the answer; how it ended. WrongError and BrokenAnswerError as above."""
        ask = self._ask
        head = await self._connection.head(ask.method)
        self.status = head.status
        self.counted = head.status != 429 and "x-ratelimit-limit-requests" in head.headers
        if head.headers.get("x-request-id") != self._name:
            raise WrongError(f"the answer of {head.headers.get('x-request-id')}: {head}")
        if head.status == 200 and ask.stream:
            if not head.streams:
                raise WrongError(f"no stream: {head}")
            return await self._read_stream()
        try:
            body = await self._body()
        except BrokenAnswerError as broken:
            if "silence" in str(broken):
                raise
            return "cut"
        self._check_nothing_follows()
        if head.status >= 400:
            check_refusal(ask, head, body)
            return str(head.status)
        check_whole(ask, body)
        return "exact" if ask.answer is not None else str(head.status)

    def _check_nothing_follows(self) -> None:
        if self._connection.excess and not self._connection.excess.startswith(b"HTTP/1.1 "):
            raise WrongError(f"behind the answer: {self._connection.excess[:200]!r}")

    async def _body(self) -> bytes:
        parts = []
        while (piece := await self._piece()) is not None:
            parts.append(piece[0])
        return b"".join(parts)

    async def _piece(self) -> tuple[bytes, bool] | None:
        if not self._slow:
            return await self._connection.piece()
        await asyncio.sleep(self._choice.random() * 0.01)
        return await self._connection.piece(2048)

    async def _read_stream(self) -> str:
        judge = StreamJudge(self._ask)
        leave_at = self._choice.randint(0, 20) if self._leaves == "events" else None
        try:
            while (piece := await self._piece()) is not None:
                judge.feed(piece[0], chunk_end=piece[1])
                if leave_at is not None and judge.events >= leave_at:
                    raise _LeftError
        except BrokenAnswerError as broken:
            raise WrongError(f"a stream breaks off after {judge.events} events: {broken}") from broken
        finally:
            self.events = judge.events
        self._check_nothing_follows()
        return judge.finish()


async def fill_log(site: Site, target: Target, rows: int) -> None:
    """Ask for the list of models so many times, as fast as it goes: the cheapest way to a row."""
    connection, ask = await Connection.open(site.port), models(random.Random(), "")
    burst = 20
    for _ in range(0, rows, burst):
        names = [site.name() for _ in range(burst)]
        visits = [Visit(site, connection, random.Random(), ask) for _ in names]
        pieces = [
            visit.request(target, target.keys[0], name) for visit, name in zip(visits, names, strict=True)
        ]
        await connection.send(b"".join(map(b"".join, pieces)))
        for name, visit in zip(names, visits, strict=True):
            site.sent[name] = visit.sent(target, await visit.read())
    connection.close()
