"""The discovery server's metrics, made from its plain counts when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import meshlocal
from meshlocal.app.discovery_access import DiscoveryAccess
from meshlocal.app.proxy_metrics import expiry, exposed, gauge
from meshlocal.app.readiness import Readiness
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.limits import Limited, ServerLimits
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import source_details
from meshlocal.net.following import Followed
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.policy.exposure import Exposure

if TYPE_CHECKING:
    from meshlocal.discovery.websocket import WebSocketServer
    from meshlocal.discovery.xds.service import XdsService


class DiscoveryCollector(Collector):
    """Everything that a running discovery server counts."""

    def __init__(
        self,
        hub: Hub,
        service: DiscoveryService,
        limits: ServerLimits,
        grpc_servers: Sequence[GrpcServer],
        readiness: Readiness,
        websocket: WebSocketServer | None = None,
        xds: XdsService | None = None,
        *,
        access: DiscoveryAccess | None = None,
        exposures: Sequence[Exposure] = (),
        followed: Callable[[], Iterable[Followed[Any]]] = tuple,
    ) -> None:
        self._followed = followed
        self._access = access
        self._exposures = exposures
        self._hub = hub
        self._service = service
        self._limits = limits
        self._grpc_servers = grpc_servers
        self._readiness = readiness
        self._websocket = websocket
        self._xds = xds

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand now."""
        yield gauge("meshlocal_build_info", "The version, as a label.", 1, version=meshlocal.__version__)
        yield gauge("meshlocal_ready", "1 while the process may be sent work.", self._readiness.ready)
        yield gauge(
            "meshlocal_grpc_connections_open", "gRPC connections.", sum(each.connections for each in self._grpc_servers)
        )
        connections = self._websocket.connections if self._websocket is not None else 0
        yield gauge("meshlocal_websocket_connections_open", "WebSocket connections.", connections)
        yield gauge("meshlocal_watchers", "Watches under way.", self._hub.watcher_count)
        yield _counter("meshlocal_changes", "Changes of a service's instances.", self._hub.changes)
        yield _counter("meshlocal_events_sent", "Events sent to watchers.", self._service.events_sent)
        yield gauge("meshlocal_subscriptions", "Services that all watches follow.", self._limits.subscriptions)
        yield from self._of_xds()
        yield self._limited()
        yield self._refused()
        yield exposed(self._exposures)
        yield expiry(self._followed())
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
        yield from _source_details(self._hub)

    def _of_xds(self) -> Iterable[Metric]:
        xds = self._xds
        yield gauge("meshlocal_xds_streams", "Streams of xDS under way.", 0 if xds is None else xds.streams)
        refused = 0 if xds is None else xds.refused
        yield _counter(
            "meshlocal_xds_names_refused",
            "Names of resources that xDS clients asked for and that can be none.",
            refused,
        )
        if xds is None:
            return
        labels = ["type"]
        responses = CounterMetricFamily("meshlocal_xds_responses", "Responses of xDS sent, by type.", labels=labels)
        rejected = CounterMetricFamily("meshlocal_xds_rejected", "Responses that a client rejected.", labels=labels)
        for kind in xds.responses:
            responses.add_metric([kind.short], xds.responses[kind])
            rejected.add_metric([kind.short], xds.rejected[kind])
        yield from (responses, rejected)

    def _refused(self) -> Metric:
        metric = CounterMetricFamily(
            "meshlocal_discovery_refused",
            "Calls refused because of who called (unauthenticated, not_allowed), and services hidden from who did"
            " (hidden).",
            labels=["reason"],
        )
        if self._access is not None:
            for reason, count in self._access.refused.items():
                metric.add_metric([reason], count)
        metric.add_metric(["hidden"], self._service.hidden)
        return metric

    def _limited(self) -> Metric:
        counts = dict(self._limits.refused)
        servers: list[GrpcServer | WebSocketServer] = [*self._grpc_servers]
        if self._websocket is not None:
            servers.append(self._websocket)
        for server in servers:
            counts[Limited.CONNECTIONS] += server.crowding.refused
            counts[Limited.CLIENT_CONNECTIONS] += server.crowding.client_refused
            counts[Limited.STALL] += server.stalled
            counts[Limited.BYTES] += server.paused
        counts[Limited.RESETS] += sum(each.rapid_resets for each in self._grpc_servers)
        if self._websocket is not None:
            counts[Limited.MESSAGE_SIZE] += self._websocket.too_large
        metric = CounterMetricFamily(
            "meshlocal_discovery_limited",
            "What a limit refused, cut off or made wait, by its key under discovery.limits.",
            labels=["limit"],
        )
        for limit, count in counts.items():
            metric.add_metric([limit], count)
        return metric


def _source_details(hub: Hub) -> Iterable[Metric]:
    both = ["source", "resource"]
    silence = GaugeMetricFamily(
        "meshlocal_source_silence_seconds", "Seconds since the registry last said anything of it.", labels=both
    )
    lists = CounterMetricFamily("meshlocal_source_lists", "How often all of it was read.", labels=both)
    events = CounterMetricFamily("meshlocal_source_events", "Changes that the registry told.", labels=both)
    failures = CounterMetricFamily("meshlocal_source_failures", "Times that it could not be followed.", labels=both)
    left_out = GaugeMetricFamily(
        "meshlocal_source_left_out",
        "What the registry has and no instance was made of, by cause.",
        labels=["source", "cause"],
    )
    for name, details in source_details(state.source for state in hub.sources):
        for resource in details.resources:
            labels = [name, resource.name]
            if resource.silence is not None:
                silence.add_metric(labels, resource.silence)
            lists.add_metric(labels, resource.lists)
            events.add_metric(labels, resource.events)
            failures.add_metric(labels, resource.failures)
        for cause, count in details.left_out.items():
            left_out.add_metric([name, cause], count)
    return silence, lists, events, failures, left_out


def _counter(name: str, text: str, count: int) -> Metric:
    counter = CounterMetricFamily(name, text)
    counter.add_metric([], count)
    return counter
