"""`pilotlight up`: gateway, loops and workers in one process, until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from pilotlight.logs import say

if TYPE_CHECKING:
    from pilotlight.bootstrap import Installation
    from pilotlight.first_start import FirstStart
    from pilotlight.settings import Settings

_log = structlog.get_logger()

_THREADS_GRACE_S = 0.5


def up_command(
    host: Annotated[
        str | None, typer.Option(help="Interface to listen on; loopback unless you say otherwise.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one. [default: 8400]")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Processes that serve OpenAI calls on the port, where one is not enough. [default: 1]",
        ),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Deploy the built-in model, ask it a question, print how to call it."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object once requests are answered.")
    ] = False,
) -> None:
    """Start the gateway and serve until Ctrl-C; workers start when requests come and end with it.

    Example: pilotlight up --port 8400
    """
    # Everything heavy is imported here: `pilotlight --help` must stay quick.
    import uvloop  # noqa: PLC0415

    from pilotlight.logs import configure_logging  # noqa: PLC0415
    from pilotlight.settings import load_settings  # noqa: PLC0415

    settings = load_settings()
    options = {"host": host, "port": port, "processes": processes}
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        settings = settings.model_copy(update={"server": settings.server.model_copy(update=given)})
    configure_logging(settings.log)
    code = uvloop.run(_serve(settings, demo=demo, as_json=as_json))
    _end_despite_threads(code)
    raise typer.Exit(code)


def _end_despite_threads(code: int) -> None:
    """End the process at once if a thread would hold up its end.

    A download that was given up may sit in a network read, and Python waits for its threads, which are those
    of a library. Everything of ours is closed and written by now.
    """
    deadline = time.monotonic() + _THREADS_GRACE_S
    for thread in threading.enumerate():
        if thread is threading.main_thread() or thread.daemon:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


async def _serve(settings: Settings, *, demo: bool, as_json: bool) -> int:
    from pilotlight.bootstrap import open_installation  # noqa: PLC0415
    from pilotlight.descriptors import ADVICE, raise_descriptor_limit  # noqa: PLC0415

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup has SIGHUP ignored: the terminal may close.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop.set)

    def announce(installation: Installation, first: FirstStart | None) -> None:
        _announce(installation, first, as_json=as_json)

    descriptors = raise_descriptor_limit()
    if descriptors.shortage:
        _log.warning("few_descriptors", problem=descriptors.shortage, advice=ADVICE)
    code = 0
    async with open_installation(
        settings, announce=announce, worker_descriptors=descriptors.inherited
    ) as installation:
        if demo:
            code = await _run_demo(installation, stop)
        if code == 0:
            await stop.wait()
        if not as_json:
            say("stopping: ending workers …")
    if not as_json:
        say("stopped.")
    return code


async def _run_demo(installation: Installation, stop: asyncio.Event) -> int:
    from pilotlight.cli.demo import run_demo  # noqa: PLC0415

    asking = asyncio.create_task(run_demo(installation.local_url, installation.settings.home), name="demo")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    done, _ = await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if asking in done:
        return asking.result()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    return 0


def _announce(installation: Installation, first: FirstStart | None, *, as_json: bool) -> None:
    if as_json:
        facts = {"url": installation.url, "home": str(installation.settings.home)}
        if first is not None:
            facts["admin_key"] = first.admin_key
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        return
    say(f"Pilotlight is up: {installation.url}   data: {installation.settings.home}")
    if first is not None:
        say(f"Admin key (shown once, stored only as a hash): {first.admin_key}")
    say("Next: pilotlight deploy pilotlight/ember    Ctrl-C stops everything.")
