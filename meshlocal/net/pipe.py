"""The seam between protocols and what carries their bytes: a plain socket, or TLS over one.

The contract. `read` and `write` never wait. Who reads goes on until `read` gives None: what carries the bytes may hold
some that no event of the socket announces, as TLS does. Who waits says for what: `wait_readable` is for the next
`read`, `wait_writable` for the next `write`, whatever the socket below has to do for it. A failure is an OSError, from
any of them; the pipe is of no use afterwards but to be aborted.

The relay loop and the lane have a written-out path for plain sockets, which they take where `plain` gives one: the same
calls without one of Python's own around each.
"""

from __future__ import annotations

import socket
from typing import Protocol

from trio.lowlevel import notify_closing, wait_readable, wait_writable

from meshlocal.net.sockets import abort, close


class Pipe(Protocol):
    """A stream of bytes both ways."""

    @property
    def identity(self) -> str:
        """Who the other side proved to be; empty if it proved nothing."""
        ...

    @property
    def told(self) -> bytes:
        """What an instance is told of that, as the value of X-Forwarded-Client-Cert; empty: nothing."""
        ...

    @property
    def plain(self) -> socket.socket | None:
        """The socket whose bytes they are; None if they are not, as with TLS."""
        ...

    def fileno(self) -> int:
        """The number of the socket below; -1 if there is none."""
        ...

    @property
    def may_hold(self) -> bool:
        """Whether `read` may give something that no event of the socket will announce."""
        ...

    def read(self, size: int) -> bytes | None:
        """What came, at most so many bytes; empty at the stream's end, None if nothing came yet."""
        ...

    def write(self, data: bytes | memoryview) -> int:
        """Send what can be sent at once; how many bytes that was."""
        ...

    def peek(self, size: int) -> bytes | None:
        """What `read` would give, which stays there. For who reads, or while nobody does."""
        ...

    def has_input(self) -> bool:
        """Whether something came that was not read. It takes nothing: another task may wait for that."""
        ...

    def end(self) -> None:
        """End our side of the stream, after all that was written. If `is_unsent` then, a `write` goes on with it."""
        ...

    @property
    def is_unsent(self) -> bool:
        """Whether something that was taken waits for room; `write` sends it, also one of nothing."""
        ...

    def close(self) -> None:
        """Close it in good order. Closing twice is harmless."""
        ...

    def abort(self) -> None:
        """Cut it, so that nothing sent on it looks complete. Harmless on one that is closed."""
        ...

    def interrupt(self) -> None:
        """Have those who wait get trio.ClosedResourceError, though it is not closed."""
        ...

    def stop_reading(self) -> None:
        """Have `read` give what came, and then the end, or that there is none."""
        ...

    async def wait_readable(self) -> None:
        """Wait until `read` may give something."""
        ...

    async def wait_writable(self) -> None:
        """Wait until `write` may take something."""
        ...


class PlainPipe:
    """A `Pipe` that is a connected, non-blocking socket.

    Args:
        sock: the socket.

    Attributes:
        plain: the socket.
    """

    __slots__ = ("plain",)

    identity = ""
    told = b""

    def __init__(self, sock: socket.socket) -> None:
        self.plain: socket.socket = sock

    may_hold = False

    def fileno(self) -> int:
        """See `Pipe.fileno`."""
        return self.plain.fileno()

    def read(self, size: int) -> bytes | None:
        """See `Pipe.read`."""
        try:
            return self.plain.recv(size)
        except BlockingIOError:
            return None

    def write(self, data: bytes | memoryview) -> int:
        """See `Pipe.write`."""
        try:
            return self.plain.send(data)
        except BlockingIOError:
            return 0

    def peek(self, size: int) -> bytes | None:
        """See `Pipe.peek`."""
        try:
            return self.plain.recv(size, socket.MSG_PEEK)
        except BlockingIOError:
            return None

    is_unsent = False

    def has_input(self) -> bool:
        """See `Pipe.has_input`."""
        return bool(self.peek(1))

    def end(self) -> None:
        """See `Pipe.end`."""
        self.plain.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `Pipe.close`."""
        close(self.plain)

    def abort(self) -> None:
        """See `Pipe.abort`."""
        abort(self.plain)

    def interrupt(self) -> None:
        """See `Pipe.interrupt`."""
        notify_closing(self.plain)

    def stop_reading(self) -> None:
        """See `Pipe.stop_reading`."""
        self.plain.shutdown(socket.SHUT_RD)

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        await wait_readable(self.plain)

    async def wait_writable(self) -> None:
        """See `Pipe.wait_writable`."""
        await wait_writable(self.plain)


async def finish_writing(pipe: Pipe) -> None:
    """End our side of the stream, and wait until that is sent.

    Raises:
        OSError: it cannot be.
    """
    pipe.end()
    while pipe.is_unsent:
        await pipe.wait_writable()
        pipe.write(b"")


def is_silent(pipe: Pipe) -> bool:
    """Whether a pipe is open and nothing came on it, as far as this host knows."""
    try:
        return pipe.peek(1) is None
    except OSError:
        return False
