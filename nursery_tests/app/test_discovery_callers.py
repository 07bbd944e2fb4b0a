"""A discovery server that knows its callers: by certificate or token, what each may see, over each transport."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import trio

from meshlocal.app.discovery_access import DiscoveryAccess
from meshlocal.client.link import Credentials, Link
from meshlocal.client.links import open_link
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.websocket import WebSocketServer
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.net.workload_api import WorkloadApi
from meshlocal.policy import model
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig, DiscoveryServerConfig
from meshlocal.policy.config_access import AllowConfig
from meshlocal.policy.model import EndpointKey, Instance, ServiceKey
from meshlocal.wire.discovery_methods import (
    LIST_CLUSTERS,
    LIST_INSTANCES,
    LIST_SERVICES,
    LIST_WATCHERS,
    LIST_ZONES,
    WATCH_INSTANCES,
    WATCH_SERVICES,
)
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.certificates import NO_TEXT, Authority
from nursery_tests.client.test_watch import FixedSource
from nursery_tests.spiffe import answer

WEB, OPS = "spiffe://example/ns/shop/sa/web", "ops"
ALLOW = (
    AllowConfig(identity="spiffe://example/ns/*/sa/web", services=("*.shop",)),
    AllowConfig(identity=OPS, services=("*",)),
)


def at(port: int, zone: str) -> Instance:
    return Instance(EndpointKey("10.0.0.1", port, "", "tcp"), {"node": "n1", "zone": zone, "cluster": f"c-{zone}"})


SERVICES = {
    ServiceKey("cart.shop"): model.index([at(1, "z1")]),
    ServiceKey("ledger.bank"): model.index([at(2, "z2")]),
}


class Setup:
    """A server's files, and what its callers have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.stranger = Authority(folder, "stranger")
        server = self.authority.issue("server", ["localhost"])
        (folder / "tokens").write_text("# who\nt0ps,ops\nnobody-special\nl0st,unlisted\n")
        self.config = DiscoveryServerConfig(
            tls_certificate_file=server.certificate,
            tls_key_file=server.key,
            tls_client_ca_file=self.authority.file,
            tokens_file=str(folder / "tokens"),
            allow=ALLOW,
        )

    def client(self, *, uri: str = "", authority: Authority | None = None, token: str = "") -> DiscoveryClientConfig:
        pair = (authority or self.authority).issue("client", uris=[uri]) if uri else None
        file = self.folder / "token"
        file.write_text(token)
        return DiscoveryClientConfig(
            connect_timeout=10,
            ca_file=self.authority.file,
            certificate_file=pair.certificate if pair is not None else None,
            key_file=pair.key if pair is not None else None,
            token_file=str(file) if token else None,
        )


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.fixture(params=["grpcs", "wss"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Served:
    """A server under way."""

    def __init__(self, url: DiscoveryUrl, access: DiscoveryAccess, service: DiscoveryService) -> None:
        self.url = url
        self.access = access
        self.service = service

    @asynccontextmanager
    async def link(self, config: DiscoveryClientConfig) -> AsyncIterator[Link]:
        with trio.fail_after(10):
            async with open_link(self.url, config, Credentials(config)) as link:
                yield link


@asynccontextmanager
async def serving(
    config: DiscoveryServerConfig, scheme: str, workload: WorkloadApi | None = None
) -> AsyncIterator[Served]:
    access = DiscoveryAccess(config, workload)
    hub = Hub([FixedSource(SERVICES)], random.Random(0))
    service = DiscoveryService(hub, heartbeat_interval=0.05)
    handlers = access.guard(service.handlers())
    sockets = open_tcp_listeners("127.0.0.1", 0)
    url = DiscoveryUrl(scheme, "localhost", sockets[0].getsockname()[1])
    server: Any = GrpcServer(handlers) if scheme == "grpcs" else WebSocketServer(handlers)
    tls = access.grpc_context if scheme == "grpcs" else access.websocket_context
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        await hub.wait_in_sync()
        await nursery.start(partial(server.serve, sockets, tls=tls))
        yield Served(url, access, service)
        nursery.cancel_scope.cancel()


async def names(link: Link) -> list[str]:
    return [each.name for each in (await link.unary(LIST_SERVICES, pb.ListServicesRequest())).services]


async def test_by_certificate_and_by_token(setup: Setup, scheme: str) -> None:
    """A certificate's SPIFFE ID, and the name behind a token, say what is seen; lists show no more."""
    async with serving(setup.config, scheme) as served:
        async with served.link(setup.client(uri=WEB)) as link:
            assert await names(link) == ["cart.shop"]
            assert [each.name for each in (await link.unary(LIST_ZONES, pb.ListZonesRequest())).zones] == ["z1"]
            clusters = await link.unary(LIST_CLUSTERS, pb.ListClustersRequest())
            assert [each.name for each in clusters.clusters] == ["c-z1"]
            found = await link.unary(LIST_INSTANCES, pb.ListInstancesRequest(service="cart.shop"))
            assert len(found.instances) == 1
            with pytest.raises(GrpcError) as caught:
                await link.unary(LIST_INSTANCES, pb.ListInstancesRequest(service="ledger.bank"))
            assert caught.value.code is StatusCode.PERMISSION_DENIED
            assert caught.value.message == f"{WEB} may not see 'ledger.bank'"
        async with served.link(setup.client(token="t0ps")) as link:
            assert await names(link) == ["cart.shop", "ledger.bank"]
        async with served.link(setup.client(uri=WEB, token="t0ps")) as link:
            assert await names(link) == ["cart.shop", "ledger.bank"]
        assert served.service.hidden == 1


async def test_a_watch_is_told_that_what_it_may_not_see_is_unknown(setup: Setup, scheme: str) -> None:
    """It costs the watch none of the services that it may see."""
    wanted = [pb.Subscription(service=name) for name in ("ledger.bank", "cart.shop")]
    async with (
        serving(setup.config, scheme) as served,
        served.link(setup.client(uri=WEB)) as link,
        link.watch(WATCH_INSTANCES, pb.WatchInstancesRequest(subscriptions=wanted)) as events,
    ):
        seen: dict[str, tuple[bool, int]] = {}
        while True:
            event = await events.receive()
            assert event is not None
            if event.HasField("heartbeat"):
                break
            seen[event.snapshot.service] = event.snapshot.unknown, len(event.snapshot.instances)
    assert seen == {"ledger.bank": (True, 0), "cart.shop": (False, 1)}


async def test_a_watch_of_the_services_names_those_that_it_may_see(setup: Setup, scheme: str) -> None:
    async with (
        serving(setup.config, scheme) as served,
        served.link(setup.client(uri=WEB)) as web,
        web.watch(WATCH_SERVICES, pb.WatchServicesRequest()) as events,
    ):
        seen: list[str] = []
        while (event := await events.receive()) is not None and not event.HasField("heartbeat"):
            seen += event.change.added
        assert seen == ["cart.shop"]


async def test_who_watches_is_listed_as_far_as_its_services_are_seen(setup: Setup, scheme: str) -> None:
    """A watcher of nothing that the caller may see is not there; and of the others, only that is told."""
    wanted = [pb.Subscription(service=name) for name in ("ledger.bank", "cart.shop")]
    async with (
        serving(setup.config, scheme) as served,
        served.link(setup.client(token="t0ps")) as ops,
        served.link(setup.client(uri=WEB)) as web,
        ops.watch(WATCH_INSTANCES, pb.WatchInstancesRequest(subscriptions=wanted)) as both,
        ops.watch(WATCH_INSTANCES, pb.WatchInstancesRequest(subscriptions=wanted[:1])) as hidden,
    ):
        await both.receive()
        await hidden.receive()
        seen = await web.unary(LIST_WATCHERS, pb.ListWatchersRequest())
        assert [[each.service for each in watcher.services] for watcher in seen.watchers] == [["cart.shop"]]
        assert not (await web.unary(LIST_WATCHERS, pb.ListWatchersRequest(service="ledger.bank"))).watchers
        all_ = await ops.unary(LIST_WATCHERS, pb.ListWatchersRequest())
        assert sorted(len(watcher.services) for watcher in all_.watchers) == [1, 2]


@pytest.mark.parametrize(
    ("credentials", "code", "told", "counted"),
    [
        ({}, StatusCode.UNAUTHENTICATED, "a bearer token is needed", "unauthenticated"),
        ({"token": "guess"}, StatusCode.UNAUTHENTICATED, "the token is not known", "unauthenticated"),
        ({"token": "t0ps,ops"}, StatusCode.UNAUTHENTICATED, "the token is not known", "unauthenticated"),
        ({"uri": WEB, "token": "guess"}, StatusCode.UNAUTHENTICATED, "the token is not known", "unauthenticated"),
        ({"token": "nobody-special"}, StatusCode.PERMISSION_DENIED, "a caller without a name is not", "not_allowed"),
        ({"token": "l0st"}, StatusCode.PERMISSION_DENIED, "unlisted is not in discovery.allow", "not_allowed"),
        ({"uri": "spiffe://example/x"}, StatusCode.PERMISSION_DENIED, "spiffe://example/x is not", "not_allowed"),
    ],
)
async def test_who_may_see_nothing(
    setup: Setup, scheme: str, credentials: dict[str, Any], code: StatusCode, told: str, counted: str
) -> None:
    async with serving(setup.config, scheme) as served:
        with pytest.raises(GrpcError) as caught:
            async with served.link(setup.client(**credentials)) as link:
                await names(link)
        assert caught.value.code is code
        assert caught.value.message.startswith(told)
        assert {why: count for why, count in served.access.refused.items() if count} == {counted: 1}


@pytest.mark.parametrize("tokens", [True, False])
async def test_a_certificate_of_another_authority(setup: Setup, scheme: str, tokens: bool) -> None:
    """Not even a good token lets it in: it is refused in the handshake, and the next client is served."""
    config = setup.config
    if not tokens:
        config = msgspec.structs.replace(config, tokens_file=None)
    async with serving(config, scheme) as served:
        with pytest.raises(GrpcError) as caught:
            async with served.link(setup.client(uri=WEB, authority=setup.stranger, token="t0ps")) as link:
                await names(link)
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert "unknown ca" in caught.value.message.lower().replace("_", " ")
        if not tokens:
            with pytest.raises(GrpcError) as caught:
                async with served.link(setup.client()) as link:
                    await names(link)
            assert "certificate required" in caught.value.message.lower().replace("_", " ")
        async with served.link(setup.client(uri=WEB)) as link:
            assert await names(link) == ["cart.shop"]


async def test_a_certificate_that_makes_no_sense_ends_nothing(setup: Setup, scheme: str) -> None:
    """P1: an authority signs what it is given, and the next client is served."""
    pair = setup.authority.issue_raw("client", NO_TEXT)
    config = msgspec.structs.replace(setup.client(), certificate_file=pair.certificate, key_file=pair.key)
    async with serving(setup.config, scheme) as served:
        with pytest.raises(GrpcError):
            async with served.link(config) as link:
                await names(link)
        async with served.link(setup.client(uri=WEB)) as link:
            assert await names(link) == ["cart.shop"]


async def test_a_bundle_speaks_of_its_own_trust_domain(setup: Setup, scheme: str) -> None:
    """Who is of another one is nobody, also where nobody is told apart."""
    api = WorkloadApi("unused", random.Random(0))
    await api.take(answer(setup.authority, WEB))
    async with serving(DiscoveryServerConfig(tls_workload_api="unix:///unused"), scheme, api) as served:
        for uri, works in (("spiffe://other/ns/shop/sa/web", False), ("spiffe://example/any", True)):
            pair = setup.authority.issue("client", ["localhost"], [uri])
            client = DiscoveryClientConfig(
                connect_timeout=10,
                identity=WEB,
                certificate_file=pair.certificate,
                key_file=pair.key,
                ca_file=setup.authority.file,
            )
            async with served.link(client) as link:
                if works:
                    assert await names(link) == ["cart.shop", "ledger.bank"]
                    continue
                with pytest.raises(GrpcError, match="no identity of the trust domain example") as caught:
                    await names(link)
                assert caught.value.code is StatusCode.UNAUTHENTICATED


async def test_grpcio_with_credentials(setup: Setup) -> None:
    pair = setup.authority.issue("grpcio", uris=[WEB])

    def ask(target: str) -> list[str]:
        credentials = grpc.ssl_channel_credentials(
            Path(setup.authority.file).read_bytes(), Path(pair.key).read_bytes(), Path(pair.certificate).read_bytes()
        )
        with grpc.secure_channel(target, credentials) as channel:
            call = channel.unary_unary(
                LIST_SERVICES.path,
                request_serializer=pb.ListServicesRequest.SerializeToString,
                response_deserializer=pb.ListServicesResponse.FromString,
            )
            return [each.name for each in call(pb.ListServicesRequest(), timeout=10).services]

    async with serving(setup.config, "grpcs") as served:
        assert await trio.to_thread.run_sync(ask, served.url.authority) == ["cart.shop"]


async def test_an_agents_certificates(setup: Setup, scheme: str) -> None:
    """Server and client by the SPIFFE Workload API; the client goes by the server's identity in place of its name."""
    api = WorkloadApi("unused", random.Random(0))
    await api.take(answer(setup.authority, WEB))
    config = DiscoveryServerConfig(tls_workload_api="unix:///unused", allow=ALLOW)
    async with serving(config, scheme, api) as served:

        async def seen(identity: str) -> list[str]:
            client = DiscoveryClientConfig(connect_timeout=10, identity=identity)
            async with open_link(served.url, client, Credentials(client, api)) as link:
                return await names(link)

        with trio.fail_after(20):
            assert await seen(WEB) == ["cart.shop"]
            with pytest.raises(GrpcError, match=f"the server proves another identity: {WEB}"):
                await seen("spiffe://example/ns/shop/sa/other")
        # Who has no certificate is not let in: there are no tokens.
        with pytest.raises(GrpcError):
            async with served.link(setup.client()) as link:
                await names(link)


async def test_a_token_is_not_sent_where_it_could_be_read(setup: Setup) -> None:
    """Whatever made the configuration: the link asks again, for each server."""
    config = setup.client(token="t0ps")
    with pytest.raises(GrpcError, match="no token goes over plaintext") as caught:
        async with open_link(DiscoveryUrl("grpc", "192.0.2.1", 1), config):
            pass
    assert caught.value.code is StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a,web*\n", "line 1: expected TOKEN"), ("a\nb,\n", "line 2"), (",web\n", "line 1"), ("a,x y", "line 1")],
)
def test_lines_that_are_no_token(setup: Setup, text: str, problem: str) -> None:
    """The error names the line, and shows nothing of it: it may hold a secret."""
    (setup.folder / "tokens").write_text(text)
    with pytest.raises(Exception, match=problem) as caught:
        DiscoveryAccess(setup.config)
    assert text.strip() not in str(caught.value)
