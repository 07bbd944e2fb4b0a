"""Unix sockets: listening on a path, with what a process that died there left behind (unix(7)).

All of it asks the file system, and so may block (behaviour rule P1).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from meshlocal.net.listen import BACKLOG, ListenError, wanted_by

_MODE = 0o666
"""Whoever can enter its folder may connect, as whoever is on this machine may to a port of 127.0.0.1."""


_LOCK_LIMIT = 1.0
"""Seconds that a lock on a folder is waited for, which others hold for some system calls only."""

_LOCK_PAUSE = 0.01


class UnixFile:
    """The file that a listening socket is known by.

    Args:
        path: where it is, in UTF-8.

    Attributes:
        path: as given.
    """

    def __init__(self, path: bytes) -> None:
        found = os.lstat(path)
        self.path = path
        self._identity = found.st_dev, found.st_ino
        self._removed = False

    @property
    def is_there(self) -> bool:
        """Whether it is where it was made."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def remove(self) -> None:
        """Remove it, once, unless another one has its place by now. Never fails."""
        if not self._removed:
            self._removed = True
            with suppress(OSError), _locked(self.path):
                if self.is_there:
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
    # Encoded here: Python would go by the locale.
    encoded = path.encode()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _locked(encoded):
            try:
                sock.bind(encoded)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(encoded)
                sock.bind(encoded)
            file = UnixFile(encoded)
            try:
                os.chmod(encoded, _MODE)
                sock.listen(BACKLOG)
            except BaseException:
                os.unlink(encoded)
                raise
    except OSError as error:
        sock.close()
        number = error.errno or 0
        raise ListenError(f"unix:{path}", error.strerror or str(error), number) from error
    except BaseException:
        sock.close()
        raise
    return sock, file


@contextmanager
def _locked(path: bytes) -> Iterator[None]:
    """Within this, no other that asks for it looks at the folder of a path, and at what is there, and changes that.

    Raises:
        OSError: somebody keeps the lock, or there is no such folder.
    """
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _LOCK_LIMIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(errno.EAGAIN, "somebody keeps a lock on the folder") from None
                time.sleep(_LOCK_PAUSE)
        yield
    finally:
        os.close(descriptor)


class UnixOpening:
    """Unix sockets that a thread opens, for listeners to come.

    Args:
        wanted: keys of the configuration, the path that each names, and the file of the listener that has it; None if
            there is none. One whose file is gone, so that nobody can connect there any more, is opened anew.

    Attributes:
        opened: those that are open and not given away, by path.
    """

    def __init__(self, wanted: Sequence[tuple[str, str, UnixFile | None]]) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._given_up = False
        self.opened: dict[str, OpenUnix] = {}

    def open(self) -> None:
        """Open them all.

        Raises:
            ListenError: one cannot be listened on; those before it stay open.
        """
        for key, path, file in self._wanted:
            if file is not None and file.is_there:
                continue
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

    def leave(self) -> list[UnixFile]:
        """Close what nobody took, also what a thread that hung opens later; the files that are to be removed."""
        with self._lock:
            self._given_up = True
            left, self.opened = self.opened, {}
        for sock, _ in left.values():
            sock.close()
        return [file for _, file in left.values()]

    def give_up(self) -> None:
        """The same, and remove the files."""
        for file in self.leave():
            file.remove()


def _remove_stale(path: bytes) -> None:
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
