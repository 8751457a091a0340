"""What is told to those who wait, from the workers there are and the starts there were."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pilotlight.core.admission import Admission, AdmissionReason, Verdict
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.worker import Rung, Stage, Worker, WorkerState
from pilotlight.gateway.outlook import Outlook
from pilotlight.ports.fleet import Health

from .conftest import IdleFleet

NOW = 1_000_000
ENDPOINT = Endpoint(id="ep", name="ep", revision=Revision(endpoint_id="ep", version=1, model="m"))
STARTING = Worker(id="w", endpoint_id="ep", version=1, stage=Stage.LOADING_WEIGHTS, state_ms=NOW - 2_000)
READY = replace(STARTING, id="r", state=WorkerState.READY, stage=Stage.READY)
FROZEN = replace(READY, id="f", state=WorkerState.FROZEN)


class Standing:
    """A clock that stands."""

    def now_ms(self):
        return NOW


def outlook(*workers, estimate_ms=8_500, throttled=None, steps=()):
    fleet = IdleFleet()
    fleet.living, fleet.state, fleet.steps = list(workers), Health(throttled=throttled), steps
    return Outlook(
        fleet=fleet, clock=Standing(), estimate=lambda _: estimate_ms, rung=lambda _: Rung.LAUNCHABLE
    )


@pytest.mark.parametrize(
    ("workers", "more", "seconds", "comment"),
    [
        ((), {}, 9, "starting stage=decision elapsed_s=1.2 estimate_s=9.7 rung=launchable"),
        ((FROZEN,), {}, 9, "starting stage=decision elapsed_s=1.2 estimate_s=9.7 rung=launchable"),
        ((STARTING,), {}, 7, "starting stage=loading_weights elapsed_s=1.2 estimate_s=7.7 rung=launchable"),
        (
            (READY, STARTING), {}, 7,
            "starting stage=loading_weights elapsed_s=1.2 estimate_s=7.7 rung=launchable",
        ),
        ((STARTING,), {"estimate_ms": 2_001}, 1, "starting stage=loading_weights elapsed_s=1.2 estimate_s=1.2 rung=launchable"),
        # It takes longer than starts do: nobody knows how long.
        ((STARTING,), {"estimate_ms": 2_000}, None, "starting stage=loading_weights elapsed_s=1.2 rung=launchable"),
        ((STARTING,), {"estimate_ms": None}, None, "starting stage=loading_weights elapsed_s=1.2 rung=launchable"),
        # What is fetched is no part of an estimate.
        (
            (STARTING,), {"steps": (("decision", NOW - 2_000), ("downloading", NOW - 1_900), ("importing", NOW - 900))},
            8, "starting stage=loading_weights elapsed_s=1.2 estimate_s=8.7 rung=launchable",
        ),
        (
            (replace(STARTING, stage=Stage.DOWNLOADING),), {}, None,
            "starting stage=downloading elapsed_s=1.2 rung=launchable",
        ),
        # All are busy: how long is not a question of starts.
        ((READY,), {}, None, "waiting stage=ready elapsed_s=1.2"),
        ((), {"throttled": "no memory"}, None, "starting stage=placement elapsed_s=1.2 rung=launchable"),
    ],
)  # fmt: skip
def test_what_is_known_of_a_wait(workers, more, seconds, comment):
    looking = outlook(*workers, **more)
    assert looking.start_s(ENDPOINT) == seconds
    assert looking.comment(ENDPOINT, 1_234) == f": pilotlight {comment}\n\n".encode()


def test_nothing_is_going_to_start_for_a_paused_endpoint():
    paused = replace(ENDPOINT, workers_max=0)
    assert outlook().start_s(paused) is None
    assert (
        outlook().comment(paused, 0)
        == b": pilotlight starting stage=paused elapsed_s=0.0 rung=launchable\n\n"
    )


@pytest.mark.parametrize(
    ("reason", "said_s", "estimate_ms", "expected"),
    [
        (AdmissionReason.HOLD_FULL, 5, 8_500, 9),
        (AdmissionReason.HOLD_FULL, 5, 40, 1),
        (AdmissionReason.HOLD_BYTES_FULL, 5, None, 5),
        (AdmissionReason.UNHEALTHY, 30, 8_500, 30),
        (AdmissionReason.UNHEALTHY, 2, 8_500, 9),
        (AdmissionReason.UNHEALTHY, 2, None, 2),
    ],
)
def test_when_to_come_again(reason, said_s, estimate_ms, expected):
    shed = Admission(verdict=Verdict.SHED, reason=reason, retry_after_s=said_s)
    assert outlook(estimate_ms=estimate_ms).retry_after_s(ENDPOINT, shed) == expected


def test_whether_anybody_is_ready():
    assert outlook(STARTING, READY).ready("ep")
    assert not outlook(STARTING, FROZEN).ready("ep")
