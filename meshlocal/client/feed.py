"""What a consumer of instances sees, wherever they come from.

The proxy reads snapshots from a sink's side and never knows whether a discovery
server or a file in the same process feeds it; `app` joins the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import anyio
import msgspec

from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot


class SnapshotSink(Protocol):
    """Where snapshots go. Calls never block."""

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        """Do, in steps, what a large snapshot needs done before it is published next.

        A feed need not call it, nor finish what it began: `publish` does what is left, at once.
        """
        ...

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        """A service's latest state, and what led to it from the one before, if the feed knows that."""
        ...


class FeedStatus(msgspec.Struct):
    """How a feed is doing: read by metrics and the admin page, written by the feed alone.

    Attributes:
        source: the URL that the feed reads now, or read last.
        connected: whether it is being read.
        confirmed_at: when what is held was last known to be current, on the clock of `anyio.current_time`; None: never.
        reconnects: how often a connection was lost or could not be made.
        refused_instances: instances left out because a field of theirs made no sense.
        problem: why it is not connected; None while it is.
        stale: what is held came from a cache file, and was not confirmed since (D2).
        began: when the feed began, on the same clock; None before that.
    """

    source: str = ""
    connected: bool = False
    confirmed_at: float | None = None
    reconnects: int = 0
    refused_instances: int = 0
    problem: str | None = None
    stale: bool = False
    began: float | None = None

    def age(self, now: float) -> float | None:
        """Seconds since what is held was known to be current (D1), or since the feed began if it never heard anything.

        None before it began.
        """
        since = self.began if self.confirmed_at is None else self.confirmed_at
        return None if since is None else max(0.0, now - since)

    @property
    def unconfirmed(self) -> bool:
        """Nothing is known, or what is known came from a cache file, and no source has said so since."""
        return self.stale or self.confirmed_at is None


@runtime_checkable
class Refreshable(Protocol):
    """A feed that can be asked again."""

    def refresh(self, service: ServiceKey) -> None:
        """Get the service's whole state anew: what is known of it seems to be wrong (D5)."""
        ...


class NoFeed:
    """A `Feed` of what needs none: every address is fixed by the configuration."""

    def __init__(self) -> None:
        # What cannot change is always current.
        self.status = FeedStatus("none", connected=True, confirmed_at=math.inf)

    def follow(self, services: Sequence[ServiceKey]) -> None:
        """See `Feed.follow`: there are none."""

    async def run(self) -> None:
        """See `Feed.run`."""
        await anyio.sleep_forever()


class Feed(Protocol):
    """A task that keeps the services' snapshots coming, into a sink."""

    @property
    def status(self) -> FeedStatus:
        """How the feed is doing."""
        ...

    def follow(self, services: Sequence[ServiceKey]) -> None:
        """Follow these services from now on."""
        ...

    async def run(self) -> None:
        """Publish snapshots until cancelled."""
        ...
