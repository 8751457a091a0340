"""Blocking calls that may take minutes, such as asking a hub, kept from holding up the end of the process.

`asyncio.to_thread` is for what returns soon: its threads are waited for when the process ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def start_in_thread(work: Callable[[], _T], *, name: str) -> Future[_T]:
    """What a blocking call will have returned or raised.

    The thread is nobody's: whoever stops waiting, or ends the process, leaves it behind.

    Args:
        work: The call.
        name: Of the thread, for people who look at stacks.
    """
    outcome: Future[_T] = Future()
    # From here on a waiter that is cancelled leaves it alone.
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            value = work()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            outcome.set_exception(error)
        else:
            outcome.set_result(value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome


async def call_in_thread(work: Callable[[], _T], *, name: str) -> _T:
    """What a blocking call returns or raises, as `start_in_thread` does it."""
    return await asyncio.wrap_future(start_in_thread(work, name=name))
