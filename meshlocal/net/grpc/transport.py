"""The byte stream that a connection runs over: an anyio stream, or a trio stream behind the same three methods."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import anyio

if TYPE_CHECKING:
    import trio


@runtime_checkable
class ByteStream(Protocol):
    """What `anyio.abc.ByteStream` offers. `receive` raises anyio.EndOfStream at the end."""

    async def receive(self, max_bytes: int = ..., /) -> bytes:
        """Receive at least one byte."""
        ...

    async def send(self, item: bytes, /) -> None:
        """Send all bytes."""
        ...

    async def aclose(self) -> None:
        """Close the stream."""
        ...


class TrioByteStream:
    """A trio stream with the methods of an anyio one.

    Args:
        stream: the stream.
        plain: the non-blocking socket right below it, if nothing stands between them: no TLS.
    """

    __slots__ = ("_plain", "_stream")

    def __init__(self, stream: trio.abc.Stream, plain: socket.socket | None = None) -> None:
        self._stream = stream
        self._plain = plain

    async def receive(self, max_bytes: int = 65_536, /) -> bytes:
        """Receive at least one byte. Raises anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError."""
        with _Translated():
            data = bytes(await self._stream.receive_some(max_bytes))
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes, /) -> None:
        """Send all bytes. Raises anyio.BrokenResourceError, anyio.ClosedResourceError."""
        with _Translated():
            await self._stream.send_all(item)

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what the peer's system takes at once; returns how many bytes that was. Not while a `send` is under way.

        0 where that cannot be done or failed: `send` then tells why.
        """
        if self._plain is None:
            return 0
        try:
            return self._plain.send(data)
        except OSError:
            return 0

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()


class _Translated:
    """trio's stream errors become anyio's."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        import trio  # here, so that an asyncio application never imports it

        if isinstance(error, trio.BrokenResourceError):
            raise anyio.BrokenResourceError from error
        if isinstance(error, trio.ClosedResourceError):
            raise anyio.ClosedResourceError from error


def adapt(stream: ByteStream | trio.abc.Stream) -> ByteStream:
    """An anyio byte stream as it is; a trio stream in a `TrioByteStream`."""
    if isinstance(stream, ByteStream):
        return stream
    return TrioByteStream(stream)
