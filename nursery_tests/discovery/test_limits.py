"""What a discovery server takes on, and how it refuses the rest, over gRPC and over WebSocket."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio_websocket
from h2.errors import ErrorCodes
from h2.events import DataReceived, PingAckReceived, ResponseReceived, StreamReset, TrailersReceived
from trio.testing import MockClock, memory_stream_pair

from meshlocal.app.discovery_metrics import DiscoveryCollector
from meshlocal.app.readiness import Readiness
from meshlocal.client.watch import DiscoveryWatch
from meshlocal.client.websocket_link import Answers
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.limits import MAX_CLIENTS, Limited, ServerLimits
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Publisher
from meshlocal.discovery.websocket import WebSocketOptions, WebSocketServer
from meshlocal.net.crowding import client_of
from meshlocal.net.grpc.client import channel_over
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.net.websocket_client import WebSocket, websocket_over
from meshlocal.net.websocket_client import WebSocketOptions as ClientOptions
from meshlocal.policy import model
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.wire.discovery_methods import LIST_ZONES, WATCH_INSTANCES
from meshlocal.wire.discovery_websocket import PROTO
from meshlocal.wire.grpc.framing import encode_message
from meshlocal.wire.grpc.metadata import header
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.h2_peer import H2Peer

wrap_client_stream: Any = trio_websocket.wrap_client_stream
"""Its hints name sockets only; it takes any stream."""

B = ServiceKey("b")
HEADERS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", WATCH_INSTANCES.path.encode()),
    (b":authority", b"test"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]


class Registry:
    """A source that its test publishes through."""

    name = "registry"

    def __init__(self) -> None:
        self.publisher: Publisher | None = None

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        self.update("1")
        task_status.started()
        await trio.sleep_forever()

    def update(self, label: str, instances: int = 1) -> None:
        assert self.publisher is not None
        made = (
            make_instance(f"10.0.{number >> 8}.{number & 255}", 1, labels={"l": label}) for number in range(instances)
        )
        self.publisher.update(B, model.index(made))


class Served:
    """A discovery server with limits. `calling(peer)` is a client at that address; over it, `watch` and `call`."""

    def __init__(self, limits: ServerLimitsConfig, heartbeat: float, nursery: trio.Nursery) -> None:
        self.registry = Registry()
        self.hub = Hub([self.registry], random.Random(0))
        self.limits = ServerLimits(limits)
        self.service = DiscoveryService(self.hub, heartbeat, self.limits)
        handlers = self.limits.guard(self.service.handlers())
        times = {"keepalive_interval": 1e6, "keepalive_timeout": 1e6, "stall_timeout": limits.stall_timeout}
        shared: dict[str, Any] = {
            "max_message_size": limits.message_size,
            "receive_rate": limits.bytes_per_second,
            "receive_burst": limits.message_size + 65_536,
            **times,
        }
        self.grpc = GrpcServer(
            handlers, GrpcOptions(send_timeout=limits.stall_timeout, **shared), max_connections=limits.connections
        )
        self.websocket = WebSocketServer(handlers, WebSocketOptions(**shared), max_connections=limits.connections)
        self._nursery = nursery

    def counted(self) -> dict[str, float]:
        """What the metric says was limited, without the zeros."""
        collector = DiscoveryCollector(
            self.hub, self.service, self.limits, [self.grpc], Readiness("test"), self.websocket
        )
        (metric,) = (each for each in collector.collect() if each.name == "meshlocal_discovery_limited")
        counts = {sample.labels["limit"]: sample.value for sample in metric.samples}
        assert counts.keys() == set(Limited)
        return {limit: count for limit, count in counts.items() if count}

    def stream(self, server: GrpcServer | WebSocketServer, peer: str = "10.0.0.9:1") -> trio.abc.Stream:
        near, far = memory_stream_pair()
        self._nursery.start_soon(server.serve_stream, far, peer)
        return near

    @asynccontextmanager
    async def grpc_call(self, peer: str, method: Any = WATCH_INSTANCES) -> AsyncIterator[Any]:
        options = GrpcOptions(max_message_size=1 << 26)
        async with channel_over(self.stream(self.grpc, peer), options=options) as channel, channel.call(method) as call:
            yield call

    @asynccontextmanager
    async def websocket_call(self, peer: str, method: Any = WATCH_INSTANCES) -> AsyncIterator[Any]:
        options = ClientOptions(max_message_size=1 << 26, keepalive_interval=1e9, keepalive_timeout=1e9)
        async with websocket_over(
            self.stream(self.websocket, peer), "test", method.path, [PROTO], options=options
        ) as websocket:
            yield _WebSocketCall(websocket, method)


class _WebSocketCall:
    def __init__(self, websocket: WebSocket, method: Any) -> None:
        self._websocket = websocket
        self.receive = Answers(websocket, method).receive

    async def send(self, request: Any, *, end: bool = False) -> None:
        await self._websocket.send(request.SerializeToString())


@asynccontextmanager
async def serving(heartbeat: float = 1000.0, **limits: Any) -> AsyncIterator[Served]:
    async with trio.open_nursery() as nursery:
        served = Served(ServerLimitsConfig(**limits), heartbeat, nursery)
        await nursery.start(served.hub.run)
        await served.hub.wait_in_sync()
        yield served
        nursery.cancel_scope.cancel()
    assert served.limits.subscriptions == 0
    assert not served.limits._client_watchers


@pytest.fixture(params=["grpc", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def calling(
    served: Served, transport: str, peer: str, method: Any = WATCH_INSTANCES
) -> AbstractAsyncContextManager[Any]:
    return (served.grpc_call if transport == "grpc" else served.websocket_call)(peer, method)


def subscribe(*services: str) -> pb.WatchInstancesRequest:
    return pb.WatchInstancesRequest(subscriptions=[pb.Subscription(service=service) for service in services])


@asynccontextmanager
async def watching(served: Served, transport: str, peer: str, *services: str) -> AsyncIterator[Any]:
    """A watch that was taken on: its first event came."""
    async with calling(served, transport, peer) as call:
        await call.send(subscribe(*(services or ("b",))), end=True)
        assert await call.receive() is not None
        yield call


async def refused(served: Served, transport: str, peer: str, *services: str) -> str:
    async with calling(served, transport, peer) as call:
        await call.send(subscribe(*(services or ("b",))), end=True)
        with pytest.raises(GrpcError) as caught:
            await call.receive()
    assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
    return caught.value.message


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what it looks at tells nobody
            await trio.sleep(0.01)


async def test_watchers_in_all(autojump_clock: MockClock, transport: str) -> None:
    """Beyond the limit a watch is refused; a place that becomes free is given away again."""
    async with serving(watchers=2) as served, watching(served, transport, "10.0.0.1:1"):
        async with watching(served, transport, "10.0.0.2:1") as second:
            assert "2 watches" in await refused(served, transport, "10.0.0.3:1")
            served.registry.update("2")
            # The first event was the snapshot; then a heartbeat, then the change.
            while (await second.receive()).WhichOneof("event") != "change":
                pass
        await until(lambda: served.hub.watcher_count == 1)
        async with watching(served, transport, "10.0.0.3:1"):
            pass
        assert served.counted() == {"watchers": 1}


async def test_watchers_of_one_client(autojump_clock: MockClock, transport: str) -> None:
    """One address cannot take the places of all others, whatever ports and connections it has."""
    async with serving(client_watchers=1) as served, watching(served, transport, "10.0.0.1:1"):
        assert "10.0.0.1 has 1 watches" in await refused(served, transport, "10.0.0.1:2")
        async with watching(served, transport, "10.0.0.2:1"), watching(served, transport, "[2001:db8::1]:1"):
            assert "2001:db8::/64" in await refused(served, transport, "[2001:db8::2]:1")
        assert served.counted() == {"client_watchers": 2}


async def test_subscriptions(autojump_clock: MockClock, transport: str) -> None:
    """Of one watch, and of all together."""
    async with serving(subscriptions=2, all_subscriptions=3) as served:
        async with watching(served, transport, "10.0.0.1:1", "b", "c"):
            assert served.limits.subscriptions == 2
            assert "3 of them; a watch takes 1 to 2" in await refused(served, transport, "10.0.0.2:1", "b", "c", "d")
            assert "follow 2 services of 3" in await refused(served, transport, "10.0.0.2:1", "b", "c")
            async with watching(served, transport, "10.0.0.2:1", "b"):
                assert served.limits.subscriptions == 3
        await until(lambda: not served.limits.subscriptions)
        async with watching(served, transport, "10.0.0.2:1", "b", "c"):
            pass
        assert served.counted() == {"subscriptions": 1, "all_subscriptions": 1}


async def test_message_size(autojump_clock: MockClock, transport: str) -> None:
    async with serving(message_size=1024) as served, watching(served, transport, "10.0.0.1:1"):
        await refused(served, transport, "10.0.0.1:2", *(f"service-{number}" for number in range(200)))
        assert served.counted() == {"message_size": 1}


async def test_a_message_that_unpacks_to_too_much(autojump_clock: MockClock) -> None:
    """A compressed request is as large as what it unpacks to."""
    bomb = encode_message(bytes(1 << 20), compress=True)
    assert len(bomb) < 2048
    async with serving(message_size=2048) as served:
        peer = RawClient(served.stream(served.grpc))
        peer.protocol.send_headers(1, [*HEADERS, (b"grpc-encoding", b"gzip")])
        peer.protocol.send_data(1, bomb, end_stream=True)
        await peer.exchange(lambda: peer.status is not None)
        assert peer.status == StatusCode.RESOURCE_EXHAUSTED
        assert served.counted() == {"message_size": 1}


async def test_calls_a_second(autojump_clock: MockClock, transport: str) -> None:
    """Each client has a rate of its own, and a call that is refused costs it nothing later."""
    async with serving(client_calls_per_second=2, client_calls_burst=3) as served:
        refusals: list[str] = []

        async def call(peer: str) -> bool:
            async with calling(served, transport, peer, LIST_ZONES) as one:
                await one.send(pb.ListZonesRequest(), end=True)
                try:
                    return bool(await one.receive() == pb.ListZonesResponse())
                except GrpcError as error:
                    refusals.append(str(error))
                    return False

        assert [await call(f"10.0.0.1:{port}") for port in range(5)] == [True, True, True, False, False]
        assert await call("10.0.0.2:1")
        await trio.sleep(1)
        assert [await call("10.0.0.1:9") for _ in range(3)] == [True, True, False]
        assert served.counted() == {"client_calls_per_second": 3}
        assert refusals == ["RESOURCE_EXHAUSTED: 10.0.0.1 begins more than 2 calls a second"] * 3


async def test_clients_that_are_remembered_are_bounded(autojump_clock: MockClock) -> None:
    limits = ServerLimits(ServerLimitsConfig(client_calls_per_second=1, client_calls_burst=1))
    for number in range(2 * MAX_CLIENTS):
        limits._admit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:1")
    assert len(limits._buckets) == MAX_CLIENTS


async def test_no_rate(autojump_clock: MockClock, transport: str) -> None:
    async with serving(client_calls_per_second=None, client_calls_burst=1, bytes_per_second=None) as served:
        for _ in range(20):
            async with watching(served, transport, "10.0.0.1:1"):
                pass
        assert served.counted() == {}


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("10.0.0.1:123", "10.0.0.1"),
        ("[2001:db8::1]:123", "2001:db8::/64"),
        ("[2001:db8::ffff:1]:5", "2001:db8::/64"),
        ("[fe80::1%eth0]:5", "fe80::/64"),
        ("[no address]:5", "[no address]"),
        ("unknown", "unknown"),
        ("", ""),
    ],
)
def test_whom_an_address_counts_as(peer: str, client: str) -> None:
    assert client_of(peer) == client


class RawClient:
    """A client that reads, and opens its windows, only as far as it is told."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._sending = trio.Lock()
        self.protocol = H2Peer(client=True, max_streams=10, max_header_list_size=16_384)
        self.events: list[Any] = []
        self.data = 0
        self.status: int | None = None

    async def open(self, size: int) -> None:
        """Open the stream's window by so much."""
        self.protocol._h2.increment_flow_control_window(size, 1)
        self.protocol._flush()
        await self.flush()

    async def flush(self) -> None:
        async with self._sending:
            out = bytes(self.protocol.outgoing)
            self.protocol.outgoing.clear()
            if out:
                await self.stream.send_all(out)

    async def receive(self) -> None:
        received = await self.stream.receive_some()
        assert received, "the server closed the connection"
        for event in self.protocol.receive(bytes(received)):
            self.events.append(event)
            if isinstance(event, DataReceived):
                self.data += len(event.data)
            if isinstance(event, ResponseReceived | TrailersReceived):
                status = header(event.headers, b"grpc-status")
                self.status = int(status) if status is not None else self.status

    async def exchange(self, condition: Callable[[], object]) -> None:
        """Read until something holds."""
        with trio.fail_after(10_000):
            await self.flush()
            while not condition():
                await self.receive()
                await self.flush()

    def seen(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


@pytest.mark.parametrize(
    "flood",
    [
        frame(6, 0, 0, b"12345678"),  # PING
        frame(4, 0, 0, struct.pack(">HI", 4, 65_535)),  # SETTINGS
        frame(8, 0, 0, struct.pack(">I", 1)),  # WINDOW_UPDATE
        frame(2, 0, 1, bytes(5)),  # PRIORITY
        frame(0x99, 0, 0, b"unknown"),
    ],
)
async def test_a_flood_of_frames_waits_in_the_peer(autojump_clock: MockClock, flood: bytes) -> None:
    """It is read at the rate that is allowed, and no faster; whoever else is connected is served meanwhile."""
    async with serving(message_size=1024, bytes_per_second=8192) as served:
        stream = served.stream(served.grpc)
        peer = RawClient(stream)
        await peer.flush()
        burst = 1024 + 65_536
        count = (burst + 10 * 8192) // len(flood)
        start = trio.current_time()
        await stream.send_all(flood * count)
        await stream.send_all(frame(6, 0, 0, b"the last"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                peer.exchange, lambda: any(each.ping_data == b"the last" for each in peer.seen(PingAckReceived))
            )
            async with watching(served, "grpc", "10.0.0.1:1"):
                assert trio.current_time() - start < 0.1
        # What was read last before the end is paid for afterwards.
        assert 9 - 32_768 / 8192 <= trio.current_time() - start <= 11
        assert set(served.counted()) == {"bytes_per_second"}
        await stream.aclose()


async def test_a_flood_of_websocket_pings_waits_in_the_peer(autojump_clock: MockClock) -> None:
    async with serving(message_size=1024, bytes_per_second=8192) as served, trio.open_nursery() as nursery:
        connection = await wrap_client_stream(
            nursery,
            served.stream(served.websocket),
            "test",
            WATCH_INSTANCES.path,
            subprotocols=[PROTO],
            message_queue_size=100,
        )
        await connection.send_message(subscribe("b").SerializeToString())
        start = trio.current_time()
        payload = bytes(100)
        # Beside the library, which would wait for each answer.
        ping = b"\x89" + bytes([0x80 | len(payload)]) + bytes(4) + payload
        await connection._stream.send_all(ping * ((1024 + 65_536 + 10 * 8192) // len(ping)))
        with trio.fail_after(100):
            await connection.ping(b"last")
        assert 9 <= trio.current_time() - start <= 11
        assert set(served.counted()) == {"bytes_per_second"}
        nursery.cancel_scope.cancel()


async def test_a_watch_whose_windows_stay_shut_is_cut(autojump_clock: MockClock) -> None:
    """D4: nothing was sent yet, so it gets a status; the connection goes on."""
    async with serving(stall_timeout=7) as served:
        peer = RawClient(served.stream(served.grpc))
        open_window(peer, 0)
        start_watch(peer)
        start = trio.current_time()
        await peer.exchange(lambda: peer.seen(StreamReset))
        assert trio.current_time() - start == pytest.approx(7, abs=0.1)
        assert [reset.error_code for reset in peer.seen(StreamReset)] == [ErrorCodes.ENHANCE_YOUR_CALM]
        assert served.counted() == {"stall_timeout": 1}
        assert served.hub.watcher_count == 0
        assert served.grpc.connections == 1
        await peer.stream.aclose()


async def test_a_watch_that_stops_within_a_message_is_cut(autojump_clock: MockClock) -> None:
    """No status can follow half a message: the stream is reset, with what gRPC takes for RESOURCE_EXHAUSTED."""
    async with serving(stall_timeout=7) as served:
        peer = RawClient(served.stream(served.grpc))
        open_window(peer, 10)
        start_watch(peer)
        await peer.exchange(lambda: peer.seen(StreamReset))
        (reset,) = peer.seen(StreamReset)
        assert reset.error_code == ErrorCodes.ENHANCE_YOUR_CALM
        assert peer.data == 10
        assert served.counted() == {"stall_timeout": 1}
        assert served.hub.watcher_count == 0
        await peer.stream.aclose()


@pytest.mark.parametrize(("every", "is_cut"), [(5, False), (9, True)])
async def test_a_large_snapshot_has_its_time_for_each_64_kib(
    autojump_clock: MockClock, every: float, is_cut: bool
) -> None:
    """A slow link is no reason to be cut; a client that takes less than that is as good as one that reads nothing."""
    async with serving(stall_timeout=7) as served:
        served.registry.update("x" * 900, instances=500)
        peer = RawClient(served.stream(served.grpc))
        open_window(peer, 0)
        start_watch(peer)
        async with trio.open_nursery() as nursery:

            async def open_windows() -> None:
                while True:
                    await peer.open(65_536)
                    await trio.sleep(every)

            nursery.start_soon(open_windows)
            await peer.exchange(lambda: peer.seen(StreamReset) or peer.data > 450_000)
            nursery.cancel_scope.cancel()
        assert bool(peer.seen(StreamReset)) is is_cut
        await peer.stream.aclose()


async def test_a_client_that_opens_its_window_byte_by_byte_is_cut(autojump_clock: MockClock) -> None:
    async with serving(stall_timeout=7) as served:
        peer = RawClient(served.stream(served.grpc))
        open_window(peer, 0)
        start_watch(peer)
        start = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def trickle() -> None:
                while True:
                    await peer.open(1)
                    await trio.sleep(1)

            nursery.start_soon(trickle)
            await peer.exchange(lambda: peer.seen(StreamReset))
            nursery.cancel_scope.cancel()
        assert trio.current_time() - start == pytest.approx(7, abs=0.1)
        await peer.stream.aclose()


async def test_a_list_that_nobody_reads_is_cut_too(autojump_clock: MockClock) -> None:
    async with serving(stall_timeout=7) as served:
        peer = RawClient(served.stream(served.grpc))
        open_window(peer, 0)
        peer.protocol.send_headers(1, [*HEADERS[:2], (b":path", LIST_ZONES.path.encode()), *HEADERS[3:]])
        peer.protocol.send_data(1, encode_message(b""), end_stream=True)
        await peer.exchange(lambda: peer.seen(StreamReset))
        assert [reset.error_code for reset in peer.seen(StreamReset)] == [ErrorCodes.ENHANCE_YOUR_CALM]
        assert served.counted() == {"stall_timeout": 1}
        await peer.stream.aclose()


def open_window(peer: RawClient, size: int) -> None:
    """Announce streams' first window; the connection's stays open."""
    peer.protocol.outgoing += frame(4, 0, 0, struct.pack(">HI", 4, size))


def start_watch(peer: RawClient) -> None:
    peer.protocol.send_headers(1, HEADERS)
    peer.protocol.send_data(1, encode_message(subscribe("b").SerializeToString()), end_stream=True)


@pytest.mark.parametrize(("every", "is_cut"), [(5, False), (9, True)])
async def test_a_websocket_client_that_reads_slowly(autojump_clock: MockClock, every: float, is_cut: bool) -> None:
    """The same over WebSocket, where the connection's own buffers are the window."""
    async with serving(stall_timeout=7) as served:
        served.registry.update("x" * 900, instances=500)
        near, far = trio.testing.lockstep_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.websocket.serve_stream, far, "10.0.0.1:1")
            connection = await wrap_client_stream(
                nursery, near, "test", WATCH_INSTANCES.path, subprotocols=[PROTO], receive_buffer_size=65_536
            )
            connection._stream = slow = Slow(near, every)
            await connection.send_message(subscribe("b").SerializeToString())
            slow.slow = True
            if is_cut:
                with pytest.raises(trio_websocket.ConnectionClosed):
                    await connection.get_message()
            else:
                assert len(await connection.get_message()) > 450_000
            nursery.cancel_scope.cancel()
        assert served.counted() == ({"stall_timeout": 1} if is_cut else {})
        assert served.websocket.connections == 0


class Slow(trio.abc.Stream):
    """Waits before each read."""

    def __init__(self, stream: trio.abc.Stream, every: float) -> None:
        self._stream = stream
        self._every = every
        self.slow = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self.slow:
            await trio.sleep(self._every)
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: Any) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def test_connections(autojump_clock: MockClock, transport: str, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the limit they are closed at once; the log says so once, however many come."""
    async with serving(connections=2) as served, AsyncExitStack() as stack:
        server = served.grpc if transport == "grpc" else served.websocket
        await stack.enter_async_context(watching(served, transport, "10.0.0.1:1"))
        await stack.enter_async_context(watching(served, transport, "10.0.0.1:1"))
        for _ in range(3):
            assert await served.stream(server).receive_some() == b""
        assert served.counted() == {"connections": 3}
        assert [record.message for record in caplog.records if "too many" in record.message] != []
        assert len([record for record in caplog.records if "too many" in record.message]) == 1


async def test_watchers_that_stop_reading_over_real_sockets(transport: str) -> None:
    """D4: with the kernel's buffers between, too, they are cut, and the others have the latest state."""
    async with serving(0.05, stall_timeout=0.5) as served, trio.open_nursery() as nursery:
        listeners = {name: open_tcp_listeners("127.0.0.1", 0) for name in ("grpc", "websocket")}
        ports = {name: found[0].getsockname()[1] for name, found in listeners.items()}
        await nursery.start(partial(served.grpc.serve, listeners["grpc"]))
        await nursery.start(partial(served.websocket.serve, listeners["websocket"]))
        sink = Sink()
        scheme = "grpc" if transport == "grpc" else "ws"
        watch = DiscoveryWatch(
            [DiscoveryUrl(scheme, "127.0.0.1", ports[transport])], [B], sink, random.Random(0), DiscoveryClientConfig()
        )
        nursery.start_soon(watch.run)
        dead = [await silent_watcher(transport, ports[transport], nursery) for _ in range(3)]
        await until(lambda: served.hub.watcher_count == 4)
        label = 0
        with trio.fail_after(60):
            while served.hub.watcher_count > 1:
                label += 1
                served.registry.update(f"{label}" + "x" * 900, instances=300)
                await trio.sleep(0.01)
        served.registry.update("the last", instances=2)
        await until(
            lambda: sink.latest is not None and {i.labels["l"] for i in sink.latest.instances.values()} == {"the last"}
        )
        assert watch.status.reconnects == 0
        assert served.counted().get("stall_timeout", 0) >= 3
        assert served.limits.subscriptions == 1
        for sock in dead:
            sock.close()
        nursery.cancel_scope.cancel()


class Sink:
    def __init__(self) -> None:
        self.latest: ServiceSnapshot | None = None

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        self.latest = snapshot


async def silent_watcher(transport: str, port: int, nursery: trio.Nursery) -> socket.socket:
    """A socket that asked for a watch, and reads nothing of it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    await stream.socket.connect(("127.0.0.1", port))
    if transport == "grpc":
        peer = RawClient(stream)
        open_window(peer, 2**31 - 1)
        peer.protocol.outgoing += frame(8, 0, 0, struct.pack(">I", 2**30))
        start_watch(peer)
        await peer.flush()
    else:
        target = f"GET {WATCH_INSTANCES.path} HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        key = f"Sec-WebSocket-Key: {'A' * 22}==\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: {PROTO}\r\n\r\n"
        await stream.send_all((target + key).encode())
        read = b""
        while b"\r\n\r\n" not in read:
            read += bytes(await stream.receive_some(1024))
        request = subscribe("b").SerializeToString()
        await stream.send_all(b"\x82" + bytes([0x80 | len(request)]) + bytes(4) + request)
    return sock
