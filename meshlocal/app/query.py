"""One question to discovery, for the command line: a server's answer, or a file's."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn, TypeVar

import msgspec
import trio

import meshlocal
from meshlocal.app.watchers import watcher_view
from meshlocal.client.link import Link
from meshlocal.client.links import open_link
from meshlocal.discovery.feeds import make_feed
from meshlocal.discovery.file_source import FileSource
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.model import (
    CLUSTER,
    ZONE,
    Caller,
    Instance,
    ModelError,
    ServiceChange,
    ServiceKey,
    ServiceSnapshot,
    index,
    known,
)
from meshlocal.wire.discovery_codec import snapshot_from_message
from meshlocal.wire.discovery_methods import LIST_CLUSTERS, LIST_INSTANCES, LIST_SERVICES, LIST_WATCHERS, LIST_ZONES
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.instances_file import InstancesFile, InstancesFileError
from meshlocal.wire.pb import discovery_pb2 as pb

TIMEOUT = 5.0
"""Seconds that one server may take to answer."""

T = TypeVar("T")


class QueryError(Exception):
    """Nobody could answer, or the answer is no. Its text is for the user."""


def list_services(discovery: DiscoveryClientConfig) -> list[dict[str, Any]]:
    """Each service's name and number of instances.

    Raises:
        QueryError: nobody could answer.
    """
    if (content := _read_file(discovery)) is not None:
        return [{"name": name, "instances": len(listed)} for name, listed in sorted(content.services.items())]

    async def ask(link: Link) -> list[dict[str, Any]]:
        answer = await link.unary(LIST_SERVICES, pb.ListServicesRequest())
        return [{"name": service.name, "instances": service.instances} for service in answer.services]

    return _ask(discovery, ask)


def list_zones(discovery: DiscoveryClientConfig) -> list[dict[str, Any]]:
    """Each zone's name.

    Raises:
        QueryError: nobody could answer.
    """
    if (content := _read_file(discovery)) is not None:
        return [{"name": name} for name in sorted({known(each.labels.get(ZONE)) for each in _all(content)} - {""})]

    async def ask(link: Link) -> list[dict[str, Any]]:
        answer = await link.unary(LIST_ZONES, pb.ListZonesRequest())
        return [{"name": zone.name} for zone in answer.zones]

    return _ask(discovery, ask)


def list_clusters(discovery: DiscoveryClientConfig) -> list[dict[str, Any]]:
    """Each cluster's name and zone.

    Raises:
        QueryError: nobody could answer.
    """
    if (content := _read_file(discovery)) is not None:
        pairs = {(known(each.labels.get(CLUSTER)), known(each.labels.get(ZONE))) for each in _all(content)}
        return [{"name": name, "zone": zone or None} for name, zone in sorted(pairs) if name]

    async def ask(link: Link) -> list[dict[str, Any]]:
        answer = await link.unary(LIST_CLUSTERS, pb.ListClustersRequest())
        return [{"name": cluster.name, "zone": cluster.zone or None} for cluster in answer.clusters]

    return _ask(discovery, ask)


def fetch_instances(discovery: DiscoveryClientConfig, service: ServiceKey) -> ServiceSnapshot:
    """The service's instances now.

    Raises:
        QueryError: nobody could answer, or no registry knows the service.
    """
    if (content := _read_file(discovery)) is not None:
        listed = content.services.get(service)
        if listed is None:
            raise QueryError(f"{discovery.urls[0]} knows no service {service!r}{_those_known(list(content.services))}")
        return ServiceSnapshot(service, "", index(listed))

    async def ask(link: Link) -> ServiceSnapshot:
        answer = await link.unary(LIST_INSTANCES, pb.ListInstancesRequest(service=service))
        message = pb.ServiceSnapshot(service=service, version=answer.version, instances=answer.instances)
        return snapshot_from_message(message, _refuse)

    return _ask(discovery, ask)


def list_watchers(discovery: DiscoveryClientConfig) -> tuple[list[dict[str, Any]], int]:
    """Who watches the first server that answers, and how many more there are than it lists.

    Raises:
        QueryError: nobody could answer.
    """
    if discovery.urls[0].scheme == "file":
        raise QueryError("nobody watches a file: ask a discovery server, with --discovery grpc://HOST:PORT")

    async def ask(link: Link) -> tuple[list[dict[str, Any]], int]:
        answer = await link.unary(LIST_WATCHERS, pb.ListWatchersRequest())
        return [watcher_view(each) for each in answer.watchers], answer.left_out

    return _ask(discovery, ask)


def fetch_all(discovery: DiscoveryClientConfig) -> list[ServiceSnapshot]:
    """Every service's instances, by the services' names. Each answer is of its own moment; who goes away meanwhile is
    left out.

    Raises:
        QueryError: nobody could answer.
    """
    if (content := _read_file(discovery)) is not None:
        return [ServiceSnapshot(name, "", index(listed)) for name, listed in sorted(content.services.items())]

    async def ask(link: Link) -> list[ServiceSnapshot]:
        with trio.fail_after(TIMEOUT):
            known = await link.unary(LIST_SERVICES, pb.ListServicesRequest())
        snapshots = []
        for service in known.services:
            with trio.fail_after(TIMEOUT):
                try:
                    answer = await link.unary(LIST_INSTANCES, pb.ListInstancesRequest(service=service.name))
                except GrpcError as error:
                    if error.code is StatusCode.NOT_FOUND:
                        continue
                    raise
            message = pb.ServiceSnapshot(service=service.name, version=answer.version, instances=answer.instances)
            snapshots.append(snapshot_from_message(message, _refuse))
        return snapshots

    return _ask(discovery, ask, timeout=math.inf)


def watch_instances(
    discovery: DiscoveryClientConfig,
    service: ServiceKey,
    rng: UniformSource,
    tell: Callable[[ServiceSnapshot], None],
) -> NoReturn:
    """Tell of the service's instances now, and whenever they changed, until `tell` fails.

    A server that is away is waited for, as a proxy does. What comes while `tell` is busy is told as one (D4).

    Raises:
        OSError: what `tell` failed with.
    """

    async def follow() -> NoReturn:
        latest = _Latest()
        caller = Caller(gethostname(), software=f"meshlocal get {meshlocal.__version__}")
        feed = make_feed(discovery, [service], latest, rng, caller=caller)
        failed: OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.run)
            try:
                while True:
                    tell(await latest.next())
            except OSError as error:
                nursery.cancel_scope.cancel()
                failed = error
        assert failed is not None, "the nursery raises whatever else ends it"
        raise failed

    trio.run(follow)


class _Latest:
    """A `SnapshotSink` that keeps one service's latest state."""

    def __init__(self) -> None:
        self._snapshot: ServiceSnapshot | None = None
        self._came = trio.Event()

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        """See `SnapshotSink.prepare`: nothing is."""
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        """See `SnapshotSink.publish`."""
        self._snapshot = snapshot
        self._came.set()

    async def next(self) -> ServiceSnapshot:
        """Wait for a state that was not given yet."""
        while self._snapshot is None:
            await self._came.wait()
            self._came = trio.Event()
        snapshot, self._snapshot = self._snapshot, None
        return snapshot


def _refuse(service: ServiceKey, error: ModelError) -> None:
    raise QueryError(f"the server's answer about {service} makes no sense: {error}")


def _those_known(services: Sequence[str]) -> str:
    shown = ", ".join(sorted(services)[:10])
    return f"; it knows {shown}{', …' if len(services) > 10 else ''}" if services else "; it knows none"


def _all(content: InstancesFile) -> list[Instance]:
    return [instance for listed in content.services.values() for instance in listed]


def _read_file(discovery: DiscoveryClientConfig) -> InstancesFile | None:
    if discovery.urls[0].scheme != "file":
        return None
    try:
        return FileSource(Path(discovery.urls[0].path)).load()
    except InstancesFileError as error:
        raise QueryError(str(error)) from None


def _ask(discovery: DiscoveryClientConfig, question: Callable[[Link], Awaitable[T]], *, timeout: float = TIMEOUT) -> T:
    """The first server's answer that is one. A server that answers `no` has answered."""

    options = msgspec.structs.replace(discovery, connect_timeout=TIMEOUT)

    async def ask_each() -> T:
        problems = []
        for url in discovery.urls:
            try:
                with trio.fail_after(timeout):
                    async with open_link(url, options) as link:
                        return await question(link)
            except GrpcError as error:
                if error.code not in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED):
                    raise QueryError(f"{url}: {error.message or error.code.name}") from None
                problems.append(f"cannot reach discovery {url}: {error.message or error.code.name}")
            except (trio.TooSlowError, TimeoutError):
                problems.append(f"cannot reach discovery {url}: no answer within {TIMEOUT:g} s")
        raise QueryError("\n".join(problems))

    return trio.run(ask_each)
