"""The management API as one ASGI application.

Its routes have full paths, so it needs no mounting; what it does not know it answers with 404.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

import pilotlight
from pilotlight.management import problems, rest_v2, routes
from pilotlight.management.guard import Guard, KeyReader
from pilotlight.management.keys import KeyService
from pilotlight.management.launchers import ReadLaunchers, launcher_routes
from pilotlight.management.service import EndpointService
from pilotlight.management.webhooks import WebhookDesk, webhook_routes
from pilotlight.management.workers import worker_list_routes
from pilotlight.ports.clock import Clock
from pilotlight.ports.logs import WorkerLogs


def management_app(
    *,
    service: EndpointService,
    keys: KeyService,
    key_reader: KeyReader,
    records: routes.RecordStore,
    slots: rest_v2.SlotReader,
    logs: WorkerLogs,
    clock: Clock,
    home: str,
    webhooks: WebhookDesk,
    launchers: ReadLaunchers,
    body_s: float,
    describe: Callable[[dict[str, Any]], dict[str, Any]] = lambda description: description,
) -> ASGIApp:
    """The management API, guarded by admin keys.

    Args:
        service: Endpoints.
        keys: Keys.
        key_reader: Looks up the key of a request; the gateway's directory.
        records: Starts, usage, requests.
        slots: Slots of ready workers; the gateway's slot table.
        logs: Logs of workers.
        clock: Time.
        home: The data folder, shown in the status.
        webhooks: Webhook secrets and dead letters.
        launchers: The launchers there are.
        body_s: How long the body of a request may take.
        describe: Adds to the OpenAPI description what others serve.
    """
    app = FastAPI(
        title="Pilotlight",
        version=pilotlight.__version__,
        docs_url=f"{routes.PREFIX}/docs",
        openapi_url=f"{routes.PREFIX}/openapi.json",
        redoc_url=None,
        redirect_slashes=False,
    )
    problems.install(app)
    app.include_router(routes.endpoint_routes(service))
    app.include_router(routes.key_routes(keys))
    app.include_router(routes.record_routes(service, records, home=home))
    app.include_router(rest_v2.serverless_routes(service, slots=slots, logs=logs, clock=clock))
    app.include_router(worker_list_routes(service, slots=slots, clock=clock))
    app.include_router(webhook_routes(service, webhooks))
    app.include_router(launcher_routes(launchers))
    own = app.openapi
    whole: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not whole:
            whole.update(describe(problems.described(own())))
        return whole

    # FastAPI's own way to extend its description.
    app.openapi = openapi  # type: ignore[method-assign]
    return Guard(app, key_reader, body_s=body_s)
