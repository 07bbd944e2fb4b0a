"""The stream below a WebSocket connection of a server: it knows its end, and ends a peer that does not read."""

from __future__ import annotations

import re
from collections.abc import Callable

import trio

from meshlocal.policy.rates import TokenBucket

_PIECE = 65_536
"""Bytes that are sent at once, each in `stall_timeout`."""

_LONGEST_HEAD = 65_536
"""Bytes of a handshake that are looked through for its Host field."""

_HOST = re.compile(rb"\r\nhost:([^\r\n]*)", re.IGNORECASE)
_CLOSE = b"\x88"
"""How a close frame begins: the only fragment, opcode 8."""


class WatchedStream(trio.abc.Stream):
    """A stream whose end can be waited for. Who made the stream below closes that one: there may be more to say on it.

    Args:
        stream: the connection.
        stall_timeout: seconds that the peer may take to read what is sent to it, of a long message the next 64 KiB.
        bucket: how many bytes may come; None: any number.
        on_pause: called each time that the peer is made to wait with what it sends.

    Attributes:
        host: the Host field of the handshake; empty before that came, or if it has none.
        said_close: a close frame was sent.
        ended: the peer ended its side, or the connection is over.
        stalled: the peer did not read in time.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        stall_timeout: float,
        bucket: TokenBucket | None = None,
        on_pause: Callable[[], object] = bool,
    ) -> None:
        self._stream = stream
        self._stall_timeout = stall_timeout
        self._bucket = bucket
        self._on_pause = on_pause
        self._pause = 0.0
        self._closed = False
        self._head: bytearray | None = bytearray()
        self.host = ""
        self.said_close = False
        self.ended = trio.Event()
        self.stalled = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        if self._closed:
            raise trio.ClosedResourceError("the connection is closed")
        if self._pause:
            self._on_pause()
            await trio.sleep(self._pause)
            self._pause = 0.0
        try:
            received = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.ended.set()
            raise
        if not received:
            self.ended.set()
        if self._head is not None:
            self._head += received
            if b"\r\n\r\n" in self._head or len(self._head) > _LONGEST_HEAD:
                found = _HOST.search(self._head)
                self.host = found[1].decode("latin-1").strip() if found is not None else ""
                self._head = None
        if self._bucket is not None:
            self._pause = self._bucket.spend(len(received), trio.current_time())
        return received

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`; a peer that does not read in time counts as broken."""
        if self._closed:
            raise trio.ClosedResourceError("the connection is closed")
        left = memoryview(data)
        # Servers' frames are not masked, and the library sends each by itself (RFC 6455, 5.2).
        self.said_close = self.said_close or data[:1] == _CLOSE
        # Who is cancelled already has sent nothing yet, and may say goodbye.
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                with trio.move_on_after(self._stall_timeout) as scope:
                    await self._stream.send_all(left[:_PIECE])
            except BaseException:
                # Some of a frame was sent. What followed, a closing frame too, would be read as its rest.
                self._closed = True
                self.ended.set()
                raise
            if scope.cancelled_caught:
                self.stalled = True
                self.ended.set()
                raise trio.BrokenResourceError("the peer reads nothing")
            left = left[_PIECE:]
            if not left:
                return

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Nothing is received or sent from now on."""
        self._closed = True
        self.ended.set()
        await trio.lowlevel.checkpoint()
