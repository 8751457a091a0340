"""The soak with the stand-in engine: everything that a data path may meet, a few hundred times a second."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from .asks import BODY_MAX, SILENCE_S, large, messages, models, plain, refused, troubled
from .campaign import Plan
from .disturbance import Faults, deletions, keys, revisions, tides
from .site import Site, Target

WATCH = Path(__file__).with_name("watch")
LIMITED = frozenset({"429"})

_CALM = {plain: 10.0, large: 0.5, messages: 1.0, models: 0.5, refused: 1.0}
_WORKERS = {"idle_timeout_s": 1, "flashboot": False}
_PACE = {"FAKE_ENGINE_EVENT_SECONDS": "0.01"}


def settings(census: Path) -> dict[str, str]:
    """Variables of a gateway for this soak.

    Args:
        census: File for what it tells of itself.
    """
    return {
        "SOAK_CENSUS": str(census),
        "PYTHONPATH": str(WATCH),
        "PILOTLIGHT_LIMITS__BODY_BYTES": str(BODY_MAX),
        "PILOTLIGHT_LIMITS__UPSTREAM_READ_S": str(SILENCE_S),
        "PILOTLIGHT_JOBS__PING_INTERVAL_MS": "1000",
        "PILOTLIGHT_JOBS__STOP_HOLD_S": "2",
        # Killed workers are no reason to wait.
        "PILOTLIGHT_WORKERS__BACKOFF_S": "1",
        "PILOTLIGHT_WORKERS__BACKOFF_MAX_S": "1",
        "PILOTLIGHT_ACCESS_LOG__FILE_BYTES": str(2**31),
    }


async def _prepare(site: Site) -> list[Target]:
    """Two endpoints alike, of which one is left in peace; each with keys of several kinds."""
    calm = await site.deploy("calm", disturbed=False, max=3, concurrency=6, env=_PACE, **_WORKERS)
    stormy = await site.deploy("stormy", disturbed=True, max=3, concurrency=6, env=_PACE, **_WORKERS)
    for target in (calm, stormy):
        target.keys += [
            await site.make_key(target, priority="high"),
            await site.make_key(target, priority="low", ends=LIMITED, requests_per_minute=120),
            await site.make_key(target, ends=LIMITED, tokens_per_minute=3000),
            await site.make_key(target, ends=LIMITED, concurrent_max=2),
        ]
    return [calm, stormy]


def plan(*, seconds: float, seed: int, census: Path, clients: int = 40) -> Plan:
    """What is done.

    Args:
        seconds: How long.
        clients: How many ask at the same time.
        seed: Chooses everything.
        census: File for what the gateway tells of itself.
    """

    def disturb(site: Site, targets: list[Target]) -> list[Coroutine[Any, Any, None]]:
        calm, stormy = targets
        return [
            tides(site, calm, f"{seed}-calm"),
            tides(site, stormy, f"{seed}-stormy"),
            Faults(site, f"{seed}-faults", every_s=3).run(),
            revisions(site, calm, f"{seed}-revisions", every_s=12, env=_PACE),
            deletions(site, f"{seed}-deletions", every_s=12, max=1, concurrency=8, env=_PACE, **_WORKERS),
            keys(site, calm, f"{seed}-keys", every_s=3),
        ]

    return Plan(
        seconds=seconds,
        seed=seed,
        clients=clients,
        pause_s=0.08,
        mix={False: _CALM, True: {**_CALM, troubled: 2.0}},
        prepare=_prepare,
        disturb=disturb,
        jobs_every_s=1.0,
        census=census,
    )
