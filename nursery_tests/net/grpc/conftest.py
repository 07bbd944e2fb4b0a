"""A server and a channel over memory streams, and a raw HTTP/2 peer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import pytest
import trio
from h2.events import Event
from trio.testing import memory_stream_pair

from meshlocal.net.grpc.client import Channel, channel_over
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.server import GrpcServer, Routes
from nursery_tests.h2_peer import GoAway, H2Peer, H2PeerError


class Link(NamedTuple):
    channel: Channel
    server: GrpcServer

    def assert_nothing_left(self) -> None:
        """No stream, no waiting task, no handler, on either side."""
        for connection in [self.channel._connection, *self.server._connections]:
            assert connection.streams == {}
            assert connection._senders == {}
        assert not self.channel._connection._waiting
        assert all(connection._handlers == 0 for connection in self.server._connections)


Connect = Callable[..., AbstractAsyncContextManager[Link]]


@pytest.fixture
def connect() -> Connect:
    @asynccontextmanager
    async def connect(
        handlers: Routes,
        client_options: GrpcOptions | None = None,
        server_options: GrpcOptions | None = None,
    ) -> AsyncIterator[Link]:
        server = GrpcServer(handlers, server_options)
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, theirs, "test")
            async with channel_over(ours, options=client_options) as channel:
                yield Link(channel, server)

    return connect


class RawPeer:
    """The other end of a connection, frame by frame."""

    def __init__(self, stream: trio.abc.Stream, *, client: bool) -> None:
        self.stream = stream
        self.protocol = H2Peer(client=client, max_streams=100, max_header_list_size=16_384)
        self.events: list[Event | GoAway] = []
        self.closed = False

    async def send(self, data: bytes = b"") -> None:
        """Send what the protocol has, and then `data` as it is."""
        out = bytes(self.protocol.outgoing) + data
        self.protocol.outgoing.clear()
        if out:
            await self.stream.send_all(out)

    async def settle(self) -> None:
        """Exchange bytes until nobody has more to say. Takes virtual time: under an autojump clock only."""
        while not self.closed:
            await self.send()
            data = None
            with trio.move_on_after(0.001) as scope:
                data = await self.stream.receive_some()
            if scope.cancelled_caught:
                return
            self.closed = data == b""
            if data:
                try:
                    self.events.extend(self.protocol.receive(bytes(data)))
                except H2PeerError:
                    self.closed = True

    def seen(self, kind: type) -> list[Event | GoAway]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def raw_peer() -> type[RawPeer]:
    return RawPeer
