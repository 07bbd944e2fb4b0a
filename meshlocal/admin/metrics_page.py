"""The `/metrics` page: what a registry collects, in the format that the client asks for."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import Route


def metrics_route(registry: CollectorRegistry) -> Route:
    """A route to a registry's metrics: OpenMetrics where `Accept` asks for it, else Prometheus text.

    Each `name[]` in the query lets one metric through, by the name of one of its samples (`requests_total`).
    """

    def route(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        try:
            # It puts the version asked for into its answer's header.
            encoder, content_type = choose_encoder(accept if accept.isascii() else "")
        except (TypeError, ValueError):  # what it raises for a version that is none
            encoder, content_type = choose_encoder("")
        names = request.values("name[]")
        source = registry.restricted_registry(names) if names else registry
        return Response(200, content_type, encoder(source))

    return route
