"""A service's instances from DNS: asked for again as soon as an answer's time is over.

what the answer is                   what follows
records                              they are the instances
no such name, or no such records     the service has no instance: DNS says so
SERVFAIL, no answer, a refusal       it is said, and asked again with backoff; what was known stays
one target of SRV has no answer      its last addresses stay; the others are as they are now
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import trio

from meshlocal.discovery.dns.resolving import Record, Records, ResolveError, Resolver
from meshlocal.discovery.retry import Problems, Retry
from meshlocal.discovery.source import FollowedResource, Instances, Publisher, Source, SourceContext, SourceDetails
from meshlocal.net.blocking import BlockedError
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.dns_options import DnsOptions, NodeMap
from meshlocal.policy.model import (
    CLUSTER,
    NODE,
    REGISTRY,
    SERVICE,
    ZONE,
    EndpointKey,
    Instance,
    ModelError,
    ServiceKey,
    make_instance,
)

SHORTEST, LONGEST = 1.0, 300.0
"""Seconds between two questions, whatever an answer says of its time."""

BACKOFF_INITIAL, BACKOFF_MAX = 1.0, 30.0
"""Seconds between tries while nobody answers."""

MOST_TARGETS = 1000
"""Names of one SRV answer that are looked up."""

PRIORITY, WEIGHT, TARGET = "srv_priority", "srv_weight", "srv_target"
"""Labels of what SRV says of an instance."""

FAILURES = (ResolveError, BlockedError)


def open_dns_source(options: object, context: SourceContext) -> Iterator[Source]:
    """The source that a `dns:` URL names."""
    assert isinstance(options, DnsOptions)
    yield DnsSource(options, context.rng, {ZONE: context.zone, CLUSTER: context.cluster})


class _Found(NamedTuple):
    """What one round found.

    Attributes:
        instances: all of them.
        ttl: seconds until the next round.
        problem: what of it could not be found out; None: nothing.
        left_out: records that make no instance.
    """

    instances: Instances
    ttl: float
    problem: str | None
    left_out: int


class DnsSource:
    """A `Source` over the records of one name. It knows one service, and says so.

    Args:
        options: which name, and whose.
        rng: for jitter.
        defaults: labels of its instances; those that are empty are none.
    """

    def __init__(self, options: DnsOptions, rng: UniformSource, defaults: Mapping[str, str]) -> None:
        self._options = options
        self._rng = rng
        self._labels = {name: value for name, value in defaults.items() if value}
        self._labels |= {SERVICE: options.service, REGISTRY: "dns"}
        self._resolver = Resolver(options.server)
        self._nodes = NodeMap(options.nodes)
        self._targets: dict[str, list[str]] = {}
        """Addresses that targets of SRV had last."""
        self._lists = self._failures = self._left_out = 0
        self._heard: float | None = None
        self._in_sync = False

    @property
    def name(self) -> str:
        """`dns:` and the name."""
        return f"dns:{self._options.name}"

    def may_know(self, service: ServiceKey) -> bool:
        """See `PartialSource`."""
        return service == self._options.service

    def details(self) -> SourceDetails:
        """See `DetailedSource`."""
        silence = None if self._heard is None else trio.current_time() - self._heard
        what = f"{self._options.kind} of {self._options.name}"
        followed = FollowedResource(what, self._in_sync, self._lists, 0, self._failures, silence)
        return SourceDetails([followed], {"malformed": self._left_out})

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Source.run`."""
        report = Problems(publisher, "dns").of("dns")
        retry = Retry(self._options.name, "dns", Backoff(BACKOFF_INITIAL, BACKOFF_MAX, self._rng), report)
        published: Instances | None = None
        self._in_sync = False
        while True:
            try:
                found = await self._ask()
            except FAILURES as error:
                self._failures += 1
                await retry.wait(str(error))
                continue
            self._lists += 1
            self._left_out = found.left_out
            self._heard = trio.current_time()
            if found.instances != published:
                published = found.instances
                if self._in_sync:
                    publisher.update(self._options.service, published)
                else:
                    publisher.replace({self._options.service: published})
            if not self._in_sync:
                self._in_sync = True
                task_status.started()
            if found.problem is not None:
                self._failures += 1
                await retry.wait(found.problem, at_most=max(found.ttl, SHORTEST))
                continue
            retry.reset()
            report(None)
            await trio.sleep(min(max(found.ttl, SHORTEST), LONGEST))

    async def _ask(self) -> _Found:
        """One round.

        Raises:
            ResolveError, BlockedError: nobody could say what records the name has.
        """
        options = self._options
        if options.kind != "SRV":
            hosts = await self._hosts(options.name, options.kind)
            return self._make([(Record(each.host, options.port), each.host) for each in hosts.records], hosts.ttl, None)
        answer = await self._resolver.resolve(options.name, "SRV")
        ttl, problem = answer.ttl, None
        found: list[tuple[Record, str]] = []
        targets: dict[str, list[str]] = {}
        for record in answer.records[:MOST_TARGETS]:
            # A single dot says that there is no such service here (RFC 2782).
            if record.host in ("", "."):
                continue
            if record.host not in targets:
                try:
                    hosts = await self._hosts(record.host, "HOST")
                except ResolveError as error:
                    problem = str(error)
                    targets[record.host] = self._targets.get(record.host, [])
                else:
                    ttl = min(ttl, hosts.ttl)
                    targets[record.host] = [each.host for each in hosts.records]
            found += [(record, address) for address in targets[record.host]]
        self._targets = targets
        if len(answer.records) > MOST_TARGETS:
            problem = f"{options.name} has {len(answer.records)} targets; {MOST_TARGETS} are looked up"
        return self._make(found, ttl, problem)

    async def _hosts(self, name: str, kind: str) -> Records:
        if kind != "HOST":
            return await self._resolver.resolve(name, kind)
        four = await self._resolver.resolve(name, "A")
        six = await self._resolver.resolve(name, "AAAA")
        # Where one family has nothing, that is no reason to ask again soon.
        times = [each.ttl for each in (four, six) if each.records] or [min(four.ttl, six.ttl)]
        return Records([*four.records, *six.records], min(times))

    def _make(self, found: list[tuple[Record, str]], ttl: float, problem: str | None) -> _Found:
        instances: dict[EndpointKey, Instance] = {}
        left_out = 0
        for record, address in found:
            labels = dict(self._labels)
            if (node := self._nodes.node(address)) is not None:
                labels[NODE] = node
            if self._options.kind == "SRV":
                labels |= {PRIORITY: str(record.priority), WEIGHT: str(record.weight), TARGET: record.host}
            try:
                made = make_instance(address, record.port, self._options.port_name, labels)
            except ModelError:
                left_out += 1
                continue
            # Of two records for one endpoint the first counts: that of the better priority.
            instances.setdefault(made.key, made)
        return _Found(instances, ttl, problem, left_out)
