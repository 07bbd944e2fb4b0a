"""A stream on a shared HTTP/2 connection that looks like an HTTP/1.1 connection to an instance, for one request.

For a client that speaks HTTP/1.1: what stands above it (`meshlocal.proxy.http.h1`) writes a request and reads a
response, and knows no difference. Both heads are translated by `meshlocal.wire.http2_heads`.
"""

from __future__ import annotations

import errno
import os
import socket

import trio

from meshlocal.net.relay_loop import current_loop
from meshlocal.net.wakeup import Wakeup
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.links import UpstreamLink
from meshlocal.proxy.http.pool import Upstream
from meshlocal.wire.http1.chunked import ChunkedBody
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.known import KnownHeads
from meshlocal.wire.http2 import ErrorCode, Headers
from meshlocal.wire.http2_heads import request_from_http1, response_to_http1, trailers_from_http1, trailers_to_http1

WAITING = 65_536
"""Bytes of a request that may wait for the instance, from which on no more is taken."""


class Http1Stream:
    """The `Pipe` of one request. Its first write has the request's whole head.

    Args:
        link: the shared connection.
        heads: reads heads of HTTP/1.1.

    Attributes:
        id: the stream's number.
        plain: None: its bytes are no socket's.
        failure: what its end is for a request of which nothing was answered.
    """

    __slots__ = (
        "_chunked",
        "_chunks",
        "_complete",
        "_heads",
        "_inbox",
        "_interrupted",
        "_left",
        "_link",
        "_method",
        "_owed",
        "_problem",
        "_readable",
        "_size",
        "_taken",
        "_writable",
        "failure",
        "id",
        "plain",
    )

    def __init__(self, link: UpstreamLink, heads: KnownHeads) -> None:
        self.id = 0
        self.plain: socket.socket | None = None
        self.failure = Failure.STALE if link.used else Failure.NO_RESPONSE
        self._link = link
        self._heads = heads
        self._method = b""
        self._chunks: ChunkedBody | None = None
        self._left = 0
        self._chunked = False
        self._complete = False
        self._problem = 0
        self._inbox = bytearray()
        self._size = 0
        self._owed = 0
        self._taken = 0
        self._interrupted = False
        loop = current_loop.get()
        self._readable = Wakeup(loop)
        self._writable = Wakeup(loop)

    # The request: see `Pipe`.

    def write(self, data: bytes | memoryview) -> int:
        """See `Pipe.write`.

        Raises:
            OSError: the stream is gone.
        """
        if self._problem or self._complete:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        size = len(data)
        if not self.id:
            self._begin(bytes(data))
        elif self._link.protocol.waiting(self.id) > WAITING:
            return 0
        else:
            self._body(bytes(data))
        return size

    def _begin(self, data: bytes) -> None:
        end = data.index(b"\r\n\r\n") + 4
        head = self._heads.request(data[:end])
        self._method = head.method
        if head.chunked:
            self._chunks = ChunkedBody(decode=True)
        self._left = head.content_length or 0
        if not self._link.open(self, request_from_http1(data[:end], head), end=not head.has_body):
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        if end < len(data):
            self._body(data[end:])

    def _body(self, data: bytes) -> None:
        chunks = self._chunks
        if chunks is None:
            self._left -= len(data)
            self._link.send(self, data, end=self._left <= 0)
            return
        try:
            pieces, _ = chunks.feed(data)
        except ProtocolError:
            # It was read before, by who checks what clients send.
            self._fail(errno.EPROTO)
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO)) from None
        piece = b"".join(pieces)
        trailers = trailers_from_http1(chunks.trailers) if chunks.finished else ()
        if piece or (chunks.finished and not trailers):
            self._link.send(self, piece, end=chunks.finished and not trailers)
        if trailers:
            self._link.end_with(self, trailers)

    def accepted(self, left: int) -> None:
        """See `UpstreamStream.accepted`."""
        if left <= WAITING:
            self._writable.set()

    async def wait_writable(self) -> None:
        """See `Pipe.wait_writable`."""
        while not (self._problem or self._complete) and self._link.protocol.waiting(self.id) > WAITING:
            await self._writable.wait()
            self._check_interrupted()

    # The response.

    def on_interim(self, fields: Headers) -> None:
        """See `UpstreamStream.on_interim`."""
        self._put(response_to_http1(fields, ends=False, sized=True))

    def on_head(self, fields: Headers, *, end: bool) -> None:
        """See `UpstreamStream.on_head`."""
        raw = response_to_http1(fields, ends=end, sized=self._method == b"HEAD")
        self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in raw
        self._put(raw)
        if end:
            self._end()

    def on_data(self, data: bytes, *, end: bool) -> None:
        """See `UpstreamStream.on_data`."""
        self._size += len(data)
        if data:
            self._put(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if end:
            self._put(trailers_to_http1(()) if self._chunked else b"")
            self._end()

    def on_trailers(self, fields: Headers) -> None:
        """See `UpstreamStream.on_trailers`."""
        self._put(trailers_to_http1(fields) if self._chunked else b"")
        self._end()

    def on_reset(self, code: int) -> None:
        """See `UpstreamStream.on_reset`."""
        self._link.leave(self)
        self.failure = Failure.REFUSED if code == ErrorCode.REFUSED_STREAM else Failure.RESET
        self._fail(errno.ECONNRESET)

    def on_lost(self, failure: Failure) -> None:
        """See `UpstreamStream.on_lost`."""
        self.failure = failure
        self._fail(errno.ECONNRESET)

    def _put(self, data: bytes) -> None:
        self._inbox += data
        self._readable.set()

    def _end(self) -> None:
        self._complete = True
        self._readable.set()
        self._writable.set()

    def _fail(self, number: int) -> None:
        self._problem = number
        self._readable.set()
        self._writable.set()

    def read(self, size: int) -> bytes | None:
        """See `Pipe.read`. Who reads on has passed on what was read before: for that the instance gets credit.

        Raises:
            OSError: the stream was reset, or its connection ended.
        """
        self._give(self._owed)
        if self._inbox:
            data = bytes(self._inbox[:size])
            del self._inbox[:size]
            if not self._inbox:
                self._owed = self._size
            return data
        if self._problem:
            raise OSError(self._problem, os.strerror(self._problem))
        return b"" if self._complete else None

    def _give(self, taken: int) -> None:
        if taken > self._taken:
            self._link.give(self.id, taken - self._taken)
            self._taken = taken

    def peek(self, size: int) -> bytes | None:
        """See `Pipe.peek`."""
        if self._inbox:
            return bytes(self._inbox[:size])
        return b"" if self._problem or self._complete else None

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        while not (self._inbox or self._problem or self._complete):
            await self._readable.wait()
            self._check_interrupted()

    identity = ""
    told = b""
    may_hold = True

    def fileno(self) -> int:
        """See `Pipe.fileno`: a stream has no socket of its own."""
        return -1

    is_unsent = False

    def has_input(self) -> bool:
        """See `Pipe.has_input`."""
        return bool(self.peek(1))

    def stop_reading(self) -> None:
        """See `Pipe.stop_reading`: nothing is relayed over a stream."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """See `Pipe.interrupt`."""
        self._interrupted = True
        self._readable.set()

    def _check_interrupted(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise trio.ClosedResourceError

    # Its end.

    def end(self) -> None:
        """See `Pipe.end`: the body's framing says so."""

    def close(self) -> None:
        """See `Pipe.close`."""
        self._leave(None if self._complete and self._sent_whole else ErrorCode.CANCEL)

    def abort(self) -> None:
        """See `Pipe.abort`."""
        self._leave(ErrorCode.CANCEL)

    @property
    def _sent_whole(self) -> bool:
        return self._chunks.finished if self._chunks is not None else self._left <= 0

    def _leave(self, code: int | None) -> None:
        self._give(self._size)
        if self.id:
            self._link.leave(self, code)


class SharedUpstream(Upstream):
    """A stream in the place of a connection: never kept, as the connection below it is.

    Args:
        link: the shared connection.
        heads: reads heads of HTTP/1.1.
    """

    __slots__ = ("_stream",)

    def __init__(self, link: UpstreamLink, heads: KnownHeads) -> None:
        self._stream = Http1Stream(link, heads)
        self.pipe = self._stream
        self.number = -1
        self.place = link.place
        self.security = link.security
        self.path = None
        self.is_unix = False
        self.pool = None
        self.used = link.used
        self.idle_since = 0.0
        self.watched = False
        self.ending = True

    def failed(self) -> Failure:
        """See `Upstream.failed`."""
        return self._stream.failure

    def look_behind(self) -> None:
        """See `Upstream.look_behind`: there is nothing behind a stream's end."""

    def is_silent(self) -> bool:
        """See `Upstream.is_silent`."""
        return True
