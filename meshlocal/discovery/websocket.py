"""The Discovery service over WebSocket, by the same handlers as over gRPC (`meshlocal.wire.discovery_websocket`).

A connection is one call. Its tasks: trio-websocket's reader, which answers pings too; pings of our own, by which a peer
that is gone is found; a look-out for what may not come after the request; and the handler. Whatever ends the call
becomes a close code, and the connection is closed within a bounded time whatever the peer does.
"""

from __future__ import annotations

import base64
import binascii
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, wrap_server_stream
from wsproto.frame_protocol import FrameProtocol
from wsproto.utilities import ProtocolError

from meshlocal.net.crowding import Crowding
from meshlocal.net.grpc.server import Handler, Routes
from meshlocal.net.listen import accept_loop
from meshlocal.net.log import get_log
from meshlocal.net.sockets import close, format_address
from meshlocal.net.tls import certificate_of
from meshlocal.net.tls_accept import accept_tls
from meshlocal.net.websocket_stream import WatchedStream
from meshlocal.policy.hosts import host_of, is_own_host, is_own_origin
from meshlocal.policy.rates import TokenBucket
from meshlocal.wire import discovery_websocket as wire
from meshlocal.wire.discovery_websocket import Close, Codec
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, Metadata

log = get_log(__name__)

MAX_CONNECTIONS = 4096

_DRAIN_BYTES = 1 << 20


class WebSocketOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and times of connections; times in seconds.

    Attributes:
        max_message_size: bytes of a request at most; more: 1009.
        handshake_timeout: from the connection to the handshake's end, and from there to the request.
        keepalive_interval: between pings.
        keepalive_timeout: that a ping's answer may take.
        stall_timeout: that the peer may take to read what is sent to it, of a long message the next 64 KiB.
        close_timeout: that the peer may take to answer a close.
        receive_rate: bytes read in a second, beyond `receive_burst`; more wait in the peer. None: as many as come.
        receive_burst: bytes read at once after a while without.
        origins: of pages that may connect, beside those of the host that they connect to.
        names: hosts that the server goes by, for pages, beside localhost, loopback addresses and that which was
            connected to.
    """

    max_message_size: int = 1 << 20
    handshake_timeout: float = 10.0
    keepalive_interval: float = 30.0
    keepalive_timeout: float = 10.0
    stall_timeout: float = 30.0
    close_timeout: float = 2.0
    receive_rate: float | None = None
    receive_burst: int = 2 << 20
    origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


class Client(NamedTuple):
    """Who is at the other end of a connection.

    Attributes:
        peer: its address and port.
        local: the address that it connected to.
        certificate: its, as `ssl.SSLObject.getpeercert` gives it; empty if it showed none that was checked.
    """

    peer: str
    local: str
    certificate: Mapping[str, object]


class WebSocketCall:
    """A call as its handler sees it: what `ServerCall` is over gRPC."""

    def __init__(
        self,
        connection: WebSocketConnection,
        method: Method[Any, Any],
        codec: Codec,
        frame: str | bytes,
        peer: str,
        metadata: Metadata,
        certificate: Mapping[str, object],
    ) -> None:
        self.peer = peer
        self.metadata = metadata
        self.certificate = certificate
        self.caller: Any = None
        self._connection = connection
        self._method = method
        self._codec = codec
        self._frame: str | bytes | None = frame

    async def receive(self) -> Any | None:
        """The request; None after it. It is read only now: who has no token, or asks too often, costs no parsing.

        Raises:
            Close: it makes no sense, or is too large for its kind.
        """
        await trio.lowlevel.checkpoint()
        frame, self._frame = self._frame, None
        return None if frame is None else self._codec.decode(frame, self._method.request_type)

    async def receive_end(self) -> None:
        """A connection is for one request: whatever else comes on it ends the call."""
        await trio.lowlevel.checkpoint()

    async def send(self, response: Any) -> None:
        """Send one response, waiting while the client does not read."""
        await self._connection.send_message(self._codec.encode(response))

    async def send_encoded(self, payload: bytes) -> None:
        """Send one response that was serialized before."""
        await self._connection.send_message(self._codec.encode_serialized(payload, self._method.response_type))

    def try_send_encoded(self, payload: bytes) -> bool:
        """False: a WebSocket message is never sent without waiting."""
        return False

    async def send_last(self, response: Any) -> None:
        """Send the last response. Unlike gRPC's, it needs no mark of its own: the close that follows is one."""
        await self.send(response)


class WebSocketServer:
    """Serves handlers, by the paths of their methods.

    Args:
        handlers: of methods that take one request.
        options: limits and times.
        max_connections: more are closed at once.

    Attributes:
        draining: the server goes away; calls that end because of it end with 1001.
        crowding: how many connections were refused because there were `max_connections`.
        stalled: connections that ended because the client did not read.
        paused: times that a client was made to wait with what it sends.
        too_large: requests that were refused for their size.
    """

    def __init__(
        self,
        handlers: Routes,
        options: WebSocketOptions | None = None,
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_client_connections: int | None = None,
    ) -> None:
        self._routes = {method.path: (method, handler) for method, handler in handlers.items()}
        self._options = options or WebSocketOptions()
        self.crowding = Crowding("websocket", max_connections, max_client_connections)
        self.stalled = 0
        self.paused = 0
        self.too_large = 0
        self._idle = trio.Event()
        self._accepting: set[trio.CancelScope] = set()
        self.draining = False

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return self.crowding.open

    async def serve(
        self,
        listeners: Sequence[socket.socket],
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept on listening sockets, which it closes, until cancelled or until `drain` has finished."""

        async def handle(client: socket.socket, peer: object) -> None:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            await self.serve_stream(stream, format_address(peer), client.getsockname()[0], tls)

        async def accept(listener: socket.socket, nursery: trio.Nursery) -> None:
            with trio.CancelScope() as scope:
                self._accepting.add(scope)
                try:
                    await accept_loop(listener, nursery, handle, on_error=_log_accept_error)
                finally:
                    self._accepting.discard(scope)
                    close(listener)

        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(accept, listener, nursery)
                task_status.started()
        finally:
            for listener in listeners:
                close(listener)

    async def drain(self) -> None:
        """Stop accepting, and wait until the last connection ended. Its calls are the handlers' to end."""
        self.draining = True
        for scope in self._accepting:
            scope.cancel()
        while self.crowding.open:
            self._idle = trio.Event()
            await self._idle.wait()

    async def serve_stream(
        self,
        stream: trio.abc.Stream,
        peer: str = "unknown",
        local: str = "127.0.0.1",
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """Serve one connection to its end, and close it.

        Args:
            stream: the connection.
            peer: the client's address and port.
            local: the address that it was made to.
            tls: gives what it is served over TLS with; None: without TLS.
        """
        try:
            await self._serve_in_place(stream, peer, local, tls)
        finally:
            if not self.crowding.open:
                self._idle.set()

    async def _serve_in_place(
        self, stream: trio.abc.Stream, peer: str, local: str, tls: Callable[[], ssl.SSLContext] | None
    ) -> None:
        with self.crowding.place(peer) as place:
            if not place:
                await trio.aclose_forcefully(stream)
                return
            try:
                certificate: Mapping[str, object] = {}
                if tls is not None:
                    secured = await accept_tls(stream, tls())
                    if secured is None:
                        return
                    stream, certificate = secured, certificate_of(secured)
                await self._serve_to_end(stream, Client(peer, local, certificate))
            except Exception as error:
                # A fault in serving one connection must not end the others.
                if not _is_peers(error):
                    log.exception("websocket connection failed", peer=peer)

    async def _serve_to_end(self, stream: trio.abc.Stream, client: Client) -> None:
        watched = WatchedStream(stream, self._options.stall_timeout, self._bucket(), self._count_pause)
        try:
            last_words: bytes | None = None
            async with trio.open_nursery() as nursery:
                try:
                    last_words = await self._serve(watched, nursery, client)
                finally:
                    nursery.cancel_scope.cancel()
            # Now that nobody reads any more.
            if last_words is not None:
                with trio.move_on_after(self._options.close_timeout):
                    await _part(stream, last_words)
        finally:
            self.stalled += watched.stalled
            await trio.aclose_forcefully(stream)

    def _count_pause(self) -> None:
        self.paused += 1

    def _bucket(self) -> TokenBucket | None:
        rate = self._options.receive_rate
        return TokenBucket(rate, self._options.receive_burst, trio.current_time()) if rate is not None else None

    async def _serve(self, stream: WatchedStream, nursery: trio.Nursery, client: Client) -> bytes | None:
        """Serve a connection's call; returns what is left to be said to a peer that broke the rules, which is told."""
        options = self._options
        accepted = None
        with trio.move_on_after(options.handshake_timeout) as handshake:
            # The library waits for a handshake for ever, also on a connection that has ended.
            nursery.start_soon(_cancel_at_end, stream, handshake)
            try:
                accepted = await self._shake_hands(stream, nursery, client)
            except ConnectionClosed:
                return None
        if accepted is None:
            return None
        connection, method, handler, codec, metadata = accepted
        ending = Close(wire.NORMAL)
        try:
            await self._call(connection, method, handler, codec, metadata, client)
        except Close as close_:
            ending = close_
        except GrpcError as error:
            ending = Close.of(error, draining=self.draining)
        except ConnectionClosed:
            pass
        except Exception:
            log.exception("websocket handler failed", method=method.path, peer=client.peer)
            ending = Close(wire.INTERNAL, "the handler failed")
        last_words = _last_words(connection, stream)
        refused = connection.closed
        self.too_large += refused is not None and refused.code == wire.TOO_BIG
        if last_words is None:
            with trio.move_on_after(options.close_timeout):
                await connection.aclose(ending.code, ending.reason or None)
        return last_words

    async def _shake_hands(
        self, stream: WatchedStream, nursery: trio.Nursery, client: Client
    ) -> tuple[WebSocketConnection, Method[Any, Any], Handler, Codec, Metadata] | None:
        request = await wrap_server_stream(
            nursery, stream, message_queue_size=1, max_message_size=self._options.max_message_size
        )
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in request.headers}
        chosen = wire.choose_codec(request.proposed_subprotocols)
        method, handler = self._routes.get(request.path.partition("?")[0], (None, None))
        if method is None or handler is None:
            await _reject(request, 404, f"no method {request.path[:256]}")
        elif not _is_welcome(headers.get("origin"), stream.host, client.local, self._options):
            await _reject(request, 403, f"pages of {headers['origin'][:256]} may not connect")
        elif chosen is None:
            await _reject(request, 400, f"offer the subprotocol {wire.PROTO} or {wire.JSON}")
        else:
            name, codec = chosen
            connection = await request.accept(subprotocol=name)
            return connection, method, handler, codec, _credentials(headers, request.proposed_subprotocols)
        return None

    async def _call(
        self,
        connection: WebSocketConnection,
        method: Method[Any, Any],
        handler: Any,
        codec: Codec,
        metadata: Metadata,
        client: Client,
    ) -> None:
        """Take the request, and run the handler.

        Raises:
            Close, GrpcError: the call ends otherwise than well.
            ConnectionClosed: the peer closed the connection.
        """
        async with trio.open_nursery() as nursery:
            ended: list[Exception] = []
            with trio.CancelScope() as calling:
                nursery.start_soon(self._keep_alive, connection, calling)
                frame: str | bytes | None = None
                try:
                    with trio.move_on_after(self._options.handshake_timeout):
                        frame = await connection.get_message()
                    if frame is None:
                        raise Close(wire.POLICY, "no request came")
                    nursery.start_soon(_look_out, connection, calling, ended)
                    await handler(
                        WebSocketCall(connection, method, codec, frame, client.peer, metadata, client.certificate)
                    )
                except Exception as error:  # noqa: BLE001 - raised below: the nursery would wrap it in a group
                    ended.append(error)
            nursery.cancel_scope.cancel()
        if ended:
            raise ended[0]

    async def _keep_alive(self, connection: WebSocketConnection, calling: trio.CancelScope) -> None:
        options = self._options
        while True:
            await trio.sleep(options.keepalive_interval)
            try:
                with trio.move_on_after(options.keepalive_timeout) as waiting:
                    await connection.ping()
            except ConnectionClosed:
                return
            if waiting.cancelled_caught:
                calling.cancel()
                return


def _is_peers(error: BaseException) -> bool:
    """Whether it is what the library raises on what a peer sent, or when it left."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_peers, error.exceptions))
    return isinstance(error, ConnectionClosed | ProtocolError | UnicodeError)


async def _look_out(connection: WebSocketConnection, calling: trio.CancelScope, ended: list[Exception]) -> None:
    """End the call when its peer does, or says what it may not."""
    try:
        await connection.get_message()
    except ConnectionClosed as error:
        ended.append(error)
    else:
        ended.append(Close(wire.POLICY, "a connection is for one request"))
    calling.cancel()


async def _cancel_at_end(stream: WatchedStream, scope: trio.CancelScope) -> None:
    await stream.ended.wait()
    scope.cancel()


def _last_words(connection: WebSocketConnection, stream: WatchedStream) -> bytes | None:
    """The close frame for a peer that broke the protocol; None if there is no call for one.

    The library sends one itself for a message that is too big (and b"" is left to say), and closes without a word on
    frames that make no sense: its `closed` then has the code that it should have sent.
    """
    closed = connection.closed
    if closed is None:
        return None
    if closed.code in (wire.PROTOCOL_ERROR, wire.INVALID) and not stream.said_close:
        return bytes(FrameProtocol(client=False, extensions=[]).close(closed.code, wire.shortened(closed.reason or "")))
    return b"" if closed.code == wire.TOO_BIG else None


async def _part(stream: trio.abc.Stream, last_words: bytes) -> None:
    """Say the last words, then read on for a moment.

    To close with bytes unread would reset the connection before the peer has read why.
    """
    read = 0
    try:
        if last_words:
            await stream.send_all(last_words)
        if isinstance(stream, trio.SocketStream):
            await stream.send_eof()
        while read < _DRAIN_BYTES and (received := await stream.receive_some()):
            read += len(received)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def _reject(request: WebSocketRequest, status: int, text: str) -> None:
    await request.reject(status, extra_headers=[(b"Content-Type", b"text/plain")], body=f"{text}\n".encode())


def _is_welcome(origin: str | None, authority: str, local: str, options: WebSocketOptions) -> bool:
    """Whether a page may connect: one of the same host, on any port, if that is a name of this server; or one of an
    origin that the config names.

    Anybody but a browser sends no origin. Without this, every page that an operator visits could read the registry.
    """
    if origin is None or origin in options.origins:
        return True
    host = host_of(authority)
    return is_own_host(host, local, options.names) and is_own_origin(origin, host, ())


def _credentials(headers: dict[str, str], proposed: Sequence[str]) -> Metadata:
    """The token as gRPC has it: from the header, or from a subprotocol."""
    if "authorization" in headers:
        return (("authorization", headers["authorization"]),)
    for name in proposed:
        if name.startswith(wire.BEARER):
            text = name.removeprefix(wire.BEARER)
            try:
                token = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                return ()
            return (("authorization", f"Bearer {token}"),)
    return ()


def _log_accept_error(error: OSError) -> None:
    log.warning("websocket accept failed", error=str(error))
