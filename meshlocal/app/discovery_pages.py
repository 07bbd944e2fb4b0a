"""The discovery server's metrics and admin pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import meshlocal
from meshlocal.admin.messages import Request, Response
from meshlocal.admin.metrics_page import metrics_route
from meshlocal.admin.server import Route
from meshlocal.app import html
from meshlocal.app.proxy_metrics import gauge
from meshlocal.app.proxy_pages import config_view, json_response, livez, readyz
from meshlocal.app.readiness import Readiness
from meshlocal.app.views import instance_view
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.service import DiscoveryService
from meshlocal.net.grpc.server import GrpcServer

if TYPE_CHECKING:
    from meshlocal.app.discovery import DiscoveryProcess


class DiscoveryCollector(Collector):
    """Everything that a running discovery server counts."""

    def __init__(self, hub: Hub, service: DiscoveryService, server: GrpcServer, readiness: Readiness) -> None:
        self._hub = hub
        self._service = service
        self._server = server
        self._readiness = readiness

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand now."""
        yield gauge("meshlocal_build_info", "The version, as a label.", 1, version=meshlocal.__version__)
        yield gauge("meshlocal_ready", "1 while the process may be sent work.", self._readiness.ready)
        yield gauge("meshlocal_grpc_connections_open", "gRPC connections.", self._server.connections)
        yield gauge("meshlocal_watchers", "Watches under way.", self._hub.watcher_count)
        yield _counter("meshlocal_changes", "Changes of a service's instances.", self._hub.changes)
        yield _counter("meshlocal_events_sent", "Events sent to watchers.", self._service.events_sent)
        instances = GaugeMetricFamily("meshlocal_service_instances", "Instances known.", labels=["service"])
        for snapshot in self._hub.snapshots():
            instances.add_metric([snapshot.service], len(snapshot.instances))
        yield instances
        in_sync = GaugeMetricFamily("meshlocal_source_in_sync", "1 once the source was in sync.", labels=["source"])
        healthy = GaugeMetricFamily("meshlocal_source_healthy", "1 while the source has no problem.", labels=["source"])
        for state in self._hub.sources:
            in_sync.add_metric([state.source.name], state.in_sync)
            healthy.add_metric([state.source.name], state.problem is None)
        yield from (in_sync, healthy)


def discovery_routes(process: DiscoveryProcess, registry: CollectorRegistry) -> Mapping[str, Route]:
    """Every page of a discovery server, by path."""
    return {
        "/": lambda request: _overview(process),
        "/livez": livez,
        "/readyz": lambda request: readyz(process.readiness),
        "/metrics": metrics_route(registry),
        "/config": lambda request: json_response(config_view(process.config)),
        "/services": lambda request: _services(process.hub, request),
    }


def _services(hub: Hub, request: Request) -> Response:
    return json_response(
        [
            {
                "service": snapshot.service,
                "version": snapshot.version,
                "instances": [instance_view(snapshot.instances[key]) for key in sorted(snapshot.instances)],
            }
            for snapshot in hub.snapshots()
        ]
    )


def _overview(process: DiscoveryProcess) -> Response:
    hub, reason = process.hub, process.readiness.reason
    state = html.bad(f"not ready: {reason}") if reason else html.good("ready")
    sources = (
        (
            html.code(each.source.name),
            html.good("in sync") if each.in_sync else html.bad("not in sync yet"),
            html.bad(each.problem) if each.problem else None,
        )
        for each in hub.sources
    )
    services = (
        (snapshot.service, len(snapshot.instances), html.code(snapshot.version)) for snapshot in hub.snapshots()
    )
    parts = [
        html.paragraph("State: ", state),
        html.paragraph(f"Watches: {hub.watcher_count}. gRPC connections: {process.server.connections}."),
        html.heading("Sources"),
        html.table(("Source", "State", "Problem"), sources),
        html.heading("Services"),
        html.table(("Service", "Instances", "Version"), services),
    ]
    title = f"meshlocal discovery {meshlocal.__version__}"
    links = ["/services", "/metrics", "/config", "/readyz", "/livez"]
    return Response(200, "text/html; charset=utf-8", html.page(title, links, parts))


def _counter(name: str, text: str, count: int) -> Metric:
    counter = CounterMetricFamily(name, text)
    counter.add_metric([], count)
    return counter
