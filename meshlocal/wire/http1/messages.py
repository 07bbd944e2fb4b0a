"""One request's body and one response, as bytes in and bytes out.

Both keep no more than they must: a head that is not complete yet, a size line that is cut in two, and of a request's
body what may have to be sent again.
"""

from __future__ import annotations

from meshlocal.wire.http1.chunked import ChunkedBody
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.known import KnownHeads
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.response import Framing, ResponseHead
from meshlocal.wire.http1.rewrite import client_head

_VERSION = b"HTTP/1."


class RequestBody:
    """A request's body on its way to an instance.

    Args:
        head: of its request.
        limit: bytes at most, chunk sizes and trailers counted; None for any number.
        hold: bytes that are kept to be sent again.

    Attributes:
        finished: all of it came.
        size: bytes that came.
        held: all that came, in pieces; None once that was more than `hold`.

    Raises:
        ProtocolError: it is announced to be longer than `limit`.
    """

    __slots__ = ("_chunks", "_hold", "_left", "_limit", "finished", "held", "size")

    def __init__(self, head: RequestHead, *, limit: int | None, hold: int) -> None:
        self._chunks = ChunkedBody() if head.chunked else None
        self._left = head.content_length or 0
        self._limit = limit
        self._hold = hold
        self.size = 0
        self.held: list[bytes] | None = []
        self.finished = not head.has_body
        if limit is not None and self._left > limit:
            raise _too_large(limit)

    @property
    def is_held(self) -> bool:
        """Whether all that came can be sent to another instance."""
        return self.held is not None

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Take what came from the client.

        Returns:
            What goes on to the instance, and how much of `data` belonged to the body.

        Raises:
            ProtocolError: it is malformed, or longer than the limit.
        """
        if self._chunks is not None:
            pieces, used = self._chunks.feed(data)
            piece = b"".join(pieces)
            self.finished = self._chunks.finished
        else:
            piece = data[: self._left]
            used = len(piece)
            self._left -= used
            self.finished = not self._left
        self.size += len(piece)
        if self._limit is not None and self.size > self._limit:
            raise _too_large(self._limit)
        if self.held is not None and piece:
            if self.size > self._hold:
                self.held = None
            else:
                self.held.append(piece)
        return piece, used


def _too_large(limit: int) -> ProtocolError:
    return ProtocolError(413, "body_too_large", f"the body is longer than {limit} bytes")


class ResponseFlow:
    """A response from its first byte to its last, from an instance to a client.

    `receive` until it gives a final head; then `begin`, and `body` for what comes after, until `complete`. `end` when
    the instance ends its stream.

    Args:
        method: of the request that it answers.
        heads: reads its heads.

    Attributes:
        any_byte: something came.
        complete: all of it came.
        reusable: it is complete, and the connection that it came on is ready for the next request.
        rest: after a head, what came behind it.
        size: bytes of the body that went on.
    """

    __slots__ = (
        "_chunks",
        "_encode",
        "_framing",
        "_heads",
        "_keep_alive",
        "_left",
        "_method",
        "_searched",
        "any_byte",
        "complete",
        "rest",
        "reusable",
        "size",
    )

    def __init__(self, method: bytes, heads: KnownHeads) -> None:
        self._method = method
        self._heads = heads
        self.any_byte = False
        self.complete = False
        self.reusable = False
        self.rest: bytes | bytearray = b""
        self.size = 0
        self._framing = Framing.NONE
        self._chunks: ChunkedBody | None = None
        self._encode = False
        self._keep_alive = False
        self._left = 0
        self._searched = 0

    def receive(self, data: bytes) -> ResponseHead | None:
        """Take what came before the final head; gives a head once it is complete, an interim one (1xx) too.

        After an interim head it is to be called again, with b"", for what came behind that.

        Raises:
            ProtocolError: it is malformed, or too large.
        """
        buffer: bytes | bytearray = data
        if self.rest:
            if not isinstance(self.rest, bytearray):
                self.rest = bytearray(self.rest)
            self.rest += data
            buffer = self.rest
        elif not data:
            return None
        self.any_byte = True
        end = buffer.find(b"\r\n\r\n", self._searched)
        if end < 0:
            if not _VERSION.startswith(buffer[: len(_VERSION)]):
                raise ProtocolError(502, "bad_status_line", "this is not HTTP/1")
            if len(buffer) > self._heads.limits.head:
                raise self._too_large()
            self.rest = buffer
            self._searched = max(len(buffer) - 3, 0)
            return None
        end += 4
        if end > self._heads.limits.head:
            raise self._too_large()
        if end == len(data) and buffer is data:
            raw, self.rest = data, b""
        else:
            raw, self.rest = bytes(buffer[:end]), bytes(buffer[end:])
        self._searched = 0
        return self._heads.response(raw)

    def _too_large(self) -> ProtocolError:
        return ProtocolError(
            502, "head_too_large", f"the response's head is larger than {self._heads.limits.head} bytes"
        )

    def closes_client(self, head: ResponseHead, *, http10: bool) -> bool:
        """Whether only the end of the connection can tell this client where the body ends."""
        return http10 and head.framing(self._method) in (Framing.CHUNKED, Framing.CLOSE)

    def begin(
        self, head: ResponseHead, *, http10: bool, close: bool, extra: bytes = b"", announce: bool = False
    ) -> bytes:
        """The final head, and what came of the body, as they go to the client.

        Args:
            head: what `receive` gave.
            http10: the client speaks HTTP/1.0, and cannot read chunks.
            close: the client's connection ends after this response; must be true where `closes_client` is.
            extra: field lines to append.
            announce: tell the client that its connection stays.

        Raises:
            ProtocolError: the body is malformed.
        """
        framing = to_client = head.framing(self._method)
        if framing is Framing.CHUNKED:
            self._chunks = ChunkedBody(decode=http10)
            if http10:
                to_client = Framing.CLOSE
        elif framing is Framing.CLOSE and not http10:
            self._encode = True
            to_client = Framing.CHUNKED
        elif framing is Framing.LENGTH:
            self._left = head.content_length or 0
        self._framing = framing
        self._keep_alive = head.keep_alive
        first = client_head(head, to_client, extra=extra, close=close, announce_keep_alive=announce)
        rest = self.rest if type(self.rest) is bytes else bytes(self.rest)
        self.rest = b""
        if framing is Framing.NONE:
            self.complete = True
            self.reusable = head.keep_alive and not rest
            return first
        return first + self.body(rest) if rest else first

    def begin_decoded(self, head: ResponseHead) -> bytes:
        """As `begin`, for a client whose protocol has a framing of its own: what came of the body, without any.

        Raises:
            ProtocolError: the body is malformed.
        """
        self._framing = framing = head.framing(self._method)
        if framing is Framing.CHUNKED:
            self._chunks = ChunkedBody(decode=True)
        elif framing is Framing.LENGTH:
            self._left = head.content_length or 0
        self._keep_alive = head.keep_alive
        rest, self.rest = bytes(self.rest), b""
        if framing is Framing.NONE:
            self.complete = True
            self.reusable = head.keep_alive and not rest
            return b""
        return self.body(rest) if rest else b""

    @property
    def trailers(self) -> bytes:
        """The fields of a decoded body's trailer section, once it is complete; empty if there are none."""
        return self._chunks.trailers if self._chunks is not None else b""

    def body(self, data: bytes) -> bytes:
        """What came of the body, as it goes to the client.

        Raises:
            ProtocolError: it is malformed.
        """
        if self._framing is Framing.LENGTH:
            size = len(data)
            out = data
            if size >= self._left:
                out = data[: self._left]
                self.complete = True
                self.reusable = self._keep_alive and size == self._left
            self._left -= len(out)
        elif self._chunks is not None:
            pieces, used = self._chunks.feed(data)
            out = b"".join(pieces)
            if self._chunks.finished:
                self.complete = True
                self.reusable = self._keep_alive and used == len(data)
        elif self._encode and data:
            out = b"%x\r\n%b\r\n" % (len(data), data)
        else:
            out = data
        self.size += len(out)
        return out

    def end(self) -> bytes | None:
        """The instance ended its stream: what is left for the client; None if the response is not whole."""
        if self._framing is not Framing.CLOSE or self.complete:
            return None
        self.complete = True
        return b"0\r\n\r\n" if self._encode else b""
