"""Hints that a file may have changed, from the kernel (inotify(7)), for a thread that looks at it.

A hint tells that it is worth looking, no more: what a network file system's other clients do gives none, nor what is
written through memory maps, and a kernel runs out of them. Who waits for hints looks from time to time besides. So
what the events say is not even read.

The three calls are libc's, by ctypes: the kept libraries for them bring a thread, an event loop or a parser of their
own, for what is a descriptor here that becomes readable.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

# inotify(7); the values are those of <sys/inotify.h>.
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_OF_FILE = _MODIFY | _ATTRIB | _CLOSE_WRITE | _DELETE_SELF | _MOVE_SELF
_OF_FOLDER = _OF_FILE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE

_LINKS = 40
"""Symbolic links that are followed for one path, as the kernel does (path_resolution(7))."""

_READ = 65536


class FileHints:
    """A thread's wait for a file to change: it is entered, armed and waited for there, and stopped from anywhere.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._inotify = -1
        self._armed = False

    def stop(self) -> None:
        """End the wait, and any later one. From any thread; also before the wait began, or after its end."""
        with self._lock:
            self._stopped.set()
            if self._pipe is not None:
                os.write(self._pipe[1], b"\0")

    def __enter__(self) -> Self:
        with self._lock:
            # Without descriptors to spare it is waited for all the same, without hints.
            with suppress(OSError):
                self._pipe = os.pipe()
            if self._stopped.is_set() and self._pipe is not None:
                os.write(self._pipe[1], b"\0")
        self._inotify = _init() if self._pipe is not None else -1
        self._armed = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            pipe, self._pipe = self._pipe, None
        for descriptor in (*(pipe or ()), self._inotify):
            if descriptor >= 0:
                os.close(descriptor)
        self._inotify = -1

    def arm(self) -> bool:
        """Have what happens to the file from now on end the next wait; whether the kernel will tell of it.

        It has to be called again after each wait, for after a hint the way to the file may lead through other folders.
        """
        if self._inotify >= 0 and not self._armed:
            self._armed = True
            for folder in folders_of(self._path):
                self._armed &= _watch(self._inotify, folder, _OF_FOLDER)
            # Its folder does not tell of what is written by another name that the file has.
            _watch(self._inotify, self._path, _OF_FILE)
        return self._armed

    def wait(self, longest: float, shortest: float) -> bool:
        """Wait for a hint; whether to go on (False: it was stopped).

        Args:
            longest: seconds after which it goes on without one.
            shortest: seconds that it waits even so, as the folder may be one in which much goes on.
        """
        if self._pipe is None:
            return not self._stopped.wait(longest)
        stopped, began = self._pipe[0], time.monotonic()
        found = _readable(longest, stopped, self._inotify)
        if self._inotify in found:
            found = _readable(began + shortest - time.monotonic(), stopped)
            # What else happened meanwhile is seen by the look that comes now.
            os.read(self._inotify, _READ)
            self._armed = False
        return stopped not in found


def folders_of(path: str) -> Iterator[str]:
    """The folders whose entries decide which file a path leads to: those that hold a link on its way, and its own."""
    at, rest = "/" if path.startswith("/") else ".", _parts(path)
    links = 0
    while rest:
        step = os.path.join(at, rest.pop())
        try:
            target = os.readlink(step)
        except OSError:
            # No link, or nothing at all.
            if not rest:
                yield at
            at = step
            continue
        yield at
        links += 1
        if links > _LINKS:
            return
        rest.extend(_parts(target))
        if target.startswith("/"):
            at = "/"


def _parts(path: str) -> list[str]:
    """A path's steps, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _readable(seconds: float, *descriptors: int) -> list[int]:
    """Wait until one of them can be read; those that can. Negative ones are none."""
    poll = select.poll()
    for descriptor in descriptors:
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(max(0.0, seconds) * 1000)]


def _init() -> int:
    """A new inotify instance; -1 where there are none, or no more of them."""
    try:
        found: int = _libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return -1
    return found


def _watch(instance: int, path: str, mask: int) -> bool:
    found: int = _libc().inotify_add_watch(instance, os.fsencode(path), ctypes.c_uint32(mask))
    return found >= 0


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
