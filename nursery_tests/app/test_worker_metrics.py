"""app/worker_metrics: sums over processes that never fall, and gauges that mean the same for several as for one."""

from __future__ import annotations

import random

import pytest
import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from meshlocal.app.config_loader import load_config
from meshlocal.app.operator import Operator
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.worker_metrics import MERGED_BY, Totals


def counter(value: float, **labels: str) -> Metric:
    metric = CounterMetricFamily("meshlocal_requests", "Some.", labels=list(labels))
    metric.add_metric(list(labels.values()), value)
    return metric


def gauge(name: str, value: float) -> Metric:
    metric = GaugeMetricFamily(name, "Some.")
    metric.add_metric([], value)
    return metric


def histogram(low: float, all_: float, total: float) -> Metric:
    metric = HistogramMetricFamily("meshlocal_http_request_seconds", "Some.", labels=["service"])
    metric.add_metric(["b"], [("0.1", low), ("+Inf", all_)], total)
    return metric


def values(metrics: list[Metric]) -> dict[tuple[str, ...], float]:
    return {(sample.name, *sample.labels.values()): sample.value for metric in metrics for sample in metric.samples}


def test_counters_and_histograms_are_added_up() -> None:
    found = Totals().merge(
        {
            1: [counter(3, service="b"), histogram(1, 4, 2.5)],
            2: [counter(4, service="b"), histogram(2, 2, 0.1)],
        }
    )
    assert values(found) == {
        ("meshlocal_requests_total", "b"): 7,
        ("meshlocal_http_request_seconds_bucket", "0.1", "b"): 3,
        ("meshlocal_http_request_seconds_bucket", "+Inf", "b"): 6,
        ("meshlocal_http_request_seconds_count", "b"): 6,
        ("meshlocal_http_request_seconds_sum", "b"): pytest.approx(2.6),
    }
    assert [metric.type for metric in found] == ["counter", "histogram"]


def test_a_worker_that_ended_or_does_not_answer_is_not_taken_off() -> None:
    totals = Totals()
    totals.merge({1: [counter(3)], 2: [counter(4)]})
    assert values(totals.merge({2: [counter(5)]})) == {("meshlocal_requests_total",): 8}
    totals.forget(1)
    assert values(totals.merge({2: [counter(5)]})) == {("meshlocal_requests_total",): 8}
    # The one in its place begins at nothing.
    assert values(totals.merge({1: [counter(1)], 2: [counter(5)]})) == {("meshlocal_requests_total",): 9}
    totals.forget(1)
    totals.forget(2)
    totals.forget(3)
    assert values(totals.merge({})) == {("meshlocal_requests_total",): 9}


def test_gauges_are_added_or_the_worst_of_all() -> None:
    one = [gauge("meshlocal_ready", 1), gauge("meshlocal_tasks", 10), gauge("meshlocal_snapshot_age_seconds", 3)]
    other = [gauge("meshlocal_ready", 0), gauge("meshlocal_tasks", 12), gauge("meshlocal_snapshot_age_seconds", 1)]
    assert values(Totals().merge({1: one, 2: other})) == {
        ("meshlocal_ready",): 0,
        ("meshlocal_tasks",): 22,
        ("meshlocal_snapshot_age_seconds",): 3,
    }


async def test_it_is_known_of_every_gauge_how_to_merge_it() -> None:
    listen = ("tcp://127.0.0.1:0=b", "http://127.0.0.1:0")
    flags = {
        "proxy.discovery.urls": ("grpc://127.0.0.1:1",),
        "proxy.listen": listen,
        "proxy.metrics.instances": True,
    }
    process = ProxyProcess(lambda: load_config(None, flags, {}, "proxy"), random.Random(0), Operator({}))
    process.feed.status.confirmed_at = trio.current_time()
    metrics = [metric for collector in process.collectors() for metric in collector.collect()]
    assert {metric.name for metric in metrics if metric.type == "gauge"} == set(MERGED_BY)
    assert {metric.type for metric in metrics} == {"gauge", "counter", "histogram"}
