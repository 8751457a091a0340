"""The smaller soak with real engines: greedy answers are known beforehand, and workers die all along."""

from __future__ import annotations

import json
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from .asks import CHAT, COMPLETIONS, MODEL, Answer, Ask
from .campaign import Plan
from .disturbance import Faults
from .site import Sent, Site, Target
from .standin import WATCH

_ENV = {"ENFORCE_EAGER": "true", "NUM_GPU_BLOCKS_OVERRIDE": "512", "MAX_NUM_SEQS": "32"}
_QUESTIONS = 24


def settings(census: Path) -> dict[str, str]:
    """Variables of a gateway for this soak.

    Args:
        census: File for what it tells of itself.
    """
    return {
        "SOAK_CENSUS": str(census),
        "PYTHONPATH": str(WATCH),
        "PILOTLIGHT_LIMITS__UPSTREAM_READ_S": "30",
        "PILOTLIGHT_WORKERS__BACKOFF_S": "1",
        "PILOTLIGHT_WORKERS__BACKOFF_MAX_S": "1",
        "PILOTLIGHT_ACCESS_LOG__FILE_BYTES": str(2**31),
    }


class Questions:
    """Asks what was answered before, while nothing disturbed it."""

    def __init__(self) -> None:
        self._known: list[tuple[str, dict[str, Any], Answer]] = []

    async def learn(self, site: Site, target: Target) -> None:
        """Have every question answered once."""
        for number in range(_QUESTIONS):
            content = f"What is {number} plus {number % 7}?"
            chat = number % 2 == 0
            body: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 20 + 10 * (number % 12)}
            body |= {"messages": [{"role": "user", "content": content}]} if chat else {"prompt": content}
            # Else most answers of the small model are short.
            body["ignore_eos"] = number % 3 > 0
            route = CHAT if chat else COMPLETIONS
            name = site.name()
            status, said = await site.call("POST", f"/v2/{target.id}/openai{route}", body, name=name)
            assert status == 200, said
            (choice,), usage = said["choices"], said["usage"]
            answer = Answer(
                choice["message"]["content"] if chat else choice["text"],
                usage["prompt_tokens"],
                usage["completion_tokens"],
                choice["finish_reason"],
            )
            site.sent[name] = Sent(target.id, "exact", status, (answer.tokens_in, answer.tokens_out))
            self._known.append((route, body, answer))

    def ask(self, choice: random.Random, _: str) -> Ask:
        """One of them, whole or as a stream."""
        route, body, answer = choice.choice(self._known)
        stream = choice.random() < 0.8
        usage = stream and choice.random() < 0.5
        more = {"stream_options": {"include_usage": True}} if usage else {}
        data = json.dumps({**body, "stream": stream, **more}).encode()
        return Ask("stream" if stream else "whole", data, answer, route=route, stream=stream, usage=usage)


def plan(*, seconds: float, seed: int, census: Path, clients: int = 12) -> Plan:
    """What is done; see `standin.plan`."""
    questions = Questions()

    async def prepare(site: Site) -> list[Target]:
        target = await site.deploy(
            "real", disturbed=True, max=2, concurrency=8, idle_timeout_s=5, flashboot=False, env=_ENV
        )
        target.flowing.set()
        await questions.learn(site, target)
        return [target]

    def disturb(site: Site, _: list[Target]) -> list[Coroutine[Any, Any, None]]:
        return [Faults(site, f"{seed}-faults", every_s=8, kinds=("kill_program", "kill_engine")).run()]

    return Plan(
        seconds=seconds,
        seed=seed,
        clients=clients,
        pause_s=0.5,
        mix={True: {questions.ask: 1.0}},
        prepare=prepare,
        disturb=disturb,
        jobs_every_s=None,
        census=census,
        maker=questions.ask,
    )
