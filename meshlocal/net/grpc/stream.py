"""One HTTP/2 stream: what a call's task reads and writes, while the connection's reader and writer move the bytes.

The reader's task only ever puts things here and wakes the call's task. Received data is handed back to the peer's
windows when the call takes it, not before; sent data waits for the peer's windows and for room in the connection's
outgoing buffer. Nothing that a call does in sending is cut in half by its cancellation: frames are appended whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import anyio
import anyio.lowlevel

from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.http2 import ErrorCode, Headers, Http2Error, Http2Protocol

_PROGRESS = 65_536
"""Bytes of a message that `send_timeout` is for: a long one has that time for each so many."""


class StreamConnection(Protocol):
    """What a stream needs of its connection.

    Attributes:
        options: of the connection.
        protocol: frames both ways.
        streams: those that live, by number.
    """

    options: GrpcOptions
    protocol: Http2Protocol
    streams: dict[int, Stream]

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Note that so many bytes of a stream's data were taken: the peer may send as many more."""
        ...

    def flush(self) -> None:
        """Send what is queued, as far as that waits for nothing."""
        ...

    def kick(self) -> None:
        """Have the task that writes send what was queued."""
        ...

    def lost(self, reason: str) -> GrpcError:
        """The connection cannot go on; gives what its calls fail with."""
        ...

    def sendable(self, stream_id: int) -> int:
        """Bytes of data that the stream may queue now."""
        ...

    async def wait_sendable(self, stream: Stream) -> None:
        """Wait until there may be more, or the stream failed."""
        ...

    def on_stall(self) -> None:
        """The peer took nothing for `send_timeout`."""
        ...

    def stream_closed(self) -> None:
        """Forget a stream of the connection that is over."""
        ...


class Stream:
    """See the module. `failure` is set once, when the stream was reset or its connection ended."""

    __slots__ = (
        "_changed",
        "_inbox",
        "_sending",
        "connection",
        "failure",
        "headers",
        "id",
        "local_ended",
        "on_failure",
        "partial",
        "peer_ended",
        "peer_refuses",
        "received",
        "trailers",
    )

    def __init__(self, connection: StreamConnection, stream_id: int) -> None:
        self.connection = connection
        self.id = stream_id
        self.headers: Headers | None = None
        self.trailers: Headers | None = None
        self.failure: GrpcError | None = None
        self.on_failure: Callable[[], None] | None = None
        self.peer_ended = False
        self.peer_refuses = False
        """The peer's answer is complete: it reads nothing more."""
        self.local_ended = False
        self.partial = False
        """A cancelled send left a message half sent: nothing can follow it but a reset."""
        self.received = 0
        """Bytes of data that came so far, taken or not: what shows that a long message makes progress."""
        self._sending = False
        self._inbox = bytearray()
        self._changed: anyio.Event | None = None

    # What the connection's reader calls.

    def put(self, data: bytes) -> None:
        """Take data that came for the stream, and wake who waits for it."""
        self.received += len(data)
        self._inbox += data
        self.wake()

    def wake(self) -> None:
        """Wake who waits for the stream: data, headers or the end came."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def fail(self, failure: GrpcError) -> None:
        """The stream was reset, or its connection ended."""
        if self.failure is None:
            self.failure = failure
            self.wake()
            if self.on_failure is not None:
                self.on_failure()

    # What the call's task calls.

    async def wait_changed(self) -> None:
        """Wait until something else comes. The caller looked at what is there, without a checkpoint since."""
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    def take(self) -> bytes:
        """All data that came, handed back to the peer's windows. May be empty."""
        if not self._inbox:
            return b""
        data = bytes(self._inbox)
        self._inbox.clear()
        self.connection.acknowledge(self.id, len(data))
        return data

    def respond(self, headers: Headers, *, end_stream: bool = False) -> None:
        """Queue a response's headers. Raises the stream's failure."""
        if self.failure is not None:
            raise self.failure
        try:
            self.connection.protocol.send_response(self.id, headers, end_stream=end_stream)
        except Http2Error as error:
            raise self.connection.lost(str(error)) from error
        self.local_ended = end_stream
        self.connection.kick()

    def send_trailers(self, trailers: Headers) -> None:
        """Queue what ends this side of the stream. Raises the stream's failure."""
        if self.failure is not None:
            raise self.failure
        try:
            self.connection.protocol.send_trailers(self.id, trailers)
        except Http2Error as error:
            raise self.connection.lost(str(error)) from error
        self.local_ended = True
        self.connection.kick()

    async def send_data(
        self, data: bytes, prefix: bytes = b"", *, end_stream: bool = False, checkpoint: bool = True
    ) -> None:
        """Queue a prefix and data, waiting for windows and room. Without `checkpoint`, only if it must wait.

        Of the data no copy is made but of what is queued: who waits holds what others hold too.

        Raises:
            GrpcError: the stream's failure.
            anyio.BrokenResourceError: the peer's answer is complete.
            anyio.ClosedResourceError: this side ended the stream before.
            anyio.BusyResourceError: another task is sending, or a send was cancelled within a message.
        """
        if self._sending or self.partial:
            raise anyio.BusyResourceError("sending on")
        self._sending = True
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
            await self._send_data(data, prefix, end_stream)
            if checkpoint:
                await anyio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._sending = False

    def try_send_data(self, data: bytes, prefix: bytes = b"") -> bool:
        """Send it all without waiting, or, False, nothing of it. What forbids it is for `send_data` to say."""
        connection = self.connection
        if self._sending or self.partial or self.local_ended or self.peer_refuses or self.failure is not None:
            return False
        if not data or connection.sendable(self.id) < len(prefix) + len(data):
            return False
        try:
            connection.protocol.send_data(self.id, prefix + data)
        except Http2Error:
            return False
        connection.flush()
        return True

    async def _send_data(self, data: bytes, prefix: bytes, end_stream: bool) -> None:
        connection = self.connection
        timeout = connection.options.send_timeout
        position = 0
        since, due = 0, math.inf
        while True:
            if self.failure is not None:
                raise self.failure
            if self.local_ended:
                raise anyio.ClosedResourceError
            if self.peer_refuses:
                raise anyio.BrokenResourceError
            left = len(prefix) + len(data) - position
            size = min(left, connection.sendable(self.id)) if left else 0
            if left and not size:
                if timeout is not None and (due == math.inf or position - since >= _PROGRESS):
                    since, due = position, anyio.current_time() + timeout
                with anyio.CancelScope(deadline=due) as scope:
                    await connection.wait_sendable(self)
                if scope.cancelled_caught:
                    connection.on_stall()
                    raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, f"too little was read for {timeout:g} s")
                continue
            last = size == left
            begin = position - len(prefix)
            chunk: bytes | memoryview
            if begin < 0:
                chunk = prefix[position : position + size] + data[: max(begin + size, 0)]
            else:
                chunk = memoryview(data)[begin : begin + size]
            try:
                connection.protocol.send_data(self.id, chunk, end_stream=end_stream and last)
            except Http2Error as error:
                raise connection.lost(str(error)) from error
            connection.kick()
            position += size
            self.partial = not last
            if last:
                self.local_ended = end_stream
                return

    def close(self, error_code: int = ErrorCode.CANCEL) -> None:
        """Leave the stream: what was not taken is dropped, and RST_STREAM sent unless both sides had ended."""
        connection = self.connection
        if connection.streams.pop(self.id, None) is None:
            return
        if self.failure is None and not (self.local_ended and self.peer_ended):
            connection.protocol.reset(self.id, error_code)
        connection.acknowledge(self.id, len(self._inbox))
        self._inbox.clear()
        connection.kick()
        connection.stream_closed()
