"""A call at a moment knows its moment, however near that is, on both loops."""

import asyncio

import pytest

from pilotlight.alarms import alarm_at

from .timeouts import UvLoop


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, UvLoop])
@pytest.mark.parametrize("delay_s", [-1.0, 0.0, 0.0004, 0.002])
def test_it_calls_once_and_knows_when(new_loop, delay_s):
    async def main():
        loop = asyncio.get_running_loop()
        moment_s = loop.time() + delay_s
        called, cancelled = loop.create_future(), []
        alarm_at(moment_s, cancelled.append, "rang").cancel()
        alarm = alarm_at(moment_s, called.set_result, "rang")
        assert alarm.moment_s == moment_s
        assert await called == "rang"
        assert cancelled == []
        alarm.cancel()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
