"""The server: handlers by method, a connection per accepted stream, a task per call, a drain that lets calls end."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import anyio
import trio

from meshlocal.net.crowding import Crowding
from meshlocal.net.grpc.connection import Connection
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.net.grpc.stream import Stream
from meshlocal.net.grpc.transport import ByteStream, TrioByteStream, adapt
from meshlocal.net.listen import Handle, accept_loop
from meshlocal.net.log import get_log
from meshlocal.net.sockets import close, format_address
from meshlocal.net.tls import certificate_of
from meshlocal.net.tls_accept import accept_tls
from meshlocal.policy.rates import TokenBucket
from meshlocal.wire.grpc.framing import ACCEPT_ENCODING
from meshlocal.wire.grpc.metadata import header, is_grpc
from meshlocal.wire.grpc.method import Method, Req, Resp
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.http2 import MAX_STREAM_ID, ErrorCode, GoAwayReceived, Headers, header_list_size

__all__ = ["GrpcServer", "Handler", "Routes", "ServerCall", "unary"]

log = get_log(__name__)

Handler: TypeAlias = Callable[[ServerCall[Any, Any]], Awaitable[None]]
Routes: TypeAlias = Mapping[Method[Any, Any], Handler]

_DRAIN = b"mldrain."

RESETS_PER_SECOND = 20
RESETS_BURST = 200
"""Calls that a client may reset on one connection: in a second, and at once after a while without."""


def unary(
    func: Callable[[Req, ServerCall[Req, Resp]], Awaitable[Resp]],
) -> Callable[[ServerCall[Req, Resp]], Awaitable[None]]:
    """A handler from a function that takes the one request and returns the one response."""

    async def handler(call: ServerCall[Req, Resp]) -> None:
        request = await call.receive()
        if request is None:
            raise GrpcError(StatusCode.INTERNAL, "the client sent no request")
        await call.receive_end()
        await call.send_last(await func(request, call))

    return handler


class _ServerConnection(Connection):
    def __init__(self, transport: ByteStream, server: GrpcServer, peer: str, certificate: Mapping[str, object]) -> None:
        super().__init__(transport, server.options, client=False)
        self._server = server
        self._peer = peer
        self._certificate = certificate
        self._handlers = 0
        self._resets = TokenBucket(RESETS_PER_SECOND, RESETS_BURST, anyio.current_time())
        self._last_stream_id = MAX_STREAM_ID
        if server.draining.is_set():
            self.drain()

    def on_request(self, stream_id: int, headers: Headers) -> None:
        # Handlers still cleaning up after a reset count: a peer cannot have more tasks here than streams.
        if stream_id > self._last_stream_id or self._handlers >= self.options.max_concurrent_streams:
            self.protocol.reset(stream_id, ErrorCode.REFUSED_STREAM)
            return
        assert self.tasks is not None
        stream = Stream(self, stream_id)
        stream.headers = headers
        self.streams[stream_id] = stream
        self._handlers += 1
        self.tasks.start_soon(self._handle, stream, headers)

    async def _handle(self, stream: Stream, headers: Headers) -> None:
        try:
            if refusal := _refusal(headers):
                stream.respond(refusal, end_stream=True)
                return
            call: ServerCall[Any, Any] = ServerCall(
                stream, headers, self._peer, self._server.draining, self._certificate
            )
            path = (header(headers, b":path") or b"").decode("latin-1")
            method, handler = self._server.route(path)
            if header_list_size(headers) > self.options.max_header_list_size:
                await call.fail(StatusCode.RESOURCE_EXHAUSTED, "metadata exceeds the limit")
            elif method is None or handler is None:
                await call.fail(StatusCode.UNIMPLEMENTED, f"no method {path[:256]}")
            else:
                await call.run(method, handler)
        except GrpcError:
            return  # the stream is gone: there is nobody to tell
        finally:
            stream.close(ErrorCode.NO_ERROR if stream.local_ended else ErrorCode.CANCEL)
            self._handlers -= 1
            self._end_drained()

    def drain(self) -> None:
        """Announce the end. The PING's answer shows that the peer saw it; then the last stream is fixed."""
        self.protocol.send_goaway(MAX_STREAM_ID, debug_data=b"draining")
        self.protocol.ping(_DRAIN)
        self.kick()

    def on_ping_ack(self, payload: bytes) -> None:
        if payload == _DRAIN and self._server.draining.is_set():
            self._last_stream_id = self.protocol.highest_inbound_stream_id
            self.protocol.send_goaway(self._last_stream_id, debug_data=b"draining")
            self._end_drained()

    def _end_drained(self) -> None:
        if self._last_stream_id != MAX_STREAM_ID and not self._handlers:
            self.end("drained")

    def on_reset(self, stream_id: int) -> None:
        # A client that gives up its calls as fast as it makes them costs the others their time (CVE-2023-44487).
        if self.closed_reason is None and not self._resets.take(anyio.current_time()):
            log.warning("grpc client resets too many calls, and is cut off", peer=self._peer)
            self._server.rapid_resets += 1
            self.protocol.send_goaway(self.protocol.highest_inbound_stream_id, ErrorCode.ENHANCE_YOUR_CALM)
            self.end("too many calls were reset")

    def on_stall(self) -> None:
        self._server.stalled += 1

    def on_pause(self) -> None:
        self._server.paused += 1

    def on_goaway(self, goaway: GoAwayReceived) -> None:
        if not self._handlers:
            self.end("the peer sent GOAWAY")


def _refusal(headers: Headers) -> list[tuple[bytes, bytes]] | None:
    """The HTTP answer to what is no gRPC request at all."""
    if header(headers, b":method") != b"POST":
        return [(b":status", b"405"), (b"allow", b"POST")]
    if not is_grpc(header(headers, b"content-type") or b""):
        return [(b":status", b"415"), (b"accept", b"application/grpc"), (b"grpc-accept-encoding", ACCEPT_ENCODING)]
    return None


class GrpcServer:
    """Serves `handlers`, one async function per method, on any number of connections.

    A handler takes a `ServerCall`. It is cancelled when the client resets the call or disconnects, or the call's
    deadline passes. GrpcError becomes the call's status; any other exception becomes UNKNOWN, without its text, and is
    logged. Neither touches another call.

    Attributes:
        crowding: how many connections were refused because there were `max_connections`.
        stalled: calls and connections that ended because the client did not read.
        paused: times that a client was made to wait with what it sends.
        rapid_resets: connections that ended because the client reset calls too fast.
    """

    def __init__(
        self,
        handlers: Routes,
        options: GrpcOptions | None = None,
        *,
        max_connections: int = 4096,
        max_client_connections: int | None = None,
    ) -> None:
        self.crowding = Crowding("grpc", max_connections, max_client_connections)
        self.stalled = 0
        self.paused = 0
        self.rapid_resets = 0
        self.options = options or GrpcOptions()
        self.draining = anyio.Event()
        """Set by `drain`. Long-lived calls watch it (`ServerCall.draining`)."""
        self._routes = {method.path: (method, handler) for method, handler in handlers.items()}
        self._connections: set[_ServerConnection] = set()
        self._accepting: set[anyio.CancelScope] = set()
        self._idle: anyio.Event | None = None

    @property
    def services(self) -> Sequence[str]:
        """The names of the services that have handlers, sorted."""
        return sorted({method.service for method, _ in self._routes.values()})

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def route(self, path: str) -> tuple[Method[Any, Any] | None, Handler | None]:
        """The method and handler of a path."""
        return self._routes.get(path, (None, None))

    async def serve(
        self,
        listeners: Iterable[socket.socket],
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept on non-blocking listening sockets, which it closes, until cancelled or until `drain` has finished.

        With `tls`, connections are TLS with the context that it gives for each. Runs on trio; `serve_stream` runs on
        any loop.

        Raises:
            OSError: a listener is of no use any more.
        """
        listeners = list(listeners)
        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, nursery, partial(self._serve_socket, tls))
                task_status.started()
        finally:
            for listener in listeners:
                close(listener)

    async def _accept(self, listener: socket.socket, nursery: trio.Nursery, handle: Handle) -> None:
        with anyio.CancelScope() as scope:
            self._accepting.add(scope)
            if self.draining.is_set():
                scope.cancel()
            try:
                await accept_loop(listener, nursery, handle, on_error=_log_accept_error)
            finally:
                self._accepting.discard(scope)
                close(listener)

    async def _serve_socket(
        self, tls: Callable[[], ssl.SSLContext] | None, client: socket.socket, peer: object
    ) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
        address = format_address(peer)
        if tls is None:
            await self.serve_stream(TrioByteStream(stream, client), address)
            return
        with self.crowding.place(address) as place:
            if not place:
                await stream.aclose()
                return
            try:
                secured = await accept_tls(stream, tls())
            except Exception:
                log.exception("grpc handshake failed", peer=address)
                return
            if secured is not None:
                await self._serve(TrioByteStream(secured), address, certificate_of(secured))

    async def serve_stream(self, stream: ByteStream | trio.abc.Stream, peer: str = "unknown") -> None:
        """Serve one connection until it ends, and close it. `peer` is what calls see as `ServerCall.peer`."""
        with self.crowding.place(peer) as place:
            if place:
                await self._serve(stream, peer, {})
            else:
                await stream.aclose()

    async def _serve(self, stream: ByteStream | trio.abc.Stream, peer: str, certificate: Mapping[str, object]) -> None:
        connection = _ServerConnection(adapt(stream), self, peer, certificate)
        self._connections.add(connection)
        try:
            await connection.run()
        except Exception:
            # A fault in serving one connection must not end the others.
            log.exception("grpc connection failed", peer=peer)
        finally:
            self._connections.discard(connection)
            if not self._connections and self._idle is not None:
                self._idle.set()

    async def drain(self) -> None:
        """Stop accepting, tell every client (GOAWAY), and wait until the last call and connection ended.

        The deadline is the caller's cancel scope: when that is cancelled, what is left is ended at once, and clients
        see UNAVAILABLE.
        """
        self.draining.set()
        for scope in self._accepting:
            scope.cancel()
        for connection in list(self._connections):
            connection.drain()
        try:
            await self._wait_idle()
        finally:
            for connection in list(self._connections):
                connection.end("drained")

    async def _wait_idle(self) -> None:
        while self._connections:
            if self._idle is None or self._idle.is_set():
                self._idle = anyio.Event()
            await self._idle.wait()


def _log_accept_error(error: OSError) -> None:
    log.warning("grpc accept failed", error=str(error))
