"""Connections to instances that wait for their next request."""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Collection, Iterator
from typing import TypeAlias

from meshlocal.net.sockets import close

Place: TypeAlias = "tuple[str, int]"
"""An instance's address and port: what a connection leads to."""


class Upstream:
    """A connection to an instance.

    Attributes:
        sock: its socket, non-blocking.
        place: where it leads.
        used: it had a response already (A4).
        idle_since: when it was put back.
    """

    __slots__ = ("idle_since", "place", "sock", "used")

    def __init__(self, sock: socket.socket, place: Place) -> None:
        self.sock = sock
        self.place = place
        self.used = False
        self.idle_since = 0.0

    def close(self) -> None:
        """Close it."""
        close(self.sock)

    def is_silent(self) -> bool:
        """Whether it is open and nothing came on it, as far as this host knows."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


class Pool:
    """The unused connections to one service's instances.

    The one used last is used next, so that those which are too many grow old and are closed. Nobody waits for a
    connection: where none is left, another is made.
    """

    __slots__ = ("_idle", "_places")

    def __init__(self) -> None:
        self._idle: dict[Place, deque[Upstream]] = {}
        self._places: Collection[Place] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def sizes(self) -> Iterator[tuple[Place, int]]:
        """Unused connections by instance."""
        return ((place, len(idle)) for place, idle in self._idle.items())

    def take(self, place: Place) -> Upstream | None:
        """A connection to the instance; None if there is none. It is the caller's."""
        idle = self._idle.get(place)
        return idle.pop() if idle else None

    def put(self, upstream: Upstream, now: float, limit: int) -> None:
        """Give a connection back, or close it: if there are `limit` already, or the instance is gone (H2)."""
        place = upstream.place
        idle = self._idle.get(place)
        if idle is None:
            if self._places is not None and place not in self._places:
                close(upstream.sock)
                return
            idle = self._idle[place] = deque()
        if len(idle) >= limit:
            close(upstream.sock)
            return
        upstream.used = True
        upstream.idle_since = now
        idle.append(upstream)

    def keep_only(self, places: Collection[Place]) -> None:
        """Close the connections to all other places, now and when they are given back (H2)."""
        self._places = places
        for place in [place for place in self._idle if place not in places]:
            for upstream in self._idle.pop(place):
                close(upstream.sock)

    def close(self) -> None:
        """Close all connections, also those that are given back later."""
        self.keep_only(())

    def sweep(self, oldest: float) -> None:
        """Close what was put back before `oldest`, and what the other side closed, or sent something on unasked."""
        poll = select.poll()
        waiting: dict[int, None] = {}
        for place, idle in list(self._idle.items()):
            while idle and idle[0].idle_since < oldest:
                close(idle.popleft().sock)
            if not idle:
                del self._idle[place]
            for upstream in idle:
                waiting[upstream.sock.fileno()] = None
                poll.register(upstream.sock, select.POLLIN)
        if not waiting:
            return
        ended = {number for number, _ in poll.poll(0)}
        if not ended:
            return
        for idle in self._idle.values():
            for upstream in [each for each in idle if each.sock.fileno() in ended]:
                idle.remove(upstream)
                close(upstream.sock)
