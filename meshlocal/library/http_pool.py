"""Connections of an HTTP transport to one instance, and what each attempt did on its own.

httpcore speaks HTTP/1.1 on each connection. Which connection a request takes is decided here: httpcore's own pool is
for many hosts, and looks through all of its requests and connections for each.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections import deque
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


class Connection:
    """One connection.

    Args:
        http: HTTP over it.
        wire: its bytes.

    Attributes:
        http, wire: as given.
        idle_since: when it was used last; infinite while it is.
    """

    __slots__ = ("http", "idle_since", "wire")

    def __init__(self, http: httpcore.AsyncHTTP11Connection, wire: Wire) -> None:
        self.http = http
        self.wire = wire
        self.idle_since = math.inf


class InstancePool:
    """Connections to one instance.

    Args:
        kind: whose httpcore speaks HTTP.
        ssl_context: for https; None: the system's authorities.
        limits: how many, and how long an unused one is kept.
        path: the instance's Unix socket, for http; None: it has none.

    Attributes:
        path: as given.
        connections: those that are open.
        in_use: requests under way, until their responses are closed.
        retired: discovery removed the instance (H2).
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
        self._waiting: deque[anyio.Event] = deque()

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
                return await connection.http.handle_async_request(request), connection
            except BaseException:
                # It has closed itself.
                self._drop(connection)
                raise

    async def put(self, connection: Connection) -> None:
        """Have a connection back whose response is closed."""
        connection.wire.record = None
        if connection.http.is_idle() and not self.retired and len(self._idle) < self._most_idle:
            connection.idle_since = anyio.current_time()
            self._idle.append(connection)
            self._wake()
            return
        if connection.http.is_closed():
            self._drop(connection)
        else:
            await self._close([connection])

    async def close_idle(self, before: float = math.inf) -> None:
        """Close connections without a request that became idle before a time."""
        old = [each for each in self._idle if each.idle_since < before]
        # All at once: another task may take those that are left, or close them.
        self._idle = [each for each in self._idle if each.idle_since >= before]
        await self._close(old)

    async def aclose(self) -> None:
        """Close every connection of the pool."""
        self.retired = True
        self._idle.clear()
        await self._close(list(self.connections))

    async def _close(self, connections: list[Connection]) -> None:
        with anyio.CancelScope(shield=True):
            for connection in connections:
                self._drop(connection)
                await connection.http.aclose()

    def _drop(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()

    async def _take(self, request: httpcore.Request, record: Record, circuit: Circuit | None) -> Connection:
        times = request.extensions["timeout"]
        found = await self._reuse()
        if found is None and len(self.connections) + self._opening >= self._most:
            try:
                with anyio.fail_after(times.get("pool")):
                    found = await self._wait()
            except TimeoutError as error:
                raise self._core.PoolTimeout("all connections to the instance are in use") from error
        if found is not None:
            return found
        self._opening += 1
        try:
            wire = await self._connect(request, record, circuit, times.get("connect"))
        except BaseException:
            self._opening -= 1
            self._wake()
            raise
        self._opening -= 1
        origin = request.url.origin
        http = self._core.AsyncHTTP11Connection(origin=origin, stream=wire, keepalive_expiry=self._expiry)
        made = Connection(http, wire)
        self.connections.add(made)
        return made

    async def _reuse(self) -> Connection | None:
        """The connection that was used last, of those that did not end meanwhile."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.http.has_expired():
                connection.idle_since = math.inf
                return connection
            await self._close([connection])
        return None

    async def _wait(self) -> Connection | None:
        """Wait for a connection, or for room for another one; those who came first come first."""
        event = anyio.Event()
        self._waiting.append(event)
        while True:
            try:
                await event.wait()
            except BaseException:
                if event.is_set():
                    self._wake()  # it was meant for somebody who waits no more
                else:
                    self._waiting.remove(event)
                raise
            found = await self._reuse()
            if found is not None or len(self.connections) + self._opening < self._most:
                return found
            event = anyio.Event()
            self._waiting.appendleft(event)

    async def _connect(
        self,
        request: httpcore.Request,
        record: Record,
        circuit: Circuit | None,
        limit: float | None,
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
        name = request.extensions.get("sni_hostname") or request.url.host.decode()
        return await wire.start_tls(self._ssl_context, name, limit)


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
