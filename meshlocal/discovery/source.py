"""What a registry looks like to the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import trio

from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.lineage import Lineage
from meshlocal.policy.model import Caller, EndpointKey, Instance, ServiceKey

Instances = Mapping[EndpointKey, Instance]
"""A service's instances by key; not changed after it is published."""


class SourceError(Exception):
    """What a URL names cannot be a source. The text says why."""


class SourceContext(NamedTuple):
    """What a factory of sources is given beside a URL's options (`meshlocal.policy.sources.SourceKind`).

    Attributes:
        rng: for jitter.
        environment: as `os.environ`.
        zone: the `zone` label of instances for which the registry gives none; empty: none.
        cluster: the labels `cluster` and `cluster_id`, unless the options name others; empty: none.
        lineage: of this server; None: nobody learns from it.
        caller: what it says of itself to those who ask.
    """

    rng: UniformSource
    environment: Mapping[str, str]
    zone: str
    cluster: str
    lineage: Lineage | None = None
    caller: Caller = Caller()


class Publisher(Protocol):
    """Where a source puts what it learns. Calls never block."""

    def replace(self, services: Mapping[ServiceKey, Instances]) -> None:
        """Publish the source's whole state: services that are not in it are gone."""
        ...

    def update(self, service: ServiceKey, instances: Instances | None) -> None:
        """Publish one service's whole state; None: the source no longer knows it."""
        ...

    def report(self, problem: str | None) -> None:
        """Say what keeps the source from being current (shown to operators); None: nothing does."""
        ...


class Source(Protocol):
    """A registry: a task that publishes what it knows, for ever.

    `run` calls `task_status.started()` once, when it is in sync: when what it published is all that the registry
    holds. Nothing that it publishes is served before (D3). An outage of the registry afterwards publishes nothing and
    is no reason to return; a source that raises is started again, and its last state stays served until it is in sync
    again.
    """

    @property
    def name(self) -> str:
        """What operators call it, for example `file:instances.yaml`."""
        ...

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        """Publish what the registry holds, until cancelled; see the class for what is started and raised."""
        ...


@runtime_checkable
class PartialSource(Protocol):
    """A source that knows beforehand that it will never know some services: nobody need wait for it to say so."""

    def may_know(self, service: ServiceKey) -> bool:
        """Whether the registry can have the service."""
        ...


class FollowedResource(NamedTuple):
    """One stream of changes that a source reads.

    Attributes:
        name: what operators call it, for example `endpointslices in shop`.
        in_sync: whether all of it was read once.
        lists: how often all of it was read.
        events: changes that came since the start.
        failures: how often it could not be followed.
        silence: seconds since the registry last said anything of it; None: it never did.
    """

    name: str
    in_sync: bool
    lists: int
    events: int
    failures: int
    silence: float | None


class SourceDetails(NamedTuple):
    """What a source can tell operators of itself.

    Attributes:
        resources: what it follows.
        left_out: how much of the registry has no instance now, by cause.
    """

    resources: Sequence[FollowedResource]
    left_out: Mapping[str, int]


@runtime_checkable
class DetailedSource(Protocol):
    """A source that can tell more of itself than whether it is in sync."""

    def details(self) -> SourceDetails:
        """How it is doing now."""
        ...


def source_details(sources: Iterable[Source]) -> Iterable[tuple[str, SourceDetails]]:
    """The names of those that can tell more of themselves, and what they tell."""
    for source in sources:
        if isinstance(source, DetailedSource):
            yield source.name, source.details()
