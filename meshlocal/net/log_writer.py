"""Lines to standard error, without ever waiting for who reads them (behaviour rule P1).

Theory of operation. A pipe that nobody empties, a terminal that was stopped and a disk that hangs hold whoever writes
to them, and a process that forwards traffic must not be held. So a line is written at once only where the kernel says
that there is room for it (poll(2); a pipe that is ready takes `PIPE_BUF` bytes whole, pipe(7)). Else it is queued for
a thread, which may wait; lines behind it are queued as well, so that they stay in order. The queue is bounded by
lines and by bytes: what does not fit is dropped and counted.
"""

from __future__ import annotations

import atexit
import os
import select
import stat
import threading
from collections import deque
from contextlib import suppress
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
        self._at_once = self._fd is not None and _tells_room(self._fd)
        self._poll = select.poll()
        if self._fd is not None:
            self._poll.register(self._fd, select.POLLOUT)
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._writing = False
        self.dropped = 0

    def write(self, line: str) -> bool:
        """Write a line, or have it written; false if it had to be dropped."""
        if self._fd is None:
            self._stream.write(line + "\n")
            self._stream.flush()
            return True
        data = (line + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            if (
                self._at_once
                and not self._lines
                and not self._writing
                and len(data) <= select.PIPE_BUF
                and self._room()
            ):
                with suppress(OSError):  # who read it has gone: there is nobody to tell
                    os.write(self._fd, data)
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

    def _room(self) -> bool:
        return any(event & select.POLLOUT for _, event in self._poll.poll(0))

    def _run(self) -> None:
        assert self._fd is not None
        while True:
            with self._lock:
                self._writing = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._lines)
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
        with suppress(OSError):
            while rest:
                self._poll.poll()
                with suppress(BlockingIOError):
                    rest = rest[os.write(self._fd, rest) :]


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _tells_room(fd: int) -> bool:
    """Whether poll(2) tells if a write would wait. It says of every file on a disk that it is ready."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))
