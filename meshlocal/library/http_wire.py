"""The bytes of one connection to an instance, as httpcore's connection reads and writes them, on any loop.

A read or a write that need not wait does not: a deadline, and a turn of the loop, cost more than the call.
"""

from __future__ import annotations

import select
import socket
import ssl
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream, SocketAttribute, SocketStream, UNIXSocketStream
from anyio.streams.tls import TLSAttribute, TLSStream

from meshlocal.net.sockets import is_unix

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


WRITES = 4
"""Writes in a row that wait for nothing, before others have their turn, and cancellation is looked at."""


class Record:
    """What one attempt did on its connection.

    Attributes:
        fresh: the connection was made for it.
        by_socket: it was made by the instance's Unix socket.
        connect_error: how the connect failed, in a word; empty if it did not.
        sent: a byte of the request may have been sent.
        received: bytes of the response.
        asked: when the last byte of the request was sent so far, by anyio.current_time(); None before the first.
    """

    __slots__ = ("asked", "by_socket", "connect_error", "fresh", "received", "sent")

    def __init__(self) -> None:
        self.asked: float | None = None
        self.by_socket = False
        self.fresh = False
        self.connect_error = ""
        self.sent = False
        self.received = 0


class SupportsFileno(Protocol):
    """A socket of whatever loop."""

    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        ...


class Wire:
    """A connection. httpcore's `AsyncNetworkStream`, by its methods; its names and timeouts are httpcore's.

    Args:
        httpcore: whose errors are raised.

    Attributes:
        record: of the attempt that uses the connection.
    """

    def __init__(self, httpcore: ModuleType) -> None:
        self._core = httpcore
        self._closed = False
        self.record: Record | None = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's
        """What comes next; empty at the stream's end."""
        try:
            received = await self._read(max_bytes, timeout)
        except TimeoutError as error:
            raise self._core.ReadTimeout("no byte in time") from error
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise self._core.ReadError(_why(error)) from error
        if self.record is not None:
            self.record.received += len(received)
        return received

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's
        """Send it all."""
        if not buffer:
            return
        record = self.record
        try:
            await self._may_write()
            if record is not None and not self._closed:
                record.sent = True
            await self._write(buffer, timeout)
        except TimeoutError as error:
            raise self._core.WriteTimeout("the instance did not read in time") from error
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise self._core.WriteError(_why(error)) from error
        if record is not None:
            record.asked = anyio.current_time()

    async def _may_write(self) -> None:
        """Be cancelled, if that is to be, before anything is sent."""

    async def _read(self, size: int, limit: float | None) -> bytes:
        raise NotImplementedError

    async def _write(self, buffer: bytes, limit: float | None) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close it, with what took its place."""
        raise NotImplementedError

    def close_now(self) -> bool:
        """Close it without a wait; False if that cannot be done."""
        raise NotImplementedError

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
    ) -> Wire:
        """TLS over it, which takes its place."""
        raise NotImplementedError

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`, which of an unused connection means that it has ended; `socket`, `client_addr`, `server_addr`
        and `ssl_object`."""
        raise NotImplementedError


class PlainWire(Wire):
    """A connected, non-blocking socket."""

    def __init__(self, sock: socket.socket, httpcore: ModuleType) -> None:
        super().__init__(httpcore)
        self._sock = sock
        self._asked = False
        self._written = 0
        self._successor: Wire | None = None

    async def _read(self, size: int, limit: float | None) -> bytes:
        # What was asked just now is not answered yet; and who reads on has its turns in between.
        if self._asked:
            self._asked = False
            await self._wait(anyio.wait_readable, limit)
        else:
            await anyio.lowlevel.checkpoint()
        while (received := self._receive(size)) is None:
            await self._wait(anyio.wait_readable, limit)
        return received

    async def _may_write(self) -> None:
        if not self._written % WRITES:
            await anyio.lowlevel.checkpoint_if_cancelled()

    async def _write(self, buffer: bytes, limit: float | None) -> None:
        sent = self._send(buffer)
        while sent < len(buffer):
            await self._wait(anyio.wait_writable, limit)
            sent += self._send(memoryview(buffer)[sent:])
        self._written += 1
        if not self._written % WRITES:
            # Cancelled only at the next: what the application writes may end by itself until then.
            await anyio.lowlevel.cancel_shielded_checkpoint()
        self._asked = True

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    def _receive(self, size: int) -> bytes | None:
        try:
            return self._sock.recv(size)
        except BlockingIOError:
            return None

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]], limit: float | None) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        if limit is None:
            await wait(self._sock)
            return
        with anyio.fail_after(limit):
            await wait(self._sock)

    async def aclose(self) -> None:
        """See `Wire.aclose`."""
        self.close_now()
        if self._successor is not None:
            await self._successor.aclose()
        await anyio.lowlevel.checkpoint()

    def close_now(self) -> bool:
        """See `Wire.close_now`."""
        if not self._closed:
            self._closed = True
            anyio.notify_closing(self._sock)
            self._sock.close()
        return self._successor is None or self._successor.close_now()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
    ) -> Wire:
        """See `Wire.start_tls`."""
        kind = UNIXSocketStream if is_unix(self._sock) else SocketStream
        try:
            stream = await kind.from_socket(self._sock)
        except BaseException as error:
            self._sock.close()
            if isinstance(error, ValueError | OSError):
                # It was reset meanwhile.
                raise self._core.ConnectError(str(error)) from error
            raise
        finally:
            self._closed = True
        self._successor = await _secured(stream, self._core, ssl_context, server_hostname, timeout)
        return self._successor

    def get_extra_info(self, info: str) -> Any:
        """See `Wire.get_extra_info`."""
        if info == "is_readable":
            return self._closed or is_readable(self._sock)
        if info == "socket":
            return self._sock
        with suppress(OSError):  # it is closed
            if info == "client_addr":
                return self._sock.getsockname()
            if info == "server_addr":
                return self._sock.getpeername()
        return None


class SecuredWire(Wire):
    """TLS over a stream of anyio's."""

    def __init__(self, stream: ByteStream, httpcore: ModuleType) -> None:
        super().__init__(httpcore)
        self._stream = stream
        self._successor: Wire | None = None

    async def _read(self, size: int, limit: float | None) -> bytes:
        try:
            with anyio.fail_after(limit):
                return await self._stream.receive(size)
        except anyio.EndOfStream:
            return b""

    async def _write(self, buffer: bytes, limit: float | None) -> None:
        with anyio.fail_after(limit):
            await self._stream.send(buffer)

    async def aclose(self) -> None:
        """See `Wire.aclose`."""
        self._closed = True
        if self._successor is not None:
            await self._successor.aclose()
        await self._stream.aclose()

    def close_now(self) -> bool:
        """See `Wire.close_now`."""
        return False

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
    ) -> Wire:
        """See `Wire.start_tls`."""
        self._successor = await _secured(self._stream, self._core, ssl_context, server_hostname, timeout)
        return self._successor

    def get_extra_info(self, info: str) -> Any:
        """See `Wire.get_extra_info`."""
        if info == "is_readable" and self._closed:
            return True
        if info == "ssl_object":
            return self._stream.extra(TLSAttribute.ssl_object, None)
        if info == "client_addr":
            return self._stream.extra(SocketAttribute.local_address, None)
        if info == "server_addr":
            return self._stream.extra(SocketAttribute.remote_address, None)
        sock = self._stream.extra(SocketAttribute.raw_socket, None)
        if info == "is_readable":
            return sock is None or is_readable(sock)
        return sock if info == "socket" else None


async def _secured(
    stream: ByteStream, httpcore: ModuleType, ssl_context: ssl.SSLContext, name: str | None, limit: float | None
) -> SecuredWire:
    try:
        with anyio.fail_after(limit):
            found = await TLSStream.wrap(stream, hostname=name, ssl_context=ssl_context, standard_compatible=False)
    except BaseException as error:
        await anyio.aclose_forcefully(stream)
        if isinstance(error, TimeoutError):
            raise httpcore.ConnectTimeout("no TLS in time") from error
        if isinstance(error, ssl.SSLError | anyio.BrokenResourceError | anyio.EndOfStream):
            raise httpcore.ConnectError(f"TLS: {_why(error)}") from error
        raise
    return SecuredWire(found, httpcore)


def is_readable(sock: SupportsFileno) -> bool:
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
