"""The management API: endpoints, keys and records over one service layer.

`bootstrap` builds `EndpointService` and `KeyService`, gives them to `management_app`, and hands the result to
the gateway, which sends it every request below `/pilotlight` and below the reserved roots of `/v2`.
"""

from __future__ import annotations

from pilotlight.management.app import management_app
from pilotlight.management.images import ImageChecker, RegistryLogins
from pilotlight.management.keys import KeyService
from pilotlight.management.service import EndpointService
from pilotlight.management.webhooks import WebhookDesk

__all__ = [
    "EndpointService",
    "ImageChecker",
    "KeyService",
    "RegistryLogins",
    "WebhookDesk",
    "management_app",
]
