"""One greedy key against many light ones at the same endpoint; how long the light ones' requests wait.

`KEYS=GREEDY,LIGHT,… python -m pilotlight.bench.harness.fair_share PORT PATH SHAPE`: SHAPE is a `Shape` in
JSON. The greedy key always has so many requests under way; each light key sends one, reads the answer, thinks
for a while and sends the next. The light keys begin a second after the greedy one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from dataclasses import asdict, dataclass

import uvloop

from pilotlight.bench.harness.streams import FIRST_TOKEN, MARK, body
from pilotlight.bench.harness.tokens import question
from pilotlight.bench.harness.wire import ConnectionLostError, connect, request_bytes

_HEAD_START_S = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked.

    Attributes:
        seconds: Length of the measurement.
        greedy: Requests that the greedy key has under way; 0: it is silent.
        greedy_tokens: Tokens of each of its answers.
        light_tokens: Tokens of the light keys' answers.
        think_s: Mean of a light key's pauses, which are distributed exponentially.
        token_s: Time of one token of the stand-in engine; 0: a real engine is asked.
        model: Its name.
        seed: Fixes the pauses.
    """

    seconds: float
    greedy: int
    greedy_tokens: int
    light_tokens: int
    think_s: float
    token_s: float
    model: str
    seed: int

    def as_argument(self) -> str:
        """What the program takes."""
        return json.dumps(asdict(self))

    def body(self, number: int, tokens: int) -> dict[str, object]:
        """A request for so many tokens."""
        if self.token_s:
            return body(tokens, self.token_s)
        fixed = {"stream": True, "temperature": 0, "ignore_eos": True, "max_tokens": tokens}
        return {"model": self.model, "messages": question(number), **fixed}


class _Answer:
    """When the first token of a stream came, and when the stand-in engine wrote it."""

    def __init__(self, first: re.Pattern[bytes]) -> None:
        self.first_ns = 0
        self.written_ns = 0
        self.tail = b""
        self._first = first

    def on_body(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-512:]
        if not self.first_ns and (found := self._first.search(self.tail)):
            self.first_ns = self.written_ns = time.monotonic_ns()
            if self._first is MARK:
                self.written_ns = int(found[2])


class Tally:
    """What was seen of the light keys, and the work that was done for whom.

    Attributes:
        wait_ms: From a light key's request to its first token in the stand-in engine, which writes it the
            moment a request arrives.
        first_ms: From a light key's request to its first token here.
        service_ms: From the first token to the end of the greedy key's answers.
        tokens: Of whole answers, the greedy key's and the light ones'.
        failures: What went wrong, in words.
    """

    def __init__(self) -> None:
        self.wait_ms: list[float] = []
        self.first_ms: list[float] = []
        self.service_ms: list[float] = []
        self.tokens = {"greedy": 0, "light": 0}
        self.failures: list[str] = []


async def _ask(
    port: int, request: bytes, answer: _Answer, tokens: int, tally: Tally, *, light: bool, until: float
) -> None:
    """One request on a connection of its own, as many short-lived clients have it."""
    connection = await connect(port)
    started_ns = time.monotonic_ns()
    try:
        status = await connection.ask(request, answer.on_body)
    except (ConnectionLostError, TimeoutError) as error:
        tally.failures.append(f"lost: {error}")
        return
    finally:
        connection.close()
    if status != 200 or b"data: [DONE]" not in answer.tail:
        tally.failures.append(f"status {status}, the answer ends {answer.tail[-200:]!r}")
        return
    if time.monotonic() <= until:
        tally.tokens["light" if light else "greedy"] += tokens
    if light:
        tally.wait_ms.append((answer.written_ns - started_ns) / 1e6)
        tally.first_ms.append((answer.first_ns - started_ns) / 1e6)
    else:
        tally.service_ms.append((time.monotonic_ns() - answer.first_ns) / 1e6)


async def main(port: int, path: str, shape: Shape, keys: list[str]) -> None:
    """Print what was seen as one JSON object."""
    tally, started = Tally(), time.monotonic()
    until = started + _HEAD_START_S + shape.seconds
    greedy_key, *light_keys = keys
    first = MARK if shape.token_s else FIRST_TOKEN

    async def be_greedy(number: int) -> None:
        request = request_bytes(path, shape.body(number, shape.greedy_tokens), key=greedy_key)
        while time.monotonic() < until and len(tally.failures) < _FAILURES_MAX:
            await _ask(port, request, _Answer(first), shape.greedy_tokens, tally, light=False, until=until)

    async def be_light(number: int, key: str) -> None:
        draw = random.Random(shape.seed * 1000 + number)  # noqa: S311 - pauses that can be repeated
        request = request_bytes(path, shape.body(number, shape.light_tokens), key=key)
        await asyncio.sleep(_HEAD_START_S + draw.uniform(0, shape.think_s))
        while time.monotonic() < until and len(tally.failures) < _FAILURES_MAX:
            await _ask(port, request, _Answer(first), shape.light_tokens, tally, light=True, until=until)
            await asyncio.sleep(draw.expovariate(1 / shape.think_s))

    await asyncio.gather(
        *[be_greedy(number) for number in range(shape.greedy)],
        *[be_light(number, key) for number, key in enumerate(light_keys)],
    )
    result = {
        "wait_ms": tally.wait_ms,
        "first_ms": tally.first_ms,
        "service_ms": tally.service_ms,
        "tokens": tally.tokens,
        "seconds": until - started,
        "failed": len(tally.failures),
        "failures": sorted(set(tally.failures))[:3],
    }
    sys.stdout.write(json.dumps(result) + "\n")


_FAILURES_MAX = 100
"""After so many it is over: a gateway that refuses everything would be asked as fast as it answers."""

if __name__ == "__main__":
    uvloop.run(
        main(
            int(sys.argv[1]),
            sys.argv[2],
            Shape(**json.loads(sys.argv[3])),
            os.environ["KEYS"].split(","),
        )
    )
