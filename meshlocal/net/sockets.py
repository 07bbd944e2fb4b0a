"""What every user of the standard library's sockets under trio needs."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import trio
from trio.lowlevel import RunVar

on_close: RunVar[Callable[[socket.socket], None] | None] = RunVar("meshlocal.sockets.on_close", default=None)
"""Told of each socket that `close` or `abort` is about to close: for what waits for sockets without trio's help."""

# The module's own makes an enumeration's member of it each time, which costs more than the system call.
_family_of = vars(socket.SocketType)["family"].__get__

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def format_address(sockaddr: object) -> str:
    """A socket's address as people write it: `127.0.0.1:80`, `[::1]:80`, `unix:/run/x.sock`."""
    if isinstance(sockaddr, tuple) and len(sockaddr) >= 2:
        host, port = sockaddr[0], sockaddr[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    # A client may bind its own to any bytes. An abstract name (unix(7)) starts with a zero byte, which ss(8) and others
    # write as an at sign.
    name = sockaddr if isinstance(sockaddr, bytes) else os.fsencode(str(sockaddr))
    return f"unix:{name.decode('utf-8', 'backslashreplace')}".replace("\0", "@")


def is_unix(sock: socket.socket) -> bool:
    """Whether it is a Unix socket (unix(7)).

    To an epoll instance those differ from TCP's in two ways. A close of the other end is told as EPOLLHUP, where TCP
    tells so only of what is over in both directions. And a read ends behind bytes that file descriptors were sent with,
    though there is more.
    """
    return bool(_family_of(sock) == socket.AF_UNIX)


def close(sock: socket.socket, *, awaited: bool = True) -> None:
    """Close a socket, waking tasks that wait for it with trio.ClosedResourceError. Closing twice is harmless.

    `awaited` false spares the search for such tasks, and two system calls with it: for who knows that there are none.
    """
    if sock.fileno() != -1:
        if awaited:
            trio.lowlevel.notify_closing(sock)
        told = on_close.get()
        if told is not None:
            told(sock)
        sock.close()


def abort(sock: socket.socket, *, awaited: bool = True) -> None:
    """Close a TCP connection with a reset instead of a clean end: what was not yet sent is dropped (RFC 9293, 3.10.5).

    Unix sockets have no such thing: one that is cut looks to its other end like one that was closed.

    Wakes tasks that wait for it with trio.ClosedResourceError; `awaited` as in `close`. Harmless on a closed socket.
    """
    if sock.fileno() != -1:
        with suppress(OSError):  # not TCP, or dead already: closing is all that is left
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        close(sock, awaited=awaited)
