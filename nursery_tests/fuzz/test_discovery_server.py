"""Frames that make no sense, into a discovery server: nobody else notices, nothing of them stays, nothing is logged as
a fault of the server's own.

Bytes are built from whole frames, some of them damaged, so that they get past the first check; and fed in pieces.
"""

from __future__ import annotations

import itertools
import logging
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, memory_stream_pair

from meshlocal.discovery.hub import Hub
from meshlocal.discovery.limits import ServerLimits
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Publisher
from meshlocal.discovery.websocket import WebSocketOptions, WebSocketServer
from meshlocal.net.grpc.client import channel_over
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.policy import model
from meshlocal.policy.model import ServiceKey, make_instance
from meshlocal.wire.discovery_methods import LIST_INSTANCES, LIST_SERVICES, WATCH_INSTANCES
from meshlocal.wire.discovery_websocket import JSON, PROTO
from meshlocal.wire.grpc.framing import encode_message
from meshlocal.wire.http2 import PREFACE
from meshlocal.wire.pb import discovery_pb2 as pb

SUBSCRIBE = pb.WatchInstancesRequest(subscriptions=[pb.Subscription(service="b"), pb.Subscription(service="c")])
MOST_OUTGOING = 1 << 20


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def head(path: str, *more: tuple[str, str]) -> bytes:
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    ]
    return Encoder().encode(fields, huffman=False)


STREAMS = st.sampled_from([0, 1, 1, 1, 3, 5, 2, 2**31 - 1])
MESSAGES = st.one_of(
    st.just(encode_message(SUBSCRIBE.SerializeToString())),
    st.just(encode_message(SUBSCRIBE.SerializeToString(), compress=True)),
    st.just(encode_message(pb.ListInstancesRequest(service="b").SerializeToString())),
    st.binary(max_size=60),
    st.binary(max_size=60).map(encode_message),
    st.just(b"\x00\xff\xff\xff\xff"),
)
HEADS = st.one_of(
    st.sampled_from([WATCH_INSTANCES.path, LIST_SERVICES.path, LIST_INSTANCES.path, "/no/Method", "", "*"]).map(head),
    st.sampled_from(["1S", "0n", "99999999H", "x", "-1S", ""]).map(
        lambda text: head(WATCH_INSTANCES.path, ("grpc-timeout", text))
    ),
    st.sampled_from(["gzip", "br", ""]).map(lambda text: head(LIST_INSTANCES.path, ("grpc-encoding", text))),
    st.just(head(LIST_SERVICES.path, ("x-bin", "!!"), ("x" * 50, "y" * 3000))),
    st.binary(max_size=60),
)
FRAMES = st.one_of(
    st.builds(frame, st.just(1), st.sampled_from([4, 5, 4, 0, 0x2C]), STREAMS, HEADS),
    st.builds(frame, st.just(0), st.sampled_from([0, 1, 1, 8]), STREAMS, MESSAGES),
    st.builds(frame, st.just(4), st.sampled_from([0, 1]), st.just(0), st.binary(max_size=12)),
    st.builds(
        frame,
        st.just(4),
        st.just(0),
        st.just(0),
        st.sampled_from([0, 1, 65_535, 2**31 - 1]).map(lambda size: struct.pack(">HI", 4, size)),
    ),
    st.builds(
        frame,
        st.just(8),
        st.just(0),
        STREAMS,
        st.sampled_from([0, 1, 65_535, 2**31 - 1]).map(lambda size: struct.pack(">I", size)),
    ),
    st.builds(frame, st.just(3), st.just(0), STREAMS, st.binary(min_size=4, max_size=4)),
    st.builds(frame, st.sampled_from([6, 7, 2, 5, 9, 10, 200]), st.integers(0, 255), STREAMS, st.binary(max_size=20)),
    st.binary(max_size=30),
)


@st.composite
def damaged(draw: st.DrawFn, parts: st.SearchStrategy[list[bytes]]) -> list[bytes]:
    """The parts as one, some of its bytes changed, in pieces of any size."""
    data = bytearray(b"".join(draw(parts)))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3])) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cuts = sorted({0, len(data), *(draw(st.lists(st.integers(0, len(data)), max_size=4)))})
    return [bytes(data[start:end]) for start, end in itertools.pairwise(cuts)] or [b""]


PREFACES = st.sampled_from([PREFACE + frame(4, 0, 0, b"")] * 8 + [PREFACE, b"", b"GET / HTTP/1.1\r\n\r\n"])
CONNECTIONS = damaged(st.builds(lambda first, rest: [first, *rest], PREFACES, st.lists(FRAMES, max_size=12)))


class Registry:
    name = "registry"

    def __init__(self) -> None:
        self.publisher: Publisher | None = None

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        self.update("1")
        task_status.started()
        await trio.sleep_forever()

    def update(self, label: str) -> None:
        assert self.publisher is not None
        instances = [make_instance(f"10.0.0.{number}", 1, labels={"l": label}) for number in range(3)]
        self.publisher.update(ServiceKey("b"), model.index(instances))


class Faults(logging.Handler):
    """Errors that are logged: an exception that nobody expected is one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@contextmanager
def no_faults() -> Iterator[None]:
    faults = Faults()
    logging.getLogger().addHandler(faults)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(faults)
    assert faults.found == []


async def attack(
    pieces: list[bytes], serve: Callable[[DiscoveryService, ServerLimits], GrpcServer | WebSocketServer], first: bytes
) -> None:
    """Feed one connection, while a watcher on another one is to notice nothing."""
    registry = Registry()
    hub, limits = Hub([registry], random.Random(0)), ServerLimits()
    service = DiscoveryService(hub, 1000, limits)
    neighbours = GrpcServer(limits.guard(service.handlers()))
    server = serve(service, limits)
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        near, far = memory_stream_pair()
        nursery.start_soon(neighbours.serve_stream, far)
        async with channel_over(near) as channel, channel.call(WATCH_INSTANCES) as call:

            async def event() -> pb.WatchInstancesResponse:
                received = await call.receive()
                assert received is not None
                return received

            await call.send(pb.WatchInstancesRequest(subscriptions=[pb.Subscription(service="b")]), end=True)
            assert (await event()).snapshot.service == "b"
            assert (await event()).HasField("heartbeat")
            attacker, attacked = memory_stream_pair()
            nursery.start_soon(server.serve_stream, attacked)
            read = await _feed(attacker, [first, *pieces])
            assert read <= MOST_OUTGOING
            registry.update("2")
            with trio.fail_after(1):
                change = (await event()).change
            assert {each.labels.labels["l"] for each in change.upserted} == {"2"}
            await attacker.aclose()
            with trio.fail_after(1000):
                while server.connections:  # noqa: ASYNC110 - the server tells nobody
                    await trio.sleep(1)
            assert hub.watcher_count == 1
            assert limits.subscriptions == 1
        nursery.cancel_scope.cancel()
    assert limits.subscriptions == 0


async def _feed(stream: trio.abc.Stream, pieces: list[bytes]) -> int:
    read = 0
    for piece in pieces:
        try:
            await stream.send_all(piece)
            with trio.move_on_after(0.01):
                while received := await stream.receive_some():
                    read += len(received)
        except trio.BrokenResourceError:
            break
    return read


def run(main: Callable[..., Any], *args: Any) -> None:
    with no_faults():
        trio.run(main, *args, clock=MockClock(autojump_threshold=0))


@given(CONNECTIONS)
def test_grpc(pieces: list[bytes]) -> None:
    """D4."""

    def serve(service: DiscoveryService, limits: ServerLimits) -> GrpcServer:
        options = GrpcOptions(keepalive_interval=20, keepalive_timeout=5, stall_timeout=5, send_timeout=5)
        return GrpcServer(limits.guard(service.handlers()), options)

    run(attack, pieces, serve, b"")


def websocket_frame(opcode: int, masked: bool, payload: bytes, length: int | None) -> bytes:
    size = len(payload) if length is None else length
    if size < 126:
        header = bytes([opcode, (0x80 if masked else 0) | size])
    elif size < 65_536:
        header = bytes([opcode, (0x80 if masked else 0) | 126]) + struct.pack(">H", size)
    else:
        header = bytes([opcode, (0x80 if masked else 0) | 127]) + struct.pack(">Q", size)
    return header + (bytes(4) if masked else b"") + payload


WEBSOCKET_FRAMES = st.builds(
    websocket_frame,
    st.one_of(st.sampled_from([0x82, 0x81, 0x02, 0x80, 0x89, 0x8A, 0x88]), st.integers(0, 255)),
    st.sampled_from([True] * 5 + [False]),
    st.one_of(
        st.just(SUBSCRIBE.SerializeToString()),
        st.just(b'{"subscriptions": [{"service": "b"}]}'),
        st.just(b"[" * 200),
        st.sampled_from([b"\x03\xe8", b"\x03\xe8bye", b"\x00\x00", b"\x03\xed\xff"]),
        st.binary(max_size=60),
    ),
    st.sampled_from([None] * 8 + [0, 125, 126, 1 << 16, 1 << 40, (1 << 63) + 1]),
)


@given(
    st.sampled_from([PROTO, PROTO, JSON, "other"]),
    damaged(st.lists(WEBSOCKET_FRAMES, max_size=8)),
    st.one_of(st.none(), st.binary(max_size=20)),
)
def test_websocket(protocol: str, pieces: list[bytes], spoilt: bytes | None) -> None:
    """D4."""
    lines = [
        f"GET {WATCH_INSTANCES.path} HTTP/1.1",
        "Host: test",
        "Connection: upgrade",
        "Upgrade: websocket",
        f"Sec-WebSocket-Key: {'A' * 22}==",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Protocol: {protocol}",
    ]
    first = "\r\n".join(lines).encode() + (b"\r\n" + spoilt if spoilt is not None else b"") + b"\r\n\r\n"

    def serve(service: DiscoveryService, limits: ServerLimits) -> WebSocketServer:
        options = WebSocketOptions(
            handshake_timeout=5, keepalive_interval=20, keepalive_timeout=5, stall_timeout=5, max_message_size=10_000
        )
        return WebSocketServer(limits.guard(service.handlers()), options)

    run(attack, pieces, serve, first)
