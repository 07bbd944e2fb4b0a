"""The `/metrics` page: what collectors say, in the format that the client asks for.

prometheus_client brings parts of http.server and email along, some 3 MB: it is imported when somebody first asks for
metrics, so that a sidecar that nobody scrapes never holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import Route

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector


def metrics_route(collectors: Callable[[], Iterable[Collector]]) -> Route:
    """A route to collectors' metrics: OpenMetrics where `Accept` asks for it, else Prometheus text.

    Each `name[]` in the query lets one metric through, by the name of one of its samples (`requests_total`).

    Args:
        collectors: makes the collectors, once.
    """
    registry: CollectorRegistry | None = None

    def route(request: Request) -> Response:
        from prometheus_client import CollectorRegistry

        nonlocal registry
        if registry is None:
            # What collectors describe is what `name[]` can name.
            registry = CollectorRegistry(auto_describe=True)
            for collector in collectors():
                registry.register(collector)
        return metrics_response(request, registry)

    return route


def metrics_response(request: Request, registry: CollectorRegistry) -> Response:
    """A registry's metrics, as the request asks for them (see `metrics_route`)."""
    from prometheus_client.exposition import choose_encoder

    accept = request.headers.get("accept", "")
    try:
        # It puts the version asked for into its answer's header.
        encoder, content_type = choose_encoder(accept if accept.isascii() else "")
    except (TypeError, ValueError):  # what it raises for a version that is none
        encoder, content_type = choose_encoder("")
    names = request.values("name[]")
    source = registry.restricted_registry(names) if names else registry
    return Response(200, content_type, encoder(source))
