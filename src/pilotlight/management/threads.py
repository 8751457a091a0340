"""Blocking calls that may take minutes, such as asking a hub, kept from holding up the end of the process.

`asyncio.to_thread` is for what returns soon: its threads are waited for when the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def call_in_thread(work: Callable[[], _T], *, name: str) -> _T:
    """What a blocking call returns or raises.

    The thread is nobody's: whoever stops waiting, or ends the process, leaves it behind.

    Args:
        work: The call.
        name: Of the thread, for people who look at stacks.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def settle(result: Callable[[], None]) -> None:
        if not outcome.done():
            result()

    def run() -> None:
        try:
            value = work()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            failure = error
            result: Callable[[], None] = lambda: outcome.set_exception(failure)  # noqa: E731
        else:
            result = lambda: outcome.set_result(value)  # noqa: E731
        # The loop may be closed by now, and then nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await outcome
