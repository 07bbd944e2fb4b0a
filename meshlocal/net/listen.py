"""Listening sockets, and the loop that accepts from one.

Sockets are the standard library's, non-blocking, waited for with trio.lowlevel:
an accepted connection that goes straight to the relay needs no wrapper around it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import trio

from meshlocal.net.relay_loop import current_loop
from meshlocal.net.sockets import format_address

if TYPE_CHECKING:
    from meshlocal.net.relay_loop import RelayLoop

BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn."""

ACCEPT_BATCH = 32
"""Connections accepted in a row before other tasks get their turn."""

CAPACITY_PAUSE = 0.1
"""Seconds to wait when the system cannot give another connection."""

_SERVED_FOR_EACH = 8
"""How many sockets a turn of the relay loop serves for each further connection that is accepted in it."""

_NEAR_CEILING = 2 * ACCEPT_BATCH
_PORT_TRIES = 16

_CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# What accept(2) on Linux passes on from a connection that failed before it was accepted, or a firewall refused.
_IGNORED_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
        errno.EOPNOTSUPP,
        errno.ENOSR,
        errno.ESOCKTNOSUPPORT,
        errno.EPROTONOSUPPORT,
        errno.ETIMEDOUT,
    }
)

# A family that this host has not, or has switched off.
_FAMILY_ABSENT = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})

Handle = Callable[[socket.socket, object], Awaitable[None]]
"""Serves one connection: the non-blocking socket, which it must close, and the peer's address."""


class Started(Enum):
    """What Trio has to do for a connection that was taken."""

    NOTHING = "nothing"
    """No task was started for it."""
    LATER = "later"
    """One was, whose first step may wait a little, where there is a relay loop: see `RelayLoop.started`."""
    NOW = "now"
    """One was, and has something to do."""


Take = Callable[[socket.socket, object], Started]
"""Has one connection served; if it raises, the socket is the caller's again, who closes it."""


class ListenError(Exception):
    """An address that cannot be listened on. `address` names it, `reason` says why, `errno` is the system's, or 0."""

    def __init__(self, address: str, reason: str, number: int = 0, key: str = "") -> None:
        super().__init__(f"{key}: " * bool(key) + f"cannot listen on {address}: {reason}")
        self.address = address
        self.reason = reason
        self.errno = number


@contextmanager
def wanted_by(key: str) -> Iterator[None]:
    """Within this, a `ListenError` says which key of the configuration asked for the address."""
    try:
        yield
    except ListenError as error:
        raise ListenError(error.address, error.reason, error.errno, key) from error.__cause__


def open_tcp_listeners(
    host: str, port: int, backlog: int | None = BACKLOG, *, shared: bool = False
) -> list[socket.socket]:
    """Listen on an address: one socket, or two for `localhost` and for the empty host, which means every address.

    Of those two families one may be missing on the host. Both get the same port, also when `port` is 0 and the
    system chooses it. No name but `localhost` is known: nothing here asks a resolver.

    Args:
        backlog: connections that may wait; None: the sockets are only bound, and do not listen. That keeps an address
            for those that are opened as `shared` with it, and fails if somebody else listens there.
        shared: several sockets may listen on the address (SO_REUSEPORT), of which the system chooses one for each
            connection. Anybody else who does not share is refused, and refuses this.

    Returns:
        Non-blocking listening sockets, the IPv4 one first; the caller closes them.

    Raises:
        ListenError: the host is no IP address, the port no port or taken, or the system refuses. Nothing stays open.
    """
    if not 0 <= port <= 65535:
        raise ListenError(f"{host}:{port}", "the port is not within 0 to 65535")
    if host == "localhost":
        return _open_both(("127.0.0.1", "::1"), port, backlog, shared)
    if host == "":
        return _open_both(("0.0.0.0", "::"), port, backlog, shared)
    return [_open(host, port, backlog, shared)]


def _open_both(hosts: tuple[str, str], port: int, backlog: int | None, shared: bool) -> list[socket.socket]:
    for tries_left in reversed(range(_PORT_TRIES)):
        listeners: list[socket.socket] = []
        absent: ListenError | None = None
        try:
            for host in hosts:
                try:
                    wanted = listeners[0].getsockname()[1] if listeners else port
                    listeners.append(_open(host, wanted, backlog, shared))
                except ListenError as error:
                    if error.errno not in _FAMILY_ABSENT:
                        raise
                    absent = error
        except BaseException as error:
            for listener in listeners:
                listener.close()
            # The port that the system chose for one family may be taken in the other: let it choose again.
            chosen = port == 0 and bool(listeners)
            if chosen and tries_left and isinstance(error, ListenError) and error.errno == errno.EADDRINUSE:
                continue
            raise
        if listeners:
            return listeners
        assert absent is not None
        raise absent
    raise AssertionError("the last try returns or raises")


def _open(host: str, port: int, backlog: int | None, shared: bool) -> socket.socket:
    shown = format_address((host, port))
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        raise ListenError(shown, "the host is neither an IP address nor localhost") from None
    listener: socket.socket | None = None
    try:
        # Numeric, so nothing is looked up; it resolves the scope of an address such as fe80::1%eth0.
        flags = socket.AI_NUMERICHOST | socket.AI_PASSIVE
        sockaddr = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=flags)[0][4]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted connections inherit it, which spares each a system call.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(sockaddr)
        if backlog is not None:
            listener.listen(backlog)
    except socket.gaierror as error:
        raise ListenError(shown, error.strerror or "the address is not usable") from error
    except OSError as error:
        if listener is not None:
            listener.close()
        number = error.errno or 0
        raise ListenError(shown, os.strerror(number) if number else str(error), number) from error
    return listener


async def accept_loop(
    listener: socket.socket,
    handler_nursery: trio.Nursery,
    handle: Handle,
    *,
    on_error: Callable[[OSError], object],
    ceiling: int = sys.maxsize,
) -> NoReturn:
    """Accept for ever, and start `handle(client, peer)` in the nursery for each connection: see `accept_each`."""
    await accept_each(listener, partial(_start, handler_nursery, handle), on_error=on_error, ceiling=ceiling)


def _start(nursery: trio.Nursery, handle: Handle, client: socket.socket, peer: object) -> Started:
    nursery.start_soon(handle, client, peer)
    return Started.NOW


async def accept_each(
    listener: socket.socket,
    take: Take,
    *,
    on_error: Callable[[OSError], object],
    ceiling: int = sys.maxsize,
) -> NoReturn:
    """Accept for ever, and have each connection taken.

    It is non-blocking, has the listener's options (with them TCP_NODELAY), and belongs to whom `take` gives it.
    Connections that failed before they were accepted are passed over. When descriptors or memory run out, `on_error`
    gets the error (it may come ten times a second), and accepting goes on after `CAPACITY_PAUSE`. The listener stays
    the caller's, who closes it after cancelling this.

    Descriptors from `ceiling` on are left for other uses: while no lower one is free, as little is accepted as when
    none is left at all. Clients wait in the listener's queue meanwhile.

    Where there is a relay loop, it accepts in the place where Trio would sleep, and this task sleeps until something
    else than a connection comes of it: a pass of Trio's own epoll and a switch to this task would cost a connection
    more than its accept.

    Raises:
        OSError: another error of accept(2): the listener is of no use.
    """
    loop = current_loop.get()
    spare = ceiling - _NEAR_CEILING
    while True:
        for _ in range(ACCEPT_BATCH):
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                if loop is None:
                    await trio.lowlevel.wait_readable(listener)
                    break
                number = await _LoopAcceptor(loop, listener, take, spare).run()
            except OSError as error:
                if error.errno in _IGNORED_ERRNOS:
                    continue
                if error.errno not in _CAPACITY_ERRNOS:
                    raise
                on_error(error)
                await trio.sleep(CAPACITY_PAUSE)
                break
            else:
                number = client.fileno()
                _give(client, peer, take)
            if number >= spare:
                # What was accepted gets its turn first, and takes the descriptors that it needs.
                await trio.lowlevel.checkpoint()
                while not _is_free_below(ceiling, listener):
                    on_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                    await trio.sleep(CAPACITY_PAUSE)
        else:
            await trio.lowlevel.checkpoint()


def accept_queued(listener: socket.socket, take: Take) -> None:
    """Accept what waits now, for the last time: what is left in the queue when a listener closes is reset.

    Connections are taken as in `accept_each`; what the system cannot give any more is left.
    """
    for _ in range(BACKLOG):
        try:
            client, peer = listener.accept()
        except OSError as error:
            if error.errno in _IGNORED_ERRNOS:
                continue
            return
        _give(client, peer, take)


def _give(client: socket.socket, peer: object, take: Take) -> Started:
    try:
        client.setblocking(False)
        return take(client, peer)
    except BaseException:
        # The nursery has ended, for one: then everything has.
        client.close()
        raise


class _LoopAcceptor:
    """Accepts in the relay loop, few connections a turn, while its task sleeps in `run`.

    Whatever does not go smoothly wakes the task, which accepts again and finds out for itself.
    """

    def __init__(self, loop: RelayLoop, listener: socket.socket, take: Take, spare: int) -> None:
        self._loop = loop
        self._listener = listener
        self._take = take
        self._family, self._type, self._protocol = int(listener.family), int(listener.type), listener.proto
        self._spare = spare
        self._number = -1
        self._raised: BaseException | None = None
        self.task: trio.lowlevel.Task | None = None

    async def run(self) -> int:
        """Accept until there is something for the task. Returns the descriptor of the last connection, -1 if none."""
        self._loop.listen(self._listener, self._on_event)
        self.task = trio.lowlevel.current_task()
        try:
            await trio.lowlevel.wait_task_rescheduled(self._abandon)
        finally:
            self._loop.unlisten(self._listener)
        if self._raised is not None:
            raise self._raised
        return self._number

    def _abandon(self, _: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _on_event(self, _: int) -> None:
        # One a turn, so that none costs an accept that finds the queue empty. But a turn takes as long as all that have
        # an event in it: where they are many, one for each few of them, or clients would wait for ever so many turns.
        for _ in range(1 + self._loop.crowd // _SERVED_FOR_EACH):
            if not self._accept():
                break

    def _accept(self) -> bool:
        """Accept a connection; tells whether there may be another one to accept here."""
        try:
            # What socket.accept() calls. It looks up and converts the listener's family and type for each connection,
            # which costs more than the system call.
            number, peer = self._listener._accept()  # type: ignore[attr-defined]  # the types know the public names only
        except BlockingIOError:
            return False  # another process that shares the listener, or its client, was faster
        except OSError as error:
            if error.errno in _IGNORED_ERRNOS:
                return True
            self._hand_over()
            return False
        self._number = number
        client = socket.socket(self._family, self._type, self._protocol, number)
        try:
            started = _give(client, peer, self._take)
        except BaseException as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            self._raised = error
            self._hand_over()
            return False
        if started is not Started.NOTHING:
            self._loop.started(soon=started is Started.NOW)
        if self._number >= self._spare:
            self._hand_over()
            return False
        return True

    def _hand_over(self) -> None:
        self._loop.unlisten(self._listener)
        self._loop.finish(self)


def _is_free_below(ceiling: int, listener: socket.socket) -> bool:
    """Whether the next descriptor that the kernel gives is below `ceiling`."""
    try:
        number = os.dup(listener.fileno())
    except OSError:
        return False
    os.close(number)
    return number < ceiling
