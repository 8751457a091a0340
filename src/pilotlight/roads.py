"""The roads of the gateway, made of the parts that `bootstrap` has put together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pilotlight.clusters.devices import read_host
from pilotlight.gateway.app import Gateway, OpenAIRoad
from pilotlight.gateway.asgi import App
from pilotlight.gateway.data_path import DataPath, StartFailedError
from pilotlight.gateway.data_path.desk import LocalDesk
from pilotlight.gateway.fronts.owner_side import OwnerSide
from pilotlight.gateway.fronts.supervisor import FrontSupervisor
from pilotlight.gateway.handover import Handed
from pilotlight.gateway.jobs import job_routes
from pilotlight.gateway.jobs.batch_routes import batch_routes
from pilotlight.gateway.jobs.http import JobRoad
from pilotlight.gateway.jobs.openai import JobOpenAI
from pilotlight.gateway.jobs.openapi import describe
from pilotlight.gateway.load_balancer import LoadBalancer
from pilotlight.gateway.openai_rates import LimitedOpenAI
from pilotlight.gateway.realtime import RealtimeRoad
from pilotlight.gateway.worker_protocol import worker_routes
from pilotlight.management import (
    EndpointService,
    ImageChecker,
    KeyService,
    RegistryLogins,
    WebhookDesk,
    management_app,
)

if TYPE_CHECKING:
    from pilotlight.bootstrap import Installation


def gateway(parts: Installation) -> Gateway:
    """What serves all requests."""
    path = data_path(parts)
    return Gateway(
        data_path=path,
        openai=openai_jobs(parts),
        serves_directly=parts.serves_directly,
        jobs=job_road(parts),
        management=management(parts),
        balancer=parts.balancer,
        leads=lambda: parts.leadership.leading,
        metrics=parts.observability.metrics.answer,
        realtime=RealtimeRoad(path, parts.serves_directly),
    )


def desk(parts: Installation) -> LocalDesk:
    """What gives slots to requests of the data path, of this process and of fronts."""
    return LocalDesk(
        directory=parts.directory,
        slots=parts.slots,
        key_limits=parts.key_limits,
        fleet=parts.fleet,
        outlook=parts.outlook,
        limits=parts.settings.limits,
        observed=parts.router.observed,
    )


def fronts(
    parts: Installation,
    listeners: Sequence[socket.socket],
    adopt: Callable[[socket.socket, Handed], None],
) -> FrontSupervisor:
    """What keeps a process at each of these sockets, to serve the data path.

    Args:
        parts: The installation.
        listeners: Sockets at the public port.
        adopt: Serves connections that ask for more than the data path.
    """
    side = OwnerSide(
        desk=parts.desk,
        directory=parts.directory,
        record=parts.recorder.record,
        settings=parts.settings,
        rates=parts.jobs.rates,
        leads=lambda: parts.leadership.leading,
        closing=lambda: parts.app.closing,
    )
    parts.pool.on_drop = side.drop
    parts.leadership.on_leading = parts.directory.touch
    return FrontSupervisor(side, listeners, adopt)


def data_path(parts: Installation) -> DataPath:
    """What serves the OpenAI routes of endpoints whose engines are reached."""
    return DataPath(
        directory=parts.directory,
        desk=parts.desk,
        pool=parts.pool,
        clock=parts.clock,
        limits=parts.settings.limits,
        entropy=os.urandom,
        record=parts.recorder.record,
        rates=parts.jobs.rates,
        tracer=parts.observability.tracer,
    )


def openai_jobs(parts: Installation) -> OpenAIRoad:
    """What serves those of all others."""
    road = JobOpenAI(parts.jobs, parts.directory, parts.settings.limits, parts.outlook, parts.key_limits)
    rates = parts.jobs.rates
    return road if rates is None else LimitedOpenAI(road, rates, parts.directory)


def load_balancer(parts: Installation) -> LoadBalancer:
    """What serves load-balancing endpoints."""
    balancer = LoadBalancer(
        directory=parts.directory,
        slots=parts.slots,
        fleet=parts.fleet,
        outlook=parts.outlook,
        clock=parts.clock,
        settings=parts.settings.load_balancer,
        entropy=os.urandom,
        record=parts.recorder.record,
        key_limits=parts.key_limits,
        start_failed=StartFailedError,
    )
    parts.listener.balanced = balancer.pool
    return balancer


def job_road(parts: Installation) -> JobRoad:
    """What serves the job API and the worker protocol."""
    limits = parts.settings.limits
    clients = job_routes(
        parts.jobs,
        parts.directory,
        slots=parts.slots,
        fleet=parts.roster,
        limits=limits,
        key_limits=parts.key_limits,
    )
    workers = worker_routes(parts.jobs, parts.fleet, limits=limits)
    batches = batch_routes(parts.jobs.batches, parts.directory, limits=limits, rates=parts.jobs.rates)
    return JobRoad([*clients, *workers, *batches], body_s=limits.body_s)


def management(parts: Installation) -> App:
    """What serves the management API."""
    service = EndpointService(
        store=parts.store,
        directory=parts.directory,
        fleet=parts.roster,
        settings=parts.settings,
        clock=parts.clock,
        entropy=os.urandom,
        wake=parts.endpoint_changed,
        manifest_loader=parts.manifest,
        host_reader=read_host,
        on_deleted=parts.endpoint_deleted,
        base_url=lambda: parts.url,
        images=ImageChecker(
            engine=parts.container_engine,
            logins=RegistryLogins(parts.secret),
            read_host=read_host,
            reserve_bytes=parts.settings.workers.memory_reserve_bytes,
            volume_roots=parts.settings.volume_roots,
            leads=lambda: parts.leadership.leading,
        ),
        estimates=parts.estimates,
    )
    return management_app(
        service=service,
        keys=KeyService(store=parts.store, directory=parts.directory, clock=parts.clock, entropy=os.urandom),
        key_reader=parts.directory,
        records=parts.store,
        slots=parts.slots,
        logs=parts.cluster.logs,
        clock=parts.clock,
        home=str(parts.settings.home),
        describe=describe,
        webhooks=WebhookDesk(
            store=parts.store,
            clock=parts.clock,
            secret=parts.secret.webhook_secret,
            wake=parts.webhooks.wake,
        ),
        launchers=parts.launchers.infos,
        body_s=parts.settings.limits.body_s,
    )
