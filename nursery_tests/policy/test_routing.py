"""Routing by host and by path prefix."""

import pytest

from meshlocal.policy.model import ServiceKey
from meshlocal.policy.routing import PrefixRoute, Router


@pytest.mark.parametrize(
    ("host", "service"),
    [
        (b"b", "b"),
        (b"B", "b"),
        (b"b.", "b"),
        (b"b.ns", "b.ns"),
        (b"b.ns.svc", "b.ns"),
        (b"b.ns.svc.cluster.local", "b.ns"),
        (b"B.NS.SVC.Cluster.Local.", "b.ns"),
        (b"a.b.c", "a.b.c"),
        (b"x.b.c", None),
        (b"b.svc.cluster.local", None),
        (b"b..svc", None),
        (b"www.example.com", None),
        (b"10.0.0.1", None),
        (b"1", None),
        (b"[::1]", None),
        (b"", None),
        (b".", None),
        (b"-b", None),
        (b"b%20c", None),
        (b"b\xe4", None),
    ],
)
def test_host(host: bytes, service: str | None) -> None:
    router = Router(named=["a.b.c"])
    assert router.route(host, b"/") == service
    assert router.route(host, b"/") == service  # from memory


def test_memory_is_bounded() -> None:
    router = Router()
    for number in range(5000):
        assert router.route(b"s%d" % number, b"/") == f"s{number}"
    assert len(router._found) <= 1024


@pytest.mark.parametrize(
    ("host", "target", "service"),
    [
        (b"x", b"/api", "api"),
        (b"x", b"/api/1", "api"),
        (b"x", b"/api?q", "api"),
        (b"x", b"/apis", "x"),
        (b"x", b"/api/v2/a", "v2"),
        (b"X", b"/api/v2", "v2"),
        (b"shop", b"/api/v2", "shop-api"),
        (b"SHOP", b"/", "shop"),
        (b"x", b"/static/", "static"),
        (b"x", b"/static", "x"),
        (b"10.0.0.1", b"/api", "api"),
        (b"10.0.0.1", b"/", None),
        (b"x", b"*", "x"),
    ],
)
def test_prefix(host: bytes, target: bytes, service: str | None) -> None:
    router = Router(
        [
            PrefixRoute("/api", ServiceKey("api")),
            PrefixRoute("/api/v2", ServiceKey("v2")),
            PrefixRoute("/static/", ServiceKey("static")),
            PrefixRoute("/api", ServiceKey("shop-api"), "shop"),
        ]
    )
    assert router.route(host, target) == service


def test_root_prefix_takes_everything() -> None:
    assert Router([PrefixRoute("/", ServiceKey("all"))]).route(b"", b"/x") == "all"


def test_domain() -> None:
    router = Router(domain="Corp.example.")
    assert router.route(b"b.ns.svc.corp.example", b"/") == "b.ns"
    assert router.route(b"b.ns.svc.cluster.local", b"/") is None


def test_long_hosts_are_not_remembered() -> None:
    """P2: clients can make up as many as they like, of any length."""
    router = Router()
    for number in range(100):
        host = b"x" * 60_000 + str(number).encode()
        assert router.route(host, b"/") is None
    assert router._found == {}
    assert router.route(b"b", b"/") == "b"
    assert list(router._found) == [b"b"]
