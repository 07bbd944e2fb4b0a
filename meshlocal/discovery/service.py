"""The Discovery service over gRPC: what the hub holds, listed and watched."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import trio

from meshlocal.discovery.hub import Hub, ServicesWatcher, Update
from meshlocal.discovery.limits import ServerLimits
from meshlocal.discovery.watches import MOST_LISTED, Watches, Watching
from meshlocal.net.grpc.server import Routes, unary
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.slices import in_slices
from meshlocal.policy.lineage import Lineage
from meshlocal.policy.model import (
    CLUSTER,
    ZONE,
    ModelError,
    ServiceKey,
    ServiceSnapshot,
    known,
    parse_service_key,
)
from meshlocal.policy.visibility import ALL, View
from meshlocal.wire.discovery_codec import (
    caller_from_message,
    change_event,
    heartbeat_event,
    instance_to_message,
    lineage_event,
    services_events,
    services_heartbeat,
    snapshot_event,
)
from meshlocal.wire.discovery_methods import (
    LIST_CLUSTERS,
    LIST_INSTANCES,
    LIST_SERVICES,
    LIST_WATCHERS,
    LIST_ZONES,
    WATCH_INSTANCES,
    WATCH_SERVICES,
)
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

_log = get_log(__name__)

_ENCODED = 16 << 20
"""Bytes of encoded events that are kept."""

_TOLD = 20
"""Names of services that a line of the log has at most."""

_Call: TypeAlias = ServerCall[pb.WatchInstancesRequest, pb.WatchInstancesResponse]


class EncodedEvents:
    """Events in their encoded form, so that a change is encoded once however many watch the service.

    Args:
        most: bytes that are kept in all, beside the latest event, which may be larger.
    """

    def __init__(self, most: int = _ENCODED) -> None:
        self._most = most
        self._events: OrderedDict[tuple[ServiceKey, str, str], bytes] = OrderedDict()
        self.size = 0

    def encode(self, update: Update) -> bytes:
        """The event that takes a watcher from the update's base to its latest snapshot."""
        base, latest, _ = update
        key = (latest.service, base.version if base is not None else "", latest.version)
        encoded = self._events.get(key)
        if encoded is None:
            encoded = self._events[key] = _event(update).SerializeToString()
            self.size += len(encoded)
            while self.size > self._most and len(self._events) > 1:
                self.size -= len(self._events.popitem(last=False)[1])
        else:
            self._events.move_to_end(key)
        return encoded


def _event(update: Update) -> pb.WatchInstancesResponse:
    base, latest, _ = update
    if base is None or base.unknown or latest.unknown:
        return snapshot_event(latest)
    change = update.change
    # Where most of it changed, the whole is no longer than the way there.
    if len(change.upserted) + len(change.removed) > len(latest.instances):
        return snapshot_event(latest)
    return change_event(change)


class DiscoveryService:
    """The methods over one hub.

    Args:
        hub: what is served.
        heartbeat_interval: the longest silence on a watch, in seconds.
        limits: how much of it is taken on; the defaults if not given.
        lineage: whom this server learns from; nobody if not given.
        watches: where watches have their place.
    """

    def __init__(
        self,
        hub: Hub,
        heartbeat_interval: float,
        limits: ServerLimits | None = None,
        lineage: Lineage | None = None,
        watches: Watches | None = None,
    ) -> None:
        self._limits = limits or ServerLimits()
        self._lineage = lineage or Lineage("alone")
        self._hub = hub
        self._heartbeat_interval = heartbeat_interval
        self._encoded = EncodedEvents()
        self.watches = watches if watches is not None else Watches()
        self.events_sent = 0
        self.hidden = 0
        """Services that were asked for, and that the caller may not see."""
        self._told_hidden = RateLimited(_log, logging.WARNING, "service hidden from a caller", interval=5.0)

    def handlers(self) -> Routes:
        """What serves each method, as `GrpcServer` takes it."""
        return {
            LIST_ZONES: unary(self._list_zones),
            LIST_CLUSTERS: unary(self._list_clusters),
            LIST_SERVICES: unary(self._list_services),
            LIST_INSTANCES: unary(self._list_instances),
            WATCH_INSTANCES: self._watch_instances,
            WATCH_SERVICES: self._watch_services,
            LIST_WATCHERS: unary(self._list_watchers),
        }

    def _require_sync(self) -> None:
        if self._hub.in_sync:
            return
        waiting = ", ".join(state.source.name for state in self._hub.sources if not state.in_sync)
        raise GrpcError(StatusCode.UNAVAILABLE, f"not in sync yet with {waiting}")

    def _seen(self, call: ServerCall[Any, Any]) -> Iterator[ServiceSnapshot]:
        """What there is of the services that a caller may see."""
        view = view_of(call)
        return (snapshot for snapshot in self._hub.snapshots() if view.sees(snapshot.service))

    async def _list_zones(self, request: pb.ListZonesRequest, call: ServerCall[Any, Any]) -> pb.ListZonesResponse:
        self._require_sync()
        names = {known(instance.labels.get(ZONE)) for each in self._seen(call) for instance in each.instances.values()}
        return pb.ListZonesResponse(zones=[pb.Zone(name=name) for name in sorted(names) if name])

    async def _list_clusters(
        self, request: pb.ListClustersRequest, call: ServerCall[Any, Any]
    ) -> pb.ListClustersResponse:
        self._require_sync()
        pairs = {
            (known(instance.labels.get(CLUSTER)), known(instance.labels.get(ZONE)))
            for each in self._seen(call)
            for instance in each.instances.values()
        }
        return pb.ListClustersResponse(
            clusters=[
                pb.Cluster(name=name, zone=zone)
                for name, zone in sorted(pairs)
                if name and (not request.zone or zone == request.zone)
            ]
        )

    async def _list_services(
        self, request: pb.ListServicesRequest, call: ServerCall[Any, Any]
    ) -> pb.ListServicesResponse:
        self._require_sync()
        wanted = {label: value for label, value in ((ZONE, request.zone), (CLUSTER, request.cluster)) if value}
        services = []
        for each in self._seen(call):
            count = sum(_carries(instance.labels, wanted) for instance in each.instances.values())
            if count or not wanted:
                services.append(pb.Service(name=each.service, instances=count))
        return pb.ListServicesResponse(services=services)

    async def _list_instances(
        self, request: pb.ListInstancesRequest, call: ServerCall[Any, Any]
    ) -> pb.ListInstancesResponse:
        service = _service_key("service", request.service)
        if not view_of(call).sees(service):
            self.hide(call, [service])
            raise GrpcError(StatusCode.PERMISSION_DENIED, f"{view_of(call).caller} may not see {service!r}")
        snapshot = self._hub.snapshot(service)
        if snapshot is None:
            self._require_sync()
        if snapshot is None or snapshot.unknown:
            raise GrpcError(StatusCode.NOT_FOUND, f"no registry knows a service {service!r}")
        wanted = dict(request.selector)
        instances = sorted(snapshot.instances.values(), key=lambda instance: instance.key)
        return pb.ListInstancesResponse(
            version=snapshot.version,
            instances=[instance_to_message(each) for each in instances if _carries(each.labels, wanted)],
        )

    async def _list_watchers(
        self, request: pb.ListWatchersRequest, call: ServerCall[Any, Any]
    ) -> pb.ListWatchersResponse:
        wanted = _service_key("service", request.service) if request.service else None
        listed, left_out = await in_slices(self.watches.listed(MOST_LISTED, view_of(call), wanted))
        return pb.ListWatchersResponse(watchers=listed, left_out=left_out)

    async def _watch_instances(self, call: _Call) -> None:
        request = await call.receive()
        if request is None:
            raise GrpcError(StatusCode.INVALID_ARGUMENT, "the call ended before its request came")
        wanted = _subscriptions(request)
        view = view_of(call)
        hidden = [service for service in wanted if not view.sees(service)]
        for service in hidden:
            del wanted[service]
        if hidden:
            self.hide(call, hidden)
        with (
            self._limits.watch(call.peer, len(request.subscriptions)),
            self._hub.watch(wanted) as watcher,
        ):
            caller = caller_from_message(request.caller)
            watching = Watching(caller, call.peer, view.caller, watcher, trio.current_time())
            with self.watches.place(watching):
                await self._serve_watch(call, watching, hidden)

    async def _watch_services(self, call: ServerCall[pb.WatchServicesRequest, pb.WatchServicesResponse]) -> None:
        if await call.receive() is None:
            raise GrpcError(StatusCode.INVALID_ARGUMENT, "the call ended before its request came")
        with (
            self._limits.watch(call.peer, 1),
            self._hub.watch_services() as watcher,
            self._lineage.followed(watcher.wake),
            self.watches.place(),
        ):
            await self._serve_services(call, watcher)

    async def _serve_services(
        self, call: ServerCall[pb.WatchServicesRequest, pb.WatchServicesResponse], watcher: ServicesWatcher
    ) -> None:
        view = view_of(call)
        told: tuple[str, ...] = ()
        said = complete = False
        while True:
            events: list[pb.WatchServicesResponse] = []
            if (servers := self._lineage.servers()) != told:
                told = servers
                events.append(lineage_event(told))
            added, removed = (list(filter(view.sees, names)) for names in watcher.take())
            if added or removed or not said or watcher.complete != complete:
                complete = watcher.complete
                events += services_events(added, removed, complete=complete)
            # The first round ends with one too: it says how long a silence may last.
            if not events or not said:
                said = True
                events.append(services_heartbeat(self._heartbeat_interval))
            for event in events:
                await call.send(event)
                self.events_sent += 1
            with trio.move_on_after(self._heartbeat_interval):
                await watcher.wait()

    def hide(self, call: ServerCall[Any, Any], services: Sequence[ServiceKey]) -> None:
        """Note that a caller asked for services that it may not see."""
        self.hidden += len(services)
        more = f" and {len(services) - _TOLD} more" if len(services) > _TOLD else ""
        self._told_hidden(
            trio.current_time(),
            client=call.peer,
            caller=view_of(call).caller,
            services=",".join(services[:_TOLD]) + more,
        )

    async def _serve_watch(self, call: _Call, watching: Watching, hidden: Sequence[ServiceKey]) -> None:
        """Serve a watch. Services that its caller may not see are unknown to it: they cost it none of the others."""
        for service in hidden:
            await call.send(snapshot_event(ServiceSnapshot(service, "", {}, unknown=True)))
        resumed = True
        watcher = watching.watcher
        pusher = _Pusher(self, call, watching)
        while True:
            updates = [*pusher.take_left(), *watcher.take()]
            if updates and watching.behind_since is None:
                watching.behind_since = trio.current_time()
            for update in updates:
                await call.send_encoded(self._encoded.encode(update))
            watching.behind_since = None
            # The first round ends with a heartbeat too, which tells one that resumed that it is current.
            if resumed or not updates:
                resumed = False
                await call.send(heartbeat_event(self._heartbeat_interval, watcher.pending))
            self.events_sent += max(1, len(updates))
            # What is pushed meanwhile does not put the heartbeat off: one may be sent too soon, never too late.
            with trio.move_on_after(self._heartbeat_interval):
                await watcher.wait(pusher.push)


class _Pusher:
    """Sends a waiting watch its updates from the hub's task, as far as they can be sent at once."""

    def __init__(self, service: DiscoveryService, call: _Call, watching: Watching) -> None:
        self._service = service
        self._call = call
        self._watching = watching
        self._watcher = watching.watcher
        self._left: list[Update] = []

    def push(self) -> bool:
        """See `hub.Push`."""
        if self._left:
            return False
        updates = self._watcher.take()
        for position, update in enumerate(updates):
            if not self._try(update):
                self._left = updates[position:]
                if self._watching.behind_since is None:
                    self._watching.behind_since = trio.current_time()
                return False
            self._service.events_sent += 1
        return True

    def _try(self, update: Update) -> bool:
        try:
            return self._call.try_send_encoded(self._service._encoded.encode(update))
        except Exception:  # noqa: BLE001 - the watch's own task meets it again, and ends with it
            return False

    def take_left(self) -> list[Update]:
        """What was taken, and is still to be sent."""
        left, self._left = self._left, []
        return left


def view_of(call: ServerCall[Any, Any]) -> View:
    """What the caller may see, as the guard before the handler says (`discovery.allow`)."""
    view = call.caller
    return view if isinstance(view, View) else ALL


def _subscriptions(request: pb.WatchInstancesRequest) -> dict[ServiceKey, str]:
    if not request.subscriptions:
        raise GrpcError(StatusCode.INVALID_ARGUMENT, "subscriptions: none; a watch takes at least one")
    subscriptions: dict[ServiceKey, str] = {}
    for position, subscription in enumerate(request.subscriptions):
        service = _service_key(f"subscriptions[{position}].service", subscription.service)
        if service in subscriptions:
            raise GrpcError(StatusCode.INVALID_ARGUMENT, f"subscriptions[{position}].service: {service!r} stands twice")
        subscriptions[service] = subscription.version
    return subscriptions


def _service_key(where: str, text: str) -> ServiceKey:
    try:
        return parse_service_key(text)
    except ModelError as error:
        raise GrpcError(StatusCode.INVALID_ARGUMENT, f"{where}: {error.what}") from None


def _carries(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(label) == value for label, value in wanted.items())
