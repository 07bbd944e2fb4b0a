"""A request's body that comes on an HTTP/2 stream."""

from __future__ import annotations

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import RequestHead


class Http2Body(RequestBody):
    """A body as it comes in DATA frames. What it has of its base is what others ask for: `held`, `size`, `finished`.

    Args:
        head: of its request.
        limit: bytes at most; None for any number.
        hold: bytes that are kept to be sent again.

    Attributes:
        fresh: pieces that nobody took yet.
        ended: all of it came. It is `finished` once all of it was taken, too.
        taken: some of it was, by an instance that was tried.
        given: bytes of it for which the client was given credit.
        trailers: the section behind it, as fields; empty if there is none.

    Raises:
        ProtocolError: it is announced to be longer than `limit`.
    """

    __slots__ = ("ended", "fresh", "given", "taken", "trailers")

    def __init__(self, head: RequestHead, *, limit: int | None, hold: int) -> None:
        super().__init__(head, limit=limit, hold=hold)
        self.fresh: list[bytes] = []
        self.ended = self.finished
        self.taken = False
        self.given = 0
        self.trailers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def is_held(self) -> bool:
        """See `RequestBody.is_held`: what nobody took yet is there, however much it is."""
        return self.held is not None or not self.taken

    def put(self, piece: bytes) -> None:
        """Take what came.

        Raises:
            ProtocolError: it is longer than the limit.
        """
        self.size += len(piece)
        if self._limit is not None and self.size > self._limit:
            raise ProtocolError(413, "body_too_large", f"the body is longer than {self._limit} bytes")
        if self.held is not None and piece:
            if self.size > self._hold:
                self.held = None
            else:
                self.held.append(piece)
