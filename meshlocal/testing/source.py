"""A registry in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import anyio

from meshlocal.client.feed import FeedStatus, SnapshotSink
from meshlocal.policy import version
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, index, parse_service_key


class FakeSource:
    """What a test publishes, in place of a discovery server: `open_mesh(source)`.

    A mesh knows at once what is set of a service that it follows. A service that it begins to follow comes a moment
    later, as from a real server.

    Args:
        services: instances by service, to begin with.

    Attributes:
        refreshed: the services of which a mesh asked for the whole state anew, as every attempt failed (D5).
    """

    def __init__(self, services: Mapping[str, Iterable[Instance]] | None = None) -> None:
        self._services: dict[ServiceKey, ServiceSnapshot] = {}
        self._feeds: list[_FakeFeed] = []
        self._problem: str | None = None
        self.refreshed: list[str] = []
        for service, instances in (services or {}).items():
            self.set(service, *instances)

    @property
    def followed(self) -> frozenset[str]:
        """The services that meshes follow now."""
        return frozenset(service for feed in self._feeds for service in feed.services)

    def set(self, service: str, *instances: Instance) -> None:
        """Publish a service's instances: these, and no others."""
        key = parse_service_key(service)
        by_key = index(instances)
        snapshot = ServiceSnapshot(key, version.text(version.total(by_key.values())), by_key)
        self._services[key] = snapshot
        for feed in self._feeds:
            feed.pass_on()

    def remove(self, service: str) -> None:
        """Know the service no longer."""
        self._services.pop(ServiceKey(service), None)
        for feed in self._feeds:
            feed.pass_on()

    def go_away(self, problem: str = "discovery is away") -> None:
        """Publish nothing until `come_back`: an outage of discovery (D1)."""
        self._problem = problem
        for feed in self._feeds:
            feed.pass_on()

    def come_back(self) -> None:
        """End the outage; what was set meanwhile is published."""
        self._problem = None
        for feed in self._feeds:
            feed.pass_on()

    def feed(self, sink: SnapshotSink) -> _FakeFeed:
        """See `meshlocal.InstanceSource`."""
        feed = _FakeFeed(self, sink)
        self._feeds.append(feed)
        return feed

    def _snapshot(self, service: ServiceKey) -> ServiceSnapshot:
        known = self._services.get(service)
        return known if known is not None else ServiceSnapshot(service, version.UNKNOWN, {}, unknown=True)


class _FakeFeed:
    """One mesh's view of a `FakeSource`."""

    def __init__(self, source: FakeSource, sink: SnapshotSink) -> None:
        self._source = source
        self._sink = sink
        self._sent: dict[ServiceKey, ServiceSnapshot] = {}
        self._wake = anyio.Event()
        self._running = False
        self.services: list[ServiceKey] = []
        self.status = FeedStatus(source="fake")

    def follow(self, services: Sequence[ServiceKey]) -> None:
        self.services = list(services)
        for gone in self._sent.keys() - set(services):
            del self._sent[gone]
        self._wake.set()

    def refresh(self, service: ServiceKey) -> None:
        self._source.refreshed.append(service)
        self._sent.pop(service, None)
        self._wake.set()

    async def run(self) -> None:
        self._running = True
        try:
            while True:
                self._wake = anyio.Event()
                self.pass_on()
                await self._wake.wait()
        finally:
            self._running = False
            self._source._feeds.remove(self)

    def pass_on(self) -> None:
        """Publish what changed. Nothing happens before the mesh runs."""
        if not self._running:
            return
        problem = self._source._problem
        if problem is not None and self.status.connected:
            self.status.reconnects += 1
        self.status.problem = problem
        self.status.connected = problem is None
        if problem is not None:
            return
        self.status.confirmed_at = anyio.current_time()
        self.status.stale = False
        for service in self.services:
            snapshot = self._source._snapshot(service)
            if self._sent.get(service) != snapshot:
                self._sent[service] = snapshot
                self._sink.publish(snapshot)
