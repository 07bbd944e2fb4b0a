"""Unix sockets: listening on a path, with what a process that died there left behind (unix(7)).

All of it asks the file system, and so may block (behaviour rule P1).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from meshlocal.net.listen import BACKLOG, ListenError, wanted_by

_MODE = 0o666
"""Whoever can enter its folder may connect, as whoever is on this machine may to a port of 127.0.0.1."""


class UnixFile(NamedTuple):
    """The file that a listening socket is known by.

    Attributes:
        path: where it is.
        identity: the device and inode that it had when it was made.
    """

    path: str
    identity: tuple[int, int]

    def remove(self) -> None:
        """Remove it, unless another one has its place by now. Never fails."""
        with suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self.identity:
                os.unlink(self.path)


OpenUnix = tuple[socket.socket, UnixFile]
"""A listening Unix socket, and its file."""


def open_unix_listener(path: str) -> OpenUnix:
    """Listen on a path. A socket that nobody listens on any more gives way to it; anything else there is left alone.

    Returns:
        A non-blocking listening socket, which the caller closes, and its file, which the caller removes.

    Raises:
        ListenError: the system refuses, or something else is there. Nothing stays open.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        found = os.lstat(path)
        file = UnixFile(path, (found.st_dev, found.st_ino))
        try:
            os.chmod(path, _MODE)
            sock.listen(BACKLOG)
        except BaseException:
            file.remove()
            raise
    except OSError as error:
        sock.close()
        number = error.errno or 0
        raise ListenError(f"unix:{path}", error.strerror or str(error), number) from error
    except BaseException:
        sock.close()
        raise
    return sock, file


class UnixOpening:
    """Unix sockets that a thread opens, for listeners to come.

    Args:
        wanted: keys of the configuration, and the path that each names.

    Attributes:
        opened: those that are open and not given away, by path.
    """

    def __init__(self, wanted: Sequence[tuple[str, str]]) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._given_up = False
        self.opened: dict[str, OpenUnix] = {}

    def open(self) -> None:
        """Open them all.

        Raises:
            ListenError: one cannot be listened on; those before it stay open.
        """
        for key, path in self._wanted:
            with wanted_by(key):
                found = open_unix_listener(path)
            with self._lock:
                if not self._given_up:
                    self.opened[path] = found
                    continue
            found[0].close()
            found[1].remove()

    def give_away(self) -> None:
        """They are their listeners' from now on."""
        self.opened.clear()

    def give_up(self) -> list[UnixFile]:
        """Close what nobody took, also what a thread that hung opens later; the files that are to be removed."""
        with self._lock:
            self._given_up = True
            left, self.opened = self.opened, {}
        for sock, _ in left.values():
            sock.close()
        return [file for _, file in left.values()]


def _remove_stale(path: str) -> None:
    """Remove a socket's file that nobody listens on.

    Raises:
        OSError: somebody does, or it is no socket's, or nobody can tell.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        number = probe.connect_ex(path)
    if number in (0, errno.EAGAIN, errno.EPROTOTYPE):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if number not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(number, os.strerror(number))
    with suppress(FileNotFoundError):
        os.unlink(path)
