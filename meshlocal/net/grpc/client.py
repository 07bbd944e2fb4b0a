"""The client: one channel is one connection. A channel that ended stays ended: reconnecting is its user's decision."""

from __future__ import annotations

import math
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Generic

import anyio
import anyio.lowlevel
from google.protobuf.message import DecodeError
from h2.errors import ErrorCodes

from meshlocal.net.grpc.connection import Connection
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.stream import Stream
from meshlocal.net.grpc.transport import ByteStream, adapt
from meshlocal.wire.grpc.framing import ACCEPT_ENCODING, MessageDecoder, check_encoding, encode_message
from meshlocal.wire.grpc.metadata import decode_grpc_message, decode_metadata, encode_metadata, format_timeout, header
from meshlocal.wire.grpc.method import Method, Req, Resp
from meshlocal.wire.grpc.status import GrpcError, Metadata, StatusCode, from_http_status, parse_status
from meshlocal.wire.http2 import GoAway, Headers, Http2Error, header_list_size

if TYPE_CHECKING:
    import trio

COMPRESS_FROM = 1024
_USER_AGENT = b"meshlocal-grpc"


class _ClientConnection(Connection):
    def __init__(self, transport: ByteStream, options: GrpcOptions) -> None:
        super().__init__(transport, options, client=True)
        self.goaway: GrpcError | None = None
        self.closing = anyio.Event()
        self._waiting: deque[anyio.Event] = deque()

    def _free_slots(self) -> int:
        if not self.settings_received:
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

    def open_stream(self, headers: Headers) -> Stream:
        """Send a request's headers on a new stream, in the place that `wait_slot` found."""
        limit = self.protocol.peer_max_header_list_size
        if limit is not None and header_list_size(headers) > limit:
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, f"metadata exceeds the peer's limit of {limit} bytes")
        try:
            stream = Stream(self, self.protocol.next_stream_id())
        except Http2Error as error:
            raise GrpcError(StatusCode.UNAVAILABLE, f"connection: {error}", unprocessed=True) from error
        stream.send_headers(headers)
        self.streams[stream.id] = stream
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

    def on_goaway(self, goaway: GoAway) -> None:
        try:
            name = ErrorCodes(goaway.error_code).name
        except ValueError:
            name = f"{goaway.error_code:#x}"
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


class ClientCall(Generic[Req, Resp]):
    """A call under way, inside `Channel.call`. One task may send while another receives."""

    def __init__(self, stream: Stream, method: Method[Req, Resp], options: GrpcOptions) -> None:
        self.method = method
        self.initial_metadata: Metadata | None = None
        """The server's metadata, once the first response or the status came."""
        self.trailing_metadata: Metadata | None = None
        """The metadata that came with the status, once `receive` saw the end."""
        self._stream = stream
        self._options = options
        self._decoder: MessageDecoder | None = None
        self._finished = False

    async def send(self, request: Req, *, end: bool = False) -> None:
        """Send one request, waiting while the server's windows are full. `end`: no other follows.

        Raises:
            GrpcError: the call failed.
            anyio.BrokenResourceError: the server ended the call with OK before.
            anyio.ClosedResourceError: after `end`.
        """
        payload = request.SerializeToString()
        data = encode_message(payload, compress=self._options.gzip and len(payload) >= COMPRESS_FROM)
        await self._send(data, end=end)

    async def end(self) -> None:
        """Half-close: no request follows. No error if the server ended the call before."""
        if not self._stream.local_ended:
            try:
                await self._send(b"", end=True)
            except anyio.BrokenResourceError:
                return

    async def _send(self, data: bytes, *, end: bool) -> None:
        try:
            await self._stream.send_data(data, end_stream=end)
        except anyio.BrokenResourceError:
            self._check_headers(self._stream.headers or ())
            code, message = self._status()
            if code is not StatusCode.OK:
                raise GrpcError(code, message, self._trailing()) from None
            raise

    async def wait_initial_metadata(self) -> Metadata:
        """Wait for the server's first headers. Raises GrpcError if the call failed before."""
        while self._stream.headers is None:
            if self._stream.failure is not None:
                raise self._stream.failure
            await self._stream.wait_changed()
        if self.initial_metadata is None:
            headers = self._stream.headers
            self._check_headers(headers)
            trailers_only = self._stream.trailers is None and header(headers, b"grpc-status") is not None
            self.initial_metadata = () if trailers_only else decode_metadata(headers)
        return self.initial_metadata

    async def receive(self) -> Resp | None:
        """The next response; None after the last, when the server's status was OK.

        Raises:
            GrpcError: the server's status, or why there is none.
        """
        await anyio.lowlevel.checkpoint()
        if self._finished:
            return None
        stream = self._stream
        await self.wait_initial_metadata()
        assert stream.headers is not None
        if self._decoder is None:
            gzip = check_encoding(header(stream.headers, b"grpc-encoding"))
            self._decoder = MessageDecoder(self._options.max_message_size, gzip=gzip)
        while True:
            payload = self._decoder.next_message()
            if payload is not None:
                return _parse(self.method.response_type, payload)
            if data := stream.take():
                self._decoder.feed(data)
            elif stream.peer_ended:
                self._finish(self._decoder)
                return None
            elif stream.failure is not None:
                raise stream.failure
            else:
                await stream.wait_changed()

    def __aiter__(self) -> AsyncIterator[Resp]:
        return self

    async def __anext__(self) -> Resp:
        response = await self.receive()
        if response is None:
            raise StopAsyncIteration
        return response

    def _check_headers(self, headers: Headers) -> None:
        """Raises GrpcError where the answer is not gRPC's."""
        if header_list_size(headers) > self._options.max_header_list_size:
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "the server's metadata exceeds the limit")
        if header(headers, b"grpc-status") is not None:
            return
        http_status = header(headers, b":status")
        if http_status != b"200":
            text = (http_status or b"none").decode("ascii", "replace")
            code = from_http_status(int(text)) if text.isdecimal() else StatusCode.UNKNOWN
            raise GrpcError(code, f"HTTP status {text}")
        content_type = header(headers, b"content-type")
        if content_type is None or not content_type.startswith(b"application/grpc"):
            raise GrpcError(StatusCode.UNKNOWN, f"content-type {content_type!r} is not gRPC's")

    def _end_headers(self) -> Headers:
        return self._stream.trailers or self._stream.headers or ()

    def _status(self) -> tuple[StatusCode, str]:
        headers = self._end_headers()
        status = header(headers, b"grpc-status")
        if status is None:
            return StatusCode.UNKNOWN, "the server sent no grpc-status"
        return parse_status(status), decode_grpc_message(header(headers, b"grpc-message") or b"")

    def _trailing(self) -> Metadata:
        if header_list_size(self._end_headers()) > self._options.max_header_list_size:
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "the server's metadata exceeds the limit")
        return decode_metadata(self._end_headers())

    def _finish(self, decoder: MessageDecoder) -> None:
        self.trailing_metadata = self._trailing()
        code, message = self._status()
        if code is not StatusCode.OK:
            raise GrpcError(code, message, self.trailing_metadata)
        decoder.finish()
        self._finished = True


def _parse(kind: type[Resp], payload: bytes) -> Resp:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise GrpcError(StatusCode.INTERNAL, f"response is no {kind.DESCRIPTOR.full_name}: {error}") from error


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
        refusal = self._connection.refusal()
        return None if refusal is None else self._connection.closed_reason or refusal.message

    async def wait_closing(self) -> str:
        """Wait until no call can start any more (GOAWAY came, or the connection ended), and say why."""
        await self._connection.closing.wait()
        return self.closed_reason or ""

    async def wait_closed(self) -> str:
        """Wait until the connection has ended, and say why."""
        await self._connection.ended.wait()
        return self._connection.closed_reason or ""

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
        self, method: Method[Req, Resp], metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> AsyncIterator[ClientCall[Req, Resp]]:
        """Start a call of any kind. Leaving the block before its end cancels it.

        Waits while the server's limit of concurrent calls is reached. The deadline of the enclosing cancel scope
        goes along as grpc-timeout.

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
        left = anyio.current_effective_deadline() - anyio.current_time()
        if left != math.inf:
            headers.append((b"grpc-timeout", format_timeout(left)))
        stream = self._connection.open_stream([*headers, *custom])
        try:
            yield ClientCall(stream, method, options)
        finally:
            stream.close(ErrorCodes.NO_ERROR if stream.peer_ended else ErrorCodes.CANCEL)


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
            ssl_context.set_alpn_protocols(["h2"])
            stream = await anyio.connect_tcp(
                host,
                port,
                ssl_context=ssl_context,
                tls_standard_compatible=False,
                tls_hostname=authority.rsplit(":", 1)[0] if authority else host,
            )
    except OSError as error:
        raise GrpcError(StatusCode.UNAVAILABLE, f"connect to {name}: {error}", unprocessed=True) from error
    scheme = "http" if ssl_context is None else "https"
    async with channel_over(stream, options=options, authority=name, scheme=scheme) as channel:
        yield channel
