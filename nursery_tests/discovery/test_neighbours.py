"""What one client of a discovery server may take of what others need (P2), and how a server leaves (S1)."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
import trio
import trio.testing

from meshlocal.discovery import watches as watches_module
from meshlocal.discovery.hub import Hub, Update
from meshlocal.discovery.limits import (
    CLIENT_UNFINISHED,
    FULL_PUSHBACK,
    MOST_UNFINISHED,
    Limited,
    ServerLimits,
)
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Publisher
from meshlocal.net.crowding import Crowding
from meshlocal.net.grpc.client import Channel, channel_over
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.server import RESETS_BURST, GrpcServer
from meshlocal.policy import model
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.model import ServiceKey, make_instance
from meshlocal.wire.discovery_methods import LIST_ZONES, WATCH_INSTANCES
from meshlocal.wire.grpc.framing import PREFIX
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

B = ServiceKey("b")
CROWD = 6000


class Registry:
    name = "registry"
    publisher: Publisher

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        crowd = (make_instance(f"10.{n >> 8}.{n & 255}.1", 9000, labels={"node": f"n{n}"}) for n in range(CROWD))
        publisher.replace({B: model.index(crowd)})
        task_status.started()
        await trio.sleep_forever()


class Serving:
    """A server over memory streams."""

    def __init__(self, nursery: trio.Nursery, limits: ServerLimits, options: GrpcOptions, hub: Hub) -> None:
        self.limits = limits
        self.service = DiscoveryService(hub, 10.0, limits)
        self.server = GrpcServer(limits.guard(self.service.handlers()), options)
        self.hub = hub
        self._nursery = nursery

    @asynccontextmanager
    async def channel(self, peer: str = "10.0.0.1:1") -> AsyncIterator[Channel]:
        near, far = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self.server.serve_stream, far, peer)
        async with channel_over(near) as channel:
            yield channel


@pytest.fixture
async def serving(nursery: trio.Nursery) -> Serving:
    hub = Hub([Registry()], random.Random(0))
    await nursery.start(hub.run)
    await hub.wait_in_sync()
    limits = ServerLimits(ServerLimitsConfig(client_calls_per_second=None, client_subscriptions=1500))
    return Serving(nursery, limits, GrpcOptions(holding=limits, max_message_size=1 << 20), hub)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not holds():  # noqa: ASYNC110 - a plain number, with no event to wait for
            await trio.sleep(0.001)


def subscriptions(*names: str) -> pb.WatchInstancesRequest:
    return pb.WatchInstancesRequest(subscriptions=[pb.Subscription(service=name) for name in names])


@contextmanager
def status(code: StatusCode) -> Iterator[list[GrpcError]]:
    found: list[GrpcError] = []
    with pytest.raises(GrpcError) as raised:
        yield found
    found.append(raised.value)
    assert raised.value.code is code


async def test_one_address_cannot_take_all_subscriptions(serving: Serving) -> None:
    """P2: others get theirs; and it gets its own back when its watches end. It is told to come back later."""
    many = subscriptions(*(f"made-up-{number}" for number in range(1000)))
    with trio.fail_after(20):
        async with serving.channel("10.0.0.1:1") as greedy, serving.channel("10.0.0.2:1") as modest:
            async with greedy.call(WATCH_INSTANCES) as first:
                await first.send(many, end=True)
                assert await first.receive() is not None
                with status(StatusCode.RESOURCE_EXHAUSTED) as refused:
                    async with greedy.call(WATCH_INSTANCES) as second:
                        await second.send(many, end=True)
                        await second.receive()
                assert "10.0.0.1's watches follow 1000 services of 1500" in refused[0].message
                assert ("grpc-retry-pushback-ms", str(round(FULL_PUSHBACK * 1000))) in refused[0].trailing
                assert serving.limits.refused[Limited.CLIENT_SUBSCRIPTIONS] == 1
                async with modest.call(WATCH_INSTANCES) as other:
                    await other.send(many, end=True)
                    assert await other.receive() is not None
            await until(lambda: "10.0.0.1" not in serving.limits._client_subscriptions)
            async with greedy.call(WATCH_INSTANCES) as again:
                await again.send(many, end=True)
                assert await again.receive() is not None
    await until(lambda: serving.limits._client_subscriptions == {})


async def test_what_follows_the_one_request_of_a_call_is_not_kept(serving: Serving) -> None:
    """P2: a client that goes on sending behind a unary request is refused at its first byte."""
    with trio.fail_after(20):
        async with serving.channel() as channel:
            with status(StatusCode.INTERNAL) as refused:
                async with channel.call(LIST_ZONES) as call:
                    await call.send(pb.ListZonesRequest())
                    # The head of a message of a megabyte.
                    await call._stream.send_data(PREFIX.pack(0, 1 << 20) + b"x" * 1000)
                    await call.receive()
            assert "more than one request" in refused[0].message
            assert serving.limits.unfinished == 0


async def test_requests_that_are_not_whole_are_bounded(serving: Serving) -> None:
    """P2: for each address, over all its connections; what was held goes with its call."""
    limits = serving.limits
    with trio.fail_after(20):
        async with serving.channel() as channel:
            for _ in range(2):
                async with channel.call(LIST_ZONES) as call:
                    await call._stream.send_data(PREFIX.pack(0, 1 << 19) + b"x" * 300_000)
                    await until(lambda: limits.unfinished >= 300_000)
                await until(lambda: not limits.unfinished)
    limits.change("10.0.0.9:1", CLIENT_UNFINISHED)
    for peer in ("10.0.0.9:2", "10.0.0.9:3"):
        with status(StatusCode.RESOURCE_EXHAUSTED):
            limits.change(peer, 1)
    for number in range(MOST_UNFINISHED // CLIENT_UNFINISHED - 1):
        limits.change(f"10.0.1.{number}:1", CLIENT_UNFINISHED)
    with status(StatusCode.RESOURCE_EXHAUSTED):
        limits.change("10.0.2.1:1", 1)
    limits.change("10.0.0.9:1", -CLIENT_UNFINISHED)
    limits.change("10.0.2.1:1", 1)
    assert limits.refused[Limited.UNFINISHED] == 3


async def test_a_client_that_resets_its_calls_as_fast_as_it_makes_them_is_cut_off(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """P2 (CVE-2023-44487); a client that gives up now and then is not."""
    with trio.fail_after(20):
        async with serving.channel() as other, serving.channel() as channel:
            made = 0
            with status(StatusCode.UNAVAILABLE):
                while made < 10 * RESETS_BURST:
                    async with channel.call(WATCH_INSTANCES) as call:
                        await call.send(subscriptions("b"))
                    made += 1
            assert RESETS_BURST <= made < 3 * RESETS_BURST
            assert await other.unary(LIST_ZONES, pb.ListZonesRequest()) is not None
    assert serving.server.rapid_resets == 1
    assert "resets too many calls" in caplog.text


async def test_connections_of_one_address_are_bounded() -> None:
    crowding = Crowding("grpc", 10, 4)
    with ExitStack() as stack:
        assert [stack.enter_context(crowding.place(f"10.0.0.1:{port}")) for port in range(6)] == [True] * 4 + [
            False
        ] * 2
        assert stack.enter_context(crowding.place("10.0.0.2:1"))
        assert stack.enter_context(crowding.place("[2001:db8::1]:1"))
        assert [stack.enter_context(crowding.place(f"10.0.1.{n}:1")) for n in range(5)] == [True] * 4 + [False]
        assert (crowding.open, crowding.refused, crowding.client_refused) == (10, 1, 2)
    assert crowding.open == 0
    assert crowding._of_client == {}


async def test_watchers_that_do_not_read_share_one_snapshot(serving: Serving) -> None:
    """P2: what waits for them is one encoded snapshot, however many there are."""
    watchers = 60

    async def watch_and_never_read() -> None:
        near, far = trio.testing.memory_stream_pair()
        nursery.start_soon(serving.server.serve_stream, far, "10.0.0.1:1")
        async with channel_over(near) as channel, channel.call(WATCH_INSTANCES) as call:
            await call.send(subscriptions("b"), end=True)
            await trio.sleep_forever()

    size = len(serving.service._encoded.encode(Update(None, serving.hub.snapshots()[0])))
    async with trio.open_nursery() as nursery:
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(watchers):
                nursery.start_soon(watch_and_never_read)
            await trio.sleep(0.2)
            await trio.testing.wait_all_tasks_blocked()
            assert serving.hub.watcher_count == watchers
            used = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert size > 200_000
        # A window's worth is with each client, and as much on its way; what is left is the same for all.
        assert used < watchers * size * 0.9
        nursery.cancel_scope.cancel()


async def test_a_drain_spreads_its_goodbyes(
    serving: Serving, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1: thousands that turn to another server in one moment would wait for each other there. No more are taken."""
    monkeypatch.setattr(watches_module, "GOODBYES", 10)
    left: list[float] = []
    began = 0.0

    async def watch(channel: Channel) -> None:
        with status(StatusCode.UNAVAILABLE):
            async with channel.call(WATCH_INSTANCES) as call:
                await call.send(subscriptions("b"), end=True)
                while await call.receive() is not None:
                    pass
        left.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery, serving.channel() as channel, serving.channel() as other:
        for _ in range(50):
            nursery.start_soon(watch, channel)
        await trio.testing.wait_all_tasks_blocked()
        assert serving.hub.watcher_count == 50
        began = trio.current_time()
        nursery.start_soon(serving.service.watches.drain, 100.0)
        await trio.testing.wait_all_tasks_blocked()
        await watch(other)  # one that comes now ends at once
        await trio.sleep(100)
        assert serving.hub.watcher_count == 0
        nursery.cancel_scope.cancel()
    assert len(left) == 51
    assert max(left) == pytest.approx(4.9, abs=0.2)
    assert sorted(left)[25] == pytest.approx(2.4, abs=0.3)


async def test_a_drain_is_through_in_its_time(
    serving: Serving, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1: however many there are."""
    monkeypatch.setattr(watches_module, "GOODBYES", 1)
    async with trio.open_nursery() as nursery, serving.channel() as channel:

        async def watch() -> None:
            with status(StatusCode.UNAVAILABLE):
                async with channel.call(WATCH_INSTANCES) as call:
                    await call.send(subscriptions("b"), end=True)
                    while await call.receive() is not None:
                        pass

        for _ in range(50):
            nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await serving.service.watches.drain(10.0)
        assert trio.current_time() - began == pytest.approx(8.0, abs=0.3)
