"""What a proxy knows, as plain data: for the admin pages, and for the command line's tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import merge
from typing import Any, NamedTuple

from meshlocal.client.fitness import Fitness
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import InstanceStatistics, Outcome, RequestKey
from meshlocal.net.slices import pieces
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.locality import LeftOut
from meshlocal.policy.model import ZONE, EndpointKey, Instance, ServiceSnapshot, known
from meshlocal.policy.picker import Picker
from meshlocal.policy.steps import Steps


def instance_view(instance: Instance) -> dict[str, Any]:
    """What pages and answers in JSON show of one instance."""
    key = instance.key
    view: dict[str, Any] = {"address": key.address, "port": key.port, "port_name": key.port_name or None}
    if key.protocol != "tcp":
        view["protocol"] = key.protocol
    conditions = instance.conditions
    return {
        **view,
        "node": instance.node or None,
        "ready": conditions.ready,
        "serving": conditions.serving,
        "terminating": conditions.terminating,
        "labels": dict(sorted(instance.labels.items())),
    }


def nodes_view(snapshots: Iterable[ServiceSnapshot]) -> list[dict[str, Any]]:
    """How many instances of each service each node has, by the nodes' names. Instances whose node nobody knows come
    last; that name is null.
    """
    services: dict[str, Counter[str]] = {}
    zones: dict[str, str] = {}
    for snapshot in snapshots:
        for instance in snapshot.instances.values():
            services.setdefault(instance.node, Counter())[snapshot.service] += 1
            zones[instance.node] = zones.get(instance.node) or known(instance.labels.get(ZONE))
    return [
        {
            "name": node or None,
            "zone": (zones[node] or None) if node else None,
            "instances": services[node].total(),
            "services": dict(sorted(services[node].items())),
        }
        for node in sorted(services, key=lambda node: (not node, node))
    ]


def health_view(fitness: Fitness, instance: Instance, now: float) -> dict[str, Any]:
    """How an instance stands (H1, H3): only what there is to say."""
    standing = fitness.health.standing(instance.key[:2], now)
    view: dict[str, Any] = {"state": standing.state, "under_way": fitness.under_way.get(instance.key[:2], 0)}
    if standing.cause is not None:
        view["cause"] = standing.cause
    if standing.failures:
        view["failures_in_a_row"] = standing.failures
    if standing.left is not None:
        view["next_trial_in"] = round(standing.left, 1)
        view["ejections"] = standing.ejections
    return view


def counts_view(counts: InstanceStatistics | None) -> dict[str, Any]:
    """What was counted of an instance; times in seconds, as far as buckets can tell them."""
    counts = counts if counts is not None else InstanceStatistics()
    view: dict[str, Any] = {"attempts": counts.attempts, "worked": counts.worked, "failures": dict(counts.failures)}
    for name, latency in (("connect", counts.connect), ("response", counts.response)):
        if latency.count:
            shares = ((f"p{share}", latency.quantile(share)) for share in (50, 90, 99))
            view[name] = {key: round(value, 6) for key, value in shares if value is not None}
    return view


class Summary(NamedTuple):
    """What a proxy did for one service so far.

    Attributes:
        total: requests that ended.
        reached: how many of the requests reached an instance: one that failed went nowhere.
        near: how many of the requests reached an instance of the first tier.
        rows: tier, reason (R1), outcome and how many, in order.
    """

    total: int
    reached: int
    near: int
    rows: Sequence[tuple[str, str, str, int]]


_REACHED = frozenset({Outcome.SERVED, Outcome.CUT, Outcome.RETURNED, Outcome.DRAINED})
"""Outcomes of requests that an instance took."""


def summary(requests: Mapping[RequestKey, int], first: str) -> Summary:
    """Sum up a service's requests; `first` is the name of the first tier."""
    reached = {key: count for key, count in requests.items() if key.outcome in _REACHED}
    near = sum(count for key, count in reached.items() if key.tier == first)
    rows = [(key.tier, key.reason, key.outcome, count) for key, count in sorted(requests.items())]
    return Summary(sum(requests.values()), sum(reached.values()), near, rows)


def sorted_in_steps(keys: Collection[EndpointKey]) -> Steps[list[EndpointKey]]:
    """Keys in order: what takes a hundredth of a second at once for ten thousand of them."""
    runs = []
    for piece in pieces(keys, 512):
        runs.append(sorted(piece))
        yield
    found: list[EndpointKey] = []
    for piece in pieces(merge(*runs), 512):
        found += piece
        yield
    return found


def left_out_in_steps(picker: Picker) -> Steps[dict[EndpointKey, LeftOut]]:
    """What is in no plan, and why."""
    found: dict[EndpointKey, LeftOut] = {}
    for piece in pieces(picker.snapshot.instances.values()):
        for instance in piece:
            why = picker.selector.left_out(instance)
            if why is not None:
                found[instance.key] = why
        yield
    return found


def tls_view(config: ProxyConfig, service: ServiceState) -> dict[str, Any] | None:
    """How a service's instances are spoken to, if not in plaintext."""
    tls = config.service(service.key).tls
    if tls is None:
        return None
    return {
        "server_name": tls.server_name,
        "identity": tls.identity,
        "port": tls.port,
        "skip_tiers": list(tls.skip_tiers),
        "plaintext_attempts": service.statistics.tls_skipped,
    }
