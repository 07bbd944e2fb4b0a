"""The stream below a WebSocket connection of a server: it knows its end, and ends a peer that does not read."""

from __future__ import annotations

import trio


class WatchedStream(trio.abc.Stream):
    """A stream whose end can be waited for. Who made the stream below closes that one: there may be more to say on it.

    Args:
        stream: the connection.
        stall_timeout: seconds that the peer may take to read what is sent to it.

    Attributes:
        ended: the peer ended its side, or the connection is over.
    """

    def __init__(self, stream: trio.abc.Stream, stall_timeout: float) -> None:
        self._stream = stream
        self._stall_timeout = stall_timeout
        self._closed = False
        self.ended = trio.Event()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        if self._closed:
            raise trio.ClosedResourceError("the connection is closed")
        try:
            received = await self._stream.receive_some(max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.ended.set()
            raise
        if not received:
            self.ended.set()
        return received

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`; a peer that does not read in time counts as broken."""
        if self._closed:
            raise trio.ClosedResourceError("the connection is closed")
        with trio.move_on_after(self._stall_timeout) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self.ended.set()
            raise trio.BrokenResourceError("the peer reads nothing")

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Nothing is received or sent from now on."""
        self._closed = True
        self.ended.set()
        await trio.lowlevel.checkpoint()
