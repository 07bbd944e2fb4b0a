"""Which service a request is for: a fixed one, by Host, by an absolute target, by path; CONNECT (A6)."""

from __future__ import annotations

import pytest
import trio

from meshlocal.policy.config_http import RouteConfig
from meshlocal.policy.model import ServiceKey
from nursery_tests.proxy.http.conftest import Proxy, Served, Upstream, Upstreams, until


def follow(proxy: Proxy, **services: Upstream) -> None:
    """Let discovery know these services, by name with `_` for a dot, and no others, from when they are asked for."""
    known = {name.replace("_", "."): upstream for name, upstream in services.items()}
    published = set()

    def on_followed(keys: list[ServiceKey]) -> None:
        for key in keys:
            if key not in published:
                published.add(key)
                upstream = known.get(key)
                proxy.publish(*([upstream] if upstream else []), service=key, unknown=upstream is None)

    proxy.table.on_followed = on_followed
    on_followed(proxy.table.keys)


@pytest.mark.parametrize(
    "host", ["c.ns", "C.NS", "c.ns:8080", "c.ns.svc", "c.ns.svc.cluster.local", "c.ns.svc.cluster.local.:80"]
)
async def test_by_host(proxy: Proxy, upstream: Upstreams, host: str) -> None:
    """The forms in which Kubernetes' resolvers know a service. Host goes on as it was sent."""
    c = await upstream("c", "n1")
    follow(proxy, c_ns=c)
    answer = await proxy.ask(host=host)
    assert (answer.status, answer.body) == (200, b"c")
    assert f"host: {host}\r\n".encode() in c.heads[0]


async def test_a_bare_name_belongs_to_the_proxys_namespace(proxy: Proxy, upstream: Upstreams) -> None:
    c = await upstream("c", "n1")
    proxy.configure(namespace="ns")
    follow(proxy, c_ns=c)
    assert (await proxy.ask(host="c")).body == b"c"
    assert (await proxy.ask(host="c.ns")).body == b"c"


async def test_a_listener_for_one_service_takes_any_host(proxy: Proxy, local: Upstream) -> None:
    async with await proxy.connect(1) as client:
        assert (await client.get(host="anything.example:99")).body == b"local"
        await client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert (await client.response()).body == b"local"
    # An instance is told some Host even where the client told none, for HTTP/1.1 wants one.
    assert b"\r\nHost: b\r\n" in local.heads[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "[::1]", "example.com.org", "a..b", ""])
async def test_a_host_that_can_be_no_service_is_answered_503(proxy: Proxy, local: Upstream, host: str) -> None:
    answer = await proxy.ask(host=host)
    assert answer.told == (503, "unknown_host")
    assert answer.body.startswith(b"meshlocal: ")
    assert answer.body.count(b"\n") == 1
    assert proxy.forwarder.shared.refused == {"unknown_host": 1}
    assert local.accepted == 0


async def test_a_service_that_no_registry_knows_is_answered_503(proxy: Proxy, local: Upstream) -> None:
    follow(proxy, b=local)
    async with await proxy.connect() as client:
        assert (await client.get(host="nobody")).told == (503, "unknown_service")
        # The connection is none the worse for it.
        assert (await client.get()).body == b"local"


async def test_services_that_requests_name_are_bounded(proxy: Proxy, local: Upstream) -> None:
    """A request under way holds its service's place; what nobody uses makes room."""
    proxy.configure(http={"max_services": 1}, attempts={"first_snapshot_wait": 20})
    async with await proxy.connect() as waits:
        await waits.send(b"GET / HTTP/1.1\r\nhost: c\r\n\r\n")
        await until(lambda: ServiceKey("c") in proxy.table.keys)
        assert (await proxy.ask(host="d")).told == (503, "too_many_services")
        proxy.publish(local, service="c")
        assert (await waits.response()).body == b"local"
        proxy.configure(http={"max_services": 1}, attempts={"first_snapshot_wait": 0})
        assert (await proxy.ask(host="d")).told == (503, "no_snapshot")
    assert ServiceKey("c") not in proxy.table.keys


async def test_a_service_that_was_dropped_is_followed_anew(proxy: Proxy, local: Upstream) -> None:
    """And its pooled connections are closed with it."""
    proxy.configure(http={"service_idle_timeout": 1000})
    follow(proxy, c=local)
    async with await proxy.connect() as client:
        assert (await client.get(host="c")).body == b"local"
        assert proxy.pooled == 1
        proxy.forwarder.sweep(trio.current_time() + 2000)
        await until(lambda: not local.open)
    proxy.table.on_followed = None
    follow(proxy, c=local)
    assert (await proxy.ask(host="c")).body == b"local"


@pytest.mark.parametrize(
    ("line", "host", "passed"),
    [
        ("GET http://b/p?q HTTP/1.1", "elsewhere", b"GET /p?q HTTP/1.1\r\nHost: b\r\n"),
        ("GET HTTP://B:8080 HTTP/1.1", "b", b"GET / HTTP/1.1\r\nHost: B:8080\r\n"),
        ("OPTIONS http://b HTTP/1.1", "b", b"OPTIONS * HTTP/1.1\r\nHost: b\r\n"),
    ],
)
async def test_absolute_targets(proxy: Proxy, local: Upstream, line: str, host: str, passed: bytes) -> None:
    """A client with `http_proxy` set sends them; the target counts, whatever Host says (RFC 9112, 3.2.2)."""
    async with await proxy.connect() as client:
        await client.send(f"{line}\r\nhost: {host}\r\nproxy-connection: keep-alive\r\n\r\n".encode())
        assert (await client.response()).body == b"local"
    assert local.heads == [passed + b"\r\n"]


async def test_options_for_the_server_itself(proxy: Proxy, local: Upstream) -> None:
    async with await proxy.connect() as client:
        await client.ask("OPTIONS", "*")
    assert local.heads[0].startswith(b"OPTIONS * HTTP/1.1\r\n")


async def test_routes_by_path(proxy: Proxy, local: Upstream, upstream: Upstreams) -> None:
    """Whole segments; the longer prefix first; one with a host before one without; the rest by Host."""
    api, deep, site = await upstream("api", "n1"), await upstream("deep", "n1"), await upstream("site", "n1")
    routes = (
        RouteConfig("/api", ServiceKey("api")),
        RouteConfig("/api/deep/", ServiceKey("deep")),
        RouteConfig("/api", ServiceKey("site"), "Site.example"),
    )
    proxy.configure(http={"routes": routes})
    follow(proxy, b=local, api=api, deep=deep, site=site)
    expected = {
        ("/api", "b"): b"api",
        ("/api?x", "b"): b"api",
        ("/api/x", "any.thing.example"): b"api",
        ("/api/deep/x", "b"): b"deep",
        ("/api/deep", "b"): b"api",
        ("/apis", "b"): b"local",
        ("/", "b"): b"local",
        ("/api/deep/x", "site.EXAMPLE:80"): b"site",
    }
    async with await proxy.connect() as client:
        got = {(path, host): (await client.get(path, host=host)).body for path, host in expected}
    assert got == expected


async def echo(upstream: Upstream, served: Served) -> bool:
    """What an instance of a tcp service may do: no HTTP."""
    await served.send(upstream.name.encode() + b"\n")
    while await served.more():
        await served.send(served.received)
        served.received = b""
    return False


@pytest.mark.parametrize("target", ["b:9000", "b:1", "B.:443"])
@pytest.mark.parametrize("listener", [0, 1])
async def test_connect(proxy: Proxy, pair: tuple[Upstream, Upstream], target: str, listener: int) -> None:
    """A tcp request by the same rules, to the service of that name, whatever the port (A1, O1)."""
    local, far = pair
    far.greets = echo
    local.refuse()
    proxy.configure(http={"response_headers": True})
    async with await proxy.connect(listener) as client:
        # What the client says before it is answered is for the instance, too.
        await client.send(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\nearly".encode())
        head = await client.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 Connection established\r\n")
        assert b"x-meshlocal-tier: other\r\nx-meshlocal-reason: local_failed\r\n" in head
        assert b"content-length" not in head
        assert await client.exactly(9) == b"far\nearly"
        await client.send(b"late")
        assert await client.exactly(4) == b"late"
        await client.send_eof()
        assert await client.rest() == b""
    await proxy.idle()
    assert [(key.outcome, count) for key, count in proxy.requests().items()] == [("served", 1)]
    statistics = proxy.table[ServiceKey("b")].statistics
    assert (statistics.bytes_sent, statistics.bytes_received, statistics.open) == (9, 13, 0)


@pytest.mark.parametrize(
    ("listener", "target"),
    [(0, "example.com.org:443"), (0, "127.0.0.1:80"), (0, "nobody:80"), (1, "c:80"), (1, "127.0.0.1:80")],
)
async def test_connect_to_anything_else_is_refused(proxy: Proxy, local: Upstream, listener: int, target: str) -> None:
    """An open proxy it is not."""
    follow(proxy, b=local)
    async with await proxy.connect(listener) as client:
        await client.send(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())
        assert (await client.response()).told == (403, "connect_forbidden")
    assert local.accepted == 0


async def test_connect_where_no_instance_takes_it(proxy: Proxy, local: Upstream) -> None:
    async with await proxy.connect() as client:
        local.refuse()
        await client.send(b"CONNECT b:80 HTTP/1.1\r\nhost: b\r\n\r\n")
        assert (await client.response()).told == (502, "failed")
        proxy.publish()
        await client.send(b"CONNECT b:80 HTTP/1.1\r\nhost: b\r\n\r\n")
        assert (await client.response()).told == (503, "no_instance")


async def test_a_tunnel_that_is_cut_is_reset(proxy: Proxy, local: Upstream) -> None:
    """Never an end that looks good."""
    local.greets = echo
    async with await proxy.connect() as client:
        await client.send(b"CONNECT b:80 HTTP/1.1\r\nhost: b\r\n\r\n")
        await client.until(b"local\n")
        local.open[0].reset()
        assert await client.is_reset()
