"""The admin server: a few read-only pages over HTTP/1.1, for people, probes and Prometheus.

It is small and strict, and never in the way of traffic: routes are synchronous functions that read state (one that has
to ask another process is asynchronous), connections are few, and every wait for a client has a deadline. When all
places are taken, whoever has been idle the longest makes room, so that clients that keep connections open never shut
out a probe.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Generator, Mapping, Sequence
from contextlib import aclosing
from functools import partial

import trio
from trio.abc import HalfCloseableStream

from meshlocal.admin.access import AdminAccess
from meshlocal.admin.messages import Head, Request, RequestReader, Response, encode, encode_head
from meshlocal.admin.streaming import Stream, StreamRoute
from meshlocal.net.listen import accept_loop
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.slices import in_slices
from meshlocal.policy.exposure import is_loopback
from meshlocal.policy.steps import Steps

MAX_CONNECTIONS = 64
MAX_STREAMS = 16
"""Answers that go on, at once: they make room for nobody, so they may not take all places."""
HEAD_TIMEOUT = 10.0
"""Seconds that a request's head may take."""
IDLE_TIMEOUT = 75.0
"""Seconds that a connection may stay open between requests."""
SEND_TIMEOUT = 30.0
"""Seconds that a client may take to read a response."""
LINGER_TIMEOUT = 1.0
"""Seconds, after a last response, for the client to read it and close."""

_READ_SIZE = 4096
_LINGER_BYTES = 1 << 20

Route = Callable[[Request], "Response | Steps[Response]"]
"""Answers one path's GET and HEAD requests; it reads state and does not block. What takes long is done in steps, and so
in slices between which traffic goes on."""

AsyncRoute = Callable[[Request], Awaitable[Response]]
"""The same, of what others know; its waits have deadlines of its own."""

log = get_log(__name__)


class AdminServer:
    """Serves routes by their exact paths.

    Args:
        routes: by path.
        access: who may read them.
        streams: routes to what goes on, by path.
        changing: paths of routes by which PUT changes something, for who asks at a loopback address.
        max_connections: that may be open at once.
        max_streams: how many of them may have an answer that goes on.
    """

    def __init__(
        self,
        routes: Mapping[str, Route | AsyncRoute],
        access: AdminAccess,
        *,
        streams: Mapping[str, StreamRoute] | None = None,
        changing: Collection[str] = (),
        max_connections: int = MAX_CONNECTIONS,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self._routes = dict(routes)
        self._access = access
        self._limit = max_connections
        self._open: set[_Place] = set()
        self._idle: dict[_Place, trio.CancelScope] = {}
        self._refusing = 0
        self._max_streams = max_streams
        self._stream_routes = dict(streams or {})
        self._changing = frozenset(changing)
        self._streams = 0
        self._accept_failed = RateLimited(log, logging.WARNING, "admin server cannot accept", interval=10)

    async def serve(
        self, listeners: Sequence[socket.socket], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled. The listeners stay the caller's."""
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                accept = partial(accept_loop, on_error=self._report)
                nursery.start_soon(accept, listener, nursery, self._handle)
            task_status.started()

    async def serve_stream(self, stream: trio.abc.Stream, local: str = "127.0.0.1") -> None:
        """Serve one connection to its end, whatever its client does. The caller closes the stream.

        Args:
            stream: the connection.
            local: the address that it was made to.
        """
        try:
            if self._make_room():
                place = _Place()
                self._open.add(place)
                try:
                    await self._converse(stream, place, local)
                finally:
                    self._open.discard(place)
            elif self._refusing < self._limit:
                self._refusing += 1
                try:
                    await _refuse(stream, Response.text("too many connections", 503))
                finally:
                    self._refusing -= 1
            # Beyond both, the connection is closed without a word.
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client left
        except Exception:  # a fault of ours in one connection ends that connection only
            log.exception("admin connection failed")

    async def _handle(self, client: socket.socket, _: object) -> None:
        local = client.getsockname()[0]
        with trio.socket.from_stdlib_socket(client) as sock:
            stream: trio.abc.Stream = trio.SocketStream(sock)
            if (context := self._access.context) is not None:
                # The handshake goes with the first bytes that are waited for, within the time of a head.
                stream = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
            await self.serve_stream(stream, local)

    def _make_room(self) -> bool:
        """Whether one more connection may be served; the one that was idle the longest goes for it if need be."""
        if len(self._open) >= self._limit and self._idle:
            place = next(iter(self._idle))
            self._open.discard(place)
            self._idle.pop(place).cancel()
        return len(self._open) < self._limit

    async def _converse(self, stream: trio.abc.Stream, place: _Place, local: str) -> None:
        reader = RequestReader()
        deadline = trio.current_time() + HEAD_TIMEOUT
        idle = False
        while place in self._open:
            data = b""
            with trio.CancelScope(deadline=deadline) as scope:
                if not reader.in_head:
                    self._idle[place] = scope
                try:
                    data = bytes(await stream.receive_some(_READ_SIZE))
                finally:
                    self._idle.pop(place, None)
            if scope.cancelled_caught:
                if reader.in_head:
                    await _refuse(stream, Response.text("the request's head took too long", 408))
                return
            if not data:
                return
            heads = reader.feed(data)
            for head in heads:
                response = await self._answer(head, local)
                if isinstance(response, Stream):
                    await self._stream(stream, response, head.request.path)
                    return
                if not await _send(stream, response):
                    return
                if not head.keep_alive:
                    await _linger(stream)
                    return
            if reader.refusal is not None:
                await _refuse(stream, reader.refusal)
                return
            if heads:
                idle = not reader.in_head
                deadline = trio.current_time() + (IDLE_TIMEOUT if idle else HEAD_TIMEOUT)
            elif idle:
                idle = False
                deadline = trio.current_time() + HEAD_TIMEOUT

    async def _stream(self, stream: trio.abc.Stream, response: Stream, path: str) -> None:
        """Send an answer that goes on, until its end or until its client leaves."""
        self._streams += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_left, stream, nursery.cancel_scope)
                try:
                    async with aclosing(response.pieces) as pieces:
                        going_on = await _send(stream, encode_head(Response(content_type=response.content_type)))
                        while going_on and (piece := await anext(pieces, None)) is not None:
                            going_on = await _send(stream, piece)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass  # the client left
                except Exception:  # a route's fault is its own, here too
                    log.exception("admin route failed", path=path)
                nursery.cancel_scope.cancel()
        finally:
            self._streams -= 1

    async def _answer(self, head: Head, local: str) -> bytes | Stream:
        try:
            response = await self._respond(head, local)
            if not isinstance(response, Stream):
                return encode(response, to=head)
            if self._streams < self._max_streams:
                return response
            await response.pieces.aclose()
            return encode(Response.text("too many pages are followed already", 503), to=head)
        except Exception:  # a route's fault is its own; the server and its other routes go on
            log.exception("admin route failed", path=head.request.path)
            return encode(Response.text("this page failed; see the log", 500), to=head)

    async def _respond(self, head: Head, local: str) -> Response | Stream:
        request = head.request
        refusal = self._access.refusal(request, local)
        if refusal is not None:
            return refusal
        methods = ("GET", "HEAD", "PUT") if request.path in self._changing else ("GET", "HEAD")
        if request.method not in methods:
            refusal = Response.text(f"{request.method} is not allowed here", 405)
            return refusal._replace(headers=(("Allow", ", ".join(methods)),))
        if request.method == "PUT" and not is_loopback(local):
            return Response.text("only who is on this machine may change this, at a loopback address", 403)
        if head.has_body:
            return Response.text("a request with a body is not served here", 413)
        if (stream := self._stream_routes.get(request.path)) is not None:
            return await stream(request)
        route = self._routes.get(request.path)
        if route is None:
            paths = sorted([*self._routes, *self._stream_routes])
            return Response.text("\n".join(["no such page; there are:", *paths]), 404)
        return await answer(route, request)

    def _report(self, error: OSError) -> None:
        self._accept_failed(trio.current_time(), errno=errno.errorcode.get(error.errno or 0, ""), error=error)


async def answer(route: Route | AsyncRoute, request: Request) -> Response:
    """What a route answers, of whatever kind it is."""
    response = route(request)
    if isinstance(response, Response):
        return response
    return await (in_slices(response) if isinstance(response, Generator) else response)


class _Place:
    """One connection among those that may be open."""

    __slots__ = ()


async def _wait_left(stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
    """Cancel once the client has closed; what it says until then is for nobody."""
    try:
        while await stream.receive_some(_READ_SIZE):
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


async def _send(stream: trio.abc.Stream, data: bytes) -> bool:
    with trio.move_on_after(SEND_TIMEOUT) as scope:
        await stream.send_all(data)
    return not scope.cancelled_caught


async def _refuse(stream: trio.abc.Stream, response: Response) -> None:
    if await _send(stream, encode(response)):
        await _linger(stream)


async def _linger(stream: trio.abc.Stream) -> None:
    """End our side, and read on for a moment.

    To close with bytes unread would reset the connection, and the client might lose the response (RFC 9112, 9.6).
    """
    with trio.move_on_after(LINGER_TIMEOUT):
        if isinstance(stream, HalfCloseableStream):
            await stream.send_eof()
        read = 0
        while read < _LINGER_BYTES and (data := await stream.receive_some(_READ_SIZE)):
            read += len(data)
