"""The watches under way on a server, whatever they are served over: who they are, and how they end when it drains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice

import trio

from meshlocal.discovery.hub import Watcher
from meshlocal.net.slices import pieces
from meshlocal.policy.model import Caller, ServiceKey
from meshlocal.policy.steps import Steps
from meshlocal.policy.visibility import ALL, View
from meshlocal.wire.discovery_codec import caller_to_message
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

GOODBYES = 400
"""Watches that a drain ends in a second at most, unless its time is too short for that."""

_MOST_OF = 0.8
"""Of a drain's time that goodbyes may take: what is left is for calls to end."""

_STEP = 0.01
"""Seconds that a drain sleeps at least, if it sleeps between two goodbyes."""

_LONGEST = (1 << 32) - 1
"""Milliseconds that are told of at most."""

GOING_AWAY = "this server is going away; watch another one"

MOST_LISTED = 5000
"""Watchers that one answer names."""


class Watching:
    """One watch, as it is told of.

    Args:
        caller: who it says to be.
        address: that it comes from.
        identity: that it proved; empty for none.
        watcher: its place in the hub.
        began: when it did, by trio.current_time().

    Attributes:
        behind_since: when there was something for it first that it has not taken yet; None: it is current.
    """

    __slots__ = ("address", "began", "behind_since", "caller", "identity", "watcher")

    def __init__(self, caller: Caller, address: str, identity: str, watcher: Watcher, began: float) -> None:
        self.caller = caller
        self.address = address
        self.identity = identity
        self.watcher = watcher
        self.began = began
        self.behind_since: float | None = began

    def to_message(self, view: View, now: float) -> pb.Watcher:
        """What a caller with this view is told of it."""
        behind = now - self.behind_since if self.behind_since is not None else 0.0
        return pb.Watcher(
            caller=caller_to_message(self.caller),
            address=self.address,
            identity=self.identity,
            age_seconds=max(0, int(now - self.began)),
            behind_ms=min(_LONGEST, max(0, math.ceil(behind * 1000))),
            services=[
                pb.Watched(service=service, version=version)
                for service, version in sorted(self.watcher.versions().items())
                if view.sees(service)
            ],
        )


class Watches:
    """The watches under way, and their ends."""

    def __init__(self) -> None:
        self._draining = False
        self._under_way: dict[trio.CancelScope, Watching | None] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    @contextmanager
    def place(self, watching: Watching | None = None) -> Iterator[None]:
        """Be one of the watches.

        Args:
            watching: as it is told of; None: it is not.

        Raises:
            GrpcError: UNAVAILABLE, the server drains.
        """
        with trio.CancelScope() as leaving:
            if self._draining:
                leaving.cancel()
            self._under_way[leaving] = watching
            try:
                yield
            finally:
                del self._under_way[leaving]
        if leaving.cancelled_caught:
            raise GrpcError(StatusCode.UNAVAILABLE, GOING_AWAY)

    def _told_of(self) -> list[Watching]:
        return [watching for watching in self._under_way.values() if watching is not None]

    def listed(
        self, most: int, view: View = ALL, wanted: ServiceKey | None = None
    ) -> Steps[tuple[list[pb.Watcher], int]]:
        """Who watches now, and how many more there are than are listed, in steps. What is behind comes first, the
        longest of all; the others follow as they came.

        Args:
            most: how many are listed.
            view: what may be told of: who watches nothing of it is not there.
            wanted: only who watches this service; None: any.
        """
        now = trio.current_time()
        behind: list[Watching] = []
        current: list[Watching] = []
        for piece in pieces(self._told_of()):
            for each in piece:
                services = each.watcher.services
                if any(map(view.sees, services)) if wanted is None else wanted in services and view.sees(wanted):
                    (current if each.behind_since is None else behind).append(each)
            yield
        behind.sort(key=lambda each: each.behind_since or 0.0)
        yield
        found: list[pb.Watcher] = []
        for each in islice(chain(behind, current), most):
            found.append(each.to_message(view, now))
            yield
        return found, len(behind) + len(current) - len(found)

    def callers(self) -> Iterator[tuple[str, Iterable[ServiceKey]]]:
        """The node of each watcher, and the services that it watches."""
        return ((each.caller.node, each.watcher.services) for each in self._told_of())

    async def drain(self, within: float) -> None:
        """End every watch with UNAVAILABLE, so that watchers turn to another server; new ones end likewise, at once.

        Thousands that turn up at another server in the same moment would wait for each other there. So they are ended
        one after the other, `GOODBYES` in a second, or as fast as it takes to be through in most of `within` seconds.
        """
        self._draining = True
        leaving = list(self._under_way)
        pause = min(1 / GOODBYES, within * _MOST_OF / max(len(leaving), 1))
        due = began = trio.current_time()
        for position, scope in enumerate(leaving):
            due = began + position * pause
            if due - trio.current_time() > _STEP:
                await trio.sleep_until(due)
            scope.cancel()
