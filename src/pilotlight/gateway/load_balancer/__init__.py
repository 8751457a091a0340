"""The load balancer: requests and WebSockets straight to a worker's own HTTP server (serverless-api.md §3).

`balancer` takes them in, `choice` finds a worker for each, `forward` exchanges a request for its answer and
`tunnel` carries a WebSocket. `head`, `body` and `refusal` are what goes over the wire; `checks` is one
health check, which `loops.health_checks` asks for.
"""

from __future__ import annotations

from pilotlight.gateway.load_balancer.balancer import LoadBalancer

__all__ = ["LoadBalancer"]
