"""A way to one discovery server, over gRPC or over WebSocket, with the same calls and the same errors."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import anyio
import msgspec

from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.grpc.method import Method, Req, Resp
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

if TYPE_CHECKING:
    from meshlocal.net.grpc.client import Channel

REQUEST_LIMIT = 10.0
"""Seconds that a server may take to accept a request."""


class LinkOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a server is reached.

    Attributes:
        connect_timeout: seconds to connect.
        keepalive_interval: seconds of silence after which the connection is probed.
        keepalive_timeout: seconds that the answer may take.
        max_message_size: bytes of an answer at most.
        ca_file: the authorities that a TLS server's certificate must come from; None: those of the system.
        token_file: holds the token that is sent along; it is read for each connection. None: no token.
    """

    connect_timeout: float = 3.0
    keepalive_interval: float = 10.0
    keepalive_timeout: float = 5.0
    max_message_size: int = 64 * 2**20
    ca_file: str | None = None
    token_file: str | None = None


class Events(Protocol):
    """A watch under way."""

    async def receive(self) -> pb.WatchInstancesResponse | None:
        """The next event; None at the end. Raises GrpcError."""
        ...


class Link(Protocol):
    """A way to a server."""

    def watch(self, request: pb.WatchInstancesRequest) -> AbstractAsyncContextManager[Events]:
        """Begin a watch, which ends with the block. Raises GrpcError, TimeoutError."""
        ...

    async def unary(self, method: Method[Req, Resp], request: Req) -> Resp:
        """Ask once. Raises GrpcError, TimeoutError."""
        ...


@asynccontextmanager
async def open_link(url: DiscoveryUrl, options: LinkOptions) -> AsyncIterator[Link]:
    """A way to the server at the URL, for as long as the block lasts.

    Raises:
        GrpcError: there is none; its text says why.
        TimeoutError: none was found within `connect_timeout`.
    """
    context = _tls(url, options)
    metadata = await _credentials(options)
    if url.scheme in ("ws", "wss"):
        # Imported here: few have a use for it.
        from meshlocal.client.websocket_link import WebSocketLink

        yield WebSocketLink(url, options, context, metadata)
        return
    from meshlocal.net.grpc.client import open_channel
    from meshlocal.net.grpc.options import GrpcOptions

    grpc_options = GrpcOptions(
        keepalive_interval=options.keepalive_interval,
        keepalive_timeout=options.keepalive_timeout,
        max_message_size=options.max_message_size,
    )
    with anyio.CancelScope() as connecting:
        connecting.deadline = anyio.current_time() + options.connect_timeout
        async with open_channel(url.host, url.port, options=grpc_options, ssl_context=context) as channel:
            connecting.deadline = float("inf")
            yield GrpcLink(channel, metadata)
    if connecting.cancelled_caught:
        raise TimeoutError


class GrpcLink:
    """A `Link` over one channel."""

    def __init__(self, channel: Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    @asynccontextmanager
    async def watch(self, request: pb.WatchInstancesRequest) -> AsyncIterator[Events]:
        """See `Link.watch`."""
        async with self._channel.call(WATCH_INSTANCES, self._metadata) as call:
            with anyio.fail_after(REQUEST_LIMIT):
                await call.send(request)
                await call.end()
            yield call

    async def unary(self, method: Method[Req, Resp], request: Req) -> Resp:
        """See `Link.unary`."""
        return await self._channel.unary(method, request, self._metadata)


def _tls(url: DiscoveryUrl, options: LinkOptions) -> ssl.SSLContext | None:
    if url.scheme not in ("grpcs", "wss"):
        return None
    try:
        return ssl.create_default_context(cafile=options.ca_file)
    except OSError as error:
        raise GrpcError(StatusCode.UNAVAILABLE, f"{options.ca_file}: {error.strerror or error}") from None


async def _credentials(options: LinkOptions) -> tuple[tuple[str, str], ...]:
    if options.token_file is None:
        return ()
    try:
        token = (await anyio.Path(options.token_file).read_text()).strip()
    except OSError as error:
        raise GrpcError(StatusCode.UNAUTHENTICATED, f"{options.token_file}: {error.strerror or error}") from None
    if not token.isascii() or not token.isprintable() or not token:
        raise GrpcError(StatusCode.UNAUTHENTICATED, f"{options.token_file}: holds no token")
    return (("authorization", f"Bearer {token}"),)
