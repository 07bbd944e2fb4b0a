"""The watch on a discovery server that never ends (behaviour rules D1 and D4).

One task owns the connection and all that is held. It watches its services on
one stream, applies each event to what it holds and passes the result to a sink.
Whatever ends the stream, it keeps what it holds, waits with exponential backoff
and jitter, and watches again from the versions that it holds, at the next of
its servers. A server that is frozen without closing is found by keepalive
pings, one that answers pings but says nothing by its missing heartbeats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TypeVar

import anyio
import anyio.lowlevel
import msgspec

from meshlocal.client.feed import FeedStatus, SnapshotSink
from meshlocal.client.link import Link, LinkOptions, open_link
from meshlocal.net.log import get_log
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.model import BaseMismatchError, ModelError, ServiceKey, ServiceSnapshot, apply
from meshlocal.policy.steps import STEP, Steps
from meshlocal.wire.discovery_codec import change_in_steps, snapshot_in_steps
from meshlocal.wire.grpc.status import GrpcError
from meshlocal.wire.pb import discovery_pb2 as pb

_log = get_log(__name__)

T = TypeVar("T")

SILENCE_FACTOR = 3.0
"""Heartbeat intervals without an event after which a watch is taken for dead."""

FIRST_EVENT_LIMIT = 10.0
"""Seconds to a watch's first event, before its server has said how often it sends heartbeats."""

MAX_EVENT_SIZE = 64 * 2**20
"""Bytes of one event at most: room for a snapshot of some 200,000 instances."""


class WatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How servers are reached, and reached again; times in seconds."""

    connect_timeout: float = 3.0
    keepalive_interval: float = 10.0
    keepalive_timeout: float = 5.0
    backoff_initial: float = 0.2
    backoff_max: float = 15.0
    ca_file: str | None = None
    token_file: str | None = None

    def link(self) -> LinkOptions:
        """What a connection to one of them goes by."""
        return LinkOptions(
            connect_timeout=self.connect_timeout,
            keepalive_interval=self.keepalive_interval,
            keepalive_timeout=self.keepalive_timeout,
            max_message_size=MAX_EVENT_SIZE,
            ca_file=self.ca_file,
            token_file=self.token_file,
        )


class DiscoveryWatch:
    """Follows services at the first of several discovery servers that answers, for ever.

    Args:
        urls: discovery servers, tried in turn.
        services: what to follow; `follow` changes it.
        sink: gets every new snapshot.
        rng: for the backoff's jitter.
        options: times.
        held: snapshots from before, to resume from (D2).
    """

    def __init__(
        self,
        urls: Sequence[DiscoveryUrl],
        services: Iterable[ServiceKey],
        sink: SnapshotSink,
        rng: UniformSource,
        options: WatchOptions | None = None,
        held: Iterable[ServiceSnapshot] = (),
    ) -> None:
        if not urls:
            raise ValueError("a watch needs at least one discovery server")
        self._urls = urls
        self._services = list(dict.fromkeys(services))
        self._sink = sink
        self._options = options or WatchOptions()
        self._backoff = Backoff(self._options.backoff_initial, self._options.backoff_max, rng)
        self._held: dict[ServiceKey, ServiceSnapshot] = {snapshot.service: snapshot for snapshot in held}
        self._stream_scope: anyio.CancelScope | None = None
        self._server_scope: anyio.CancelScope | None = None
        self._refreshing = False
        self._followed = anyio.Event()
        self._current = False
        self._said: dict[str, str] = {}
        self.status = FeedStatus()

    def follow(self, services: Iterable[ServiceKey]) -> None:
        """Follow these services from now on. What is held of those that stay is kept."""
        wanted = list(dict.fromkeys(services))
        if wanted == self._services:
            return
        self._services = wanted
        for service in self._held.keys() - set(wanted):
            del self._held[service]
        self._followed.set()
        if self._stream_scope is not None:
            self._stream_scope.cancel()

    def refresh(self, service: ServiceKey) -> None:
        """Get the service's whole state anew, over a new connection, to the next server if there are several (D5).

        What is wrong may be the service's state here, the stream that it came on, or the server.
        """
        if self._server_scope is not None and self.status.connected:
            self._held.pop(service, None)
            self._refreshing = True
            self._server_scope.cancel()

    async def run(self) -> None:
        """Watch until cancelled."""
        for url in cycle(self._urls):
            self.status.source = str(url)
            problem = "the watch ended"
            try:
                await self._watch_server(url)
            except GrpcError as error:
                problem = str(error)
            except TimeoutError:
                problem = "no answer in time"
            except OSError as error:
                problem = error.strerror or str(error)
            except (BaseMismatchError, UnexpectedEventError) as error:
                # What is held may not be what the server thinks: ask for the whole again (D1).
                self._held.clear()
                problem = str(error)
            self._current = False
            if self._refreshing:
                self._refreshing = False
                continue
            self._lost(str(url), problem)
            await anyio.sleep(self._backoff.next())

    def _lost(self, url: str, problem: str) -> None:
        # Said once an outage and server, not once a try: an outage may last for days.
        if self._said.get(url) != problem:
            self._said[url] = problem
            _log.warning("discovery is away; going on with what is known", url=url, problem=problem)
        self.status.connected = False
        self.status.problem = problem
        self.status.reconnects += 1

    async def _watch_server(self, url: DiscoveryUrl) -> None:
        with anyio.CancelScope() as self._server_scope:
            try:
                async with open_link(url, self._options.link()) as link:
                    while await self._watch_once(link, url):
                        pass
            finally:
                self._server_scope = None

    async def _watch_once(self, link: Link, url: DiscoveryUrl) -> bool:
        """One stream, until it ends; true if it ended because other services are to be followed."""
        self._followed = anyio.Event()
        if not self._services:
            await self._followed.wait()
            return True
        with anyio.CancelScope() as scope:
            self._stream_scope = scope
            try:
                await self._follow_stream(link, url)
            finally:
                self._stream_scope = None
        return scope.cancelled_caught

    async def _follow_stream(self, link: Link, url: DiscoveryUrl) -> None:
        request = pb.WatchInstancesRequest(
            subscriptions=[
                pb.Subscription(service=service, version=held.version if (held := self._held.get(service)) else "")
                for service in self._services
            ]
        )
        limit = FIRST_EVENT_LIMIT
        async with link.watch(request) as events:
            while True:
                with anyio.fail_after(limit):
                    event = await events.receive()
                if event is None:
                    return
                limit = await self._take(event, limit)
                if not self.status.connected:
                    self.status.connected = True
                    self.status.problem = None
                    self._said.clear()
                    self._backoff.reset()
                    _log.info("discovery is watched", url=str(url), services=len(self._services))

    async def _take(self, event: pb.WatchInstancesResponse, limit: float) -> float:
        """Apply one event; returns the seconds that the next may take."""
        kind = event.WhichOneof("event")
        if kind == "heartbeat":
            self._current = not event.heartbeat.pending
        if self._current:
            # Events come in order, so each one shows that what came before it is current still.
            self.status.confirmed_at = anyio.current_time()
            self.status.stale = False
        if kind == "heartbeat":
            return max(event.heartbeat.interval_ms / 1000 * SILENCE_FACTOR, 1.0)
        if kind == "snapshot":
            snapshot = await _in_steps(snapshot_in_steps(event.snapshot, self._refuse))
            changed = len(snapshot.instances)
        elif kind == "change":
            held = self._held.get(ServiceKey(event.change.service))
            if held is None:
                raise UnexpectedEventError(f"a change came of {event.change.service!r}, of which nothing is held")
            change = await _in_steps(change_in_steps(event.change, self._refuse))
            snapshot = apply(held, change)
            changed = len(change.upserted)
        else:
            # An event of a later version of the interface: it is there to be ignored by earlier ones.
            return limit
        if snapshot.service not in self._services:
            raise UnexpectedEventError(f"an event came of {snapshot.service!r}, which is not watched")
        if changed > max(STEP, len(snapshot.instances) // 4):
            for _ in self._sink.prepare(snapshot):
                await anyio.lowlevel.checkpoint()
        self._held[snapshot.service] = snapshot
        self._sink.publish(snapshot)
        return limit

    def _refuse(self, service: ServiceKey, error: ModelError) -> None:
        self.status.refused_instances += 1
        _log.warning("instance refused", service=service, where=error.where, problem=error.what, url=self.status.source)


async def _in_steps(steps: Steps[T]) -> T:
    """Do what has many steps, and let others go on between them."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
        await anyio.lowlevel.checkpoint()


class UnexpectedEventError(Exception):
    """A discovery server sent what does not fit what went before."""
