"""Lines to standard error, without ever waiting for who reads them (behaviour rule P1).

Theory of operation. A pipe that nobody empties, a terminal that was stopped and a disk that hangs hold whoever writes
to them, and a process that forwards traffic must not be held. So a line is written at once only where the kernel can be
asked not to wait: a pipe is opened once more for that, non-blocking, and takes `PIPE_BUF` bytes whole or not at all
(pipe(7)); a socket takes `MSG_DONTWAIT`. To ask first whether there is room would not do: another process that writes
to the same may take it. Else, and always to a terminal or a disk, a line is queued for a thread, which may wait; lines
behind it are queued as well, so that they stay in order. The queue is bounded by lines and by bytes: what does not fit
is dropped and counted.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TextIO

MOST_LINES = 4096
MOST_BYTES = 4 << 20
"""What is queued at most."""

LAST_WORDS = 1.0
"""Seconds that a process waits at its end for what is queued."""


class LineWriter:
    """Writes lines to a stream. Any thread may call it.

    Args:
        stream: one that has no file descriptor (in tests) is written to directly.

    Attributes:
        dropped: lines that were dropped so far.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fd = _descriptor(stream)
        self._closing = ExitStack()
        self._send = _sender(self._fd, self._closing) if self._fd is not None else None
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._writing = False
        self._closed = False
        self.dropped = 0

    def write(self, line: str) -> bool:
        """Write a line, or have it written; false if it had to be dropped."""
        if self._fd is None:
            self._stream.write(line + "\n")
            self._stream.flush()
            return True
        data = (line + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            if self._send is not None and not self._lines and not self._writing and len(data) <= select.PIPE_BUF:
                try:
                    data = data[self._send(data) :]
                except BlockingIOError:
                    pass
                except OSError:  # who read it has gone: there is nobody to tell
                    return True
                if not data:
                    return True
            if len(self._lines) >= MOST_LINES or self._size + len(data) > MOST_BYTES:
                self.dropped += 1
                return False
            self._lines.append(data)
            self._size += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="meshlocal log", daemon=True)
                self._thread.start()
                atexit.register(self.flush)
            self._lock.notify_all()
        return True

    def flush(self, limit: float = LAST_WORDS) -> bool:
        """Wait until what is queued was written, for so many seconds at most; tells whether it was."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._lines and not self._writing, limit)

    def close(self) -> None:
        """No line comes any more. What is queued is written still."""
        with self._lock:
            self._closed = True
            self._send = None
            self._lock.notify_all()
        self._closing.close()
        if self._thread is not None:
            atexit.unregister(self.flush)

    def _run(self) -> None:
        assert self._fd is not None
        while True:
            with self._lock:
                self._writing = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    return
                data = b"".join(self._lines)
                self._lines.clear()
                self._size = 0
                self._writing = True
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                # Somebody made it non-blocking: then it is waited for here.
                self._poll_until_ready(rest)
            except OSError:
                continue

    def _poll_until_ready(self, rest: memoryview) -> None:
        assert self._fd is not None
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        with suppress(OSError):
            while rest:
                poll.poll()
                with suppress(BlockingIOError):
                    rest = rest[os.write(self._fd, rest) :]


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _sender(fd: int, closing: ExitStack) -> Callable[[bytes], int] | None:
    """What sends bytes to the descriptor and never waits: it returns how many it took, or raises BlockingIOError.

    None: there is no such thing for this descriptor. `closing` closes what it took.
    """
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            closing.callback(os.close, own)
            return partial(os.write, own)
        if stat.S_ISSOCK(mode):
            sock = socket.socket(fileno=os.dup(fd))
            closing.callback(sock.close)
            return lambda data: sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        pass
    return None
