"""Connections of an HTTP transport to one instance.

httpcore speaks HTTP/1.1 on each connection. Which connection a request takes is decided here: httpcore's own pool is
for many hosts, and looks through all of its requests and connections for each.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from meshlocal.library.http_kind import HttpKind
from meshlocal.library.http_wire import PlainWire, Record, Wire
from meshlocal.net.dial import Connecting, classify_connect_error, connect_socket
from meshlocal.net.sockets import is_unix
from meshlocal.policy.limits import Circuit, Limit

if TYPE_CHECKING:
    import httpcore
    import httpx


Key = tuple["httpcore.Origin", str]
"""What a connection is for: scheme and address, and the name that a certificate proved; empty without TLS."""


class Connection:
    """One connection.

    Args:
        http: HTTP over it.
        wire: its bytes.
        key: what it is for.

    Attributes:
        http, wire, key: as given.
        idle_since: when it was used last; infinite while it is.
    """

    __slots__ = ("http", "idle_since", "key", "wire")

    def __init__(self, http: httpcore.AsyncHTTP11Connection, wire: Wire, key: Key) -> None:
        self.http = http
        self.wire = wire
        self.key = key
        self.idle_since = math.inf


class _Waiter:
    """A request that waits for a connection, or for room for another.

    Attributes:
        key: what it is for.
        event: set once it has something.
        found: the connection that it was given.
        room: it was given room for one.
    """

    __slots__ = ("event", "found", "key", "room")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.event = anyio.Event()
        self.found: Connection | None = None
        self.room = False


class InstancePool:
    """Connections to one instance. Who waits for one is given it, in the order in which they came.

    Args:
        kind: whose httpcore speaks HTTP.
        ssl_context: for https; None: the system's authorities.
        limits: how many, and how long an unused one is kept.
        path: the instance's Unix socket, for http; None: it has none.

    Attributes:
        path: as given.
        connections: those that are open.
        in_use: requests under way, until their responses are closed.
        retired: discovery removed the instance (H2), or the client was closed.
    """

    def __init__(
        self, kind: HttpKind, ssl_context: ssl.SSLContext | None, limits: httpx.Limits, path: str | None = None
    ) -> None:
        self.path = path
        self.connections: set[Connection] = set()
        self.in_use = 0
        self.retired = False
        self._kind = kind
        self._core: Any = kind.httpcore
        self._ssl_context = ssl_context
        self._most = math.inf if limits.max_connections is None else limits.max_connections
        self._most_idle = math.inf if limits.max_keepalive_connections is None else limits.max_keepalive_connections
        self._expiry = limits.keepalive_expiry
        self._idle: list[Connection] = []
        self._opening = 0
        self._forgotten: list[Connection] = []
        """Those that count no more, and have yet to be closed, which takes a wait."""
        self._waiting: deque[_Waiter] = deque()

    @property
    def idle(self) -> int:
        """How many connections wait for a request."""
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection."""
        return len(self._waiting)

    async def send(
        self, request: httpcore.Request, record: Record, circuit: Circuit | None = None
    ) -> tuple[httpcore.Response, Connection]:
        """Send a request; returns once the response's head has come.

        Args:
            request: what to send.
            record: is told what the attempt does.
            circuit: counts those that wait for a connect; None: nobody does.

        Returns:
            The response, and its connection, which is to be `put` back once the response is closed.

        Raises:
            httpx.TransportError: there was none; the record says how far the request came.
        """
        with self._kind.as_httpx_errors():
            connection = await self._take(request, record, circuit)
            connection.wire.record = record
            try:
                response: httpcore.Response = await connection.http.handle_async_request(request)
                if not record.received:
                    # httpcore held it when the request was sent: an answer to nothing, or to somebody else.
                    raise self._core.RemoteProtocolError("a response that nobody asked for")
            except BaseException as error:
                await self._close([connection])
                if isinstance(error, self._core.ConnectionNotAvailable):
                    raise self._core.ConnectError("the connection was closed meanwhile") from error
                raise
            return response, connection

    async def put(self, connection: Connection) -> None:
        """Have a connection back whose response is closed."""
        connection.wire.record = None
        if connection not in self.connections:
            return
        if connection.http.is_idle() and not self.retired and (self._waiting or len(self._idle) < self._most_idle):
            self._lay_aside(connection)
            if self._forgotten:
                await self._close(())
        else:
            await self._close([connection])

    async def close_idle(self, before: float = math.inf) -> None:
        """Close connections without a request that became idle before a time."""
        await self._close([each for each in self._idle if each.idle_since < before])

    async def aclose(self) -> None:
        """Close every connection of the pool; who waits for one gets none."""
        self.retired = True
        waiting, self._waiting = self._waiting, deque()
        for waiter in waiting:
            waiter.event.set()
        await self._close(list(self.connections))

    async def _close(self, connections: Iterable[Connection]) -> None:
        """Close these, which count no more from here on, whatever becomes of the closing."""
        left, self._forgotten = self._forgotten, []
        for connection in connections:
            if connection in self.connections:
                self.connections.remove(connection)
                if connection in self._idle:
                    self._idle.remove(connection)
                if not connection.wire.close_now():
                    left.append(connection)
        self._serve_waiting()
        with anyio.CancelScope(shield=True):
            for connection in left:
                await connection.http.aclose()

    def _lay_aside(self, connection: Connection) -> None:
        if connection not in self.connections:
            return  # the pool was closed meanwhile
        connection.idle_since = anyio.current_time()
        self._idle.append(connection)
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        """Give to those that wait what there is, the first one first."""
        while self._waiting:
            waiter = self._waiting[0]
            waiter.found = self._reuse(waiter.key)
            if waiter.found is None:
                if not self._has_room():
                    return
                waiter.room = True
                self._opening += 1
            self._waiting.popleft().event.set()

    def _reuse(self, key: Key) -> Connection | None:
        """The connection for this that was used last, of those that did not end meanwhile."""
        for connection in reversed(self._idle):
            if connection.key == key:
                if not connection.http.has_expired():
                    self._idle.remove(connection)
                    connection.idle_since = math.inf
                    return connection
                self._forget(connection)
        return None

    def _has_room(self) -> bool:
        """Whether another one may be made; one that is idle, and for something else, gives way to it."""
        if len(self.connections) + self._opening >= self._most and self._idle:
            self._forget(self._idle[0])
        return len(self.connections) + self._opening < self._most

    def _forget(self, connection: Connection) -> None:
        """Close an idle one; what takes a wait is done when the next one is put back or closed."""
        self._idle.remove(connection)
        self.connections.discard(connection)
        if not connection.wire.close_now():
            self._forgotten.append(connection)

    async def _take(self, request: httpcore.Request, record: Record, circuit: Circuit | None) -> Connection:
        times = request.extensions["timeout"]
        key = self._key(request)
        found: Connection | None = None
        if self._waiting or ((found := self._reuse(key)) is None and not self._has_room()):
            found = await self._wait(key, times.get("pool"))
        elif found is None:
            self._opening += 1
        if found is not None:
            return found
        # There is room for one, which is counted in `_opening`.
        try:
            wire = await self._connect(request, key, record, circuit, times.get("connect"))
        except BaseException:
            self._opening -= 1
            self._serve_waiting()
            raise
        self._opening -= 1
        http = self._core.AsyncHTTP11Connection(origin=key[0], stream=wire, keepalive_expiry=self._expiry)
        made = Connection(http, wire, key)
        self.connections.add(made)
        return made

    def _key(self, request: httpcore.Request) -> Key:
        if request.url.scheme != b"https":
            return request.url.origin, ""
        return request.url.origin, str(request.extensions.get("sni_hostname") or request.url.host.decode())

    async def _wait(self, key: Key, limit: float | None) -> Connection | None:
        """Wait for a connection, or for room for another one (None), which is counted in `_opening` then."""
        waiter = _Waiter(key)
        self._waiting.append(waiter)
        try:
            with anyio.fail_after(limit):
                await waiter.event.wait()
        except BaseException as error:
            # What it was given just now is for others.
            if waiter.found is not None:
                self._lay_aside(waiter.found)
            elif waiter.room:
                self._opening -= 1
                self._serve_waiting()
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
            if isinstance(error, TimeoutError):
                raise self._core.PoolTimeout("all connections to the instance are in use") from error
            raise
        if waiter.found is None and not waiter.room:
            raise self._core.ConnectError("the client was closed")
        return waiter.found

    async def _connect(
        self, request: httpcore.Request, key: Key, record: Record, circuit: Circuit | None, limit: float | None
    ) -> Wire:
        record.fresh = True
        if circuit is not None and not circuit.enter(Limit.WAITING):
            record.connect_error = f"limit_{Limit.WAITING}"
            raise self._core.ConnectError("as many requests wait for an instance as its limits allow")
        try:
            with anyio.fail_after(limit):
                # What https is spoken at is the port.
                path = self.path if request.url.scheme == b"http" else None
                sock = await _connect(request.url.host.decode(), request.url.port or 0, path)
        except TimeoutError as error:
            record.connect_error = "timeout"
            raise self._core.ConnectTimeout("no answer in time") from error
        except OSError as error:
            record.connect_error = classify_connect_error(error)
            raise self._core.ConnectError(error.strerror or str(error)) from error
        finally:
            if circuit is not None:
                circuit.leave(Limit.WAITING)
        record.by_socket = is_unix(sock)
        wire = PlainWire(sock, self._core)
        if request.url.scheme != b"https":
            return wire
        if self._ssl_context is None:
            self._ssl_context = self._core.default_ssl_context()
        self._ssl_context.set_alpn_protocols(["http/1.1"])
        return await wire.start_tls(self._ssl_context, key[1], limit)


async def _connect(host: str, port: int, path: str | None) -> socket.socket:
    await anyio.lowlevel.checkpoint()
    connecting: Connecting[object] = connect_socket(path) or Connecting(host, port)
    try:
        if connecting.pending:
            await anyio.wait_writable(connecting.socket)
        connecting.finish()
    except BaseException:
        connecting.socket.close()
        raise
    return connecting.socket
