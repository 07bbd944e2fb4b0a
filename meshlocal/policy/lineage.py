"""Which discovery servers a server learns from, directly and by way of others, so that none learns from itself.

Each server makes up an id when it starts. Who follows it is told that id, and those of the servers that it asks, and of
those that these ask. A server that finds its own among them would hear what it said itself: what its registries forget
would come back to it for ever. It refuses, as a BGP speaker refuses a route whose path has its own number
(RFC 4271, section 9.1.2).

Whom a server asks is told whether it uses the answers or not, and is not forgotten while the connection is down. So
every server of a loop sees the loop as long as it is there, and none uses the others' answers now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from meshlocal.policy.problems import quote

MOST = 256
"""Servers that one may learn from, directly and by way of others."""

MOST_TEXT = 64
"""Characters of an id."""


class LineageError(ValueError):
    """A server must not be learned from. The text says why."""


class DuplicateError(LineageError):
    """A server is learned from already, by way of another source."""


class Lineage:
    """One server's id, and whom it learns from.

    Args:
        own: its id; others have the same one only by accident.
    """

    def __init__(self, own: str) -> None:
        self.own = own
        self._told: dict[str, tuple[str, ...]] = {}
        """By source: the ids that its server told of, its own first."""
        self._accepted: set[str] = set()
        self._servers: tuple[str, ...] = (own,)
        self._said: object = None
        self._listeners: dict[object, Callable[[], None]] = {}

    def servers(self) -> tuple[str, ...]:
        """What this server tells those who follow it: its id, then those that it learns from."""
        return self._servers

    def note(self, source: str, servers: Sequence[str]) -> None:
        """Take what the server behind a source tells of itself.

        Raises:
            LineageError: it must not be learned from, as long as it tells no other lineage.
        """
        # What makes no sense is not passed on.
        told = tuple(each for each in servers if each and len(each) <= MOST_TEXT and each.isprintable())
        self._told[source] = told[: MOST + 1]
        self._accepted.discard(source)
        try:
            self._judge(source, servers, told)
            self._accepted.add(source)
        finally:
            self._tell()

    def _judge(self, source: str, servers: Sequence[str], told: Sequence[str]) -> None:
        if len(told) != len(servers) or not told:
            raise LineageError("its lineage makes no sense: an id is missing, is too long, or cannot be printed")
        if len(told) > MOST:
            raise LineageError(f"it learns from more than {MOST} servers")
        if told[0] == self.own:
            raise LineageError("it is this server itself")
        if self.own in told:
            raise LineageError("it learns from this server: each would hear what it said itself")
        for other in self._accepted:
            if self._told[other][0] == told[0]:
                raise DuplicateError(f"it is the same server as {quote(other)}, which is followed already")

    def forget(self, source: str) -> None:
        """The source is gone for good."""
        self._told.pop(source, None)
        self._accepted.discard(source)
        self._tell()

    def _tell(self) -> None:
        others = dict.fromkeys(each for told in self._told.values() for each in told)
        others.pop(self.own, None)
        # In a loop everybody's own id comes back by way of the others, and is told: it is how they know.
        self._servers = (self.own, *sorted(others))[: MOST + 1]
        followed = {source: self._told[source][0] for source in self._accepted}
        if (said := (self._servers, followed)) != self._said:
            self._said = said
            for listener in list(self._listeners.values()):
                listener()

    @contextmanager
    def followed(self, listener: Callable[[], None]) -> Iterator[None]:
        """Have `listener` called whenever what `servers` gives may be another, or who is followed is."""
        key = object()
        self._listeners[key] = listener
        try:
            yield
        finally:
            del self._listeners[key]
