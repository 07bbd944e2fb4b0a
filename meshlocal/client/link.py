"""A way to one discovery server, over gRPC or over WebSocket, with the same calls and the same errors."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anyio
import msgspec

from meshlocal.net.blocking import BlockedError, Blocking
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

    @property
    def received(self) -> int:
        """Bytes that came so far, of an event that is not whole yet too."""
        ...

    async def receive(self) -> pb.WatchInstancesResponse | None:
        """The next event; None at the end. Raises GrpcError."""
        ...


class Link(Protocol):
    """A way to a server."""

    async def probe(self) -> None:
        """See whether a server is there, without a question. Raises GrpcError, TimeoutError."""
        ...

    def watch(self, request: pb.WatchInstancesRequest) -> AbstractAsyncContextManager[Events]:
        """Begin a watch, which ends with the block. Raises GrpcError, TimeoutError."""
        ...

    async def unary(self, method: Method[Req, Resp], request: Req) -> Resp:
        """Ask once. Raises GrpcError, TimeoutError."""
        ...


class Credentials:
    """What servers are told of who calls, and how they must prove who they are: from files that may change.

    The files are looked at for each connection, and read when they changed. A file system that hangs costs the
    attempt, and nothing else (P1).

    Args:
        ca_file: see `LinkOptions`.
        token_file: see `LinkOptions`.
    """

    def __init__(self, ca_file: str | None, token_file: str | None) -> None:
        self._ca_file = ca_file
        self._token_file = token_file
        self._files = Blocking()
        self._context: ssl.SSLContext | None = None
        self._made_of: object = None

    async def context(self) -> ssl.SSLContext:
        """How servers are authenticated. Made anew when the file changed.

        Raises:
            GrpcError: the file cannot be used; the text says which and why.
        """
        try:
            return await self._files.run(self._make_context)
        except (OSError, ValueError) as error:
            raise GrpcError(StatusCode.UNAVAILABLE, f"{self._ca_file}: {_said(error)}") from None

    def _make_context(self) -> ssl.SSLContext:
        made_of: object = ()
        if self._ca_file is not None:
            found = os.stat(self._ca_file)
            made_of = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._context is None or made_of != self._made_of:
            self._context = ssl.create_default_context(cafile=self._ca_file)
            self._made_of = made_of
        return self._context

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent along with each call.

        Raises:
            GrpcError: the file holds no token, or cannot be read; the text says which and why.
        """
        if self._token_file is None:
            return ()
        try:
            token = (await self._files.run(_read, self._token_file)).decode("ascii").strip()
        except UnicodeDecodeError:
            token = ""
        except OSError as error:
            raise GrpcError(StatusCode.UNAUTHENTICATED, f"{self._token_file}: {_said(error)}") from None
        if not token.isprintable() or not token:
            raise GrpcError(StatusCode.UNAUTHENTICATED, f"{self._token_file}: holds no token")
        return (("authorization", f"Bearer {token}"),)


def import_links(urls: Iterable[DiscoveryUrl]) -> None:
    """Import what the URLs will need: an import reads files, which nothing may do once the event loop runs."""
    for url in urls:
        if url.scheme in ("ws", "wss"):
            import meshlocal.client.websocket_link
        elif url.scheme in ("grpc", "grpcs"):
            import meshlocal.net.grpc.client  # noqa: F401 - who reads a file needs no gRPC
        if url.scheme in ("grpcs", "wss"):
            import anyio.streams.tls  # noqa: F401 - few use TLS


@asynccontextmanager
async def open_link(
    url: DiscoveryUrl, options: LinkOptions, credentials: Credentials | None = None
) -> AsyncIterator[Link]:
    """A way to the server at the URL, for as long as the block lasts.

    Args:
        url: where the server is.
        options: how it is reached.
        credentials: those of `options`, kept from one link to the next by who opens several.

    Raises:
        GrpcError: there is none; its text says why.
        TimeoutError: none was found within `connect_timeout`.
    """
    credentials = credentials or Credentials(options.ca_file, options.token_file)
    context = await credentials.context() if url.scheme in ("grpcs", "wss") else None
    metadata = await credentials.metadata()
    if url.scheme in ("ws", "wss"):
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

    async def probe(self) -> None:
        """See `Link.probe`."""
        with anyio.fail_after(REQUEST_LIMIT):
            await self._channel.probe()

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


def _read(file: str) -> bytes:
    return Path(file).read_bytes()


def _said(error: Exception) -> str:
    if isinstance(error, BlockedError):
        return str(error)
    return (isinstance(error, OSError) and error.strerror) or str(error)
