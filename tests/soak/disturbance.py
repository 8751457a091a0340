"""What goes on beside the requests: tides, faults, new revisions, deletions, keys that come and go, jobs.

Each is seeded, so that a run can be repeated as far as processes can.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilotlight.clusters.processes import find_processes
from pilotlight.processes import send_signal

from .asks import Answer, counted, plain
from .clients import Client
from .site import Site, Target

_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}


async def tides(site: Site, target: Target, seed: str) -> None:
    """An endpoint is asked for a while, and then left alone for long enough that its workers go."""
    choice = random.Random(seed)
    while not site.over.is_set():
        target.flowing.set()
        await site.pause(choice.uniform(5, 15))
        target.flowing.clear()
        await site.pause(choice.uniform(2.5, 5))


class Faults:
    """Kills and stops processes of the workers of endpoints that are `disturbed`.

    Args:
        site: Where.
        seed: Chooses moment, process and fault.
        every_s: Mean time between two faults.
        kinds: What is done.
    """

    KINDS = ("kill_program", "kill_engine", "kill_engine", "stop_engine", "stop_program")

    def __init__(self, site: Site, seed: str, *, every_s: float, kinds: tuple[str, ...] = KINDS) -> None:
        self._site = site
        self._choice = random.Random(seed)
        self._every_s = every_s
        self._kinds = kinds

    async def run(self) -> None:
        """Until the soak is over."""
        while await self._site.pause(self._choice.expovariate(1 / self._every_s)):
            targets = [target for target in self._site.targets if target.disturbed]
            target = self._choice.choice(targets)
            workers = [each for each in await self._site.workers(target) if each["state"] == "ready"]
            if not workers:
                continue
            worker = self._choice.choice(workers)
            await self._strike(worker["id"], self._choice.choice(self._kinds))

    async def _strike(self, worker_id: str, kind: str) -> None:
        found = await asyncio.to_thread(find_processes, {worker_id: None})
        of_program = kind.endswith("program")
        program = self._program_of(found.get(worker_id, []))
        doomed = [each for each in found.get(worker_id, []) if (each.pid == program) is of_program]
        if not doomed:
            return
        self._site.counts[f"faults.{kind}"] += 1
        if kind.startswith("kill"):
            for each in doomed:
                send_signal(each, signal.SIGKILL)
            return
        for each in doomed:
            send_signal(each, signal.SIGSTOP)
        # Some are shorter than the silence that is borne, some are longer.
        await asyncio.sleep(self._choice.uniform(0.2, 8))
        for each in doomed:
            send_signal(each, signal.SIGCONT)

    def _program_of(self, found: list[Any]) -> int:
        """The worker program among the processes of a worker: the gateway's child."""
        for each in found:
            with contextlib.suppress(OSError):
                if (
                    int(Path(f"/proc/{each.pid}/stat").read_text().rpartition(")")[2].split()[1])
                    == self._site.pid
                ):
                    return int(each.pid)
        return 0


async def revisions(site: Site, target: Target, seed: str, *, every_s: float, env: dict[str, str]) -> None:
    """New revisions of an endpoint under load: old workers finish what they have, nothing is lost."""
    choice = random.Random(seed)
    number = 0
    while await site.pause(choice.uniform(0.5, 1.5) * every_s):
        number += 1
        changed = {"env": {**env, "SOAK_REVISION": str(number)}}
        await site.managed("PATCH", f"/pilotlight/v1/endpoints/{target.id}", changed)
        site.counts["revisions"] += 1


async def deletions(site: Site, seed: str, *, every_s: float, **settings: Any) -> None:
    """An endpoint that is deleted under load, asked once more, and made anew."""
    choice = random.Random(seed)
    number = 0
    while not site.over.is_set():
        number += 1
        target = await site.deploy(f"passing-{number}", disturbed=False, **settings)
        target.flowing.set()
        await site.pause(choice.uniform(0.5, 1.5) * every_s)
        await site.delete(target)
        site.counts["deletions"] += 1
        await site.pause(1)
        target.flowing.clear()
        site.targets.remove(target)


async def keys(site: Site, target: Target, seed: str, *, every_s: float) -> None:
    """A key is made, used, revoked, and used once more: only strangers' requests are refused, but all of them."""
    choice = random.Random(seed)
    client = Client(site, f"{seed}-client", {}, pause_s=1, leaves=0)
    while await site.pause(choice.uniform(0.5, 1.5) * every_s):
        if not target.flowing.is_set():
            continue
        key = await site.make_key(target, priority=choice.choice(("low", "normal", "high")))

        def ask(ends: frozenset[str], key: Any = key) -> Any:
            name = site.name()
            asked = plain(choice, name)
            asked.ends = ends or asked.ends
            return client.ask(target, key, (name, asked))

        await asyncio.gather(*(ask(frozenset()) for _ in range(3)))
        # One is under way while the key is revoked.
        under_way = asyncio.create_task(ask(frozenset({"exact", "401"})))
        await site.managed("DELETE", f"/pilotlight/v1/keys/{key.id}")
        await under_way
        for _ in range(2):
            await ask(frozenset({"401"}))
        site.counts["keys"] += 1
    client.close()


class Jobs:
    """Submits jobs and waits for them, now and then by streaming or with `/runsync`; some it cancels.

    Args:
        site: Where.
        seed: Chooses.
        every_s: Mean time between two jobs.

    Attributes:
        submitted: Job id → endpoint id.
    """

    def __init__(self, site: Site, seed: str, *, every_s: float) -> None:
        self._site = site
        self._choice = random.Random(seed)
        self._every_s = every_s
        self.submitted: dict[str, str] = {}

    async def run(self) -> None:
        """Until the soak is over."""
        site, choice = self._site, self._choice
        async with asyncio.TaskGroup() as group:
            while await site.pause(choice.expovariate(1 / self._every_s)):
                flowing = [each for each in site.targets if each.flowing.is_set() and each.name != "passing"]
                if flowing:
                    group.create_task(self._one(choice.choice(flowing), choice.random()))

    async def _one(self, target: Target, draw: float) -> None:
        site = self._site
        prompt, answer = counted(site.name(), self._choice.randint(1, 30))
        stream = draw < 0.3
        job_input = {"input": {"prompt": prompt, "stream": stream, "sampling_params": {"max_tokens": 100}}}
        path = f"/v2/{target.id}"
        status, job = await site.call(
            "POST", f"{path}/{'runsync' if 0.3 <= draw < 0.5 else 'run'}", job_input
        )
        if status != 200:
            site.report(f"job on {target.name}: {status} {job}")
            return
        self.submitted[job["id"]] = target.id
        cancelled = draw > 0.9
        if cancelled:
            await site.call("POST", f"{path}/cancel/{job['id']}")
        for _ in range(20):
            if job["status"] in _ENDED:
                break
            _, job = await site.call("GET", f"{path}/status-sync/{job['id']}?wait=10000")
        self._judge(target, job, answer, cancelled=cancelled)

    def _judge(self, target: Target, job: dict[str, Any], answer: Answer, *, cancelled: bool) -> None:
        status = job["status"]
        self._site.counts[f"jobs.{target.name}.{status}"] += 1
        said = "".join(words(job.get("output")))
        right = {
            "COMPLETED": said == answer.text,
            # Its worker was lost twice.
            "FAILED": target.disturbed and bool(job.get("error")),
            "CANCELLED": cancelled,
        }
        if not right.get(status, False):
            self._site.report(f"job on {target.name}, expected {answer.text[:80]!r}: {str(job)[:600]}")


def words(output: Any) -> Iterator[str]:
    """The tokens of a job's output, whichever of its forms (vllm-worker.md §3.3)."""
    if isinstance(output, dict):
        for name, value in output.items():
            if name == "tokens":
                yield from value
            elif name != "usage":
                yield from words(value)
    elif isinstance(output, list):
        for value in output:
            yield from words(value)
