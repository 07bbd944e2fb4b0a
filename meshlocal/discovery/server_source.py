"""Instances from another discovery server: its services, whichever there are, watched like a proxy's.

    what happens                             what follows
    the server is away, ends or breaks off   the next one, with backoff (`DiscoveryWatch`); what was known stays
    it does not know all services yet        those that it has not named stay until it does (D3, D8)
    a service is gone                        it is gone here too
    it learns from this server               it is named, and not followed as long as that is so; what was known stays
                                             (`meshlocal.policy.lineage`)

One connection carries both: the list of services, and a stream for each thousand of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
import trio

from meshlocal.client.link import Events, Link
from meshlocal.client.watch import FIRST_EVENT_LIMIT, SILENCE_FACTOR, DiscoveryWatch, UnknowingError
from meshlocal.discovery.retry import Problems
from meshlocal.discovery.source import (
    FollowedResource,
    Instances,
    Publisher,
    Source,
    SourceContext,
    SourceDetails,
    SourceError,
)
from meshlocal.net.log import get_log
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.exposure import TOKEN_IN_PLAINTEXT, would_show_token
from meshlocal.policy.lineage import DuplicateError, Lineage, LineageError
from meshlocal.policy.meshlocal_options import MeshlocalOptions
from meshlocal.policy.model import (
    CLUSTER,
    ZONE,
    Caller,
    EndpointKey,
    Instance,
    ModelError,
    ServiceChange,
    ServiceKey,
    ServiceSnapshot,
    known,
    parse_service_key,
)
from meshlocal.policy.steps import STEP, Steps, finish
from meshlocal.wire.discovery_codec import caller_to_message
from meshlocal.wire.discovery_methods import WATCH_SERVICES
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

_log = get_log(__name__)

MOST_SERVICES = 50_000
"""Services that another server may have: a stream carries a thousand, and a connection a hundred streams."""

MOST_BAD = 100
"""Names that cannot be any which are remembered, to tell of them."""

_NAME_SHOWN = 253

BACKOFF_MAX = 15.0
"""Seconds between two tries at most."""


def open_server_source(options: object, context: SourceContext) -> Iterator[Source]:
    """The source that a `meshlocal:` URL names."""
    assert isinstance(options, MeshlocalOptions)
    config = DiscoveryClientConfig(
        urls=options.urls,
        backoff_max=BACKOFF_MAX,
        ca_file=options.ca_file or None,
        certificate_file=options.certificate_file or None,
        key_file=options.key_file or None,
        identity=options.identity or None,
        token_file=options.token_file or None,
        allow_plaintext_tokens=options.allow_plaintext_tokens,
    )
    if shown := [str(url) for url in options.urls if would_show_token(url, config)]:
        raise SourceError(f"token_file: {TOKEN_IN_PLAINTEXT}, which {shown[0]} is: use TLS (grpcs://, wss://)")
    defaults = {ZONE: options.zone or context.zone, CLUSTER: options.cluster or context.cluster}
    yield ServerSource(
        options, defaults, context.lineage or Lineage("alone"), config=config, caller=context.caller, rng=context.rng
    )


class ServerSource:
    """A `Source` over the services of another discovery server.

    Args:
        options: which one; several that know the same.
        defaults: labels of instances that say nothing of them; those that are empty are none.
        lineage: this server's.
        config: how the servers are reached.
        caller: what they are told of this one.
        rng: for jitter.
    """

    def __init__(
        self,
        options: MeshlocalOptions,
        defaults: Mapping[str, str],
        lineage: Lineage,
        *,
        config: DiscoveryClientConfig,
        caller: Caller,
        rng: UniformSource,
    ) -> None:
        self._options = options
        self._key = f"meshlocal:{options}"
        """By the whole URL, as the same server may stand in two."""
        self._labels = _Labels(defaults)
        self._lineage = lineage
        self._config = config
        self._caller = caller
        self._rng = rng
        self._begin()

    def _begin(self) -> None:
        self._named: dict[ServiceKey, None] = {}
        """Services that the server has named over this connection; a dict for its order."""
        self._names: dict[ServiceKey, None] = {}
        """Those that are followed, but for a refusal."""
        self._heard: set[ServiceKey] = set()
        """Those of which the server spoke."""
        self._published: dict[ServiceKey, Instances] = {}
        self._prepared: tuple[ServiceSnapshot, Instances] | None = None
        self._complete = self._in_sync = False
        self._told: list[str] = []
        self._refusal: str | None = None
        """Why the server is not followed."""
        self._lists = self._events = self._failures = 0
        self._last: float | None = None

    @property
    def name(self) -> str:
        """`meshlocal:` with the servers, without the rest."""
        return f"meshlocal:{','.join(map(str, self._options.urls))}"

    def details(self) -> SourceDetails:
        """See `DetailedSource`."""
        silence = None if self._last is None else trio.current_time() - self._last
        followed = FollowedResource("services", self._in_sync, self._lists, self._events, self._failures, silence)
        return SourceDetails([followed], {})

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Source.run`."""
        self._begin()
        self._problems = problems = Problems(publisher, "meshlocal")
        self._publisher, self._task_status = publisher, task_status
        self._report_refusal = problems.of("lineage")
        self._report_names = problems.of("services")
        self._report_server = problems.of("server")
        self._watch = DiscoveryWatch(
            self._options.urls,
            (),
            self,
            self._rng,
            self._config,
            caller=self._caller,
            beside=self._follow_services,
            on_problem=self._note_problem,
        )
        try:
            with self._lineage.followed(self._judge_again):
                await self._watch.run()
        finally:
            self._lineage.forget(self._key)

    def _note_problem(self, problem: str | None) -> None:
        self._failures += problem is not None
        self._report_server(problem and f"{self._watch.status.source}: {problem}")

    async def _follow_services(self, link: Link, reached: Callable[[], None]) -> None:
        """Follow which services there are, over one connection."""
        self._named, self._complete = {}, False
        bad: dict[str, str] = {}
        limit, told = FIRST_EVENT_LIMIT, False
        began = trio.current_time()
        request = pb.WatchServicesRequest(caller=caller_to_message(self._caller))
        async with link.watch(WATCH_SERVICES, request) as events:
            while (event := await _next(events, limit, self._leave_at(began))) is not None:
                self._last = trio.current_time()
                kind = event.WhichOneof("event")
                if not told and kind != "lineage":
                    raise GrpcError(StatusCode.INTERNAL, "it has not said whom it learns from")
                if kind == "heartbeat":
                    limit = max(event.heartbeat.interval_ms / 1000 * SILENCE_FACTOR, 1.0)
                elif kind == "lineage":
                    told = True
                    self._take_lineage(event.lineage.servers)
                elif kind == "change":
                    _apply(event.change, self._named, bad)
                    self._complete = event.change.complete
                    waits = "the server has not said yet which services there are"
                    waits_for_it = not self._complete and self._refusal is None
                    self._report_names(_bad_names(bad) or (waits if waits_for_it else None))
                    self._events += 1
                    self._lists += self._complete
                    self._take_names()
                reached()
        raise GrpcError(StatusCode.UNAVAILABLE, "the server ended the list of its services")

    def _leave_at(self, began: float) -> float:
        """When another server is to be asked, as this one has not said which services there are (D6)."""
        return math.inf if self._complete else began + self._watch.pending_limit()

    def _take_lineage(self, servers: Iterable[str]) -> None:
        self._told = list(servers)
        self._judge()
        if self._refusal is not None and len(self._options.urls) > 1:
            raise GrpcError(StatusCode.FAILED_PRECONDITION, f"it is not followed: {self._refusal}")

    def _judge_again(self) -> None:
        """Another source's server is another one now: this one may no longer be the same."""
        if self._refusal is not None:
            self._judge()

    def _judge(self) -> None:
        refusal = None
        try:
            self._lineage.note(self._key, self._told)
        except LineageError as error:
            refusal = str(error)
            if isinstance(error, DuplicateError) and not self._in_sync:
                # The other source says what this one would.
                self._become_in_sync()
        if refusal != self._refusal:
            self._refusal = refusal
            url = self._watch.status.source
            if refusal is not None:
                _log.error("discovery server refused", url=url, problem=refusal)
            self._report_refusal(refusal and f"{url} is not followed: {refusal}")
        self._take_names()

    def _take_names(self) -> None:
        """Follow what the server has named; and, until that is all, what it had before."""
        if self._refusal is not None:
            # What it says does not count; what was known stays.
            self._watch.follow(())
            return
        gone = [name for name in self._names if name not in self._named] if self._complete else []
        for name in gone:
            del self._names[name]
            self._heard.discard(name)
            self._drop(name)
        self._names |= self._named
        self._watch.follow(self._names)
        self._note_sync()

    def _drop(self, service: ServiceKey) -> None:
        if self._published.pop(service, None) is not None:
            self._publisher.update(service, None)

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        """See `SnapshotSink.prepare`."""
        made = yield from self._labels.all(snapshot.instances)
        self._prepared = snapshot, made

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        """See `SnapshotSink.publish`."""
        prepared, self._prepared = self._prepared, None
        service = snapshot.service
        if service not in self._names or self._refusal is not None:
            return
        self._events += 1
        self._last = trio.current_time()
        self._heard.add(service)
        if snapshot.unknown:
            self._drop(service)
        else:
            before = self._published.get(service)
            if prepared is not None and prepared[0] is snapshot:
                instances = prepared[1]
            elif change is not None and before is not None:
                instances = self._labels.changed(before, change)
            else:
                instances = finish(self._labels.all(snapshot.instances))
            self._published[service] = instances
            self._publisher.update(service, instances)
        self._note_sync()

    def _note_sync(self) -> None:
        """In sync once the server has named all, and spoken of each."""
        if self._in_sync or self._refusal is not None or not self._complete:
            return
        if self._names.keys() <= self._heard:
            self._become_in_sync()

    def _become_in_sync(self) -> None:
        self._in_sync = True
        self._task_status.started()
        # Whoever becomes in sync has no problem, as far as the hub knows.
        self._problems.tell()


class _Labels:
    """Adds labels to instances that come without."""

    def __init__(self, defaults: Mapping[str, str]) -> None:
        self._defaults = {name: value for name, value in defaults.items() if value}

    def one(self, instance: Instance) -> Instance:
        """An instance with them."""
        missing = {name: value for name, value in self._defaults.items() if not known(instance.labels.get(name))}
        return msgspec.structs.replace(instance, labels={**instance.labels, **missing}) if missing else instance

    def all(self, instances: Instances) -> Steps[Instances]:
        """All of a service's, in steps."""
        if not self._defaults:
            return instances
        made: dict[EndpointKey, Instance] = {}
        for position, (key, instance) in enumerate(instances.items()):
            made[key] = self.one(instance)
            if position % STEP == STEP - 1:
                yield
        return made

    def changed(self, before: Instances, change: ServiceChange) -> Instances:
        """What a change makes of those that have them already."""
        made = dict(before)
        for key in change.removed:
            made.pop(key, None)
        made.update((each.key, self.one(each)) for each in change.upserted)
        return made


async def _next(
    events: Events[pb.WatchServicesResponse], limit: float, leave_at: float
) -> pb.WatchServicesResponse | None:
    """The next event; None at the stream's end.

    Raises:
        TimeoutError: not a byte came in `limit` seconds.
        UnknowingError: it is later than `leave_at`.
    """
    while True:
        received = events.received
        with trio.CancelScope(deadline=min(trio.current_time() + limit, leave_at)):
            try:
                return await events.receive()
            except GrpcError as error:
                if error.code is StatusCode.UNIMPLEMENTED:
                    text = "it cannot say which services it has: it is of an earlier version"
                    raise GrpcError(StatusCode.UNIMPLEMENTED, text) from None
                raise
        if trio.current_time() >= leave_at:
            raise UnknowingError("its registries have not said yet which services there are")
        if events.received == received:
            raise TimeoutError


def _apply(change: pb.ServicesChange, named: dict[ServiceKey, None], bad: dict[str, str]) -> None:
    """Take a change of the list. A name that cannot be one is left out, and kept by what is wrong with it."""
    for name in change.removed:
        named.pop(ServiceKey(name), None)
        bad.pop(name[:_NAME_SHOWN], None)
    for name in change.added:
        try:
            named[parse_service_key(name)] = None
        except ModelError as error:
            if len(bad) < MOST_BAD:
                bad[name[:_NAME_SHOWN]] = error.what[:_NAME_SHOWN]
    if len(named) > MOST_SERVICES:
        raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, f"it has more than {MOST_SERVICES} services")


def _bad_names(bad: Mapping[str, str]) -> str | None:
    if not bad:
        return None
    more = f"; and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"a service is left out: {next(iter(bad.values()))}{more}"
