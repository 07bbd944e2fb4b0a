"""The proxy's metrics, made from its plain counts when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import meshlocal
from meshlocal.app.readiness import Readiness
from meshlocal.client.feed import FeedStatus
from meshlocal.client.services import ServiceTable
from meshlocal.net.busy_poll import BusyPoll
from meshlocal.net.following import Followed
from meshlocal.net.slices import pieces
from meshlocal.net.tls import certificates
from meshlocal.policy.addresses import format_host_port
from meshlocal.policy.exposure import Exposure
from meshlocal.policy.model import HostPort, ServiceKey
from meshlocal.proxy.listeners import Listeners
from meshlocal.proxy.tcp.forwarder import KEPT_TASKS, TcpForwarder

if TYPE_CHECKING:
    from meshlocal.proxy.bypass.bypass import Bypass
    from meshlocal.proxy.tls import TlsServer

SERVICES = 8
INSTANCES = 1000
"""Instances of which metrics are told, at most."""

CONNECTIONS = 512
"""Services, and connections, that a step looks at: well below a millisecond's worth."""


class ProxyCollector(Collector):
    """Everything that a running proxy counts.

    Args:
        services: picks, attempts, requests and instances.
        forwarder: connections that are open.
        listeners: errors of accepting.
        feed: how discovery is doing.
        readiness: whether the proxy may be sent work.
        busy_poll: what it spent awake; None if it always sleeps.
        tls: what shakes hands with clients, by the listeners' scheme.
        followed: gives what is made of files, own certificates among it.
        exposures: what is open beyond this machine; None: another process says that.
        each_instance: whether each instance's counts are told, too.
    """

    def __init__(
        self,
        services: ServiceTable,
        forwarder: TcpForwarder,
        listeners: Listeners,
        feed: FeedStatus,
        readiness: Readiness,
        busy_poll: BusyPoll | None,
        tls: Mapping[str, TlsServer],
        *,
        followed: Callable[[], Iterable[Followed[Any]]] = tuple,
        exposures: Iterable[Exposure] | None = (),
        each_instance: bool = False,
        bypass: Bypass | None = None,
    ) -> None:
        self._bypass = bypass
        self._followed = followed
        self._each_instance = each_instance
        self._exposures = exposures
        self._services = services
        self._forwarder = forwarder
        self._listeners = listeners
        self._feed = feed
        self._readiness = readiness
        self._busy_poll = busy_poll
        self._tls = tls

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand now."""
        return filter(None, self.collect_in_steps())

    def collect_in_steps(self) -> Iterator[Metric | None]:
        """See `meshlocal.admin.metrics_page.InSteps`."""
        yield gauge("meshlocal_build_info", "The version, as a label.", 1, version=meshlocal.__version__)
        yield gauge("meshlocal_ready", "1 while the proxy may be sent work.", self._readiness.ready)
        yield gauge(
            "meshlocal_node_unknown",
            "1 if the proxy does not know its node, or its own value of the first label of prefer.",
            self._services.node_unknown,
        )
        yield gauge(
            "meshlocal_node_unmatched",
            "1 if the proxy knows its node, and no instance of any watched service is on it.",
            self._services.node_unmatched,
        )
        yield from self._requests()
        yield from self._instances()
        yield from self._refusals()
        yield from self._bypassed()
        yield from self._connections()
        yield from self._discovery()
        errors = CounterMetricFamily(
            "meshlocal_accept_errors", "Connections that the system could not give.", labels=["listener"]
        )
        for listener in self._listeners.current:
            errors.add_metric([str(listener.configured)], listener.accept_errors)
        yield errors
        handshakes = CounterMetricFamily(
            "meshlocal_tls_handshakes",
            "TLS handshakes of clients: ok, failed, timeout, not_allowed, limited.",
            labels=["scheme", "outcome"],
        )
        for scheme, server in self._tls.items():
            for outcome, count in server.handshakes.items():
                handshakes.add_metric([scheme, outcome], count)
        yield handshakes
        yield expiry(self._followed())
        if self._exposures is not None:
            yield exposed(self._exposures)
        awake = CounterMetricFamily(
            "meshlocal_busy_poll_seconds",
            "Time by the clock spent looking for something to do instead of sleeping, until there was, or in vain.",
            labels=["outcome"],
        )
        spent = self._busy_poll
        awake.add_metric(["found"], 0.0 if spent is None else spent.found)
        awake.add_metric(["in_vain"], 0.0 if spent is None else spent.in_vain)
        yield awake

    def _requests(self) -> Iterator[Metric | None]:
        requests = CounterMetricFamily(
            "meshlocal_requests",
            "Requests that ended, by the tier that they went to, why they left the first, and how they ended.",
            labels=["service", "tier", "reason", "outcome"],
        )
        picks = CounterMetricFamily(
            "meshlocal_picks",
            "Instances picked for an attempt, by tier and why the request left the first.",
            labels=["service", "tier", "reason"],
        )
        attempts = CounterMetricFamily(
            "meshlocal_attempts", "Attempts, by tier and how they ended.", labels=["service", "tier", "outcome"]
        )
        connects = HistogramMetricFamily(
            "meshlocal_connect_seconds",
            "From an attempt to its connection with an instance, by tier.",
            labels=["service", "tier"],
        )
        durations = HistogramMetricFamily(
            "meshlocal_connection_seconds",
            "From a connection with an instance to its end, by tier (tcp listeners).",
            labels=["service", "tier"],
        )
        for piece in pieces(list(self._services), SERVICES):
            yield None
            for service in piece:
                statistics = service.statistics
                for tier, times in statistics.durations.items():
                    durations.add_metric([service.key, tier], times.buckets(), times.total)
                for tier, times in statistics.connects.items():
                    connects.add_metric([service.key, tier], times.buckets(), times.total)
                for key, count in statistics.requests.items():
                    requests.add_metric([service.key, *key], count)
                for (tier, reason), count in statistics.picks.items():
                    picks.add_metric([service.key, tier, reason], count)
                for (tier, outcome), count in statistics.attempts.items():
                    attempts.add_metric([service.key, tier, outcome], count)
        yield from (requests, picks, attempts, connects, durations)
        if self._each_instance:
            yield from self._of_instances()

    def _of_instances(self) -> Iterator[Metric | None]:
        """Of each instance, as far as `INSTANCES` reach."""
        labels = ["service", "instance", "node"]
        attempts = CounterMetricFamily(
            "meshlocal_instance_attempts",
            "Attempts on an instance, with proxy.metrics.instances, by how they ended.",
            labels=[*labels, "outcome"],
        )
        under_way = GaugeMetricFamily(
            "meshlocal_instance_under_way", "Requests under way on an instance, likewise.", labels=labels
        )
        response = HistogramMetricFamily(
            "meshlocal_instance_response_seconds",
            "From a request to its response's end (HTTP), likewise.",
            labels=labels,
        )
        left = INSTANCES
        for service in list(self._services):
            if service.picker is None:
                continue
            nodes = {key[:2]: instance.node for key, instance in service.picker.snapshot.instances.items()}
            for piece in pieces(list(service.statistics.instances.items()), SERVICES):
                yield None
                for place, counts in piece[:left]:
                    own = [service.key, format_host_port(*place), nodes.get(place, "")]
                    attempts.add_metric([*own, "worked"], counts.worked)
                    for word, count in counts.failures.items():
                        attempts.add_metric([*own, word], count)
                    under_way.add_metric(own, service.fitness.under_way.get(place, 0))
                    if counts.response.count:
                        response.add_metric(own, counts.response.buckets(), counts.response.total)
                left = max(0, left - len(piece))
        yield from (attempts, under_way, response)

    def _instances(self) -> Iterator[Metric | None]:
        instances = GaugeMetricFamily("meshlocal_instances", "Usable instances, by tier.", labels=["service", "tier"])
        left_out = GaugeMetricFamily(
            "meshlocal_instances_left_out", "Instances known but not used.", labels=["service"]
        )
        for piece in pieces(list(self._services), SERVICES):
            yield None
            for service in piece:
                if service.picker is not None:
                    for tier, size in service.picker.tier_sizes().items():
                        instances.add_metric([service.key, tier], size)
                    unused = len(service.picker.snapshot.instances) - len(service.picker)
                    left_out.add_metric([service.key], unused)
        yield from (instances, left_out)

    def _bypassed(self) -> Iterator[Metric | None]:
        if self._bypass is None:
            return
        active = GaugeMetricFamily(
            "meshlocal_bypass_active",
            "1 while connects to a listener go straight to instances, 0 while they reach the proxy, by why.",
            labels=["service", "listener", "reason"],
        )
        for each in self._bypass.listed():
            reason = each.why_not or ""
            active.add_metric([each.service, format_host_port(*each.listener), reason], each.why_not is None)
        yield active
        connects = CounterMetricFamily(
            "meshlocal_bypassed_connects",
            "Connects that went straight to an instance of the first tier, past the proxy.",
            labels=["service", "instance", "tier", "via"],
        )
        missed = CounterMetricFamily(
            "meshlocal_bypass_missed",
            "Connects to a bypassed listener that found no instance listening, and reached the proxy.",
            labels=["service"],
        )
        totals: Counter[tuple[ServiceKey, HostPort]] = Counter()
        missing: Counter[ServiceKey] = Counter()
        for key, counts in self._bypass.counts():
            missing[key] += counts.missed
            for place, count in counts.connects.items():
                totals[key, place] += count
            yield None
        nearest = self._services.locality.tiers[0]
        for (service, place), count in totals.items():
            connects.add_metric([service, format_host_port(*place), nearest, "bypass"], count)
        for service, count in missing.items():
            missed.add_metric([service], count)
        yield from (connects, missed)

    def _refusals(self) -> Iterator[Metric | None]:
        ejected = GaugeMetricFamily(
            "meshlocal_instances_ejected",
            "Instances that are tried last of all: ejected, on trial, or failing their checks.",
            labels=["service"],
        )
        ejections = CounterMetricFamily(
            "meshlocal_ejections", "Instances ejected, by what showed that they fail.", labels=["service", "cause"]
        )
        checks = CounterMetricFamily(
            "meshlocal_health_checks", "Health checks of instances, passed or failed.", labels=["service", "outcome"]
        )
        replays = CounterMetricFamily(
            "meshlocal_tcp_replays",
            "Connections that went on to another instance before the first byte of one, by why.",
            labels=["service", "reason"],
        )
        skipped = CounterMetricFamily(
            "meshlocal_tls_skipped",
            "Attempts to connect to instances on this very host in plaintext, as the service's tls.skip_tiers has it.",
            labels=["service"],
        )
        by_socket = CounterMetricFamily(
            "meshlocal_unix_connects",
            "Connections to instances of this node that were made by their Unix sockets (proxy.socket_folder).",
            labels=["service"],
        )
        refused = CounterMetricFamily(
            "meshlocal_limit_refused",
            "Requests refused because of a limit; without a service: a limit of the whole proxy.",
            labels=["service", "limit"],
        )
        for piece in pieces(list(self._services), SERVICES):
            yield None
            for service in piece:
                ejected.add_metric([service.key], len(service.fitness.health))
                for cause, count in service.fitness.health.total.items():
                    ejections.add_metric([service.key, cause], count)
                for outcome, count in service.statistics.checks.items():
                    checks.add_metric([service.key, outcome], count)
                for reason, count in service.statistics.replays.items():
                    replays.add_metric([service.key, reason], count)
                if service.security is not None:
                    skipped.add_metric([service.key], service.statistics.tls_skipped)
                if service.sockets is not None:
                    by_socket.add_metric([service.key], service.statistics.unix_connects)
                for limit, count in service.circuit.refused.items():
                    refused.add_metric([service.key, limit], count)
        for limit, count in self._services.circuit.refused.items():
            refused.add_metric(["", limit], count)
        yield from (ejected, ejections, checks, replays, skipped, by_socket, refused)

    def _connections(self) -> Iterator[Metric | None]:
        moving: dict[str, tuple[int, int]] = {}
        for some in pieces(list(self._forwarder), CONNECTIONS):
            yield None
            for connection in some:
                if (counters := connection.counters) is not None:
                    sent, received = moving.get(connection.service.key, (0, 0))
                    moving[connection.service.key] = (
                        sent + counters.client_to_upstream,
                        received + counters.upstream_to_client,
                    )
        connections = GaugeMetricFamily(
            "meshlocal_connections_open", "Connections with an instance.", labels=["service"]
        )
        connecting = GaugeMetricFamily(
            "meshlocal_requests_waiting", "Clients waiting for an instance.", labels=["service"]
        )
        moved = CounterMetricFamily(
            "meshlocal_bytes",
            "Bytes moved, to instances (sent) and from them (received).",
            labels=["service", "direction"],
        )
        for piece in pieces(list(self._services), SERVICES):
            yield None
            for service in piece:
                statistics = service.statistics
                connections.add_metric([service.key], statistics.open)
                connecting.add_metric([service.key], statistics.connecting)
                sent, received = moving.get(service.key, (0, 0))
                moved.add_metric([service.key, "sent"], statistics.bytes_sent + sent)
                moved.add_metric([service.key, "received"], statistics.bytes_received + received)
        yield from (connections, connecting, moved)
        yield gauge(
            "meshlocal_connection_tasks_kept",
            f"Trio tasks that wait for another connection, of which up to {KEPT_TASKS} are kept.",
            self._forwarder.kept_tasks,
        )

    def _discovery(self) -> Iterable[Metric]:
        feed = self._feed
        yield gauge("meshlocal_discovery_connected", "1 while discovery is read.", feed.connected)
        age = feed.age(trio.current_time())
        known = GaugeMetricFamily(
            "meshlocal_snapshot_age_seconds",
            "Seconds since what is known was last known to be current, or since the start if nothing was heard yet.",
        )
        if age is not None:
            known.add_metric([], age)
        yield known
        yield gauge(
            "meshlocal_snapshot_stale",
            "1 while nothing is known, or what is known comes from the cache file, unconfirmed.",
            feed.unconfirmed,
        )
        yield gauge(
            "meshlocal_snapshot_missing",
            "1 while nothing is known: no discovery server was heard yet, and there is no cache file.",
            feed.confirmed_at is None,
        )
        for name, text, count in (
            ("meshlocal_discovery_reconnects", "Connections to discovery lost, or not made.", feed.reconnects),
            ("meshlocal_discovery_refused_instances", "Instances refused as malformed.", feed.refused_instances),
        ):
            counter = CounterMetricFamily(name, text)
            counter.add_metric([], count)
            yield counter


def exposed(exposures: Iterable[Exposure]) -> Metric:
    """What is open beyond this machine."""
    metric = GaugeMetricFamily(
        "meshlocal_exposed",
        "1 for each address beyond this machine that is served without tls, or without authentication, by the key that"
        " opens it.",
        labels=["key", "address", "lacks"],
    )
    for each in exposures:
        metric.add_metric([each.key, each.address, each.lacks], 1)
    return metric


def expiry(followed: Iterable[Followed[Any]]) -> Metric:
    """When own certificates end."""
    metric = GaugeMetricFamily(
        "meshlocal_certificate_not_after_timestamp_seconds",
        "When a certificate of one's own ends, in seconds since 1970, by its file.",
        labels=["file"],
    )
    for file, period in certificates(followed).items():
        metric.add_metric([file], period.not_after)
    return metric


def gauge(name: str, text: str, value: float, **labels: str) -> Metric:
    """A gauge of one value."""
    gauge = GaugeMetricFamily(name, text, labels=list(labels))
    gauge.add_metric(list(labels.values()), value)
    return gauge
