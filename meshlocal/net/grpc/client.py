"""The client: one channel is one connection. A channel that ended stays ended: reconnecting is its user's decision."""

from __future__ import annotations

import math
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from meshlocal.net.connect_errors import CONNECT_ERRORS, why_not_connected
from meshlocal.net.grpc.clientcall import ClientCall
from meshlocal.net.grpc.connection import Connection
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.stream import Stream
from meshlocal.net.grpc.transport import ByteStream, adapt
from meshlocal.net.tls import TlsContext, certificate_of
from meshlocal.wire.grpc.framing import ACCEPT_ENCODING
from meshlocal.wire.grpc.metadata import encode_metadata, format_timeout
from meshlocal.wire.grpc.method import CallMethod, Got, Method, Req, Resp, Sent
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.http2 import ErrorCode, GoAwayReceived, Headers, Http2Error, header_list_size

if TYPE_CHECKING:
    import trio

__all__ = ["Channel", "ClientCall", "channel_over", "open_channel"]

_USER_AGENT = b"meshlocal-grpc"


class _ClientConnection(Connection):
    def __init__(self, transport: ByteStream, options: GrpcOptions) -> None:
        super().__init__(transport, options, client=True)
        self.goaway: GrpcError | None = None
        self.closing = anyio.Event()
        self._waiting: deque[anyio.Event] = deque()

    def _free_slots(self) -> int:
        if not self.protocol.settings_received:
            return 0
        limit = min(self.options.max_concurrent_streams, self.protocol.peer_max_streams)
        return limit - len(self.streams)

    def _wake_waiting(self) -> None:
        wake = len(self._waiting) if self.refusal() else min(self._free_slots(), len(self._waiting))
        for _ in range(wake):
            self._waiting.popleft().set()

    def refusal(self) -> GrpcError | None:
        """Why no call can start any more."""
        if self.closed_reason is not None:
            return GrpcError(StatusCode.UNAVAILABLE, f"connection: {self.closed_reason}", unprocessed=True)
        return self.goaway

    async def wait_slot(self) -> None:
        """Wait for a free place among the peer's streams. Raises GrpcError where none can come."""
        await anyio.lowlevel.checkpoint()
        while (refusal := self.refusal()) is None and self._free_slots() <= 0:
            event = anyio.Event()
            self._waiting.append(event)
            try:
                await event.wait()
            except BaseException:
                if event.is_set():
                    self._wake_waiting()  # the place goes to the next in the queue
                else:
                    self._waiting.remove(event)
                raise
        if refusal is not None:
            raise refusal

    def give_place_back(self) -> None:
        """A call will not start in the place that `wait_slot` found."""
        self._wake_waiting()

    def open_stream(self, headers: Headers) -> Stream:
        """Send a request's headers on a new stream, in the place that `wait_slot` found."""
        limit = self.protocol.peer_max_header_list_size
        if limit is not None and header_list_size(headers) > limit:
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, f"metadata exceeds the peer's limit of {limit} bytes")
        try:
            stream = Stream(self, self.protocol.send_request(headers))
        except Http2Error as error:
            raise GrpcError(StatusCode.UNAVAILABLE, f"connection: {error}", unprocessed=True) from error
        self.streams[stream.id] = stream
        self.kick()
        return stream

    def on_settings(self) -> None:
        self._wake_waiting()

    def on_end(self) -> None:
        self.closing.set()
        self._wake_waiting()

    def stream_closed(self) -> None:
        if self.goaway is not None and not self.streams:
            self.end(self.goaway.message)
        else:
            self._wake_waiting()

    def on_stream_ended(self, stream: Stream) -> None:
        stream.peer_refuses = True
        if (sender := self._senders.get(stream.id)) is not None:
            sender.set()

    def on_goaway(self, goaway: GoAwayReceived) -> None:
        name = ErrorCode.name_of(goaway.error_code)
        debug = goaway.debug_data[:128].decode("utf-8", "replace")
        reason = f"the peer sent GOAWAY {name}" + (f" ({debug})" if debug else "")
        self.goaway = failure = GrpcError(StatusCode.UNAVAILABLE, reason, unprocessed=True)
        for stream in [stream for stream in self.streams.values() if stream.id > goaway.last_stream_id]:
            stream.fail(failure)
            if (sender := self._senders.get(stream.id)) is not None:
                sender.set()
        self.closing.set()
        self.stream_closed()
        self._wake_waiting()


class Channel:
    """A connection to one server. See `open_channel`."""

    def __init__(self, connection: _ClientConnection, authority: str, scheme: str) -> None:
        self._connection = connection
        self._base = (
            (b":scheme", scheme.encode()),
            (b":authority", authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", _USER_AGENT),
            (b"grpc-accept-encoding", ACCEPT_ENCODING),
        )

    @property
    def closed_reason(self) -> str | None:
        """Why no call can start any more; None while one can."""
        connection = self._connection
        return connection.closed_reason if connection.goaway is None else connection.goaway.message

    async def probe(self) -> None:
        """Wait until a call could start.

        Raises:
            GrpcError: none can, on this channel.
        """
        await self._connection.wait_slot()

    async def wait_closing(self) -> str:
        """Wait until no call can start any more (GOAWAY came, or the connection ended), and say why."""
        await self._connection.closing.wait()
        return self.closed_reason or ""

    async def wait_closed(self) -> str:
        """Wait until the connection has ended, and say why."""
        await self._connection.ended.wait()
        return self.closed_reason or ""

    async def unary(
        self, method: Method[Req, Resp], request: Req, metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> Resp:
        """Send one request and return the one response.

        The deadline of the enclosing cancel scope goes along as grpc-timeout.

        Raises:
            GrpcError: the call failed.
            ValueError: `metadata` may not be sent.
        """
        async with self.call(method, metadata) as call:
            with suppress(anyio.BrokenResourceError):  # the server answered without waiting for the request
                await call.send(request, end=True)
            response = await call.receive()
            if response is None:
                raise GrpcError(StatusCode.INTERNAL, "the server sent no response")
            if await call.receive() is not None:
                raise GrpcError(StatusCode.INTERNAL, "the server sent more than one response")
            return response

    @asynccontextmanager
    async def call(
        self,
        method: CallMethod[Sent, Got],
        metadata: Iterable[tuple[str, str | bytes]] = (),
        *,
        deadline: float | None = None,
    ) -> AsyncIterator[ClientCall[Sent, Got]]:
        """Start a call of any kind. Leaving the block before its end cancels it.

        Waits while the server's limit of concurrent calls is reached.

        Args:
            method: what is called.
            metadata: what goes along.
            deadline: what goes along as grpc-timeout, by anyio.current_time(); by default that of the enclosing cancel
                scope.

        Raises:
            GrpcError: no call can start on this channel (UNAVAILABLE, `unprocessed`).
            ValueError: `metadata` may not be sent.
        """
        options = self._connection.options
        custom = encode_metadata(metadata)
        await self._connection.wait_slot()
        headers: list[tuple[bytes, bytes]] = [(b":method", b"POST"), (b":path", method.path.encode()), *self._base]
        if options.gzip:
            headers.append((b"grpc-encoding", b"gzip"))
        try:
            if deadline is None:
                deadline = anyio.current_effective_deadline()
            left = deadline - anyio.current_time()
            if left == -math.inf:
                await anyio.lowlevel.checkpoint()  # cancelled as it was given its place
            if left != math.inf:
                headers.append((b"grpc-timeout", format_timeout(left)))
            stream = self._connection.open_stream([*headers, *custom])
        except BaseException:
            # The place that it was given goes to the next in the queue.
            self._connection.give_place_back()
            raise
        try:
            yield ClientCall(stream, method, options)
        finally:
            stream.close(ErrorCode.NO_ERROR if stream.peer_ended else ErrorCode.CANCEL)


@asynccontextmanager
async def channel_over(
    stream: ByteStream | trio.abc.Stream,
    *,
    options: GrpcOptions | None = None,
    authority: str = "localhost",
    scheme: str = "http",
) -> AsyncIterator[Channel]:
    """A channel over an open stream (anyio's or trio's), which is closed at the end."""
    connection = _ClientConnection(adapt(stream), options or GrpcOptions())
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.run)
        try:
            yield Channel(connection, authority, scheme)
        except Exception as error:  # noqa: BLE001 - raised below: the task group would wrap it in a group
            failure = error
        connection.protocol.send_goaway(0)
        connection.end("closed by this side")
    if failure is not None:
        raise failure


@asynccontextmanager
async def open_channel(
    host: str,
    port: int,
    *,
    options: GrpcOptions | None = None,
    ssl_context: ssl.SSLContext | None = None,
    authority: str | None = None,
) -> AsyncIterator[Channel]:
    """Connect to a server, over TLS if a context is given (its ALPN is set to h2).

    `authority` is the host name that the server sees and that its certificate must match; `host:port` by default.

    Raises:
        GrpcError: UNAVAILABLE, the connection failed (`unprocessed`).
    """
    name = authority or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    try:
        if ssl_context is None:
            stream: ByteStream = await anyio.connect_tcp(host, port)
        else:
            stream = await _connect_tls(host, port, ssl_context, _host_of(authority) if authority else host)
    except CONNECT_ERRORS as error:
        raise GrpcError(StatusCode.UNAVAILABLE, why_not_connected(error), unprocessed=True) from error
    scheme = "http" if ssl_context is None else "https"
    async with channel_over(stream, options=options, authority=name, scheme=scheme) as channel:
        yield channel


async def _connect_tls(host: str, port: int, context: ssl.SSLContext, hostname: str) -> ByteStream:
    from anyio.streams.tls import TLSAttribute  # few channels use TLS; `client.link.import_links` imports it in time

    context.set_alpn_protocols(["h2"])
    # HTTP/2 frames its messages, so a connection cut short is noticed without TLS's own closing handshake.
    stream = await anyio.connect_tcp(
        host, port, ssl_context=context, tls_standard_compatible=False, tls_hostname=hostname
    )
    try:
        if isinstance(context, TlsContext):
            context.check(certificate_of(stream.extra(TLSAttribute.ssl_object)))
        if stream.extra(TLSAttribute.alpn_protocol, None) != "h2":
            raise ConnectionError("the server does not offer HTTP/2 (ALPN h2)")
    except OSError:
        await stream.aclose()
        raise
    return stream


def _host_of(authority: str) -> str:
    host, colon, port = authority.rpartition(":")
    return host.strip("[]") if colon and port.isdecimal() else authority
