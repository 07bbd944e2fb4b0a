"""admin/metrics_page: the format that Accept asks for, and filters by name."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.metrics_page import metrics_route


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("requests", "Requests.", ["service"], registry=made).labels("b").inc(3)
    Gauge("connections", "Connections.", registry=made).set(2)
    return made


def page(registry: CollectorRegistry, query: str = "", accept: str | None = None) -> Response:
    headers = {} if accept is None else {"accept": accept}
    return metrics_route(lambda: [registry])(Request("GET", "/metrics", query, headers))


def test_prometheus_text_unless_asked_otherwise(registry: CollectorRegistry) -> None:
    response = page(registry)
    assert (response.status, response.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b'requests_total{service="b"} 3.0\n' in response.body
    assert b"# EOF" not in response.body


def test_openmetrics_where_accept_has_it(registry: CollectorRegistry) -> None:
    response = page(registry, accept="application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert response.content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert response.body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept",
    ["application/openmetrics-text; version=abc", 'text/plain; version="1.0"', "text/plain;version=1.0\xa0", "\xff"],
)
def test_an_odd_accept_gets_the_plain_format(registry: CollectorRegistry, accept: str) -> None:
    assert page(registry, accept=accept).content_type == "text/plain; version=0.0.4; charset=utf-8"


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
def test_names_filter(registry: CollectorRegistry, query: str, there: set[bytes]) -> None:
    body = page(registry, query).body
    assert {name for name in (b"connections", b"requests_total") if b"\n" + name in body} == there
