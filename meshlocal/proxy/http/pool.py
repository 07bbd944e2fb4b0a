"""Connections to instances that wait for their next request."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from meshlocal.client.security import Security
from meshlocal.net.pipe import Pipe, is_silent
from meshlocal.net.sockets import is_unix
from meshlocal.policy.model import HostPort
from meshlocal.policy.retry import Failure

if TYPE_CHECKING:
    from meshlocal.net.relay_loop import RelayLoop


class Upstream:
    """A connection to an instance.

    Attributes:
        pipe: its bytes.
        sock: the connection's socket, non-blocking; None if its bytes are not plain.
        number: the socket's file descriptor; -1 likewise.
        place: where it leads.
        security: that it was made with; None: it is in plaintext.
        path: of the instance's Unix socket, when it was made; None: it had none.
        is_unix: it is one.
        pool: that has it, while it waits.
        used: it had a response already (A4).
        idle_since: when it was put back.
        watched: the relay's loop has it.
        ending: its other side closed it, or it failed, or said more than was asked for.
    """

    __slots__ = (
        "ending",
        "idle_since",
        "is_unix",
        "number",
        "path",
        "pipe",
        "place",
        "pool",
        "security",
        "sock",
        "used",
        "watched",
    )

    def __init__(self, pipe: Pipe, place: HostPort, security: Security | None, path: str | None = None) -> None:
        self.pipe = pipe
        self.sock = sock = pipe.plain
        self.number = sock.fileno() if sock is not None else -1
        self.place = place
        self.security = security
        self.path = path
        self.is_unix = sock is not None and is_unix(sock)
        self.pool: Pool | None = None
        self.used = False
        self.idle_since = 0.0
        self.watched = False
        self.ending = False

    def failed(self) -> Failure:
        """What its end is for a request of which nothing was answered."""
        return Failure.STALE if self.used else Failure.NO_RESPONSE

    def on_event(self, mask: int) -> None:
        """While it waits for a request nothing may come on it: neither its end nor what nobody asked for."""
        if self.pool is not None:
            self.pool.drop(self, spoke=self.spoke())

    def spoke(self) -> bool:
        """Whether something came on it that may have been meant as the answer to a request.

        A 408 is none: so a server may say that it waited for long enough (RFC 9110, 15.5.9). Nor is white space.
        """
        try:
            said = self.pipe.peek(16) or b""
        except OSError:
            return False
        return bool(said.strip()) and said[9:12] != b"408"

    def look_behind(self) -> None:
        """A response filled the last read of it: what may be behind it, read by nobody, would make no other event."""
        self.ending = self.ending or not self.is_silent()

    def is_silent(self) -> bool:
        """Whether it is open and nothing came on it, as far as this host knows."""
        return is_silent(self.pipe)


class Pool:
    """The unused connections to one service's instances.

    The one used last is used next, so that those which are too many grow old and are closed. Nobody waits for a
    connection: where none is left, another is made.

    With the relay's loop, a connection that its other side closes, or says something on unasked, is closed as that
    happens; without, when it is taken, or by the next sweep.

    Args:
        loop: if there is one.

    Attributes:
        on_unasked: told of an instance that said something while nobody had asked it.
        security: that connections are made with now (T1); those of another are not kept.
        paths: of instances' Unix sockets now; connections that were made when an instance had another are not kept.
    """

    __slots__ = ("_idle", "_loop", "_places", "on_unasked", "paths", "security")

    def __init__(self, loop: RelayLoop | None = None) -> None:
        self._loop = loop
        self.on_unasked: Callable[[HostPort], None] | None = None
        self.security: Security | None = None
        self.paths: Mapping[HostPort, str] = {}
        self._idle: dict[HostPort, deque[Upstream]] = {}
        self._places: Collection[HostPort] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def sizes(self) -> Iterator[tuple[HostPort, int]]:
        """How many connections lie unused, by instance."""
        return ((place, len(idle)) for place, idle in self._idle.items())

    def take(self, place: HostPort, *, sure: bool) -> Upstream | None:
        """A connection to the instance; None if there is none. It is the caller's.

        Args:
            place: where it leads.
            sure: it is looked at once more: what is to be sent on it cannot be sent again (A4).
        """
        idle = self._idle.get(place)
        while idle:
            upstream = idle.pop()
            # The loop goes on to call `on_event`, which does nothing from here on, until another handler is set.
            upstream.pool = None
            if upstream.watched and not sure:
                return upstream
            if upstream.is_silent():
                return upstream
            self._close(upstream, spoke=upstream.spoke())
        return None

    def put(self, upstream: Upstream, now: float, limit: int, *, watched: bool = False) -> None:
        """Give a connection back, or close it: if there are `limit` already, or the instance is gone (H2).

        Args:
            upstream: the connection.
            now: by trio.current_time().
            limit: unused connections to its instance at most.
            watched: the loop had it all the time.
        """
        place = upstream.place
        if upstream.security is not self.security or upstream.path != self.paths.get(place):
            upstream.pipe.close()
            return
        idle = self._idle.get(place)
        if idle is None:
            if self._places is not None and place not in self._places:
                upstream.pipe.close()
                return
            idle = self._idle[place] = deque()
        if len(idle) >= limit:
            upstream.pipe.close()
            return
        upstream.used = True
        upstream.idle_since = now
        upstream.pool = self
        idle.append(upstream)
        if self._loop is not None and upstream.sock is not None:
            self._loop.handlers[upstream.number] = upstream.on_event
            if not (watched and upstream.watched):
                # What happened while the loop did not look makes an event now.
                self._loop.watch(upstream.sock)
                upstream.watched = True

    def drop(self, upstream: Upstream, *, spoke: bool = False) -> None:
        """Close one that waits; `spoke`: something came on it."""
        idle = self._idle.get(upstream.place)
        if idle is not None and upstream in idle:
            idle.remove(upstream)
            self._close(upstream, spoke=spoke)

    def _close(self, upstream: Upstream, *, spoke: bool) -> None:
        upstream.pipe.close()
        if spoke and self.on_unasked is not None:
            self.on_unasked(upstream.place)

    def keep_only(self, places: Collection[HostPort]) -> None:
        """Close the connections to all other places, now and when they are given back (H2)."""
        self._places = places
        self.drop_places([place for place in self._idle if place not in places])

    def renew(self, security: Security | None) -> None:
        """Keep only what is made with this from now on (T1)."""
        self.security = security
        self.drop_places(list(self._idle))

    def drop_places(self, places: Iterable[HostPort]) -> None:
        """Close the connections to these places that wait."""
        for place in places:
            for upstream in self._idle.pop(place, ()):
                upstream.pipe.close()

    def close(self) -> None:
        """Close all connections, also those that are given back later."""
        self.keep_only(())

    def sweep(self, oldest: float) -> None:
        """Close what was put back before `oldest`, and what the other side closed, or sent something on unasked."""
        poll = select.poll()
        waiting: dict[int, None] = {}
        for place, idle in list(self._idle.items()):
            while idle and idle[0].idle_since < oldest:
                idle.popleft().pipe.close()
            if not idle:
                del self._idle[place]
            for upstream in list(idle):
                if upstream.sock is not None:
                    waiting[upstream.number] = None
                    poll.register(upstream.sock, select.POLLIN)
                elif not upstream.is_silent():
                    # What came may be TLS's own, and say nothing of the stream within.
                    idle.remove(upstream)
                    self._close(upstream, spoke=upstream.spoke())
        if not waiting:
            return
        ended = {number for number, _ in poll.poll(0)}
        if not ended:
            return
        for idle in self._idle.values():
            for upstream in [each for each in idle if each.number in ended]:
                idle.remove(upstream)
                self._close(upstream, spoke=upstream.spoke())
