"""What fronts are told, and what they tell beside requests for slots."""

from __future__ import annotations

import asyncio

import structlog

from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.gateway.fronts import owner_side
from pilotlight.settings import load_settings

from .conftest import a_key, an_endpoint


async def test_a_front_works_by_the_settings_of_the_owner_whatever_its_own_files_say(
    rig, monkeypatch, tmp_path
):
    settings = load_settings(home=tmp_path / "home", server={"port": 1234}, limits={"hold_s": 7})
    rig.own(settings=settings)
    (tmp_path / "pilotlight.toml").write_text('no_such_setting = 1\n[engine.homes]\n"1.0" = "/nowhere"\n')
    monkeypatch.setenv("PILOTLIGHT_CONFIG", str(tmp_path / "pilotlight.toml"))
    monkeypatch.setenv("PILOTLIGHT_LIMITS__HOLD_S", "1")
    front = await rig.front()
    assert front.side.settings.model_dump() == settings.model_dump()


async def test_changes_count_at_every_front_before_their_maker_is_answered(rig):
    fronts = [await rig.front() for _ in range(3)]
    epochs = [front.side.directory.epoch for front in fronts]
    for front in fronts:
        await front.settle()
    await rig.store.add_key(a_key("new", heartbeat_s=0.5, endpoint_ids=frozenset({"a", "b"})))
    await rig.store.add_endpoint(an_endpoint("second", workers_max=7))
    await rig.directory.refresh()
    for front, epoch in zip(fronts, epochs, strict=True):
        directory = front.side.directory
        assert list(directory.endpoints()) == list(rig.directory.endpoints())
        assert directory.key("rpa_new") == rig.directory.key("rpa_new") == a_key(
            "new", heartbeat_s=0.5, endpoint_ids=frozenset({"a", "b"})
        )  # fmt: skip
        assert directory.epoch > epoch
        await directory.refresh()
        assert directory.endpoint("second").workers_max == 7


async def test_a_front_that_is_late_holds_up_no_change_for_long(rig, monkeypatch):
    monkeypatch.setattr(owner_side, "_FOLLOWED_S", 0.01)
    front = await rig.front()
    await front.settle()
    front.side._handlers[owner_side.messages.State] = lambda _: None
    with structlog.testing.capture_logs() as logs:
        await rig.directory.refresh()
    assert [entry["event"] for entry in logs] == ["fronts_late"]
    front.attached.close()
    await front.attached.lost.wait()
    rig.fronts.remove(front)
    await rig.directory.refresh()


async def test_a_front_that_is_lost_holds_up_no_change(rig):
    front = await rig.front()
    await front.settle()
    front.side._handlers[owner_side.messages.State] = lambda _: None
    refreshing = asyncio.create_task(rig.directory.refresh())
    await asyncio.sleep(0)
    front.attached.close()
    async with asyncio.timeout(0.9 * owner_side._FOLLOWED_S):
        await refreshing


async def test_the_lead_and_the_end_are_told(rig):
    front = await rig.front()
    assert (front.side.leading, front.side.closing) == (True, False)
    rig.leading, rig.closing = False, True
    rig.directory.touch()
    await front.settle()
    assert (front.side.leading, front.side.closing) == (False, True)


async def test_ready_rows_drops_and_stop(rig):
    front, dropped = await rig.front(), []
    front.side.on_drop = dropped.append
    row = RequestRecord(
        id="r", road=Road.DATA, endpoint_id="ep", key_id="run", route="/v1/x", status=200, outcome=Outcome.OK,
        arrival_ms=1, tokens_in=3, client_id="mine", trace="t",
    )  # fmt: skip
    front.side.ready()
    front.side.record(row)
    rig.owner.drop(["unix:/a", "unix:/b"])
    front.attached.stop()
    await front.attached.ready.wait()
    await front.side.stopping.wait()
    front.side.record(row)
    await front.side.close()
    await front.attached.lost.wait()
    assert (rig.rows, dropped) == ([row, row], [("unix:/a", "unix:/b")])
    front.attached.stop()


async def test_a_front_that_comes_later_knows_what_the_others_know(rig):
    first = await rig.front()
    await rig.store.add_key(a_key("new"))
    await rig.directory.refresh()
    later = await rig.front()
    assert first.side.directory.key("rpa_new") == later.side.directory.key("rpa_new") == a_key("new")
