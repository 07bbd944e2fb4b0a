"""Which instances are connected to by a Unix socket instead of their port."""

from __future__ import annotations

import functools
import os.path
from typing import NamedTuple

from meshlocal.policy.model import SOCKET, Instance, known

PATH_LIMIT = 107
"""Bytes of a Unix socket's path, in UTF-8 (unix(7), sun_path, which ends with a zero byte)."""


class UnixSocketError(ValueError):
    """A label that names no socket. Its text says why."""


class UnixSockets(NamedTuple):
    """Where a caller may find instances' sockets.

    Attributes:
        folder: that they are in; whoever can name an instance can have callers connect to any socket below it, and to
            no other.
        node: the caller's; other nodes' files are not here.
    """

    folder: str
    node: str

    def of(self, instance: Instance) -> str | None:
        """The path of an instance's socket; None if it has none here, or its label names none."""
        name = instance.labels.get(SOCKET)
        if not name or not self.node or instance.node != self.node:
            return None
        return _look(self.folder, name)[0]

    def look(self, name: str) -> tuple[str | None, str | None]:
        """The path that a label names; or what is wrong with it."""
        return _look(self.folder, name)


@functools.lru_cache(maxsize=1024)
def _look(folder: str, name: str) -> tuple[str | None, str | None]:
    try:
        return socket_path(folder, name), None
    except UnixSocketError as error:
        return None, str(error)


def socket_path(folder: str, name: str) -> str:
    """The path that a label names: a name within the folder, such as `cache.sock`, or a path that leads there.

    Raises:
        UnixSocketError: it leads elsewhere, or is too long for a socket.
    """
    name = known(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UnixSocketError(f"{name!r} cannot be written in UTF-8") from None
    path = os.path.normpath(os.path.join(folder, name))
    root = os.path.normpath(folder)
    if ".." in name.split("/") or not path.startswith(root.rstrip("/") + "/") or "\0" in name:
        raise UnixSocketError(f"{name!r} is no path within {folder}")
    if len(path.encode()) > PATH_LIMIT:
        raise UnixSocketError(f"{path!r} is longer than the {PATH_LIMIT} bytes that a socket's path may have")
    return path
