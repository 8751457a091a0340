"""From the first poll of an unmodified worker to its last (worker-protocol.md §6, §15)."""

from __future__ import annotations

import asyncio
import signal

import pytest
import structlog

from pilotlight.domain.worker import WorkerState
from pilotlight.settings import JobSettings

pytestmark = pytest.mark.timeout(400)  # the first test of a machine builds the environment of its release


async def test_idle_worker_asks_seldom(lab):
    """§15 scenario 3: every empty take is held, so the rate follows from the hold."""
    worker = await lab.worker()
    takes = await lab.until(lambda: len(found := lab.requests("job-take", worker.worker_id)) == 4 and found)
    shortest_s = 2 * 0.9
    assert takes[-1].at - takes[0].at >= 3 * shortest_s
    assert 1 / (JobSettings().take_hold_s * 0.9) <= 0.1


async def test_workers_that_get_nothing_do_not_storm(lab, monkeypatch):
    """§15 scenarios 4 and 22: paused, overloaded, and refused because a file in the image replaces the key."""
    monkeypatch.setattr("pilotlight.gateway.worker_protocol._REFUSED_HOLD_S", 0.01)
    config = lab.folder / ".runpod" / "config.toml"
    config.parent.mkdir()
    config.write_text('[default]\napi_key = "rpa_SOMEBODY"\n')
    for endpoint in ("paused", "broken"):
        await lab.endpoint(endpoint)
    with structlog.testing.capture_logs() as logs:
        refused = await lab.worker(HOME=str(lab.folder))
        paused = await lab.worker(endpoint="paused")
        lab.platform.fleet.become(paused.worker_id, WorkerState.DRAINING)
        broken = await lab.worker(endpoint="broken")
        await lab.ready(refused, paused, broken)

        async def defective(*_, **__):
            raise RuntimeError("a defect of ours")

        lab.platform.fleet.took = defective
        takes = await lab.until(
            lambda: len(found := lab.requests("job-take", refused.worker_id)) == 2 and found
        )
        # Its heartbeats have the right key, whatever the file says.
        assert any(seen.status == 200 for seen in lab.requests("ping", refused.worker_id))
    assert takes[1].at - takes[0].at >= 4.9
    assert takes[0].status == 429
    # The broken endpoint's worker was held first, then refused once, and pauses since.
    assert [seen.status for seen in lab.requests("job-take", broken.worker_id)][1:] in ([429], [429, 429])
    assert len(lab.requests("job-take", paused.worker_id)) <= 5
    warnings = [entry for entry in logs if entry["event"] == "worker_key_refused"]
    assert [entry["worker_id"] for entry in warnings] == [refused.worker_id]
    assert "~/.runpod/config.toml" in warnings[0]["advice"]


@pytest.mark.parametrize("release", ["1.9", "1.6"])
async def test_workers_of_earlier_releases_do_not_storm_when_we_fail(lab, monkeypatch, release):
    """§9, §11: 1.6 does not pause after 429, and asked twelve times a second."""
    hold_s = 1.0
    monkeypatch.setattr("pilotlight.gateway.worker_protocol._REFUSED_HOLD_S", hold_s)

    async def defective(*_, **__):
        raise RuntimeError("a defect of ours")

    lab.platform.fleet.took = defective
    worker = await lab.worker(release=release)
    takes = await lab.until(lambda: len(found := lab.requests("job-take", worker.worker_id)) == 3 and found)
    assert takes[0].status == 429
    assert takes[2].at - takes[0].at >= 2 * hold_s


@pytest.mark.parametrize("release", ["1.12", "1.9"])
async def test_end_of_the_gateway_with_an_idle_worker(lab, release):
    """§6.3, §15 scenario 11: signalled while its polls are open, then answered, it ends by itself at once.

    One whose polls were answered first asked again, and slept for 5 s after the answer, 429.
    """
    worker = await lab.worker(release=release)
    await lab.ready(worker)
    await lab.platform.parked()
    lab.platform.service.begin_close()
    # What ends its polls in between must not put it to sleep either.
    for poll in list(lab.platform.service._ledger.links[worker.worker_id].polls):
        poll.expire()
    takes = len(lab.requests("job-take", worker.worker_id))
    await lab.until(lambda: len(lab.requests("job-take", worker.worker_id)) > takes)
    worker.process.send_signal(signal.SIGTERM)
    lab.platform.service.release_polls(worker.worker_id)
    assert await worker.exit_code() == 0
    assert {seen.status for seen in lab.requests("job-take", worker.worker_id)} == {204}


@pytest.mark.parametrize("release", ["1.12", "1.9", "1.6"])
async def test_drain_of_an_idle_worker(lab, release):
    """§15 scenario 11, §6.3: mark, signal, answer the polls; what arrives meanwhile goes elsewhere."""
    worker = await lab.worker(release=release)
    await lab.ready(worker)
    await lab.platform.fleet.drain(worker.worker_id, reason="scale down")
    job_id = await lab.run({"n": 1})
    worker.process.send_signal(signal.SIGTERM)
    lab.platform.service.release_polls(worker.worker_id)
    code = await worker.exit_code()
    # Releases before 1.7 do not catch the signal.
    assert code == (-signal.SIGTERM if release == "1.6" else 0)
    await lab.platform.fleet.end(worker.worker_id, "drained")
    assert (await lab.platform.status(job_id))["status"] == "IN_QUEUE"
    other = await lab.worker()
    assert (await lab.finished(job_id))["workerId"] == other.worker_id


@pytest.mark.parametrize("release", ["1.12", "1.9", "1.6"])
async def test_drain_of_a_busy_worker(lab, release):
    """§15 scenario 11: its result is kept; a release that dies of the signal loses it, and it runs again."""
    worker = await lab.worker(release=release)
    gate = lab.gate("end")
    job_id = await lab.run(gate.input)
    await lab.until(lambda: gate.started)
    await lab.platform.fleet.drain(worker.worker_id, reason="scale down")
    worker.process.send_signal(signal.SIGTERM)
    lab.platform.service.release_polls(worker.worker_id)
    if release != "1.6":
        late = await lab.run({"n": 2})
        gate.open()
        assert await worker.exit_code() == 0
        assert (await lab.platform.status(job_id))["status"] == "COMPLETED"
        assert (await lab.platform.status(late))["status"] == "IN_QUEUE"
        return
    assert await worker.exit_code() == -signal.SIGTERM
    await lab.platform.fleet.end(worker.worker_id, "signal 15")
    gate.open()
    other = await lab.worker()
    done = await lab.finished(job_id)
    assert (done["status"], done["retries"], done["workerId"]) == ("COMPLETED", 1, other.worker_id)


@pytest.mark.parametrize("release", ["1.9", "1.6"])
async def test_death_of_a_worker_without_stop_channel(lab, release):
    """§15 scenarios 9 and 21: the end of its process is the sign; the job runs once more."""
    first = await lab.worker(release=release)
    gate = lab.gate("end")
    job_id = await lab.run(gate.input)
    await lab.until(lambda: gate.started)
    first.process.kill()
    await first.exit_code()
    assert lab.requests("job-stop", first.worker_id) == []
    await lab.platform.fleet.end(first.worker_id, "signal 9")
    gate.open()
    second = await lab.worker()
    done = await lab.finished(job_id)
    assert (done["status"], done["retries"], done["workerId"]) == ("COMPLETED", 1, second.worker_id)


@pytest.mark.parametrize("way", ["refresh", "async"])
async def test_refresh(lab, way):
    """§15 scenario 15, §6.4: from the start config and from one result; nothing more is handed out."""
    worker = await lab.worker(way)
    done = await lab.result({"do": "refresh"} if way == "async" else {"n": 1})
    assert done["status"] == "COMPLETED"
    await lab.until(lambda: lab.platform.fleet.drained)
    assert lab.platform.fleet.drained[0][0] == worker.worker_id
    waiting = await lab.run({"n": 2})
    worker.process.send_signal(signal.SIGTERM)
    lab.platform.service.release_polls(worker.worker_id)
    assert await worker.exit_code() == 0
    assert (await lab.platform.status(waiting))["status"] == "IN_QUEUE"


async def test_failed_fitness_check(lab):
    """§15 scenario 16, §3.6: the reason reaches the fleet, and the worker is ended."""
    worker = await lab.worker("unfit")
    assert await worker.exit_code() == 1
    await lab.until(lambda: lab.platform.fleet.killed)
    (report,) = [report for worker_id, report in lab.platform.fleet.reports if worker_id == worker.worker_id]
    assert "model file is missing" in report.failure.cause
    assert "model_is_there" in report.failure.cause
    assert lab.requests("job-take", worker.worker_id) == []


async def test_dead_proxy(lab):
    """§15 scenario 23: heartbeats still arrive, because our host is exempt."""
    dead = "http://127.0.0.1:9"
    worker = await lab.worker(HTTP_PROXY=dead, HTTPS_PROXY=dead, http_proxy=dead)
    done, _ = await asyncio.gather(
        lab.result({"n": 1}), lab.until(lambda: lab.requests("ping", worker.worker_id))
    )
    assert done["status"] == "COMPLETED"
