"""The stream below a WebSocket connection of a server: it knows its end, and ends a peer that does not read."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshlocal.policy.rates import TokenBucket

_PIECE = 65_536


class WatchedStream(trio.abc.Stream):
    """A stream whose end can be waited for. Who made the stream below closes that one: there may be more to say on it.

    Args:
        stream: the connection.
        stall_timeout: seconds that the peer may take to read what is sent to it, of a long message the next 64 KiB.
        bucket: how many bytes may come; None: any number.
        on_pause: called each time that the peer is made to wait with what it sends.

    Attributes:
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
        if self._bucket is not None:
            self._pause = self._bucket.spend(len(received), trio.current_time())
        return received

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`; a peer that does not read in time counts as broken."""
        if self._closed:
            raise trio.ClosedResourceError("the connection is closed")
        left = memoryview(data)
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
