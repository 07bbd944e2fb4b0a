"""admin/metrics_page: the format that Accept asks for, and filters by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.metrics_page import metrics_route
from meshlocal.admin.server import answer


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("requests", "Requests.", ["service"], registry=made).labels("b").inc(3)
    Gauge("connections", "Connections.", registry=made).set(2)
    return made


async def page(registry: CollectorRegistry, query: str = "", accept: str | None = None) -> Response:
    headers = {} if accept is None else {"accept": accept}
    return await answer(metrics_route(lambda: [registry]), Request("GET", "/metrics", query, headers))


async def test_prometheus_text_unless_asked_otherwise(registry: CollectorRegistry) -> None:
    response = await page(registry)
    assert (response.status, response.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b'requests_total{service="b"} 3.0\n' in response.body
    assert b"# EOF" not in response.body


async def test_openmetrics_where_accept_has_it(registry: CollectorRegistry) -> None:
    response = await page(registry, accept="application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert response.content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert response.body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept",
    ["application/openmetrics-text; version=abc", 'text/plain; version="1.0"', "text/plain;version=1.0\xa0", "\xff"],
)
async def test_an_odd_accept_gets_the_plain_format(registry: CollectorRegistry, accept: str) -> None:
    assert (await page(registry, accept=accept)).content_type == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize(
    ("query", "there"),
    [
        ("name[]=connections", {b"connections"}),
        ("name%5B%5D=requests_total", {b"requests_total"}),
        ("name[]=connections&name[]=requests_total", {b"connections", b"requests_total"}),
        ("name[]=unknown", set()),
        ("other=connections", {b"connections", b"requests_total"}),
    ],
)
async def test_names_filter(registry: CollectorRegistry, query: str, there: set[bytes]) -> None:
    body = (await page(registry, query)).body
    assert {name for name in (b"connections", b"requests_total") if b"\n" + name in body} == there


class Large:
    """What a proxy of many services has: a counter and a histogram with thousands of samples."""

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("requests", "Requests.", labels=["service", "tier"])
        latency = HistogramMetricFamily("latency_seconds", "Latency.", labels=["service"])
        for number in range(250):
            for tier in ("node", "zone", "other"):
                requests.add_metric([f"s{number}", tier], number)
            latency.add_metric(
                [f"s{number}"], [(str(bound), bound * number) for bound in (1.0, 2.0)] + [("+Inf", 9)], 5
            )
        yield requests
        yield latency
        yield CounterMetricFamily("nothing", "Nothing yet.", labels=["service"])


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_a_large_page_is_the_same_in_slices(accept: str) -> None:
    """P1: it is written part by part, and others have their turn in between."""
    turns = 0

    async def other_task() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other_task)
        response = await answer(metrics_route(lambda: [Large()]), Request("GET", "/metrics", "", {"accept": accept}))
        nursery.cancel_scope.cancel()
    generate: Any = generate_openmetrics if accept else generate_latest
    whole = generate(Large())
    assert response.body == whole
    assert turns >= 3
