"""`open_mesh`: what a sidecar does, inside an application (rules A1 to A8, D1 to D5, H1, L1 to L6, O1 to O5, R1, R2).

A mesh is the feed of instances, the table of services and their cursors: the
very parts that the proxy is made of. Its background tasks live in the block of
`open_mesh`. A service is followed from its first use, and until it was not used
for some minutes.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import anyio
import anyio.lowlevel
import anyio.to_thread

from meshlocal.client.feed import Feed, Refreshable, SnapshotSink
from meshlocal.client.place import locality_of, unknown_labels
from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.discovery.feeds import make_feed
from meshlocal.library.errors import MeshClosedError, MeshConfigError, TooManyServicesError
from meshlocal.library.options import MAX_SERVICES, mesh_config
from meshlocal.library.views import MeshStatistics, ServicePlan, plan_of, statistics_of
from meshlocal.net.groups import single
from meshlocal.net.log import get_log
from meshlocal.net.supervision import Supervision
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.model import NODE, ModelError, ServiceKey, ServiceSnapshot, parse_service_key

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio
    from anyio.abc import TaskGroup

    from meshlocal.client.cache import SnapshotCache

_log = get_log(__name__)


@runtime_checkable
class InstanceSource(Protocol):
    """What instances come from beside a URL: `meshlocal.testing.FakeSource`, or an application's own."""

    def feed(self, sink: SnapshotSink) -> Feed:
        """A task that keeps snapshots coming into the sink."""
        ...


class Mesh:
    """Services, seen from where this application runs. Made by `open_mesh`.

    Its methods take a service's name as its registry gives it: `b`, or `b.namespace`.
    """

    def __init__(self, config: ProxyConfig, rng: random.Random) -> None:
        self._config = config
        self._services = ServiceTable(config, locality_of(config), rng)
        self._services.on_followed = self._follow
        self._services.is_away = self._is_away
        self._supervision = Supervision(rng)
        self._feed: Feed | None = None
        self._cache: SnapshotCache | None = None
        self._tasks: TaskGroup | None = None
        self._changed: dict[ServiceKey, anyio.Event] = {}
        self._listeners: dict[Callable[[ServiceSnapshot], None], None] = {}

    @property
    def node(self) -> str:
        """The node that this mesh takes for its own; empty if unknown (L1)."""
        return self._services.locality.node

    @property
    def tiers(self) -> tuple[str, ...]:
        """The names of the tiers, nearest first (L3)."""
        return self._services.locality.tiers

    async def open_tcp_stream(self, service: str) -> trio.SocketStream:
        """Connect to an instance of a service: one of this node, else another one (A1, A2, O1). Needs trio.

        Returns:
            A stream as `trio.open_tcp_stream` gives; it is the caller's to close.

        Raises:
            NoInstanceError: there is no instance to try.
            AttemptsFailedError: each that was tried failed.
            DeadlineError: the deadline came first.
            NotTrioError: this is not trio's loop.
            MeshClosedError, TooManyServicesError: see there.
            ValueError: the name can be no service's.
        """
        # Imported here: an application on another loop has no use for it.
        from meshlocal.library.streams import open_tcp_stream

        return await open_tcp_stream(self, self._key(service))

    def plan(self, service: str) -> ServicePlan:
        """The order in which the next request would try the service's instances, and why (R2). Moves no cursor.

        A service that was not used before is followed from now on; its plan has steps once `wait_heard` returns.
        """
        return plan_of(self._demand(self._key(service)))

    async def wait_heard(self, service: str) -> None:
        """Wait until something is known of the service, were it only that no registry knows it.

        It waits as long as it takes: the caller's cancel scope is the limit.
        """
        await anyio.lowlevel.checkpoint()
        key = self._key(service)
        while self._demand(key).picker is None:
            await self._wait_changed(key)

    def watch(self, service: str) -> ServiceWatch:
        """Follow the service's instances: an async iterator of snapshots, the present one first.

        A loop that is slower than the changes gets the latest state, and no queue of those between (D4).
        """
        return ServiceWatch(self, self._key(service))

    def statistics(self) -> MeshStatistics:
        """What was counted, and how discovery is doing."""
        return statistics_of(self._services, self._running().status, anyio.current_time())

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        """For the feed: what comes before a large snapshot is published."""
        return self._services.prepare(snapshot)

    def publish(self, snapshot: ServiceSnapshot) -> None:
        """For the feed: a service's latest state."""
        self._services.publish(snapshot)
        for listener in list(self._listeners):
            listener(snapshot)
        self._wake(snapshot.service)

    def _key(self, service: str) -> ServiceKey:
        try:
            return self._config.service_key(parse_service_key(service))
        except ModelError as error:
            raise ValueError(str(error)) from None

    def _running(self) -> Feed:
        if self._feed is None:
            raise MeshClosedError("the mesh is closed: the block of its open_mesh was left")
        return self._feed

    def _demand(self, key: ServiceKey) -> ServiceState:
        """The state of a service, which is followed from now on."""
        self._running()
        state = self._services.demand(key, anyio.current_time())
        if state is None:
            raise TooManyServicesError(f"{key}: {MAX_SERVICES} other services are in use already")
        return state

    def _follow(self, services: list[ServiceKey]) -> None:
        if self._feed is not None:
            if self._cache is not None and self._cache.recall(services):
                self._cache.mark_stale()
            self._feed.follow(services)

    def _is_away(self) -> bool:
        return self._feed is not None and not self._feed.status.connected

    async def _wait_changed(self, key: ServiceKey) -> None:
        """Wait for the service's next snapshot, or the mesh's end."""
        state = self._demand(key)
        event = self._changed.get(key)
        if event is None:
            event = self._changed[key] = anyio.Event()
        state.in_use += 1
        try:
            await event.wait()
        finally:
            state.in_use -= 1

    def _wake(self, key: ServiceKey) -> None:
        event = self._changed.pop(key, None)
        if event is not None:
            event.set()

    async def _drop_unused(self) -> None:
        while True:  # noqa: ASYNC110 - what it waits for is the passing of time itself
            await anyio.sleep(self._services.drop_unused(anyio.current_time()))

    async def _open_cache(self, file: str) -> SnapshotCache:
        # Imported here: few have a cache file.
        from meshlocal.client.cache import SnapshotCache

        self._cache = SnapshotCache(Path(file), self, lambda: self._services.keys)
        # In a thread nothing may be passed on; no service is followed yet, so that nothing is.
        await anyio.to_thread.run_sync(self._cache.load)
        return self._cache

    def _open(self, feed: Feed, tasks: TaskGroup, *, own: bool) -> None:
        self._feed = feed
        self._tasks = tasks
        if self._cache is not None:
            self._cache.status = feed.status
            tasks.start_soon(self._supervision.keep, "cache file", self._cache.run)
        if isinstance(feed, Refreshable):
            self._services.on_failing = feed.refresh
        if own:
            # What an application's own source raises is the application's.
            tasks.start_soon(feed.run)
        else:
            tasks.start_soon(self._supervision.keep, "discovery", feed.run)
        tasks.start_soon(self._supervision.keep, "unused services", self._drop_unused)
        for line in unknown_labels(self._services.locality, ""):
            _log.warning(line)

    def _close(self) -> None:
        self._feed = None
        self._tasks = None
        for key in list(self._changed):
            self._wake(key)


class ServiceWatch:
    """An async iterator of a service's snapshots. Made by `Mesh.watch`; needs no closing."""

    def __init__(self, mesh: Mesh, key: ServiceKey) -> None:
        self._mesh = mesh
        self._key = key
        self._last: ServiceSnapshot | None = None

    def __aiter__(self) -> ServiceWatch:
        return self

    async def __anext__(self) -> ServiceSnapshot:
        """Wait for a state that differs from the one before.

        Raises:
            MeshClosedError: the mesh's block was left.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            picker = self._mesh._demand(self._key).picker
            if picker is not None and not _equal(self._last, picker.snapshot):
                self._last = picker.snapshot
                return picker.snapshot
            await self._mesh._wait_changed(self._key)


def _equal(last: ServiceSnapshot | None, latest: ServiceSnapshot) -> bool:
    return last is not None and last.version == latest.version and last.unknown == latest.unknown


@asynccontextmanager
async def open_mesh(
    *sources: str | InstanceSource,
    node_name: str | None = None,
    prefer: Sequence[str] = (NODE,),
    labels: Mapping[str, str] | None = None,
    within: str | None = None,
    namespace: str | None = None,
    attempts: AttemptPolicy | None = None,
    services: Mapping[str, ServiceConfig] | None = None,
    ejection: EjectionConfig | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    token_file: str | os.PathLike[str] | None = None,
    cache_file: str | os.PathLike[str] | None = None,
    rng: random.Random | None = None,
) -> AsyncIterator[Mesh]:
    """Know the instances of services for as long as the block lasts, nearest first.

    Nothing of discovery is waited for here: the first use of a service waits for its instances (A7). Runs on trio and
    on asyncio.

    Args:
        sources: discovery servers (`grpc://HOST:PORT`, over TLS `grpcs://`, over WebSocket `ws://` and `wss://`),
            tried in turn; or one file (`file:PATH`); or one `InstanceSource`.
        node_name: the node that this application runs on; by default the environment's NODE_NAME (L1).
        prefer: label keys, nearest tier first (L3).
        labels: this application's own labels beside node, such as zone.
        within: a label key: instances that do not share this application's value are never used (L6).
        namespace: the namespace that a service's name without a dot belongs to.
        attempts: how long and how often a request is tried.
        services: what holds for single services, by name.
        ejection: when an instance on which requests fail is tried last of all, and for how long (H1).
        ca_file: the authorities, in PEM, of which one must have signed the certificate of a `grpcs://` or `wss://`
            server; by default those of the system.
        token_file: a file with the token that is sent to discovery servers, read for each connection.
        cache_file: a file that keeps the last snapshots over a restart, one for each mesh, in a directory that exists
            (D2).
        rng: for the cursors' first positions and the jitter of reconnects.

    Raises:
        MeshConfigError: an argument cannot be used.
    """
    urls = [each for each in sources if isinstance(each, str)]
    own = [each for each in sources if not isinstance(each, str)]
    if own and len(sources) > 1:
        raise MeshConfigError(["sources: an InstanceSource stands alone, with no other source"])
    if not sources:
        raise MeshConfigError(["sources: none is given; such as grpc://127.0.0.1:7070 or file:instances.yaml"])
    config = mesh_config(
        urls,
        os.environ,
        node_name=node_name,
        prefer=prefer,
        labels=labels,
        within=within,
        namespace=namespace,
        attempts=attempts,
        services=services,
        ejection=ejection,
        ca_file=ca_file,
        token_file=token_file,
        cache_file=cache_file,
    )
    rng = rng or random.Random()
    mesh = Mesh(config, rng)
    file = config.discovery.cache_file
    sink: SnapshotSink = mesh if file is None else await mesh._open_cache(file)
    feed = own[0].feed(sink) if own else make_feed(config.discovery, (), sink, rng)
    failure: Exception | None = None
    try:
        async with anyio.create_task_group() as tasks:
            mesh._open(feed, tasks, own=bool(own))
            try:
                yield mesh
            except Exception as error:  # noqa: BLE001 - raised below: the task group would wrap it in a group
                failure = error
            finally:
                mesh._close()
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if failure is not None:
            # Two failures: neither is lost.
            raise BaseExceptionGroup("the block of open_mesh and its mesh failed", [failure, single(group)]) from None
        raise single(group) from None
    if failure is not None:
        raise failure
