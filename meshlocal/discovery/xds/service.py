"""The aggregated stream of xDS over one hub: each service as a listener, a route, a cluster and its endpoints, with the
client's own node first."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, TypeAlias

import trio

from meshlocal.discovery.hub import Hub, ServicesWatcher, Update, Watcher
from meshlocal.discovery.limits import Resize, ServerLimits
from meshlocal.discovery.service import view_of
from meshlocal.discovery.watches import Watches, Watching
from meshlocal.discovery.xds.subscription import ALL, Content, Subscription
from meshlocal.net.grpc.server import Routes
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.slices import in_slices
from meshlocal.policy.locality import Selector
from meshlocal.policy.model import NODE, ModelError, ServiceKey, ServiceSnapshot
from meshlocal.policy.picker import Picker
from meshlocal.policy.steps import STEP, Steps
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import envoy_discovery_pb2 as pb
from meshlocal.wire.xds import (
    MOST_NAME,
    STREAM,
    Place,
    ResourceName,
    ResourceType,
    assignment,
    cluster,
    error_text,
    kind_of,
    listener,
    no_endpoints,
    parse_resource_name,
    place_of,
    response,
    route,
)

_log = get_log(__name__)

_KEPT = 64 << 20
"""Bytes of encoded endpoints that are kept."""

_RESPONSE = 1 << 20
"""Bytes of endpoints after which a response ends; what is left goes with the next one. gRPC takes 4 MiB."""

_TURN = 10_000
"""Instances that are looked at in a stream's turn at most, beyond those of one service."""

_OVERHEAD = 512
"""Bytes that an entry of what is kept takes beside its body."""

_FIXED_KEPT = 1 << 15
"""Resources that are kept of those that follow from their name alone; each has some 500 bytes."""

_TOLD = 500
"""Characters of a client's reasons that are logged."""

_INTERVAL = 5.0
"""Seconds between two lines of the log that say the same."""

_Call: TypeAlias = ServerCall[pb.DiscoveryRequest, pb.DiscoveryResponse]

Hide: TypeAlias = Callable[[ServerCall[Any, Any], Sequence[ServiceKey]], None]

_FIXED = {ResourceType.LISTENER: listener, ResourceType.ROUTE: route, ResourceType.CLUSTER: cluster}


class XdsService:
    """xDS over one hub.

    Args:
        hub: what is served.
        limits: how much of it is taken on.
        watches: where streams have their place, beside other watches.
        hide: told of services that a client asked for and may not see.
        prefer: the labels by which instances are near, for clients that do not say it themselves.

    Attributes:
        streams: under way.
        responses: sent, by type.
        rejected: by clients, by type.
        refused: names of resources that can be none.
    """

    def __init__(
        self,
        hub: Hub,
        limits: ServerLimits,
        watches: Watches,
        hide: Hide,
        prefer: Sequence[str] = (NODE,),
    ) -> None:
        self.hub = hub
        self.streams = 0
        self.responses: Counter[ResourceType] = Counter(dict.fromkeys(ResourceType, 0))
        self.rejected: Counter[ResourceType] = Counter(dict.fromkeys(ResourceType, 0))
        self.refused = 0
        self._limits = limits
        self._watches = watches
        self.hide = hide
        self._prefer = tuple(prefer)
        self._kept: OrderedDict[object, Content] = OrderedDict()
        self._kept_size = 0
        self.turns = trio.Lock()
        """Held by a stream while it makes what it sends: where all make something of one change, others have turns
        between them."""
        self._tell_rejected = RateLimited(_log, logging.WARNING, "xds response rejected", interval=_INTERVAL)
        self._tell_ignored = RateLimited(_log, logging.WARNING, "xds type not served", interval=_INTERVAL)
        self._tell_limited = RateLimited(_log, logging.WARNING, "xds stream refused", interval=_INTERVAL)
        self._tell_refused = RateLimited(_log, logging.WARNING, "xds resource name refused", interval=_INTERVAL)

    def handlers(self) -> Routes:
        """What serves the method, as `GrpcServer` takes it."""
        return {STREAM: self._serve}

    async def _serve(self, call: _Call) -> None:
        with self._limits.watch(call.peer, 0) as resize:
            with self._watches.place():
                request = await call.receive()
            if request is not None:
                await self._serve_stream(call, request, resize)

    async def _serve_stream(self, call: _Call, request: pb.DiscoveryRequest, resize: Resize) -> None:
        if not request.HasField("node"):
            raise GrpcError(StatusCode.INVALID_ARGUMENT, "node: the stream's first request has none")
        try:
            place = place_of(request.node, self._prefer)
        except ModelError as error:
            raise GrpcError(StatusCode.INVALID_ARGUMENT, str(error)) from None
        with self.hub.watch({}) as watcher:
            watching = Watching(place.caller, call.peer, view_of(call).caller, watcher, trio.current_time())
            self.streams += 1
            try:
                with self._watches.place(watching):
                    await _Stream(self, call, place, watching, resize).run(request)
            finally:
                self.streams -= 1

    def ignore(self, call: _Call, url: str) -> None:
        """Note that a client asked for a type that is not served: it gets no answer, and goes on with the others."""
        self._tell_ignored(trio.current_time(), client=call.peer, type=url[:_TOLD])

    def limit(self, call: _Call, place: Place, problem: str) -> None:
        """Note that a stream ends, as it wants too much."""
        self._tell_limited(trio.current_time(), client=call.peer, caller=place.caller.name, problem=problem)

    def refuse(self, call: _Call, error: ModelError) -> None:
        """Note that a client asked for what can be no resource; to it, it does not exist."""
        self.refused += 1
        self._tell_refused(trio.current_time(), client=call.peer, problem=str(error))

    def reject(self, call: _Call, place: Place, subscription: Subscription, problem: str) -> None:
        """Note that a client rejected a response."""
        self.rejected[subscription.kind] += 1
        self._tell_rejected(
            trio.current_time(),
            client=call.peer,
            caller=place.caller.name,
            node=place.caller.node,
            type=subscription.kind.short,
            version=subscription.version,
            problem=problem[:_TOLD],
        )

    def endpoints(self, name: str, resource: ResourceName, snapshot: ServiceSnapshot, place: Place) -> Steps[Content]:
        """A service's instances as they look from a place, in steps."""
        key = (name, snapshot.version, place.key)
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
            return content
        picker = yield from Picker.in_steps(Selector(place.locality, resource.port_name), snapshot)
        content = Content.of((yield from assignment(name, picker)))
        if key not in self._kept:
            self._kept_size += len(content.body) + _OVERHEAD
        self._kept[key] = content
        while self._kept_size > _KEPT and len(self._kept) > 1:
            self._kept_size -= len(self._kept.popitem(last=False)[1].body) + _OVERHEAD
        return content


@lru_cache(maxsize=_FIXED_KEPT)
def _fixed(kind: ResourceType, name: str) -> Content:
    """What follows from a name alone, shared by all streams."""
    return Content.of(_FIXED[kind](name))


def _none(name: str) -> Content:
    return Content.of(no_endpoints(name))


class _Stream:
    """One client's stream: a task reads its requests, another sends it what there is.

    What is sent is made of what its watcher holds, not of what the hub has at that moment: whatever comes after is
    something for the watcher to take, also if it is what there was before.
    """

    def __init__(self, service: XdsService, call: _Call, place: Place, watching: Watching, resize: Resize) -> None:
        self._service = service
        self._call = call
        self._place = place
        self._watching = watching
        self._watcher: Watcher = watching.watcher
        self._resize = resize
        self._view = view_of(call)
        self._subscriptions = {kind: Subscription(kind) for kind in ResourceType}
        self._known: dict[str, ResourceName | None] = {}
        """By name, what the resources that it wants stand for; None: they can be none, or it may not see them."""
        self._names: dict[ServiceKey, tuple[str, ...]] = {}
        """By service, what it wants of it."""
        self._services: ServicesWatcher | None = None
        """Since it had a wildcard: which services there are."""
        self._every: dict[ServiceKey, None] = {}
        """Those of them that it may see."""

    async def run(self, request: pb.DiscoveryRequest) -> None:
        """Serve it until the client ends it."""
        with ExitStack() as opened:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                next_request: pb.DiscoveryRequest | None = request
                while next_request is not None:
                    self._take(next_request)
                    if self._services is None and self._wildcard:
                        self._services = opened.enter_context(self._service.hub.watch_services())
                        self._learn(self._services)
                        nursery.start_soon(self._follow_services, self._services)
                    next_request = await self._call.receive()
                nursery.cancel_scope.cancel()

    def _take(self, request: pb.DiscoveryRequest) -> None:
        kind = kind_of(request.type_url)
        if kind is None:
            self._service.ignore(self._call, request.type_url)
            return
        subscription = self._subscriptions[kind]
        if subscription.is_stale(request.response_nonce):
            return
        names = tuple(request.resource_names)
        if names != subscription.asked:
            self._check(names)
        answer = subscription.request(names, request.response_nonce, request.version_info)
        if answer.answered and (problem := error_text(request)) is not None:
            self._service.reject(self._call, self._place, subscription, problem)
        if answer.changed:
            self._follow()
        self._watcher.wake()

    def _check(self, names: Sequence[str]) -> None:
        """Refuse what is too much, before it costs anything.

        Raises:
            GrpcError: it is.
        """
        self._take_place(sum(name not in self._every for name in names))
        for position, name in enumerate(names):
            if len(name) > MOST_NAME:
                problem = f"resource_names[{position}]: is longer than {MOST_NAME} characters"
                raise GrpcError(StatusCode.INVALID_ARGUMENT, problem)

    def _take_place(self, names: int) -> None:
        """Count so many names, and the wildcard, as one: what it brings is the registries' doing, not the client's."""
        try:
            self._resize(names + self._wildcard)
        except GrpcError as error:
            self._service.limit(self._call, self._place, error.message)
            raise

    @property
    def _wildcard(self) -> bool:
        return any(each.wildcard for each in self._subscriptions.values())

    def _follow(self) -> None:
        """Watch the services of what is wanted, and no others."""
        wanted = {name for each in self._subscriptions.values() for name in each.names}
        self._take_place(sum(name not in self._every for name in wanted))
        gone = self._known.keys() - wanted
        new = wanted - self._known.keys()
        changed: dict[ServiceKey, list[str]] = {}
        for name in gone:
            if (resource := self._known.pop(name)) is not None:
                changed.setdefault(resource.service, [])
        hidden = []
        for name in new:
            resource = self._parse(name)
            if resource is not None and not self._view.sees(resource.service):
                hidden.append(resource.service)
                resource = None
            self._known[name] = resource
            if resource is not None:
                changed.setdefault(resource.service, []).append(name)
        for service, more in changed.items():
            names = (*(name for name in self._names.pop(service, ()) if name not in gone), *more)
            if names:
                self._names[service] = names
        if hidden:
            self._service.hide(self._call, hidden)
        self._watch()

    def _parse(self, name: str) -> ResourceName | None:
        try:
            return parse_resource_name(name)
        except ModelError as error:
            self._service.refuse(self._call, error)
            return None

    def _watch(self) -> None:
        every = self._every if self._wildcard else {}
        followed = set(self._watcher.services)
        for service in followed:
            if service not in self._names and service not in every:
                self._watcher.unfollow(service)
        subscriptions = self._subscriptions.values()
        for service, names in self._names.items():
            if service not in followed or self._watcher.held(service) is None:
                holds = any(each.may_hold(name) for each in subscriptions for name in names)
                self._watcher.follow(service, holds=holds)
        for service in every:
            if service not in followed:
                self._watcher.follow(service, holds=any(each.may_hold(service) for each in subscriptions))

    async def _follow_services(self, services: ServicesWatcher) -> None:
        while True:
            await services.wait()
            self._learn(services)
            self._watcher.wake()

    def _learn(self, services: ServicesWatcher) -> None:
        """Take which services there are more, and less."""
        added, removed = services.take()
        self._every.update(dict.fromkeys(filter(self._view.sees, added)))
        for service in removed:
            self._every.pop(service, None)
        for subscription in self._subscriptions.values():
            if subscription.wildcard:
                for service in (*added, *removed):
                    subscription.mark(service)
        self._watch()

    async def _write(self) -> None:
        while True:
            for update in self._watcher.take():
                self._mark(update)
            subscriptions = self._subscriptions.values()
            if self._watching.behind_since is None and any(each.is_due for each in subscriptions):
                self._watching.behind_since = trio.current_time()
            for subscription in subscriptions:
                while subscription.is_due and await self._send(subscription):
                    pass
            if not any(each.under_way or each.is_due for each in subscriptions):
                self._watching.behind_since = None
            await self._watcher.wait()

    def _mark(self, update: Update) -> None:
        """Something about a service changed."""
        base, latest, _ = update
        appeared = base is None or base.unknown != latest.unknown
        names = self._names.get(latest.service, ())
        for kind, subscription in self._subscriptions.items():
            if appeared or kind is ResourceType.ENDPOINTS:
                for name in names:
                    subscription.mark(name)
                if subscription.wildcard:
                    subscription.mark(latest.service)

    async def _send(self, subscription: Subscription) -> bool:
        """Send what is due of a type, or some of it; False: nothing of it can be said yet."""
        async with self._service.turns:
            contents = await in_slices(self._contents(subscription))
            if contents is None:
                subscription.hold()
                return False
            resources = subscription.respond(contents)
            if resources is None:
                return True
            kind = subscription.kind
            payload = await in_slices(response(kind, subscription.version, subscription.nonce, resources))
        self._service.responses[kind] += 1
        await self._call.send_encoded(payload)
        return True

    def _contents(self, subscription: Subscription) -> Steps[dict[str, Content | None] | None]:
        """What is due of a type, or some of it, in steps; None: nothing of it can be said yet."""
        kind = subscription.kind
        left_out = False
        if subscription.wildcard and self._services is not None and not self._services.complete:
            if subscription.may_hold(ALL):
                return None
            left_out = True
        # By now: what is asked for may change between two steps.
        names = [(name, self._resource(subscription, name)) for name in subscription.take(self._every)]
        contents: dict[str, Content | None] = {}
        size = work = 0
        for position, (name, resource) in enumerate(names):
            if position % STEP == STEP - 1:
                yield
            held = self._watcher.held(resource.service) if resource is not None else None
            if resource is not None and held is None:
                # Nobody can speak of it. Who may have it keeps it; it is marked once there is a word (D3).
                if kind.whole and subscription.may_hold(name):
                    return None
                left_out = kind.whole
                continue
            if kind is ResourceType.ENDPOINTS:
                if resource is None or held is None:
                    content = _none(name)
                else:
                    content = yield from self._service.endpoints(name, resource, held, self._place)
                    work += len(held.instances)
            elif held is None or held.unknown:
                contents[name] = None
                continue
            else:
                content = _fixed(kind, name)
            contents[name] = content
            size += len(content.body) if subscription.is_news(name, content) else 0
            if not kind.whole and (size > _RESPONSE or work > _TURN):
                subscription.put_back(each for each, _ in names[position + 1 :])
                break
        if left_out and not any(
            each is not None and subscription.is_news(name, each) for name, each in contents.items()
        ):
            return None
        return contents

    def _resource(self, subscription: Subscription, name: str) -> ResourceName | None:
        """What a name stands for, if the client may see it."""
        if name in self._known:
            return self._known[name]
        return ResourceName(ServiceKey(name)) if subscription.wildcard and name in self._every else None
