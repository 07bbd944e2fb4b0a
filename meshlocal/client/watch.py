"""The watch on a discovery server that never ends (behaviour rules D1, D4 and D6).

One task owns the connection and all that is held. It watches its services on a stream for each `MOST_SUBSCRIPTIONS` of
them, applies each event to what it holds and passes the result to a sink. Whatever ends the streams, it keeps what it
holds, waits with exponential backoff and jitter, and watches again from the versions that it holds, at the next of its
servers.

    what a server does                            what follows
    it refuses, ends, or breaks off               the next server, after the backoff, or after what it asks for
    it is frozen without closing                  found by keepalive pings; likewise
    it answers pings, but says nothing            found by its missing heartbeats; likewise. A long event that makes
                                                  progress is no silence
    it does not know a service yet (`pending`)    after `PENDING_LIMIT` the next server; if none knows it, they are
                                                  visited at longer and longer intervals (D6)
    it sends what makes no sense                  the next server, and everything from the start (D1)

Nothing that a watch meets ends its task: that costs an attempt, a line in the log and a backoff (P1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import cycle
from typing import Any

import anyio
import anyio.lowlevel

from meshlocal.client.feed import FeedStatus, SnapshotSink
from meshlocal.client.link import Credentials, Events, Link
from meshlocal.client.links import import_links, open_link
from meshlocal.net.groups import first_of
from meshlocal.net.log import get_log
from meshlocal.net.slices import in_slices
from meshlocal.net.tls import SvidSource
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.model import (
    BaseMismatchError,
    Caller,
    ModelError,
    ServiceChange,
    ServiceKey,
    ServiceSnapshot,
    apply,
)
from meshlocal.policy.steps import STEP
from meshlocal.wire.discovery_codec import caller_to_message, change_in_steps, snapshot_in_steps
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.grpc.status import PUSHBACK, GrpcError
from meshlocal.wire.pb import discovery_pb2 as pb

_log = get_log(__name__)

SILENCE_FACTOR = 3.0
"""Heartbeat intervals without an event after which a watch is taken for dead."""

FIRST_EVENT_LIMIT = 10.0
"""Seconds without a byte before a watch's first event: its server has not said yet how often it sends heartbeats."""

PENDING_LIMIT = 5.0
"""Seconds for which a server may not know a service yet, while there are other servers to ask (D6)."""

PENDING_LONGEST = 60.0
"""The same, at most, once no server knew it: it doubles with each round of all of them."""

FOLLOW_PAUSE = 0.2
"""Seconds that a stream lasts at least before it is given up because other services are to be followed. The first
change after a while is followed at once; a flood of them costs the server no more than five streams a second."""

FOLLOW_PAUSE_LONGEST = 60.0
"""The same, at most, where streams are given up again and again before each service has come: it doubles each time, so
that one which takes long to send comes in the end."""

PROBE_INTERVAL = 10.0
"""Seconds between two looks at a server that is asked for nothing, as no service is followed."""

MOST_SUBSCRIPTIONS = 1000
"""Services on one stream at most: as many as a discovery server takes by default."""

PUSHBACK_LONGEST = 60.0
"""Seconds for which a server is left alone at its word."""


Beside = Callable[[Link, Callable[[], None]], Coroutine[Any, Any, None]]
"""A task beside the streams of a connection, which says what is followed. It is given the connection, and what it calls
whenever the server answers: before the first time nothing is followed. Whatever it raises ends the connection."""


class DiscoveryWatch:
    """Follows services at the first of several discovery servers that answers, for ever.

    Args:
        urls: discovery servers, tried in turn.
        services: what to follow; `follow` changes it.
        sink: gets every new snapshot.
        rng: for the backoff's jitter.
        config: how servers are reached, and reached again; its URLs do not count here.
        held: snapshots from before, to resume from (D2).
        workload: gives the certificate and authorities that `config` names no files of.
        caller: who follows, for the servers' operators to see.
        beside: what says which services are followed, where the server is asked for that too.
        on_problem: told of what ends a connection, and of None when a server answers.
    """

    def __init__(
        self,
        urls: Sequence[DiscoveryUrl],
        services: Iterable[ServiceKey],
        sink: SnapshotSink,
        rng: UniformSource,
        config: DiscoveryClientConfig | None = None,
        held: Iterable[ServiceSnapshot] = (),
        workload: SvidSource | None = None,
        caller: Caller = Caller(),  # noqa: B008 - it is immutable
        beside: Beside | None = None,
        on_problem: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        if not urls:
            raise ValueError("a watch needs at least one discovery server")
        self._urls = urls
        self._caller = caller_to_message(caller)
        self._beside = beside
        self._on_problem = on_problem
        self._services = list(dict.fromkeys(services))
        self._sink = sink
        self._config = config or DiscoveryClientConfig()
        self._credentials = Credentials(self._config, workload)
        import_links(urls)
        self._backoff = Backoff(self._config.backoff_initial, self._config.backoff_max, rng, least=0.0)
        self._rng = rng
        self._held: dict[ServiceKey, ServiceSnapshot] = {snapshot.service: snapshot for snapshot in held}
        self._reached_at = math.inf
        """Since when the server of this connection has answered."""
        self._follow_pause = FOLLOW_PAUSE
        self._server_scope: anyio.CancelScope | None = None
        self._refreshing = False
        self._followed = anyio.Event()
        self._subscribed: frozenset[ServiceKey] = frozenset()
        self._dropped: set[ServiceKey] = set()
        """Services of the streams that are open which were dropped since they began, whether they came back or not."""
        self._unheard: set[int] = set()
        """Streams of this connection on which no heartbeat came yet."""
        self._pending: set[ServiceKey] = set()
        self._pending_since = 0.0
        self._left = 0
        """Servers that were left in a row because they did not know a service."""
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
        self._dropped |= self._subscribed - set(wanted)
        self._followed.set()

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
        self.status.began = anyio.current_time()
        for url in cycle(self._urls):
            self.status.source = str(url)
            problem, pause = "the watch ended", 0.0
            try:
                await self._watch_server(url)
            # What is known must be gone on with (P1). A cancellation that comes in the same moment goes on.
            except* Exception as errors:  # noqa: BLE001 - whatever it is
                problem, pause = self._explain(first_of(errors))
            self._pending.clear()
            if self._refreshing:
                self._refreshing = False
                continue
            self._lost(str(url), problem)
            # A server that answers and fails each time is one that fails.
            if anyio.current_time() - self._reached_at >= self._config.backoff_max:
                self._backoff.reset()
            self._reached_at = math.inf
            await anyio.sleep(max(self._backoff.next(), pause))

    def _explain(self, error: Exception) -> tuple[str, float]:
        """What ended a watch, in words, and the seconds that its server asks to be left alone for."""
        if isinstance(error, GrpcError):
            return str(error), _pushback(error) * self._rng.uniform(1.0, 1.5)
        if isinstance(error, UnknowingError):
            self._left += 1
            return str(error), 0.0
        if isinstance(error, TimeoutError):
            return str(error) or "no answer in time", 0.0
        if isinstance(error, OSError):
            return error.strerror or str(error), 0.0
        if isinstance(error, BaseMismatchError | UnexpectedEventError):
            # What is held may not be what the server thinks: ask for the whole again (D1).
            self._held.clear()
            return str(error), 0.0
        # Nor does anybody know then what of it was passed on.
        self._held.clear()
        _log.exception("the watch on discovery failed by a fault of this program")
        return f"{type(error).__name__}: {error}", 0.0

    def _lost(self, url: str, problem: str) -> None:
        # Said once an outage and server, not once a try: an outage may last for days.
        if self._said.get(url) != problem:
            self._said[url] = problem
            if self._held or not self._services:
                _log.warning("discovery is away; going on with what is known", url=url, problem=problem)
            else:
                _log.warning("discovery is away, and nothing is known yet", url=url, problem=problem)
        self.status.connected = False
        self.status.problem = problem
        self.status.reconnects += 1
        self._on_problem(problem)

    def _reached(self, url: DiscoveryUrl) -> None:
        """Note that the server answers."""
        if not self.status.connected:
            self.status.connected = True
            self.status.problem = None
            self._said.clear()
            self._reached_at = anyio.current_time()
            self._on_problem(None)
            _log.info("discovery is watched", url=str(url), services=len(self._services))

    async def _watch_server(self, url: DiscoveryUrl) -> None:
        with anyio.CancelScope() as self._server_scope:
            try:
                async with (
                    open_link(url, self._config, self._credentials) as link,
                    anyio.create_task_group() as tasks,
                ):
                    if self._beside is not None:
                        answered = anyio.Event()

                        def reached() -> None:
                            answered.set()
                            if not self._services:
                                # Else that is to be seen by the events of what is followed.
                                self._reached(url)

                        tasks.start_soon(self._beside, link, reached)
                        await answered.wait()
                    await self._watch_link(link, url)
                    tasks.cancel_scope.cancel()
            finally:
                self._server_scope = None

    async def _watch_link(self, link: Link, url: DiscoveryUrl) -> None:
        """Watch what is to be followed, until the server ends that."""
        while True:
            self._followed = anyio.Event()
            if self._services:
                if not await self._watch_once(link, url):
                    return
            elif self._beside is not None:
                await self._followed.wait()
            else:
                await self._wait_for_services(link, url)

    async def _wait_for_services(self, link: Link, url: DiscoveryUrl) -> None:
        """Look at the server from time to time, until there is a service to follow."""
        while not self._followed.is_set():
            await link.probe()
            # There is nothing that could be out of date.
            self.status.confirmed_at = anyio.current_time()
            self._reached(url)
            with anyio.move_on_after(PROBE_INTERVAL):
                await self._followed.wait()

    async def _watch_once(self, link: Link, url: DiscoveryUrl) -> bool:
        """The streams of one set of services, until one ends; true if others are to be followed."""
        services = self._services
        chunks = [services[at : at + MOST_SUBSCRIPTIONS] for at in range(0, len(services), MOST_SUBSCRIPTIONS)]
        self._subscribed = frozenset(services)
        self._dropped.clear()
        # The time for which this server has not known a service goes on, whatever else is to be followed (D6).
        self._pending.intersection_update(services)
        self._unheard = set(range(len(chunks)))
        changed = False
        async with anyio.create_task_group() as tasks:

            async def give_up_when_followed() -> None:
                nonlocal changed
                earliest = anyio.current_time() + self._follow_pause
                await self._followed.wait()
                await anyio.sleep(max(0.0, earliest - anyio.current_time()))
                again = self._follow_pause * 2 if self._unheard else FOLLOW_PAUSE
                self._follow_pause = min(again, FOLLOW_PAUSE_LONGEST)
                changed = True
                tasks.cancel_scope.cancel()

            async def follow(position: int, chunk: Sequence[ServiceKey]) -> None:
                await self._follow_stream(link, url, position, chunk)
                tasks.cancel_scope.cancel()

            tasks.start_soon(give_up_when_followed)
            for position, chunk in enumerate(chunks):
                tasks.start_soon(follow, position, chunk)
        return changed

    async def _follow_stream(
        self, link: Link, url: DiscoveryUrl, position: int, services: Sequence[ServiceKey]
    ) -> None:
        request = pb.WatchInstancesRequest(
            subscriptions=[
                pb.Subscription(service=service, version=held.version if (held := self._held.get(service)) else "")
                for service in services
            ],
            caller=self._caller,
        )
        limit = FIRST_EVENT_LIMIT
        async with link.watch(WATCH_INSTANCES, request) as events:
            while (event := await self._next(events, limit)) is not None:
                limit = await self._take(event, limit, position, services)
                self._reached(url)

    async def _next(self, events: Events[pb.WatchInstancesResponse], limit: float) -> pb.WatchInstancesResponse | None:
        """The next event; None at the stream's end.

        Raises:
            TimeoutError: not a byte came in `limit` seconds.
            UnknowingError: the server has not known a service for too long.
        """
        received, quiet_until = events.received, anyio.current_time() + limit
        while True:
            with anyio.CancelScope(deadline=min(quiet_until, self._leave_at())):
                return await events.receive()
            now = anyio.current_time()
            # Another stream may have heard meanwhile of what was pending.
            if now >= self._leave_at():
                names = sorted(self._pending)
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UnknowingError(f"its registries have not said yet where {names[0]}{more} runs")
            if now >= quiet_until:
                if events.received == received:
                    raise TimeoutError
                received, quiet_until = events.received, now + limit

    def _leave_at(self) -> float:
        """When another server is to be asked, as this one does not know a service (D6)."""
        return self._pending_since + self.pending_limit() if self._pending else math.inf

    def pending_limit(self) -> float:
        """Seconds for which a server may not know a service (D6); without end where there is no other."""
        if len(self._urls) == 1:
            return math.inf
        return min(PENDING_LIMIT * 2.0 ** min(self._left // len(self._urls), 16), PENDING_LONGEST)

    async def _take(
        self, event: pb.WatchInstancesResponse, limit: float, position: int, services: Sequence[ServiceKey]
    ) -> float:
        """Apply one event of a stream of these services; returns the seconds that the next may take."""
        kind = event.WhichOneof("event")
        if kind == "heartbeat":
            self._hear(event.heartbeat, position, services)
        if not self._unheard and not self._pending:
            # Events come in order, so each one shows that what came before it is current still.
            self._left = 0
            self.status.confirmed_at = anyio.current_time()
            self.status.stale = False
        if kind == "heartbeat":
            return max(event.heartbeat.interval_ms / 1000 * SILENCE_FACTOR, 1.0)
        change: ServiceChange | None = None
        if kind == "snapshot":
            snapshot = await in_slices(snapshot_in_steps(event.snapshot, self._refuse), 0.0)
            changed = len(snapshot.instances)
        elif kind == "change":
            held = self._held.get(ServiceKey(event.change.service))
            if held is None:
                if event.change.service in self._dropped:
                    return limit
                raise UnexpectedEventError(f"a change came of {event.change.service!r}, of which nothing is held")
            change = await in_slices(change_in_steps(event.change, self._refuse), 0.0)
            snapshot = apply(held, change)
            changed = len(change.upserted)
        else:
            # An event of a later version of the interface: it is there to be ignored by earlier ones.
            return limit
        if snapshot.service not in self._subscribed:
            raise UnexpectedEventError(f"an event came of {snapshot.service!r}, which is not watched")
        self._pending.discard(snapshot.service)
        if snapshot.service not in self._services or snapshot.service in self._dropped:
            # It was dropped a moment ago, and its stream has not ended yet.
            return limit
        if changed > max(STEP, len(snapshot.instances) // 4):
            for _ in self._sink.prepare(snapshot):
                await anyio.lowlevel.checkpoint()
            if snapshot.service not in self._services or snapshot.service in self._dropped:
                # It was dropped meanwhile.
                return limit
        self._held[snapshot.service] = snapshot
        self._sink.publish(snapshot, change)
        return limit

    def _hear(self, heartbeat: pb.Heartbeat, position: int, services: Sequence[ServiceKey]) -> None:
        self._unheard.discard(position)
        if not self._pending:
            self._pending_since = anyio.current_time()
        self._pending.difference_update(services)
        self._pending.update(map(ServiceKey, heartbeat.pending))

    def _refuse(self, service: ServiceKey, error: ModelError) -> None:
        self.status.refused_instances += 1
        _log.warning("instance refused", service=service, where=error.where, problem=error.what, url=self.status.source)


def _pushback(error: GrpcError) -> float:
    """The seconds that a server asks to be left alone for; 0 if it does not, or not in a number."""
    for name, value in error.trailing:
        if name == PUSHBACK and isinstance(value, str) and value.isascii() and value.isdigit():
            return min(int(value[:9]) / 1000, PUSHBACK_LONGEST)
    return 0.0


class UnexpectedEventError(Exception):
    """A discovery server sent what does not fit what went before."""


class UnknowingError(Exception):
    """A server has not known a service for too long. The text says which."""
