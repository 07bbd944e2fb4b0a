"""The Discovery service: lists, watches, refusals, the same over gRPC and over WebSocket (D1, D3, D4)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from meshlocal.client.websocket_link import Answers, WebSocketLink
from meshlocal.discovery.hub import Hub, Update
from meshlocal.discovery.service import DiscoveryService, EncodedEvents
from meshlocal.discovery.source import Instances
from meshlocal.discovery.websocket import WebSocketServer
from meshlocal.net.grpc.client import Channel, channel_over, open_channel
from meshlocal.net.grpc.server import GrpcServer, ServerCall
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.net.websocket_client import WebSocket, WebSocketOptions, websocket_over
from meshlocal.policy import model
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.steps import finish
from meshlocal.wire.discovery_methods import (
    LIST_CLUSTERS,
    LIST_INSTANCES,
    LIST_SERVICES,
    LIST_WATCHERS,
    LIST_ZONES,
    METHODS,
    SERVICE_NAME,
    WATCH_INSTANCES,
    WATCH_SERVICES,
)
from meshlocal.wire.discovery_websocket import PROTO
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.discovery.held import HeldSource

B = ServiceKey("b")


class WebSocketCall:
    def __init__(self, websocket: WebSocket, method: Method[Any, Any]) -> None:
        self._websocket = websocket
        self.receive = Answers(websocket, method).receive

    async def send(self, request: Any, *, end: bool = False) -> None:
        await self._websocket.send(request.SerializeToString())


class WebSocketChannel(WebSocketLink):
    """A gRPC channel's calls over WebSocket, each over a stream of its own in memory."""

    def __init__(self, server: WebSocketServer, nursery: trio.Nursery) -> None:
        super().__init__(DiscoveryUrl("ws", "test", 1), DiscoveryClientConfig(), None, ())
        self._server = server
        self._nursery = nursery

    def _open(self, target: str) -> AbstractAsyncContextManager[WebSocket]:
        near, far = lockstep_stream_pair()
        self._nursery.start_soon(self._server.serve_stream, far)
        options = WebSocketOptions(max_message_size=1 << 26, keepalive_interval=1e9, keepalive_timeout=1e9)
        return websocket_over(near, "test", target, [PROTO], options=options)

    @asynccontextmanager
    async def call(self, method: Method[Any, Any]) -> AsyncIterator[WebSocketCall]:
        async with self._open(method.path) as websocket:
            yield WebSocketCall(websocket, method)


class Served:
    def __init__(
        self, source: HeldSource, hub: Hub, service: DiscoveryService, channel: Channel | WebSocketChannel
    ) -> None:
        self.source = source
        self.hub = hub
        self.service = service
        self.channel: Any = channel

    async def in_sync(self) -> None:
        self.source.sync.set()
        await self.hub.wait_in_sync()


Serving = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture(params=["grpc", "websocket"])
def serving(request: pytest.FixtureRequest) -> Serving:
    @asynccontextmanager
    async def serving(heartbeat: float = 1000.0) -> AsyncIterator[Served]:
        source = HeldSource()
        hub = Hub([source], random.Random(0))
        service = DiscoveryService(hub, heartbeat)
        async with trio.open_nursery() as nursery:
            await nursery.start(hub.run)
            if request.param == "grpc":
                near, far = memory_stream_pair()
                nursery.start_soon(GrpcServer(service.handlers()).serve_stream, far)
                async with channel_over(near) as channel:
                    await wait_all_tasks_blocked()
                    yield Served(source, hub, service, channel)
            else:
                server = WebSocketServer(service.handlers())
                await wait_all_tasks_blocked()
                yield Served(source, hub, service, WebSocketChannel(server, nursery))
                await wait_all_tasks_blocked()
                assert server.connections == 0
            nursery.cancel_scope.cancel()

    return serving


def at(last: int, **labels: str) -> Instance:
    return make_instance(f"10.0.0.{last}", 9000, "grpc", labels)


def subscribe(*services: str, version: str = "") -> pb.WatchInstancesRequest:
    subscriptions = [pb.Subscription(service=service, version=version) for service in services]
    return pb.WatchInstancesRequest(subscriptions=subscriptions)


def addresses(instances: Iterable[pb.Instance]) -> list[str]:
    return sorted(each.endpoint.address for each in instances)


def test_methods_are_those_of_the_interface() -> None:
    """The typed methods agree with the generated service's descriptor."""
    described = pb.DESCRIPTOR.services_by_name["Discovery"]
    assert described.full_name == SERVICE_NAME
    assert {
        (method.path, method.request_type.DESCRIPTOR, method.response_type.DESCRIPTOR, method.server_streaming)
        for method in METHODS
    } == {
        (f"/{SERVICE_NAME}/{each.name}", each.input_type, each.output_type, each.server_streaming)
        for each in described.methods
    }


async def test_lists(serving: Serving) -> None:
    """Zones, clusters, services and instances, whole and filtered."""
    async with serving() as served:
        served.source.update("b", at(1, zone="z1", cluster="c1", node="n1"), at(2, zone="z2", cluster="c2"))
        served.source.update("a", at(3, zone="z1", cluster="c3"), at(4))
        served.source.update("none")
        await served.in_sync()
        ask = served.channel.unary
        assert [zone.name for zone in (await ask(LIST_ZONES, pb.ListZonesRequest())).zones] == ["z1", "z2"]
        clusters = await ask(LIST_CLUSTERS, pb.ListClustersRequest(zone="z1"))
        assert [(each.name, each.zone) for each in clusters.clusters] == [("c1", "z1"), ("c3", "z1")]
        assert len((await ask(LIST_CLUSTERS, pb.ListClustersRequest())).clusters) == 3
        services = await ask(LIST_SERVICES, pb.ListServicesRequest())
        assert [(each.name, each.instances) for each in services.services] == [("a", 2), ("b", 2), ("none", 0)]
        services = await ask(LIST_SERVICES, pb.ListServicesRequest(zone="z1", cluster="c1"))
        assert [(each.name, each.instances) for each in services.services] == [("b", 1)]
        answer = await ask(LIST_INSTANCES, pb.ListInstancesRequest(service="b"))
        assert addresses(answer.instances) == ["10.0.0.1", "10.0.0.2"]
        snapshot = served.hub.snapshot(B)
        assert snapshot is not None
        assert answer.version == snapshot.version
        answer = await ask(LIST_INSTANCES, pb.ListInstancesRequest(service="b", selector={"node": "n1"}))
        assert addresses(answer.instances) == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("service", "code", "message"),
    [
        ("nobody", StatusCode.NOT_FOUND, "no registry knows a service 'nobody'"),
        ("", StatusCode.INVALID_ARGUMENT, "service: is empty"),
        ("a b", StatusCode.INVALID_ARGUMENT, "service: 'a b' is no service name"),
    ],
)
async def test_services_that_cannot_be_listed(serving: Serving, service: str, code: StatusCode, message: str) -> None:
    """A service that nobody knows, or that nobody could: a status that names it."""
    async with serving() as served:
        await served.in_sync()
        with pytest.raises(GrpcError, match=message) as refused:
            await served.channel.unary(LIST_INSTANCES, pb.ListInstancesRequest(service=service))
        assert refused.value.code is code


async def test_lists_before_the_sources_are_in_sync(serving: Serving) -> None:
    """D3: nothing is listed, least of all as empty, while a source is not in sync; its name is told."""
    async with serving() as served:
        for method, request in (
            (LIST_ZONES, pb.ListZonesRequest()),
            (LIST_CLUSTERS, pb.ListClustersRequest()),
            (LIST_SERVICES, pb.ListServicesRequest()),
            (LIST_INSTANCES, pb.ListInstancesRequest(service="b")),
        ):
            with pytest.raises(GrpcError, match="not in sync yet with held") as refused:
                await served.channel.unary(method, request)
            assert refused.value.code is StatusCode.UNAVAILABLE


async def test_watch_from_nothing_to_changes(serving: Serving) -> None:
    """A watch of two services: pending, then snapshots, then changes, each from the version before."""
    async with serving() as served:
        async with served.channel.call(WATCH_INSTANCES) as call:
            await call.send(subscribe("b", "c"), end=True)
            first = await call.receive()
            assert first is not None
            assert list(first.heartbeat.pending) == ["b", "c"]
            assert first.heartbeat.interval_ms == 1_000_000
            served.source.update("b", at(1), at(2), at(4), at(5))
            await served.in_sync()
            events = [await call.receive(), await call.receive()]
            snapshots = {each.snapshot.service: each.snapshot for each in events if each is not None}
            assert addresses(snapshots["b"].instances) == ["10.0.0.1", "10.0.0.2", "10.0.0.4", "10.0.0.5"]
            assert snapshots["c"].unknown
            served.source.update("b", at(1, node="n1"), at(3), at(4), at(5))
            event = await call.receive()
            assert event is not None
            assert event.change.base_version == snapshots["b"].version
            assert addresses(event.change.upserted) == ["10.0.0.1", "10.0.0.3"]
            assert [each.address for each in event.change.removed] == ["10.0.0.2"]
        await wait_all_tasks_blocked()
        assert served.hub.watcher_count == 0


async def test_a_watch_that_resumes_is_told_that_it_is_current(serving: Serving) -> None:
    """D1: from the current version nothing is sent but a heartbeat."""
    async with serving() as served:
        served.source.update("b", at(1))
        await served.in_sync()
        snapshot = served.hub.snapshot(B)
        assert snapshot is not None
        async with served.channel.call(WATCH_INSTANCES) as call:
            await call.send(subscribe("b", version=snapshot.version), end=True)
            event = await call.receive()
            assert event is not None
            assert event.WhichOneof("event") == "heartbeat"
            assert not event.heartbeat.pending


async def test_heartbeats_fill_the_silence(serving: Serving, autojump_clock: MockClock) -> None:
    """A watch on which nothing changes hears from its server once an interval."""
    async with serving(heartbeat=5.0) as served:
        await served.in_sync()
        async with served.channel.call(WATCH_INSTANCES) as call:
            await call.send(subscribe("b"), end=True)
            event = await call.receive()
            assert event is not None
            assert event.snapshot.unknown
            times = []
            for _ in range(4):
                event = await call.receive()
                assert event is not None
                assert event.HasField("heartbeat")
                times.append(trio.current_time())
            assert [round(after - before, 3) for before, after in pairwise(times)] == [5.0] * 3


async def test_a_watcher_that_reads_late_gets_the_latest(serving: Serving, autojump_clock: MockClock) -> None:
    """D4: a watcher that did not read for many changes of a large service gets few, large steps, not all of them."""
    crowd = [make_instance(f"10.{i // 250}.{i % 250}.1", 9000, labels={"filler": "x" * 200}) for i in range(1000)]
    async with serving() as served:
        served.source.update("b", *crowd)
        await served.in_sync()
        async with served.channel.call(WATCH_INSTANCES) as call:
            await call.send(subscribe("b"), end=True)
            await wait_all_tasks_blocked()
            for i in range(200):
                changed = [make_instance(each.key.address, 9000, labels={"round": str(i)}) for each in crowd]
                served.source.update("b", *changed)
                await wait_all_tasks_blocked()
            events = 0
            version = ""
            latest = served.hub.snapshot(B)
            assert latest is not None
            while version != latest.version:
                event = await call.receive()
                assert event is not None
                events += 1
                version = event.snapshot.version or event.change.version or version
            assert events <= 4


async def test_a_change_is_passed_on_to_all_who_wait() -> None:
    """Over sockets: each of many watchers gets each step, and none of their tasks is woken for it."""
    count, steps = 40, 5
    source = HeldSource()
    hub = Hub([source], random.Random(0))
    service = DiscoveryService(hub, 1000.0)
    listeners = open_tcp_listeners("127.0.0.1", 0)
    got: list[list[str]] = [[] for _ in range(count)]
    beats = 0
    news = trio.Event()

    async def watch(number: int) -> None:
        nonlocal news, beats
        async with (
            open_channel("127.0.0.1", listeners[0].getsockname()[1]) as channel,
            channel.call(WATCH_INSTANCES) as call,
        ):
            await call.send(subscribe("b"), end=True)
            async for event in call:
                if event.HasField("change") or event.HasField("snapshot"):
                    instances = event.change.upserted if event.HasField("change") else event.snapshot.instances
                    got[number] += addresses(instances)
                else:
                    beats += 1
                news.set()
                news = trio.Event()

    async def until_all(expected: list[str]) -> None:
        with trio.fail_after(20):
            while any(each != expected for each in got):
                await news.wait()

    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        await nursery.start(GrpcServer(service.handlers()).serve, listeners)
        source.update("b", at(1))
        source.sync.set()
        for number in range(count):
            nursery.start_soon(watch, number)
        await until_all(["10.0.0.1"])
        with trio.fail_after(20):
            while beats < count:  # a heartbeat ends each one's first round
                await news.wait()
        await wait_all_tasks_blocked()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ServerCall, "send_encoded", None)
            for step in range(2, 2 + steps):
                source.update("b", *(at(last) for last in range(1, step + 1)))
                await until_all([f"10.0.0.{last}" for last in range(1, step + 1)])
        assert got == [[f"10.0.0.{last}" for last in range(1, steps + 2)]] * count
        assert beats == count
        nursery.cancel_scope.cancel()


async def test_an_event_that_cannot_be_sent_ends_its_watch_only(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails for a watch while it waits is that watch's own failure, and no source's or other watch's."""
    encode = EncodedEvents.encode

    def encode_all_but_c(self: EncodedEvents, update: Update) -> bytes:
        if update.latest.service == "c" and len(update.latest.instances) > 1:
            raise ValueError("no such event")
        return encode(self, update)

    monkeypatch.setattr(EncodedEvents, "encode", encode_all_but_c)
    async with serving() as served:
        served.source.update("b", at(1))
        served.source.update("c", at(1))
        await served.in_sync()
        async with served.channel.call(WATCH_INSTANCES) as good, served.channel.call(WATCH_INSTANCES) as bad:
            for call, service in ((good, "b"), (bad, "c")):
                await call.send(subscribe(service), end=True)
                assert addresses((await call.receive()).snapshot.instances) == ["10.0.0.1"]
                assert (await call.receive()).HasField("heartbeat")
            await wait_all_tasks_blocked()
            served.source.update("c", at(1), at(2))
            with trio.fail_after(20), pytest.raises(GrpcError) as caught:
                await bad.receive()
            assert caught.value.code is StatusCode.UNKNOWN
            served.source.update("b", at(1), at(2))
            with trio.fail_after(20):
                assert addresses((await good.receive()).change.upserted) == ["10.0.0.2"]
    assert "no such event" in caplog.text


class FullCall:
    """A watch of b and c whose connection is full at times: it takes the second of two events only by waiting."""

    peer = "test"
    caller = None

    def __init__(self, source: HeldSource) -> None:
        self.source = source
        self.instances = [at(1), at(2)]
        self.tries = 0
        self.held: dict[str, str] = {}
        self.late = 0

    def grow(self, *services: str) -> None:
        """Give services one more instance, each."""
        self.instances.append(at(len(self.instances) + 1))
        for service in services:
            self.source.update(service, *self.instances)

    async def receive(self) -> pb.WatchInstancesRequest:
        await trio.lowlevel.checkpoint()
        return subscribe("b", "c")

    async def send(self, response: pb.WatchInstancesResponse) -> None:
        await trio.lowlevel.checkpoint()

    async def send_encoded(self, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._take(payload)

    def try_send_encoded(self, payload: bytes) -> bool:
        self.tries += 1
        if self.tries == 2:
            self.late += 1
            self.grow("b", "c")  # before anybody else has a turn
            return False
        self._take(payload)
        return True

    def _take(self, payload: bytes) -> None:
        event = pb.WatchInstancesResponse.FromString(payload)
        if event.HasField("snapshot"):
            self.held[event.snapshot.service] = event.snapshot.version
        else:
            assert event.change.base_version == self.held[event.change.service], "overtaken by what came later"
            self.held[event.change.service] = event.change.version


async def test_no_event_overtakes_one_that_could_not_be_sent_at_once(nursery: trio.Nursery) -> None:
    """D1: what is left of a push is sent first, whoever gets to send what changed after it."""
    source = HeldSource()
    hub = Hub([source], random.Random(0))
    service = DiscoveryService(hub, 1000.0)
    await nursery.start(hub.run)
    await wait_all_tasks_blocked()
    call = FullCall(source)
    call.grow("b", "c")
    source.sync.set()
    await hub.wait_in_sync()
    watch: Any = service.handlers()[WATCH_INSTANCES]
    nursery.start_soon(watch, call)
    await wait_all_tasks_blocked()
    rounds = 30  # who has the next turn, the hub or the watch, is left to chance
    for _ in range(rounds):
        call.tries = 0
        call.grow("b", "c")
        await wait_all_tasks_blocked()
    assert call.late == rounds
    assert call.held == {each.service: each.version for each in hub.snapshots()}
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.WatchInstancesRequest(), "subscriptions: none"),
        (subscribe("b", "c", "b"), r"subscriptions\[2\]\.service: 'b' stands twice"),
        (subscribe("b", "no good"), r"subscriptions\[1\]\.service: 'no good' is no service name"),
    ],
)
async def test_watches_that_are_refused(serving: Serving, request_: pb.WatchInstancesRequest, message: str) -> None:
    """A request that makes no sense gets INVALID_ARGUMENT, and says which of its parts it was."""
    async with serving() as served:
        async with served.channel.call(WATCH_INSTANCES) as call:
            await call.send(request_, end=True)
            with pytest.raises(GrpcError, match=message) as refused:
                await call.receive()
        assert refused.value.code is StatusCode.INVALID_ARGUMENT
        assert served.hub.watcher_count == 0


async def test_a_drain_ends_watches(serving: Serving) -> None:
    """S1: a server that goes away ends its watches with UNAVAILABLE, so that watchers turn to another."""
    async with serving() as served:
        await served.in_sync()
        async with served.channel.call(WATCH_INSTANCES) as call:
            await call.send(subscribe("b"), end=True)
            assert await call.receive() is not None
            assert await call.receive() is not None
            # What is cut amid a message gets no goodbye.
            await wait_all_tasks_blocked()
            await served.service.watches.drain(10)
            with pytest.raises(GrpcError, match="going away") as ended:
                await call.receive()
        assert ended.value.code is StatusCode.UNAVAILABLE
        assert served.hub.watcher_count == 0


def snapshot_of(version: str, instances: Instances, *, unknown: bool = False) -> ServiceSnapshot:
    return ServiceSnapshot(B, version, instances, unknown)


def test_an_event_is_encoded_once_however_many_watch() -> None:
    """The fan-out's cost: one encoding a change; and it stays bounded."""
    encoded = EncodedEvents(most=1000)
    one, two = snapshot_of("1", model.index([at(1), at(2)])), snapshot_of("2", model.index([at(1), at(2), at(3)]))
    assert encoded.encode(Update(one, two)) is encoded.encode(Update(one, two))
    event = pb.WatchInstancesResponse.FromString(encoded.encode(Update(one, two)))
    assert addresses(event.change.upserted) == ["10.0.0.3"]
    for i in range(200):
        encoded.encode(Update(None, snapshot_of(str(i), {})))
        assert encoded.size == sum(map(len, encoded._events.values())) <= 1000
    assert len(encoded._events) > 10
    large = snapshot_of("large", model.index(at(number) for number in range(1, 200)))
    assert encoded.encode(Update(None, large)) is encoded.encode(Update(None, large))
    assert len(encoded._events) == 1


@pytest.mark.parametrize(
    ("base", "latest"),
    [
        (None, snapshot_of("2", model.index([at(1)]))),
        (snapshot_of("unknown", {}, unknown=True), snapshot_of("2", model.index([at(1)]))),
        (snapshot_of("1", model.index([at(1)])), snapshot_of("unknown", {}, unknown=True)),
        (snapshot_of("1", model.index([at(1), at(2)])), snapshot_of("2", model.index([at(3)]))),
    ],
)
def test_the_whole_is_sent_where_a_change_would_not_do(base: ServiceSnapshot | None, latest: ServiceSnapshot) -> None:
    """From nothing, to or from an unknown service, and where most of it changed, a snapshot is sent."""
    event = pb.WatchInstancesResponse.FromString(EncodedEvents().encode(Update(base, latest)))
    assert event.snapshot.version == latest.version
    assert event.snapshot.unknown == latest.unknown


async def list_watchers(served: Served, service: str = "") -> list[pb.Watcher]:
    answer = await served.channel.unary(LIST_WATCHERS, pb.ListWatchersRequest(service=service))
    assert answer.left_out == 0
    return list(answer.watchers)


async def test_who_watches_is_listed(serving: Serving, autojump_clock: MockClock) -> None:
    """Its words, its address, since when, and which version of each service it was told."""
    async with serving() as served:
        served.source.update("b", at(1))
        await served.in_sync()
        assert await list_watchers(served) == []
        request = subscribe("b", "c")
        request.caller.CopyFrom(pb.Caller(name="web-1", node="n1", software="meshlocal proxy 1"))
        async with served.channel.call(WATCH_INSTANCES) as events:
            await events.send(request, end=True)
            while not (await events.receive()).HasField("heartbeat"):
                pass
            await trio.sleep(5)
            [watcher] = await list_watchers(served)
            assert (watcher.caller.name, watcher.caller.node, watcher.caller.software) == (
                *("web-1", "n1"),
                "meshlocal proxy 1",
            )
            assert (watcher.age_seconds, watcher.behind_ms, watcher.identity) == (5, 0, "")
            told = served.hub.snapshot(B)
            assert told is not None
            assert {each.service: each.version for each in watcher.services}["b"] == told.version
            assert len(await list_watchers(served, "b")) == 1
            assert await list_watchers(served, "zz") == []
            served.source.update("b", at(1), at(2))
            await events.receive()
            changed = served.hub.snapshot(B)
            assert changed is not None
            [watcher] = await list_watchers(served, "b")
            assert {each.service: each.version for each in watcher.services}["b"] == changed.version != told.version
        await wait_all_tasks_blocked()
        assert await list_watchers(served) == []


async def test_what_a_caller_says_of_itself_is_cut(serving: Serving) -> None:
    """Bounded, and nothing that a terminal would obey."""
    async with serving() as served:
        await served.in_sync()
        request = subscribe("b")
        request.caller.name = "x" * 10_000
        request.caller.node = "n1\x1b[31m\n"
        async with served.channel.call(WATCH_INSTANCES) as events:
            await events.send(request, end=True)
            await events.receive()
            [watcher] = await list_watchers(served)
            assert (watcher.caller.name, watcher.caller.node) == ("x" * 253, "n1[31m")


async def test_a_list_of_watchers_is_bounded(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlocal.discovery.service.MOST_LISTED", 1)
    async with serving() as served:
        await served.in_sync()
        async with served.channel.call(WATCH_INSTANCES) as one, served.channel.call(WATCH_INSTANCES) as two:
            for call in (one, two):
                await call.send(subscribe("b"), end=True)
                await call.receive()
            answer = await served.channel.unary(LIST_WATCHERS, pb.ListWatchersRequest())
            assert (len(answer.watchers), answer.left_out) == (1, 1)


class SlowCall:
    """A caller that reads nothing until it is let."""

    caller = None
    peer = "10.0.0.9"

    def __init__(self) -> None:
        self.reads = trio.Event()

    async def receive(self) -> pb.WatchInstancesRequest:
        await trio.lowlevel.checkpoint()
        return subscribe("b")

    async def send(self, response: pb.WatchInstancesResponse) -> None:
        await self.reads.wait()

    async def send_encoded(self, payload: bytes) -> None:
        await self.reads.wait()

    def try_send_encoded(self, payload: bytes) -> bool:
        return self.reads.is_set()


async def test_who_does_not_read_is_behind(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """From when there was something for it until it has taken all of it."""
    source = HeldSource()
    hub = Hub([source], random.Random(0))
    service = DiscoveryService(hub, 1000.0)
    await nursery.start(hub.run)
    await wait_all_tasks_blocked()
    source.update("b", at(1))
    source.sync.set()
    await hub.wait_in_sync()
    call = SlowCall()
    watch: Any = service.handlers()[WATCH_INSTANCES]
    nursery.start_soon(watch, call)
    await wait_all_tasks_blocked()

    def behind() -> int:
        [watcher], _ = finish(service.watches.listed(10))
        return watcher.behind_ms

    await trio.sleep(2)
    assert behind() == 2000
    call.reads.set()
    await wait_all_tasks_blocked()
    assert behind() == 0
    call.reads = trio.Event()
    source.update("b", at(1), at(2))
    await trio.sleep(3)
    assert 2900 <= behind() <= 3000
    source.update("b", at(1), at(2), at(3))
    await trio.sleep(1)
    assert 3900 <= behind() <= 4000, "what is for it meanwhile makes it no younger"
    call.reads.set()
    await wait_all_tasks_blocked()
    assert behind() == 0
    nursery.cancel_scope.cancel()


async def test_the_services_are_watched(serving: Serving, autojump_clock: MockClock) -> None:
    """Whom the server learns from first, then what it knows, then what changes; heartbeats fill the silence (D3)."""
    async with serving(heartbeat=5.0) as served, served.channel.call(WATCH_SERVICES) as call:
        await call.send(pb.WatchServicesRequest(), end=True)
        assert list((await call.receive()).lineage.servers) == ["alone"]
        first = await call.receive()
        assert first.WhichOneof("event") == "change"
        assert not first.change.complete
        assert (await call.receive()).heartbeat.interval_ms == 5000
        served.source.update("b", at(1))
        served.source.update("c", at(2))
        await served.in_sync()
        while not (change := (await call.receive()).change).complete:
            assert not change.added
        assert list(change.added) == ["b", "c"]
        served.source.update("b", at(1), at(2))
        began = trio.current_time()
        assert (await call.receive()).WhichOneof("event") == "heartbeat"
        assert trio.current_time() - began <= 5.0
        assert served.source.publisher is not None
        served.source.publisher.update(B, None)
        gone = (await call.receive()).change
        assert (list(gone.added), list(gone.removed), gone.complete) == ([], ["b"], True)


async def to_its_end(call: Any) -> None:
    while True:
        await call.receive()


async def test_a_watch_of_the_services_ends_with_the_drain(serving: Serving) -> None:
    """So that who follows turns to another server; one that comes later is sent away at once."""
    async with serving() as served:
        async with served.channel.call(WATCH_SERVICES) as call:
            await call.send(pb.WatchServicesRequest(), end=True)
            for _ in range(3):
                assert await call.receive() is not None
            # What is cut amid a message gets no goodbye.
            await wait_all_tasks_blocked()
            await served.service.watches.drain(10)
            with pytest.raises(GrpcError, match="going away") as ended:
                await to_its_end(call)
            assert ended.value.code is StatusCode.UNAVAILABLE
        async with served.channel.call(WATCH_SERVICES) as late:
            await late.send(pb.WatchServicesRequest(), end=True)
            with pytest.raises(GrpcError, match="going away"):
                await to_its_end(late)
        assert not len(served.service.watches)


@pytest.mark.parametrize("first", [WATCH_INSTANCES, WATCH_SERVICES])
async def test_one_client_may_watch_the_services_and_instances(serving: Serving, first: Method[Any, Any]) -> None:
    """Whichever ends first: each counts, and what counted is given back."""
    requests: dict[Method[Any, Any], Any] = {
        WATCH_INSTANCES: subscribe("b"),
        WATCH_SERVICES: pb.WatchServicesRequest(),
    }
    second = WATCH_SERVICES if first is WATCH_INSTANCES else WATCH_INSTANCES
    async with serving() as served:
        await served.in_sync()
        async with served.channel.call(first) as call:
            await call.send(requests[first], end=True)
            await call.receive()
            async with served.channel.call(second) as other:
                await other.send(requests[second], end=True)
                for _ in range(2 if second is WATCH_INSTANCES else 3):
                    await other.receive()
                await wait_all_tasks_blocked()
                assert served.service._limits.subscriptions == 2
                await served.service.watches.drain(10)
                with pytest.raises(GrpcError, match="going away"):
                    await to_its_end(other)
        await wait_all_tasks_blocked()
        assert served.service._limits.subscriptions == 0
        assert not served.service._limits._client_subscriptions
