"""Metrics of http listeners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from meshlocal.app.proxy_metrics import SERVICES
from meshlocal.client.latency import Latency
from meshlocal.net.slices import pieces
from meshlocal.net.wall_clock import wall_clock

if TYPE_CHECKING:
    from meshlocal.proxy.http.forwarder import HttpForwarder
    from meshlocal.proxy.http.service import HttpService
from meshlocal.proxy.http.statistics import STATUS_NAMES


class HttpCollector(Collector):
    """Everything that http listeners count beside what every listener does.

    Args:
        forwarder: gives what serves them; None while there are none.
        spans: gives how many spans were exported or lost, by what became of them.
    """

    def __init__(
        self, forwarder: Callable[[], HttpForwarder | None], spans: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        self._forwarder = forwarder
        self._spans = spans

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand now."""
        return filter(None, self.collect_in_steps())

    def collect_in_steps(self) -> Iterator[Metric | None]:
        """See `meshlocal.admin.metrics_page.InSteps`."""
        forwarder = self._forwarder()
        services = list(forwarder.services.values()) if forwarder is not None else []
        clients = GaugeMetricFamily("meshlocal_http_clients_open", "Clients' connections to http listeners.")
        refused = CounterMetricFamily(
            "meshlocal_http_refused", "Requests that no instance was tried for, by reason.", labels=["reason"]
        )
        if forwarder is not None:
            clients.add_metric([], len(forwarder))
            for reason, count in forwarder.shared.refused.items():
                refused.add_metric([reason], count)
        spans = CounterMetricFamily(
            "meshlocal_trace_spans",
            "Spans by what became of them: exported; dropped, as too many waited; refused by the collector; failed, as"
            " it was away.",
            labels=["outcome"],
        )
        for outcome, count in self._spans().items():
            spans.add_metric([outcome], count)
        yield clients
        yield refused
        yield spans
        yield from _responses(services)
        yield from _retries(services)
        yield from _pools(services)


def _responses(services: Iterable[HttpService]) -> Iterator[Metric | None]:
    responses = CounterMetricFamily(
        "meshlocal_http_responses",
        "Requests that ended, by the tier that they went to, why they left the first, their response's status, and the"
        " version of HTTP that they came in.",
        labels=["service", "tier", "reason", "status", "protocol"],
    )
    calls = CounterMetricFamily(
        "meshlocal_grpc_calls",
        "gRPC calls that ended, by the tier that they went to, why they left the first, and their status.",
        labels=["service", "tier", "reason", "status"],
    )
    latency = HistogramMetricFamily(
        "meshlocal_http_request_seconds",
        "From a request's head to its response's end, by the tier that it went to; none: no instance was tried.",
        labels=["service", "tier"],
    )
    for piece in pieces(services, SERVICES):
        yield None
        for service in piece:
            statistics = service.statistics
            for (tier, reason, status, protocol), count in statistics.responses.items():
                responses.add_metric([service.state.key, tier, reason, status, protocol], count)
            for (tier, reason, number), count in statistics.calls.items():
                calls.add_metric([service.state.key, tier, reason, STATUS_NAMES[number]], count)
            for tier, times in service.state.statistics.responses.items():
                latency.add_metric([service.state.key, tier], _buckets(times), times.total)
    yield from (responses, calls, latency)


def _buckets(times: Latency) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    """Buckets, some of them with a request that is traced. Only OpenMetrics has a place for that."""
    found: list[tuple[str, float] | tuple[str, float, Exemplar]] = [*times.buckets()]
    if times.exemplars:
        offset = wall_clock() - trio.current_time()
        for number, known in times.exemplars.items():
            shown = Exemplar({"trace_id": known.trace_id}, known.seconds, known.at + offset)
            found[number] = (*found[number][:2], shown)
    return found


def _retries(services: Iterable[HttpService]) -> Iterator[Metric | None]:
    retries = CounterMetricFamily(
        "meshlocal_http_retries", "Requests sent again, by what failed before.", labels=["service", "cause"]
    )
    refused = CounterMetricFamily(
        "meshlocal_http_retries_refused", "Retries after an answer that the budget did not allow.", labels=["service"]
    )
    for piece in pieces(services, SERVICES):
        yield None
        for service in piece:
            for cause, count in service.statistics.retries.items():
                retries.add_metric([service.state.key, cause], count)
            refused.add_metric([service.state.key], service.budget.refused)
    yield from (retries, refused)


def _pools(services: Iterable[HttpService]) -> Iterator[Metric | None]:
    idle = GaugeMetricFamily(
        "meshlocal_http_pool_connections", "Connections to instances that wait for a request.", labels=["service"]
    )
    made = CounterMetricFamily(
        "meshlocal_http_pool_connections_made", "Connections made to instances.", labels=["service"]
    )
    reused = CounterMetricFamily(
        "meshlocal_http_pool_connections_reused", "Requests sent on a connection that had waited.", labels=["service"]
    )
    shared = GaugeMetricFamily(
        "meshlocal_http2_connections", "Connections to instances in HTTP/2, which requests share.", labels=["service"]
    )
    for piece in pieces(services, SERVICES):
        yield None
        for service in piece:
            idle.add_metric([service.state.key], len(service.pool))
            shared.add_metric([service.state.key], len(service.links))
            made.add_metric([service.state.key], service.statistics.connections_made)
            reused.add_metric([service.state.key], service.statistics.connections_reused)
    yield from (idle, made, reused, shared)
