"""The warm ladder with the real engine: every rung, every fall to the next one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from tests.conftest import LiveInstallation, live_installation

from .waking import ANSWER, Sleeper, end, engine_of, held, launcher_of, processes_of, state_of, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def place() -> Iterator[LiveInstallation]:
    """An installation of this module's own: its launcher is killed. A busy machine may be slow to answer after a
    thaw, which is not what is tested here."""
    with live_installation(PILOTLIGHT_WORKERS__THAW_TIMEOUT_S="10") as installation:
        # Keeps the launcher there from test to test.
        installation.deploy("pilotlight/ember", "keeper")
        launcher_of(installation)
        yield installation


@pytest.fixture
def sleeper(place: LiveInstallation) -> Iterator[Sleeper]:
    """A frozen worker that has answered before."""
    sleeper = Sleeper(place, "sleeper")
    assert sleeper.ask() == ANSWER
    sleeper.await_frozen()
    yield sleeper
    sleeper.remove()


def test_an_endpoint_at_zero_starts_from_the_launcher(place):
    endpoint = Sleeper(place, "launchable", flashboot=False)
    launcher = launcher_of(place)
    assert endpoint.ask() == ANSWER
    running = processes_of(endpoint.worker_id())
    assert launcher["pid"] not in running, "the launcher belongs to nobody"
    assert len(running) >= 3, "worker program, API server, engine core"
    (start,) = until(lambda: [each for each in endpoint.starts() if each["first_token_after_ms"] is not None])
    assert (start["rung"], start["outcome"]) == ("launchable", "ready")
    assert start["memory_bytes"] > 100e6
    reached = [stage["stage"] for stage in start["stages"]]
    for stage in ("decision", "spawned", "config", "loading_weights", "warming_up", "ready", "first_token"):
        assert stage in reached
    assert [stage["at_ms"] for stage in start["stages"]] == sorted(
        stage["at_ms"] for stage in start["stages"]
    )
    endpoint.await_none()
    assert [pid for pid in running if state_of(pid) not in {"", "Z"}] == []
    endpoint.remove()


def test_a_frozen_worker_answers_again_after_any_pause(sleeper):
    """The second pause is longer than vLLM's own server keeps idle connections."""
    worker_id = sleeper.worker_id()
    start = sleeper.starts()[0]
    for pause_s in (1, 6):
        time.sleep(pause_s)
        assert sleeper.ask() == ANSWER
        start = sleeper.start_after(start)
        assert start["rung"] == "frozen"
        assert sleeper.await_frozen() == worker_id
    assert {"ready", "frozen"} <= sleeper.usage_states()
    shown = sleeper.api.get(f"/v2/{sleeper.id}/health").json()["workers"]
    assert not any(shown.values()), "in no counter of RunPod's"


def test_a_frozen_engine_that_was_killed_is_replaced(sleeper):
    worker_id = sleeper.worker_id()
    end(engine_of(worker_id))
    assert sleeper.ask() == ANSWER
    assert sleeper.worker_id() != worker_id
    assert processes_of(worker_id) == []


def test_a_worker_program_that_was_killed_takes_its_frozen_engine_along(sleeper):
    worker_id = sleeper.worker_id()
    engine = engine_of(worker_id)
    end([pid for pid in processes_of(worker_id) if pid not in engine])
    assert sleeper.ask() == ANSWER
    assert sleeper.worker_id() != worker_id
    until(lambda: not any(state_of(pid) for pid in engine))


def test_an_engine_that_hangs_after_the_thaw_is_replaced(sleeper):
    worker_id = sleeper.worker_id()
    with held(max(engine_of(worker_id))):
        assert sleeper.ask() == ANSWER
        assert sleeper.worker_id() != worker_id


def test_engines_outlive_their_launcher_and_starts_do_without_it(sleeper, place):
    worker_id = sleeper.worker_id()
    launcher = launcher_of(place)
    end([launcher["pid"]])
    assert sleeper.ask() == ANSWER
    assert sleeper.worker_id() == worker_id, "it was thawed, and serves"
    other = Sleeper(place, "other", flashboot=False)
    assert other.ask() == ANSWER
    assert until(other.starts)[0]["outcome"] == "ready"
    other.remove()
    assert launcher_of(place)["pid"] != launcher["pid"], "it was started again"
