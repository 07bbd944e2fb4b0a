"""One HTTP/2 connection that carries gRPC calls: a reader, a writer, and the streams between them and the calls.

    peer → reader (run) → Http2Protocol → Stream → call's task
    peer ← writer       ← outgoing ← Http2Protocol ← call's task

All state changes are synchronous, so a cancelled call leaves no frame half written and nothing locked. Bounds:

- A stream holds at most one window of data that its call has not taken; the connection's window covers all streams.
- Calls stop sending DATA at `SEND_MARK` bytes in the outgoing buffer. What the reader answers by itself (PING,
  SETTINGS, refused streams) stops growing at `READ_MARK`, when the reader stops reading.
- What comes beyond `receive_rate` waits in the peer: a flood of small frames costs this side no more than that.
- A peer that takes no bytes for `stall_timeout`, or answers no PING for `keepalive_timeout`, loses the connection.
"""

from __future__ import annotations

import math

import anyio
import anyio.abc

from meshlocal.net.connect_errors import STREAM_ERRORS
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.stream import Stream
from meshlocal.net.grpc.transport import ByteStream, TrioByteStream
from meshlocal.policy.rates import TokenBucket
from meshlocal.wire.grpc.status import GrpcError, StatusCode, from_http2_error
from meshlocal.wire.http2 import (
    MAX_FRAME_SIZE,
    DataReceived,
    ErrorCode,
    Event,
    GoAwayReceived,
    Headers,
    Http2Error,
    Http2Limits,
    Http2Protocol,
    PingAcknowledged,
    RequestReceived,
    ResponseReceived,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)

SEND_MARK = 65_536
"""Bytes that wait to be sent, from which on no call queues more data."""

READ_MARK = 131_072
"""Bytes that wait to be sent, from which on nothing more is read: what comes might ask for answers without end."""

READ_SIZE = 32_768
"""Bytes read, or written, at once."""

FLUSH_TIME = 1.0
"""Seconds that a connection that ends gives its peer to take the last bytes, and its transport to close."""
_KEEPALIVE = b"mlalive."
_GLITCHES = Http2Limits().glitches
_ANY = (2**32, 2**32)
"""Of what somebody else bounds: the server bounds resets, by what they cost it, and `receive_rate` all frames."""


class Connection:
    """One side of a connection. `run` does the I/O; the side's class says what requests, GOAWAY and ends mean."""

    def __init__(self, transport: ByteStream, options: GrpcOptions, *, client: bool) -> None:
        self.options = options
        self.protocol = Http2Protocol(
            client=client,
            limits=Http2Limits(
                max_streams=options.max_concurrent_streams,
                max_header_list_size=options.max_header_list_size,
                resets=_ANY,
                glitches=_GLITCHES if options.receive_rate is None else _ANY,
            ),
        )
        self.outgoing = bytearray()
        """Frames that wait to be sent."""
        self.streams: dict[int, Stream] = {}
        self.closed_reason: str | None = None
        self._transport = transport
        self._send_nowait = transport.send_nowait if isinstance(transport, TrioByteStream) else _never_now
        self._ending = False
        self._peer_reads = True
        self._read_scope = anyio.CancelScope()
        self._write_wanted: anyio.Event | None = None
        self._read_wanted: anyio.Event | None = None
        self._senders: dict[int, anyio.Event] = {}
        self.tasks: anyio.abc.TaskGroup | None = None
        """For the side's own tasks; cancelled when the connection ends. Set while `run` runs."""
        self.ended = anyio.Event()

    # The side's part.

    def on_request(self, stream_id: int, headers: Headers) -> None:
        """A peer opened a stream (servers only)."""

    def on_goaway(self, goaway: GoAwayReceived) -> None:
        """The peer takes no more streams above `goaway.last_stream_id`."""

    def on_ping_ack(self, payload: bytes) -> None:
        """The peer answered a PING that was not the keepalive's."""

    def on_settings(self) -> None:
        """The peer's settings came or changed."""

    def on_end(self) -> None:
        """The connection is ending: `closed_reason` was set, and every stream failed."""

    def on_reset(self, stream_id: int) -> None:
        """The peer reset a stream."""

    def on_stall(self) -> None:
        """The peer did not read in time: a call's failure, or the connection's end, comes of it."""

    def on_pause(self) -> None:
        """The peer sends more than `receive_rate`, and is made to wait."""

    def stream_closed(self) -> None:
        """A stream was closed by its call."""

    # Called by streams and calls.

    def lost(self, reason: str) -> GrpcError:
        """The error for a call that this connection can no longer carry."""
        return GrpcError(StatusCode.UNAVAILABLE, f"connection: {self.closed_reason or reason}")

    def kick(self) -> None:
        """There may be something to write."""
        self.outgoing += self.protocol.data_to_send()
        if self._write_wanted is not None:
            self._write_wanted.set()
            self._write_wanted = None

    def flush(self) -> None:
        """Write what there is at once, as far as that goes without waiting; the writer does the rest."""
        self.outgoing += self.protocol.data_to_send()
        # A writer that waits for something to write has nothing under way: no bytes can overtake its own.
        if self._write_wanted is not None and not self._ending:
            self._write_nowait()
        if self.outgoing:
            self.kick()

    def _write_nowait(self) -> None:
        outgoing = self.outgoing
        with memoryview(outgoing) as view, view[:READ_SIZE] as chunk:
            sent = self._send_nowait(chunk)
        del outgoing[:sent]

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Data was consumed: give the peer its windows back."""
        self.protocol.acknowledge(stream_id, size)
        self.kick()

    def sendable(self, stream_id: int) -> int:
        """Bytes of DATA that may be queued now."""
        return 0 if len(self.outgoing) >= SEND_MARK else min(self.protocol.sendable(stream_id), MAX_FRAME_SIZE)

    async def wait_sendable(self, stream: Stream) -> None:
        """Wait until `sendable` may have changed, or the stream failed."""
        event = self._senders[stream.id] = anyio.Event()
        try:
            await event.wait()
        finally:
            self._senders.pop(stream.id, None)

    def end(self, reason: str, failure: GrpcError | None = None) -> None:
        """End the connection: fail its streams, flush what is queued for at most FLUSH_TIME, close. Only once."""
        if self.closed_reason is not None:
            return
        self.closed_reason = reason
        self._ending = True
        for stream in list(self.streams.values()):
            stream.fail(failure or self.lost(reason))
        self._wake_senders()
        self.on_end()
        self.kick()
        self._read_scope.cancel()

    # The tasks.

    async def run(self) -> None:
        """Do the I/O until the connection ends, then close the transport."""
        try:
            async with anyio.create_task_group() as tasks:
                self.tasks = tasks
                try:
                    written = anyio.Event()
                    tasks.start_soon(self._write, written)
                    with self._read_scope:
                        self.end(await self._read())
                    if self._peer_reads:
                        with anyio.move_on_after(FLUSH_TIME):
                            await written.wait()
                finally:
                    self.end("cancelled")
                    with anyio.move_on_after(FLUSH_TIME, shield=True):
                        await self._close_transport()
                    tasks.cancel_scope.cancel()
        finally:
            self.ended.set()

    async def _close_transport(self) -> None:
        try:
            await self._transport.aclose()
        except STREAM_ERRORS:
            return  # closed all the same

    async def _read(self) -> str:
        """Read until the connection ends, and return the reason."""
        options = self.options
        interval = math.inf if options.keepalive_interval is None else options.keepalive_interval
        bucket = None
        if options.receive_rate is not None:
            bucket = TokenBucket(options.receive_rate, options.receive_burst, anyio.current_time())
        pinged = False
        try:
            while True:
                while len(self.outgoing) >= READ_MARK:
                    self._read_wanted = anyio.Event()
                    await self._read_wanted.wait()
                data = b""
                with anyio.move_on_after(options.keepalive_timeout if pinged else interval):
                    data = await self._transport.receive(READ_SIZE)
                if data:
                    pinged = False
                    self._dispatch(data)
                elif pinged:
                    return f"keepalive: nothing came for {options.keepalive_timeout:g} s after a PING"
                else:
                    pinged = True
                    self.protocol.ping(_KEEPALIVE)
                self.kick()
                if bucket is not None and (pause := bucket.spend(len(data), anyio.current_time())):
                    self.on_pause()
                    await anyio.sleep(pause)
        except anyio.EndOfStream:
            self._peer_reads = False
            return "closed by the peer" + ("" if self.protocol.settings_received else ", which said nothing in HTTP/2")
        except Http2Error as error:
            return f"HTTP/2 error: {error}" if self.protocol.settings_received else "the peer does not speak HTTP/2"
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            self._peer_reads = False
            return f"broken: {_describe(error)}"

    async def _write(self, written: anyio.Event) -> None:
        self.kick()
        outgoing = self.outgoing
        reason = ""
        try:
            while True:
                while not outgoing:
                    if self._ending:
                        return
                    self._write_wanted = anyio.Event()
                    await self._write_wanted.wait()
                # Nearly always that is all; a deadline and a switch of tasks cost more than the write itself.
                self._write_nowait()
                if outgoing:
                    chunk = bytes(memoryview(outgoing)[:READ_SIZE])
                    del outgoing[: len(chunk)]
                    with anyio.move_on_after(self.options.stall_timeout) as scope:
                        await self._transport.send(chunk)
                    if scope.cancelled_caught:
                        self.on_stall()
                        reason = f"stalled: the peer took nothing for {self.options.stall_timeout:g} s"
                        return
                if len(outgoing) < SEND_MARK:
                    self._wake_senders()
                    if self._read_wanted is not None:
                        self._read_wanted.set()
                        self._read_wanted = None
        except STREAM_ERRORS as error:
            reason = f"broken: {_describe(error)}"
        finally:
            written.set()
            if reason:
                self.end(reason)

    def _wake_senders(self) -> None:
        for event in self._senders.values():
            event.set()

    # What came.

    def _dispatch(self, data: bytes) -> None:
        for event in self.protocol.receive(data):
            self._on_event(event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            stream = self.streams.get(event.stream_id)
            if stream is None:
                self.protocol.acknowledge(event.stream_id, len(event.data))
                return
            if event.data:
                stream.put(event.data)
            if event.end_stream:
                self._end_peer(stream)
        elif isinstance(event, WindowUpdated):
            if event.stream_id == 0:
                self._wake_senders()
            elif (sender := self._senders.get(event.stream_id)) is not None:
                sender.set()
        elif isinstance(event, RequestReceived):
            self.on_request(event.stream_id, event.headers)
            if event.end_stream and (stream := self.streams.get(event.stream_id)) is not None:
                self._end_peer(stream)
        elif isinstance(event, ResponseReceived | TrailersReceived):
            self._on_headers(event)
        elif isinstance(event, StreamReset):
            self.on_reset(event.stream_id)
            self._fail_reset(
                event.stream_id, event.error_code, unprocessed=event.error_code == ErrorCode.REFUSED_STREAM
            )
        elif isinstance(event, StreamClosed):
            if event.error_code:
                # The engine's own doing: what came on it broke the rules.
                self._fail_reset(event.stream_id, event.error_code, unprocessed=False)
        elif isinstance(event, SettingsReceived):
            self._wake_senders()
            self.on_settings()
        elif isinstance(event, GoAwayReceived):
            self.on_goaway(event)
        elif isinstance(event, PingAcknowledged) and event.opaque_data != _KEEPALIVE:
            self.on_ping_ack(event.opaque_data)

    def _end_peer(self, stream: Stream) -> None:
        stream.peer_ended = True
        self.on_stream_ended(stream)
        stream.wake()

    def on_stream_ended(self, stream: Stream) -> None:
        """The peer ended its side of a stream."""

    def _on_headers(self, event: ResponseReceived | TrailersReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        if isinstance(event, TrailersReceived):
            stream.trailers = event.headers
            ended = True
        else:
            stream.headers = event.headers
            ended = event.end_stream
        if ended:
            self._end_peer(stream)
        else:
            stream.wake()

    def _fail_reset(self, stream_id: int, code: int, *, unprocessed: bool) -> None:
        stream = self.streams.get(stream_id)
        if stream is None or stream.peer_refuses:
            return
        stream.fail(
            GrpcError(from_http2_error(code), f"stream reset with {ErrorCode.name_of(code)}", unprocessed=unprocessed)
        )
        if (sender := self._senders.get(stream.id)) is not None:
            sender.set()


def _never_now(data: bytes | memoryview) -> int:
    return 0


def _describe(error: Exception) -> str:
    return str(error.__cause__ or error) or type(error).__name__
