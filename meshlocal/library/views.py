"""What a mesh tells of itself: values that do not change when the mesh does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from meshlocal.client.feed import FeedStatus
from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.client.statistics import RequestKey
from meshlocal.policy.locality import LeftOut
from meshlocal.policy.model import Instance, ServiceSnapshot
from meshlocal.policy.picker import Reason


class PlanStep(NamedTuple):
    """One step of a plan.

    Attributes:
        instance: what is tried.
        tier: its tier's name, the label key that it shares with the mesh, or `other`.
        reason: why the request has left the first tier; None while it has not (R1).
        last_resort: the instance is terminating, and tried only because all others failed (L4).
    """

    instance: Instance
    tier: str
    reason: Reason | None
    last_resort: bool

    def __str__(self) -> str:
        return f"{self.instance.key} {self.tier} {self.reason or ''}".rstrip()


class ServicePlan(msgspec.Struct, frozen=True):
    """The order in which the next request tries a service's instances, if each attempt fails, and why (R2).

    Attributes:
        service: its name.
        heard: whether a snapshot of the service has come yet; there are no steps before.
        known: whether a registry knows the service.
        node: the mesh's own node; empty if unknown (L1).
        tiers: the tiers' names, nearest first.
        steps: what is tried, in order.
        left_out: instances that are never tried, each with the reason (L4, L6).
    """

    service: str
    heard: bool
    known: bool
    node: str
    tiers: tuple[str, ...]
    steps: tuple[PlanStep, ...] = ()
    left_out: tuple[tuple[Instance, LeftOut], ...] = ()

    def __str__(self) -> str:
        where = f"service {self.service}, seen from node {self.node or 'unknown'}"
        if not self.heard:
            return f"{where}: nothing heard yet"
        if not self.steps:
            return f"{where}: no usable instance" if self.known else f"{where}: no registry knows it"
        return "\n".join([where, *(f"{number}. {step}" for number, step in enumerate(self.steps, start=1))])


class ServiceStatistics(msgspec.Struct, frozen=True):
    """Counts of one service, by the same names as the proxy's metrics.

    Attributes:
        requests: that ended, by tier, reason and outcome. A stream counts when it is handed over.
        attempts: by tier and how they ended.
        picks: by tier and reason.
        waiting: requests that wait for an instance now.
        instances: usable ones by tier; None before the first snapshot.
    """

    requests: Mapping[RequestKey, int]
    attempts: Mapping[tuple[str, str], int]
    picks: Mapping[tuple[str, str], int]
    waiting: int
    instances: Mapping[str, int] | None


class MeshStatistics(msgspec.Struct, frozen=True):
    """How a mesh is doing.

    Attributes:
        node: its own; empty if unknown (L1).
        node_unmatched: the node is known, every service in use too, and no instance of any is on it (L5).
        source: where instances come from: the URL that is read now, or was read last.
        connected: whether it is being read.
        problem: why it is not; None while it is.
        age: seconds since what is known was last known to be current; None if nothing ever came (D1).
        reconnects: how often the connection to discovery was lost, or could not be made.
        refused_instances: instances left out because a field of theirs made no sense.
        stale: what is known came from the cache file, and was not confirmed since (D2).
        services: the services in use.
    """

    node: str
    node_unmatched: bool
    source: str
    connected: bool
    problem: str | None
    age: float | None
    reconnects: int
    refused_instances: int
    stale: bool
    services: Mapping[str, ServiceStatistics]


def plan_of(state: ServiceState) -> ServicePlan:
    """A service's plan as it stands. Moves no cursor."""
    selector = state.selector
    node, names, picker = selector.locality.node, selector.tiers, state.picker
    if picker is None:
        return ServicePlan(state.key, heard=False, known=False, node=node, tiers=names)
    steps = tuple(PlanStep(pick.instance, names[pick.tier], pick.reason, pick.last_resort) for pick in state.preview())
    snapshot: ServiceSnapshot = picker.snapshot
    return ServicePlan(
        state.key,
        heard=True,
        known=not snapshot.unknown,
        node=node,
        tiers=names,
        steps=steps,
        left_out=tuple(sorted(picker.left_out(), key=lambda pair: pair[0].key)),
    )


def statistics_of(services: ServiceTable, feed: FeedStatus, now: float) -> MeshStatistics:
    """The counts as they stand; `now` is on the clock of `anyio.current_time`."""
    return MeshStatistics(
        node=services.locality.node,
        node_unmatched=services.node_unmatched,
        source=feed.source,
        connected=feed.connected,
        problem=feed.problem,
        age=feed.age(now),
        reconnects=feed.reconnects,
        refused_instances=feed.refused_instances,
        stale=feed.stale,
        services={
            state.key: ServiceStatistics(
                requests=dict(state.statistics.requests),
                attempts=dict(state.statistics.attempts),
                picks=dict(state.statistics.picks),
                waiting=state.statistics.connecting,
                instances=dict(state.picker.tier_sizes()) if state.picker is not None else None,
            )
            for state in services
        },
    )
