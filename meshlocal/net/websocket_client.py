"""A WebSocket client (RFC 6455) on any loop: wsproto over an anyio stream, with limits and keepalive."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import msgspec
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from meshlocal.net.connect_errors import CONNECT_ERRORS, STREAM_ERRORS, why_not_connected
from meshlocal.net.grpc.transport import ByteStream, adapt
from meshlocal.net.tls import TlsContext, certificate_of

if TYPE_CHECKING:
    import trio
    from anyio.streams.tls import TLSStream

_READ_SIZE = 65536
_MAX_REJECTION = 4096
_ABNORMAL = 1006
_TOO_BIG = 1009
_PROTOCOL_ERROR = 1002
_CLOSE_TIMEOUT = 1.0


class WebSocketOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and times, in bytes and seconds.

    Attributes:
        max_message_size: of what is received; more: the connection is closed with 1009.
        keepalive_interval: of silence, after which a ping is sent.
        keepalive_timeout: that then may pass without a byte.
    """

    max_message_size: int
    keepalive_interval: float
    keepalive_timeout: float


class ClosedError(Exception):
    """The connection is closed.

    Attributes:
        code: of RFC 6455, section 7.4; 1006 if it broke off.
        reason: for people.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class RejectedError(Exception):
    """The server did not accept the handshake.

    Attributes:
        status: its HTTP status; 0 if what it sent is no HTTP.
        reason: what it said.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


class WebSocket:
    """A connection. One task receives, one sends."""

    def __init__(self, stream: ByteStream, options: WebSocketOptions) -> None:
        self._stream = stream
        self._options = options
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._text: list[str] = []
        self._bytes = bytearray()
        self._size = 0
        self._closed: ClosedError | None = None
        self.subprotocol: str | None = None
        self.received = 0
        """Bytes of messages that came so far, of one that is not whole yet too; answers to pings are none."""

    async def send(self, message: str | bytes) -> None:
        """Send a message.

        Raises:
            ClosedError: the connection is closed.
        """
        if self._closed is not None:
            raise self._closed
        await self._send(TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message))

    async def receive(self) -> str | bytes:
        """Wait for a message; meanwhile pings are answered, and silence is probed.

        Raises:
            ClosedError: the connection is closed.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        while True:
            message = await self._next_message()
            if message is not None:
                return message
            await self._read()

    async def _next_message(self) -> str | bytes | None:
        if self._closed is not None:
            raise self._closed
        for event in self._protocol.events():
            if isinstance(event, TextMessage | BytesMessage):
                self._size += len(event.data)
                self.received += len(event.data)
                if self._size > self._options.max_message_size:
                    reason = f"a message exceeds {self._options.max_message_size} bytes"
                    await self.aclose(_TOO_BIG, reason)
                    raise self._ended(_TOO_BIG, reason)
                if isinstance(event, TextMessage):
                    self._text.append(event.data)
                else:
                    self._bytes += event.data
                if event.message_finished:
                    return self._whole(text=isinstance(event, TextMessage))
            elif isinstance(event, Ping):
                await self._send(event.response())
            elif isinstance(event, CloseConnection):
                with anyio.move_on_after(_CLOSE_TIMEOUT):
                    await self._send(event.response())
                raise self._ended(int(event.code), event.reason or "")
            else:
                assert isinstance(event, Pong)
        return None

    def _whole(self, *, text: bool) -> str | bytes:
        message = "".join(self._text) if text else bytes(self._bytes)
        self._text.clear()
        self._bytes.clear()
        self._size = 0
        return message

    async def _read(self) -> None:
        options = self._options
        data = await self._read_within(options.keepalive_interval)
        if data is None:
            await self._send(Ping(payload=b"meshlocal"))
            data = await self._read_within(options.keepalive_timeout)
            if data is None:
                raise self._ended(_ABNORMAL, "a ping was not answered in time")
        try:
            self._protocol.receive_data(data)
        except (RemoteProtocolError, LocalProtocolError) as error:
            raise self._ended(_PROTOCOL_ERROR, f"the server broke the protocol: {error}") from None

    async def _read_within(self, seconds: float) -> bytes | None:
        try:
            with anyio.move_on_after(seconds):
                return await self._stream.receive(_READ_SIZE)
        except STREAM_ERRORS as error:
            raise self._ended(_ABNORMAL, _broke_off(error)) from None
        return None

    async def _send(self, event: Event) -> None:
        try:
            await self._stream.send(self._protocol.send(event))
        except LocalProtocolError as error:
            raise self._ended(_PROTOCOL_ERROR, str(error)) from None
        except STREAM_ERRORS as error:
            raise self._ended(_ABNORMAL, _broke_off(error)) from None

    def _ended(self, code: int, reason: str) -> ClosedError:
        if self._closed is None:
            self._closed = ClosedError(code, reason)
        return self._closed

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, if the connection is open. Does not wait for the answer; the stream stays open."""
        if self._closed is None:
            with anyio.move_on_after(_CLOSE_TIMEOUT):
                try:
                    await self._send(CloseConnection(code=code, reason=reason))
                except ClosedError:
                    return
            self._ended(code, reason)

    async def shake_hands(self, request: Request) -> None:
        """The opening handshake.

        Raises:
            RejectedError: the server refused it, or speaks no WebSocket.
            ClosedError: the connection broke off.
        """
        await self._send(request)
        rejection: RejectConnection | None = None
        text = b""
        heard = False
        while True:
            try:
                data = await self._stream.receive(_READ_SIZE)
            except anyio.EndOfStream:
                if rejection is not None:
                    raise _rejected(rejection, text) from None
                said = "speaks no WebSocket" if heard else "closed the connection"
                raise RejectedError(0, f"the server {said}") from None
            except STREAM_ERRORS as error:
                raise RejectedError(0, _broke_off(error)) from None
            heard = True
            try:
                self._protocol.receive_data(data)
            except RemoteProtocolError as error:
                raise RejectedError(0, f"the server speaks no WebSocket: {error}") from None
            for event in self._protocol.events():
                if isinstance(event, AcceptConnection):
                    self.subprotocol = event.subprotocol
                    return
                if isinstance(event, RejectConnection):
                    rejection = event
                elif isinstance(event, RejectData):
                    text += event.data
                if rejection is not None and (
                    not rejection.has_body
                    or (isinstance(event, RejectData) and event.body_finished)
                    or len(text) > _MAX_REJECTION
                ):
                    raise _rejected(rejection, text)


def _broke_off(error: Exception) -> str:
    told = why_not_connected(error) if isinstance(error, ssl.SSLError) else ""
    return f"the connection broke off: {told}" if told else "the connection broke off"


def _rejected(rejection: RejectConnection, text: bytes) -> RejectedError:
    return RejectedError(rejection.status_code, text[:_MAX_REJECTION].decode("utf-8", "replace").strip())


@asynccontextmanager
async def open_websocket(
    host: str,
    port: int,
    target: str,
    subprotocols: Sequence[str],
    *,
    options: WebSocketOptions,
    ssl_context: ssl.SSLContext | None = None,
    headers: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[WebSocket]:
    """A connection for as long as the block lasts, over TLS if a context is given.

    Raises:
        ConnectionError: no connection; its text says why.
        RejectedError: the server did not accept the handshake, or none of the subprotocols.
    """
    try:
        if ssl_context is None:
            stream: ByteStream = await anyio.connect_tcp(host, port)
        else:
            stream = await anyio.connect_tcp(
                host, port, ssl_context=ssl_context, tls_standard_compatible=False, tls_hostname=host
            )
            await _check(stream, ssl_context)
    except CONNECT_ERRORS as error:
        raise ConnectionError(why_not_connected(error)) from error
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    async with websocket_over(stream, authority, target, subprotocols, options=options, headers=headers) as websocket:
        yield websocket


async def _check(stream: TLSStream, context: ssl.SSLContext) -> None:
    """See that a server is who it is to be, where a context says who that is."""
    from anyio.streams.tls import TLSAttribute  # few use TLS; `client.link.import_links` imports it in time

    try:
        if isinstance(context, TlsContext):
            context.check(certificate_of(stream.extra(TLSAttribute.ssl_object)))
    except OSError:
        await stream.aclose()
        raise


@asynccontextmanager
async def websocket_over(
    stream: ByteStream | trio.abc.Stream,
    authority: str,
    target: str,
    subprotocols: Sequence[str],
    *,
    options: WebSocketOptions,
    headers: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[WebSocket]:
    """A connection over an open stream (anyio's or trio's), which is closed at the end.

    Raises:
        RejectedError: the server did not accept the handshake, or none of the subprotocols.
    """
    adapted = adapt(stream)
    websocket = WebSocket(adapted, options)
    try:
        extra = [(name.encode(), value.encode()) for name, value in headers]
        request = Request(host=authority, target=target, subprotocols=list(subprotocols), extra_headers=extra)
        try:
            await websocket.shake_hands(request)
        except ClosedError as error:
            raise RejectedError(0, error.reason) from None
        if websocket.subprotocol not in subprotocols:
            raise RejectedError(0, "the server chose no subprotocol that was offered")
        yield websocket
        await websocket.aclose()
    finally:
        with anyio.CancelScope() as at_once:
            at_once.cancel()
            await adapted.aclose()
