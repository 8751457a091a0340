"""A front: one of several processes that serve the data path on one port (`python -m pilotlight.front`).

It is started by `gateway.fronts.supervisor`, with three sockets as its arguments, by number: its link to the
owner, over which come its settings and everything it needs to know; its door, through which it hands over
what is not for the data path; and the one that it listens on. It obeys the link alone, not signals, and ends
at once when that is lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import NoReturn

import uvloop

from pilotlight.descriptors import raise_descriptor_limit
from pilotlight.gateway.data_path import DataPath
from pilotlight.gateway.fronts.front_gateway import FrontGateway
from pilotlight.gateway.fronts.front_side import FrontSide
from pilotlight.gateway.fronts.link import LinkError
from pilotlight.gateway.handover import Door
from pilotlight.gateway.observability import tracing_of
from pilotlight.gateway.upstream import UpstreamPool
from pilotlight.huge_pages import keep_in_huge_pages
from pilotlight.logs import configure_logging
from pilotlight.loops.tasks import Endless
from pilotlight.serving import Server, certificate_of, server_config
from pilotlight.system import SystemClock, calm_collector

_ORPHANED = 3
"""Exit status of one whose owner is gone."""


def main() -> NoReturn:
    """Serve until the owner says otherwise."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    link, door, listener = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    raise_descriptor_limit()
    uvloop.run(_serve(link, door, listener))
    sys.exit(0)


async def _serve(link: socket.socket, door: socket.socket, listener: socket.socket) -> None:
    try:
        side = await FrontSide.connect(link)
    except LinkError:
        os._exit(_ORPHANED)
    leaving = asyncio.create_task(_end_with_owner(side), name="end with the owner")
    settings = side.settings
    configure_logging(settings.log)
    certificate = certificate_of(settings.server)
    pool = UpstreamPool(idle_s=settings.limits.upstream_idle_s)
    side.on_drop = pool.drop
    tracing = tracing_of(settings)
    app = FrontGateway(
        data_path=DataPath(
            directory=side.directory,
            desk=side.desk,
            pool=pool,
            clock=SystemClock(),
            limits=settings.limits,
            entropy=os.urandom,
            record=side.record,
            tracer=tracing,
        ),
        directory=side.directory,
        told=side,
        hand_over=Door(door).hand_over,
        tells_models=settings.limits.profile == "none",
    )
    server = Server(
        server_config(app, grace_s=settings.server.shutdown_s),
        None if certificate is None else (listener, certificate),
    )
    serving = asyncio.create_task(server.serve([listener] if certificate is None else []), name="server")
    answering = asyncio.create_task(server.answering.wait(), name="server-answering")
    stopping = asyncio.create_task(side.stopping.wait(), name="stop")
    await asyncio.wait({serving, answering}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    calm_collector()
    memory = Endless(keep_in_huge_pages, "huge pages")
    if settings.server.huge_pages:
        memory.start()
    side.ready()
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    leaving.cancel()
    await memory.stop()
    pool.close()
    if tracing is not None:
        await tracing.close()
    await side.close()


async def _end_with_owner(side: FrontSide) -> None:
    await side.lost.wait()
    os._exit(_ORPHANED)


if __name__ == "__main__":
    main()
