"""A test's time ends a test on uvloop."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from .timeouts import UvLoop


def test_what_fails_in_a_signal_handler_ends_the_test_and_says_where_it_waits(capsys):
    def end(*_):
        pytest.fail("its time is over")

    async def waits_forever():
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGUSR1)
        await asyncio.Event().wait()

    before = signal.signal(signal.SIGUSR1, end)
    try:
        with asyncio.Runner(loop_factory=UvLoop) as runner, pytest.raises(RuntimeError, match="loop stopped"):
            runner.run(waits_forever())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "await asyncio.Event().wait()" in capsys.readouterr().err
