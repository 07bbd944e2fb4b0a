"""Connections of the httpx transport: one pool for each instance, and what each attempt did on its connection.

httpcore keeps the pools and speaks HTTP. Its network streams are wrapped here, to know of an attempt what A3 asks:
whether a byte of the request may have been sent, and whether one of a response came. An attempt runs in one task, and
finds its own record in a context variable.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import anyio
import anyio.lowlevel
import httpcore
import httpx
from anyio.abc import ByteStream, SocketAttribute, SocketStream, UNIXSocketStream
from anyio.streams.tls import TLSAttribute, TLSStream

from meshlocal.net.dial import Connecting, classify_connect_error, connect_socket
from meshlocal.net.sockets import is_unix
from meshlocal.policy.limits import Circuit, Limit

_ERRORS: dict[type[Exception], type[httpx.TransportError]] = {
    httpcore.ConnectTimeout: httpx.ConnectTimeout,
    httpcore.ReadTimeout: httpx.ReadTimeout,
    httpcore.WriteTimeout: httpx.WriteTimeout,
    httpcore.PoolTimeout: httpx.PoolTimeout,
    httpcore.ConnectError: httpx.ConnectError,
    httpcore.ReadError: httpx.ReadError,
    httpcore.WriteError: httpx.WriteError,
    httpcore.UnsupportedProtocol: httpx.UnsupportedProtocol,
    httpcore.LocalProtocolError: httpx.LocalProtocolError,
    httpcore.RemoteProtocolError: httpx.RemoteProtocolError,
}


class Record:
    """What one attempt did on its connection.

    Args:
        circuit: counts those that wait for a connect; None: nobody does.
        path: the instance's Unix socket; None: it has none.

    Attributes:
        by_socket: the connection was made by it.
        fresh: the connection was made for it.
        connect_error: how the connect failed, in a word; empty if it did not.
        sent: a byte of the request may have been sent.
        received: bytes of the response.
        stream: the connection; None before the first byte was sent.
        asked: when the last byte of the request was sent so far, by anyio.current_time(); None before the first.
    """

    __slots__ = ("asked", "by_socket", "circuit", "connect_error", "fresh", "path", "received", "sent", "stream")

    def __init__(self, circuit: Circuit | None = None, path: str | None = None) -> None:
        self.circuit = circuit
        self.path = path
        self.by_socket = False
        self.asked: float | None = None
        self.fresh = False
        self.connect_error = ""
        self.sent = False
        self.received = 0
        self.stream: _Stream | None = None


_record: ContextVar[Record | None] = ContextVar("meshlocal_attempt", default=None)


@contextmanager
def recorded(record: Record) -> Iterator[None]:
    """Connections that this task uses in the block note in the record what they do."""
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)


@contextmanager
def as_httpx_errors() -> Iterator[None]:
    """httpcore's errors become httpx's of the same name."""
    try:
        yield
    except Exception as error:
        kind = _ERRORS.get(type(error))
        if kind is None:
            raise
        raise kind(str(error)) from error


class SupportsFileno(Protocol):
    """A socket of whatever loop."""

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        ...


class InstancePool:
    """Connections to one instance.

    Args:
        ssl_context: for https; None: the system's authorities.
        limits: how many, and how long an unused one is kept.

    Attributes:
        streams: those that are open.
        in_use: requests under way, until their responses are closed.
        retired: discovery removed the instance (H2).
    """

    def __init__(self, ssl_context: ssl.SSLContext | None, limits: httpx.Limits) -> None:
        self.streams: set[_Stream] = set()
        self.in_use = 0
        self.retired = False
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_Backend(self),
        )

    async def send(self, request: httpcore.Request, record: Record) -> httpcore.Response:
        """Send a request; returns once the response's head has come.

        Raises:
            httpx.TransportError: it did not; the record says how far the request came.
        """
        with as_httpx_errors(), recorded(record):
            return await self._pool.handle_async_request(request)

    async def close_idle(self, before: float = math.inf) -> None:
        """Close connections without a request that became idle before a time."""
        for stream in [each for each in self.streams if not each.busy and each.idle_since < before]:
            await stream.aclose()

    async def aclose(self) -> None:
        """Close every connection of the pool."""
        await self._pool.aclose()


class _Stream(httpcore.AsyncNetworkStream):
    """A connection of one pool.

    Attributes:
        busy: a request is under way on it.
        idle_since: when it was busy last.
    """

    def __init__(self, stream: ByteStream, pool: InstancePool) -> None:
        self._stream = stream
        self._pool = pool
        self._closed = False
        self.busy = True
        self.idle_since = math.inf
        pool.streams.add(self)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's
        try:
            with anyio.fail_after(timeout):
                received = await self._stream.receive(max_bytes)
        except anyio.EndOfStream:
            return b""
        except TimeoutError as error:
            raise httpcore.ReadTimeout("no byte in time") from error
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpcore.ReadError(_why(error)) from error
        if (record := _record.get()) is not None:
            record.received += len(received)
        return received

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's
        if not buffer:
            return
        record = _record.get()
        if record is not None and not self._closed:
            record.sent = True
            record.stream = self
            self.busy = True
        try:
            with anyio.fail_after(timeout):
                await self._stream.send(buffer)
            if record is not None:
                record.asked = anyio.current_time()
        except TimeoutError as error:
            raise httpcore.WriteTimeout("the instance did not read in time") from error
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpcore.WriteError(_why(error)) from error

    def release(self) -> None:
        """Note that the connection's request is over: it is idle from now on."""
        self.busy = False
        self.idle_since = anyio.current_time()

    async def aclose(self) -> None:
        self._closed = True
        self._pool.streams.discard(self)
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
    ) -> httpcore.AsyncNetworkStream:
        try:
            with anyio.fail_after(timeout):
                stream = await TLSStream.wrap(
                    self._stream, hostname=server_hostname, ssl_context=ssl_context, standard_compatible=False
                )
        except BaseException as error:
            self._pool.streams.discard(self)
            await anyio.aclose_forcefully(self._stream)
            if isinstance(error, TimeoutError):
                raise httpcore.ConnectTimeout("no TLS in time") from error
            if isinstance(error, ssl.SSLError | anyio.BrokenResourceError | anyio.EndOfStream):
                raise httpcore.ConnectError(f"TLS: {_why(error)}") from error
            raise
        self._pool.streams.discard(self)
        return _Stream(stream, self._pool)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable" and self._closed:
            return True  # httpcore's question whether an unused connection has ended
        if info == "ssl_object":
            return self._stream.extra(TLSAttribute.ssl_object, None)
        if info == "client_addr":
            return self._stream.extra(SocketAttribute.local_address, None)
        if info == "server_addr":
            return self._stream.extra(SocketAttribute.remote_address, None)
        sock = self._stream.extra(SocketAttribute.raw_socket, None)
        if info == "is_readable":
            return sock is None or _is_readable(sock)
        return sock if info == "socket" else None


class _Backend(httpcore.AsyncNetworkBackend):
    """Connects as the proxy does, on any loop."""

    def __init__(self, pool: InstancePool) -> None:
        self._pool = pool

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        record = _record.get() or Record()
        record.fresh = True
        circuit = record.circuit
        if circuit is not None and not circuit.enter(Limit.WAITING):
            record.connect_error = f"limit_{Limit.WAITING}"
            raise httpcore.ConnectError("as many requests wait for an instance as its limits allow")
        try:
            with anyio.fail_after(timeout):
                sock = await _connect(host, port, record.path)
                record.by_socket = is_unix(sock)
                kind = UNIXSocketStream if record.by_socket else SocketStream
                stream = await kind.from_socket(sock)
        except TimeoutError as error:
            record.connect_error = "timeout"
            raise httpcore.ConnectTimeout("no answer in time") from error
        except OSError as error:
            record.connect_error = classify_connect_error(error)
            raise httpcore.ConnectError(error.strerror or str(error)) from error
        finally:
            if circuit is not None:
                circuit.leave(Limit.WAITING)
        return _Stream(stream, self._pool)


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


def _is_readable(sock: SupportsFileno) -> bool:
    """Whether an unused connection has ended, or brought what nobody asked for."""
    number = sock.fileno()
    if number < 0:
        return True
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))


def _why(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__
