"""What a mesh is made of: the feed of instances, the table of services, and its background tasks.

`meshlocal.Mesh` is the face of it that applications see; what connects streams and sends HTTP requests for them works
with this.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from meshlocal.client.feed import Feed, Refreshable
from meshlocal.client.place import LABEL_UNKNOWN, locality_of, unknown_labels
from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.library.errors import MeshClosedError, TooManyServicesError
from meshlocal.library.options import MAX_SERVICES
from meshlocal.net.log import get_log
from meshlocal.net.supervision import Supervision
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.model import ModelError, ServiceChange, ServiceKey, ServiceSnapshot, parse_service_key

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from meshlocal.client.cache import SnapshotCache

_log = get_log(__name__)


class MeshCore:
    """A mesh's parts. A `SnapshotSink`.

    Args:
        config: a proxy's section, as the mesh's arguments make it.
        rng: for the cursors' first positions and for jitter.

    Attributes:
        config: as given.
        services: what is known of each service that is in use.
        supervision: of the background tasks.
        tasks: where background tasks are started; None before the block of `open_mesh`, and after it.
        listeners: called with each snapshot.
        connections: to instances, of what keeps some: by its kind and options.
    """

    def __init__(self, config: ProxyConfig, rng: random.Random) -> None:
        self.config = config
        self.services = ServiceTable(config, locality_of(config), rng)
        self.services.on_followed = self._follow
        self.services.is_away = self._is_away
        self.supervision = Supervision(rng)
        self.tasks: TaskGroup | None = None
        self.listeners: dict[Callable[[ServiceSnapshot], None], None] = {}
        self.connections: dict[object, object] = {}
        self._feed: Feed | None = None
        self._cache: SnapshotCache | None = None
        self._changed: dict[ServiceKey, anyio.Event] = {}

    @property
    def feed(self) -> Feed:
        """Where snapshots come from.

        Raises:
            MeshClosedError: the mesh's block was left.
        """
        if self._feed is None:
            raise MeshClosedError("the mesh is closed: the block of its open_mesh was left")
        return self._feed

    def key(self, service: str) -> ServiceKey:
        """The registry's name of a service, of the name that the application gives it.

        Raises:
            ValueError: it can be no service's.
        """
        try:
            return self.config.service_key(parse_service_key(service))
        except ModelError as error:
            raise ValueError(str(error)) from None

    def demand(self, key: ServiceKey) -> ServiceState:
        """The state of a service, which is followed from now on.

        Raises:
            MeshClosedError: the mesh's block was left.
            TooManyServicesError: as many others are in use as may be.
        """
        _ = self.feed
        state = self.services.demand(key, anyio.current_time())
        if state is None:
            raise TooManyServicesError(f"{key}: {MAX_SERVICES} other services are in use already")
        return state

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        """See `SnapshotSink.prepare`."""
        return self.services.prepare(snapshot)

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        """See `SnapshotSink.publish`."""
        self.services.publish(snapshot, change)
        for listener in list(self.listeners):
            listener(snapshot)
        self._wake(snapshot.service)

    async def wait_changed(self, key: ServiceKey) -> None:
        """Wait for the service's next snapshot, or the mesh's end."""
        state = self.demand(key)
        event = self._changed.get(key)
        if event is None:
            event = self._changed[key] = anyio.Event()
        state.in_use += 1
        try:
            await event.wait()
        finally:
            state.in_use -= 1

    async def open_cache(self, file: str) -> SnapshotCache:
        """Read the cache file, if there is one: the sink that snapshots go through (D2)."""
        # Imported here: few have a cache file.
        from meshlocal.client.cache import SnapshotCache

        self._cache = SnapshotCache(Path(file), self, lambda: self.services.keys)
        # In a thread nothing may be passed on; no service is followed yet, so that nothing is.
        await anyio.to_thread.run_sync(self._cache.load)
        return self._cache

    def open(self, feed: Feed, tasks: TaskGroup, *, own: bool) -> None:
        """Begin to follow services.

        Args:
            feed: where snapshots come from.
            tasks: where background tasks live.
            own: the feed is the application's, as is what it raises.
        """
        self._feed = feed
        self.tasks = tasks
        if self._cache is not None:
            self._cache.status = feed.status
            tasks.start_soon(self.supervision.keep, "cache file", self._cache.run)
        if isinstance(feed, Refreshable):
            self.services.on_failing = feed.refresh
        if own:
            tasks.start_soon(feed.run)
        else:
            tasks.start_soon(self.supervision.keep, "discovery", feed.run)
        tasks.start_soon(self.supervision.keep, "unused services", self._drop_unused)
        for line in unknown_labels(self.services.locality, ""):
            _log.warning(LABEL_UNKNOWN, problem=line)

    def close(self) -> None:
        """The block is left: who waits is told."""
        self._feed = None
        self.tasks = None
        for key in list(self._changed):
            self._wake(key)

    def _follow(self, services: list[ServiceKey]) -> None:
        if self._feed is not None:
            if self._cache is not None and self._cache.recall(services):
                self._cache.mark_stale()
            self._feed.follow(services)

    def _is_away(self) -> bool:
        return self._feed is not None and not self._feed.status.connected

    def _wake(self, key: ServiceKey) -> None:
        event = self._changed.pop(key, None)
        if event is not None:
            event.set()

    async def _drop_unused(self) -> None:
        while True:  # noqa: ASYNC110 - what it waits for is the passing of time itself
            await anyio.sleep(self.services.drop_unused(anyio.current_time()))
