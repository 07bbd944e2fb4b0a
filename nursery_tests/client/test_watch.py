"""The watch on discovery servers, over real loopback sockets, by gRPC and by WebSocket (D1, D4)."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
from trio.testing import MockClock

from meshlocal.client.watch import FIRST_EVENT_LIMIT, DiscoveryWatch
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Instances, Publisher
from meshlocal.discovery.websocket import WebSocketServer
from meshlocal.net.grpc.server import GrpcServer, Routes
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy import model
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.model import Instance, ServiceChange, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.wire.discovery_codec import heartbeat_event, instance_to_message
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.ports import free_port

SCHEME = ContextVar("scheme", default="grpc")
B, C = ServiceKey("b"), ServiceKey("c")
QUICK = DiscoveryClientConfig(
    connect_timeout=1, keepalive_interval=0.05, keepalive_timeout=0.05, backoff_initial=0.01, backoff_max=0.02
)
LIMIT = 20


def at(last: int, **labels: str) -> Instance:
    return make_instance(f"10.0.0.{last}", 9000, labels=labels)


class FixedSource:
    name = "fixed"

    def __init__(self, services: Mapping[ServiceKey, Instances]) -> None:
        self._services = services
        self.publisher: Publisher | None = None

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        publisher.replace(self._services)
        task_status.started()
        await trio.sleep_forever()


class Sink:
    """Remembers what was published, and lets a test wait for it."""

    def __init__(self) -> None:
        self.snapshots: list[ServiceSnapshot] = []
        self._changed = anyio.Event()

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        self.snapshots.append(snapshot)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, holds: Callable[[ServiceSnapshot], bool]) -> ServiceSnapshot:
        with anyio.fail_after(LIMIT):
            seen = 0
            while True:
                for snapshot in self.snapshots[seen:]:
                    seen += 1
                    if holds(snapshot):
                        return snapshot
                await self._changed.wait()


def addresses(snapshot: ServiceSnapshot) -> list[str]:
    return sorted(each.key.address for each in snapshot.instances.values())


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the status is plain numbers for metrics, with no event to wait for
            await anyio.sleep(0.005)


@pytest.fixture(params=["grpc", "ws"], autouse=True)
def scheme(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs over each transport."""
    token = SCHEME.set(request.param)
    yield request.param
    SCHEME.reset(token)


@asynccontextmanager
async def serving(
    routes: Routes, port: int = 0, ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[DiscoveryUrl]:
    sockets = open_tcp_listeners("127.0.0.1", port)
    url = DiscoveryUrl(SCHEME.get(), "127.0.0.1", sockets[0].getsockname()[1])
    server = GrpcServer(routes) if url.scheme == "grpc" else WebSocketServer(routes)
    async with trio.open_nursery() as nursery:
        if ssl_context is not None:
            ssl_context.set_alpn_protocols(["h2" if url.scheme == "grpc" else "http/1.1"])
        tls = (lambda: ssl_context) if ssl_context is not None else None
        await nursery.start(partial(server.serve, sockets, tls=tls))
        yield url
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def discovery(
    services: Mapping[ServiceKey, Instances], port: int = 0, ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[DiscoveryUrl, FixedSource]]:
    source = FixedSource(services)
    hub = Hub([source], random.Random(0))
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        await hub.wait_in_sync()
        async with serving(DiscoveryService(hub, heartbeat_interval=0.05).handlers(), port, ssl_context) as url:
            yield url, source
        nursery.cancel_scope.cancel()


def watch(sink: Sink, *urls: DiscoveryUrl, services: tuple[ServiceKey, ...] = (B,)) -> DiscoveryWatch:
    return DiscoveryWatch(urls, services, sink, random.Random(0), QUICK)


class SteppingSink(Sink):
    """Notes what was prepared, and how often another task had its turn by each step."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0
        self.prepared: list[ServiceSnapshot] = []
        self.turns_at: list[int] = []

    async def other_task(self) -> None:
        while True:
            await anyio.lowlevel.checkpoint()
            self.turns += 1

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        for _ in range(10):
            self.turns_at.append(self.turns)
            yield
        self.prepared.append(snapshot)


async def test_a_large_snapshot_keeps_nobody_waiting(nursery: trio.Nursery) -> None:
    """What a snapshot of many instances takes is done in steps, before it is published; a small change has none."""
    crowd = [make_instance(f"10.1.{number >> 8}.{number & 255}", 9000) for number in range(1000)]
    sink = SteppingSink()
    async with discovery({B: model.index(crowd)}) as (url, source):
        nursery.start_soon(sink.other_task)
        nursery.start_soon(watch(sink, url).run)
        first = await sink.until(lambda each: len(each.instances) == 1000)
        assert sink.prepared == [first]
        # Tasks whose turn it is run in any order, so that two steps can come between two turns, and no more.
        assert all(before < after for before, after in zip(sink.turns_at, sink.turns_at[2:], strict=False))
        assert source.publisher is not None
        source.publisher.update(B, model.index([*crowd, at(1)]))
        await sink.until(lambda each: len(each.instances) == 1001)
        assert sink.prepared == [first]
        # All are others now: so large a change is prepared as well.
        source.publisher.update(B, model.index(make_instance(f"10.2.{n >> 8}.{n & 255}", 9000) for n in range(900)))
        last = await sink.until(lambda each: len(each.instances) == 900)
        assert sink.prepared[-1] is last


async def test_snapshot_changes_and_heartbeats(nursery: trio.Nursery) -> None:
    """A service's snapshot comes first, then its changes; heartbeats keep its age near nothing."""
    sink = Sink()
    async with discovery({B: model.index([at(1, node="n1"), at(2)])}) as (url, source):
        following = watch(sink, url, services=(B, C))
        nursery.start_soon(following.run)
        first = await sink.until(lambda each: each.service == B)
        assert addresses(first) == ["10.0.0.1", "10.0.0.2"]
        assert (await sink.until(lambda each: each.service == C)).unknown
        assert source.publisher is not None
        source.publisher.update(B, model.index([at(1, node="n9"), at(3)]))
        changed = await sink.until(lambda each: "10.0.0.3" in addresses(each))
        assert addresses(changed) == ["10.0.0.1", "10.0.0.3"]
        assert changed.instances[at(1).key].node == "n9"
        assert following.status.connected
        confirmed = following.status.confirmed_at
        assert confirmed is not None
        await until(lambda: (following.status.confirmed_at or 0) > confirmed)
        nursery.cancel_scope.cancel()


async def test_loss_of_discovery_keeps_what_is_known_and_resumes(nursery: trio.Nursery) -> None:
    """D1: while discovery is away nothing changes but the age; when it is back, what changed meanwhile comes."""
    sink = Sink()
    async with discovery({B: model.index([at(1)])}) as (url, _):
        following = watch(sink, url)
        nursery.start_soon(following.run)
        await sink.until(lambda each: addresses(each) == ["10.0.0.1"])
    await until(lambda: not following.status.connected and following.status.problem is not None)
    assert len(sink.snapshots) == 1
    reconnects = following.status.reconnects
    await until(lambda: following.status.reconnects > reconnects + 3)
    assert len(sink.snapshots) == 1
    async with discovery({B: model.index([at(1)])}, url.port):
        await until(lambda: following.status.connected)
        assert len(sink.snapshots) == 1, "equal content has an equal version: nothing is sent again"
    async with discovery({B: model.index([at(1), at(2)])}, url.port):
        await sink.until(lambda each: addresses(each) == ["10.0.0.1", "10.0.0.2"])
    nursery.cancel_scope.cancel()


async def test_an_unreachable_server_is_waited_for(nursery: trio.Nursery) -> None:
    """D1: discovery that is not there at the start is served from once it comes."""
    port = free_port()
    sink = Sink()
    following = watch(sink, DiscoveryUrl(SCHEME.get(), "127.0.0.1", port))
    nursery.start_soon(following.run)
    await until(lambda: following.status.reconnects >= 2)
    assert "refused" in (following.status.problem or "").lower()
    async with discovery({B: model.index([at(1)])}, port):
        await sink.until(lambda each: addresses(each) == ["10.0.0.1"])
        nursery.cancel_scope.cancel()


async def test_a_frozen_server_is_found_and_another_one_taken(nursery: trio.Nursery) -> None:
    """D1: a server that took the connection and then says nothing is given up within its keepalive time."""
    sink = Sink()
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        frozen_url = DiscoveryUrl(SCHEME.get(), "127.0.0.1", frozen.getsockname()[1])
        async with discovery({B: model.index([at(1)])}) as (url, _):
            following = watch(sink, frozen_url, url)
            nursery.start_soon(following.run)
            await sink.until(lambda each: addresses(each) == ["10.0.0.1"])
            assert following.status.source == str(url)
            assert following.status.reconnects == 1
            nursery.cancel_scope.cancel()


async def test_following_other_services_keeps_what_is_held(nursery: trio.Nursery) -> None:
    """A change of the services watched sends nothing again of those that stay."""
    sink = Sink()
    async with discovery({B: model.index([at(1)]), C: model.index([at(2)])}) as (url, _):
        following = watch(sink, url)
        nursery.start_soon(following.run)
        await sink.until(lambda each: each.service == B)
        following.follow([B, C])
        await sink.until(lambda each: each.service == C)
        following.follow([C])
        following.follow([C, B])
        await sink.until(lambda each: sum(one.service == B for one in sink.snapshots) == 2)
        assert [each.service for each in sink.snapshots].count(C) == 1
        assert following.status.reconnects == 0
        nursery.cancel_scope.cancel()


def scripted(*rounds: list[pb.WatchInstancesResponse], requests: list[pb.WatchInstancesRequest]) -> Routes:
    """A server that sends one list of events to each watch in turn, then stays silent."""
    left = list(rounds)

    async def handler(call: ServerCall[Any, Any]) -> None:
        request = await call.receive()
        assert request is not None
        requests.append(request)
        for event in left.pop(0) if left else []:
            await call.send(event)
        await trio.sleep_forever()

    return {WATCH_INSTANCES: handler}


def whole(service: str, version: str, *instances: Instance) -> pb.WatchInstancesResponse:
    messages = [instance_to_message(each) for each in instances]
    return pb.WatchInstancesResponse(snapshot=pb.ServiceSnapshot(service=service, version=version, instances=messages))


def change(service: str, base: str, version: str) -> pb.WatchInstancesResponse:
    return pb.WatchInstancesResponse(change=pb.ServiceChange(service=service, base_version=base, version=version))


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (change("b", "7", "8"), "a change of b from version '7' does not fit b at version '1'"),
        (change("c", "", "8"), "a change came of 'c', of which nothing is held"),
        (whole("d", "1"), "an event came of 'd', which is not watched"),
    ],
)
async def test_events_that_do_not_fit_start_over(
    nursery: trio.Nursery, event: pb.WatchInstancesResponse, problem: str
) -> None:
    """D1: never a mix: after an event that does not fit, the whole is asked for, and what is published stays."""
    sink = Sink()
    requests: list[pb.WatchInstancesRequest] = []
    async with serving(scripted([whole("b", "1", at(1)), event], [whole("b", "9", at(2))], requests=requests)) as url:
        following = watch(sink, url)
        seen: list[str | None] = []
        nursery.start_soon(following.run)
        await until(lambda: seen.append(following.status.problem) or len(requests) == 2)
        await sink.until(lambda each: addresses(each) == ["10.0.0.2"])
        assert problem in seen
        assert [each.version for each in requests[1].subscriptions] == [""]
        assert [addresses(each) for each in sink.snapshots] == [["10.0.0.1"], ["10.0.0.2"]]
        nursery.cancel_scope.cancel()


async def test_a_bad_instance_is_left_out_and_the_others_used(nursery: trio.Nursery) -> None:
    """An instance with a port that is none costs itself only, and is counted."""
    sink = Sink()
    event = whole("b", "1", at(1))
    event.snapshot.instances.add(endpoint=pb.NetworkEndpoint(address="10.0.0.2", port=70000))
    event.snapshot.instances.add(endpoint=pb.NetworkEndpoint(address="", port=1))
    async with serving(scripted([event], requests=[])) as url:
        following = watch(sink, url)
        nursery.start_soon(following.run)
        snapshot = await sink.until(lambda each: each.service == B)
        assert addresses(snapshot) == ["10.0.0.1"]
        assert following.status.refused_instances == 2
        nursery.cancel_scope.cancel()


async def test_age_counts_from_the_last_word_while_registries_are_away(nursery: trio.Nursery) -> None:
    """D3: a server that cannot speak for a service yet confirms nothing, however often its heart beats."""
    sink = Sink()
    events = [whole("b", "1", at(1)), *[heartbeat_event(0.01, [C])] * 3]
    async with serving(scripted(events, requests=[])) as url:
        following = watch(sink, url, services=(B, C))
        nursery.start_soon(following.run)
        await sink.until(lambda each: each.service == B)
        await until(lambda: following.status.connected)
        assert following.status.confirmed_at is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("interval", "lasts"), [(0.01, 1.0), (1.0, 3.0), (5.0, 15.0), (None, FIRST_EVENT_LIMIT)], ids=str
)
async def test_a_server_that_misses_its_heartbeats_is_given_up(
    nursery: trio.Nursery, autojump_clock: MockClock, interval: float | None, lasts: float
) -> None:
    """D1: after three of the intervals that it told, though it answers pings; what is known stays."""
    sink = Sink()
    requests: list[pb.WatchInstancesRequest] = []
    events = [whole("b", "1", at(1))] + ([] if interval is None else [heartbeat_event(interval, [])])
    options = DiscoveryClientConfig(
        keepalive_interval=0.5, keepalive_timeout=0.4, backoff_initial=0.01, backoff_max=0.02
    )
    async with serving(scripted(events, [], requests=requests)) as url:
        following = DiscoveryWatch([url], [B], sink, random.Random(0), options)
        nursery.start_soon(following.run)
        await sink.until(lambda each: each.service == B)
        began = anyio.current_time()
        with anyio.fail_after(100):
            while len(requests) < 2:  # noqa: ASYNC110 - a list, with no event to wait for
                await anyio.sleep(0.1)
        assert lasts <= anyio.current_time() - began <= lasts + 0.2
        assert following.status.problem == "no answer in time"
        assert len(sink.snapshots) == 1
        assert [each.version for each in requests[1].subscriptions] == ["1"]
        nursery.cancel_scope.cancel()


def test_watch_runs_on_asyncio() -> None:
    """The watch is a library's too: it runs in any anyio app."""
    port = free_port()

    async def main() -> None:
        sink = Sink()
        following = watch(sink, DiscoveryUrl(SCHEME.get(), "127.0.0.1", port))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(following.run)
            await until(lambda: following.status.reconnects >= 2)
            tasks.cancel_scope.cancel()
        assert not following.status.connected

    anyio.run(main, backend="asyncio")


async def test_asked_again_it_gets_the_whole_from_another_connection(nursery: trio.Nursery) -> None:
    """D5: and that is no outage."""
    sink = Sink()
    async with discovery({B: model.index([at(1)])}) as (url, _source):
        following = watch(sink, url)
        nursery.start_soon(following.run)
        await sink.until(lambda snapshot: addresses(snapshot) == ["10.0.0.1"])
        for count in (2, 3):
            following.refresh(B)
            await until(partial(lambda wanted: len(sink.snapshots) == wanted, count))
            assert addresses(sink.snapshots[-1]) == ["10.0.0.1"]
        assert following.status.connected
        assert following.status.reconnects == 0
        nursery.cancel_scope.cancel()


async def test_asked_again_it_turns_to_the_next_server(nursery: trio.Nursery) -> None:
    """D5: the one that it watched may be what is wrong."""
    sink = Sink()
    async with (
        discovery({B: model.index([at(1)])}) as (wrong, _),
        discovery({B: model.index([at(2)])}) as (right, _),
    ):
        following = watch(sink, wrong, right)
        nursery.start_soon(following.run)
        await sink.until(lambda snapshot: addresses(snapshot) == ["10.0.0.1"])
        following.refresh(B)
        await sink.until(lambda snapshot: addresses(snapshot) == ["10.0.0.2"])
        assert following.status.source == str(right)
        nursery.cancel_scope.cancel()


async def test_asked_again_while_discovery_is_away_it_keeps_what_it_has(nursery: trio.Nursery) -> None:
    """D1, D5."""
    sink = Sink()
    following = watch(sink, DiscoveryUrl(SCHEME.get(), "127.0.0.1", free_port()))
    nursery.start_soon(following.run)
    await until(lambda: following.status.reconnects >= 1)
    following.refresh(B)
    await until(lambda: following.status.reconnects >= 3)
    assert not following.status.connected
    nursery.cancel_scope.cancel()
