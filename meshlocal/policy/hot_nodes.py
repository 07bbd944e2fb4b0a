"""Where callers outnumber the instances of their own node (L1): pure, over who watches and what there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from heapq import nsmallest
from itertools import islice
from typing import NamedTuple

from meshlocal.policy.model import ServiceKey, ServiceSnapshot
from meshlocal.policy.steps import STEP, Steps


class HotNode(NamedTuple):
    """A node with more callers of a service than usable instances of it.

    Attributes:
        service: its name.
        node: its name.
        callers: proxies and applications on it that follow the service.
        instances: of the service, on it, that are ready. With none, all its callers' requests leave the node.
    """

    service: ServiceKey
    node: str
    callers: int
    instances: int


MOST = 1000
"""Hot nodes that are named."""


def hot_nodes(
    callers: Iterable[tuple[str, Iterable[ServiceKey]]], snapshots: Iterable[ServiceSnapshot]
) -> Steps[tuple[list[HotNode], int]]:
    """The hottest nodes, and how many hot ones there are, in steps: those without an instance come first, then those
    with the most callers for each instance.

    Args:
        callers: of each its node, and the services that it follows. Those whose node nobody knows count nowhere.
        snapshots: what there is. A service that is not among them has no hot nodes.
    """
    calling: Counter[tuple[ServiceKey, str]] = Counter()
    for node, services in callers:
        if node:
            calling.update((service, node) for service in services)
        yield
    ready: Counter[tuple[ServiceKey, str]] = Counter()
    known: set[ServiceKey] = set()
    for snapshot in snapshots:
        if not snapshot.unknown:
            known.add(snapshot.service)
            for position, instance in enumerate(snapshot.instances.values()):
                ready[snapshot.service, instance.node] += instance.conditions.ready
                if position % STEP == STEP - 1:
                    yield
        yield
    hottest: list[HotNode] = []
    total = 0
    pairs = iter(calling.items())
    while some := list(islice(pairs, STEP)):
        hot = [
            HotNode(service, node, count, ready[service, node])
            for (service, node), count in some
            if service in known and count > ready[service, node]
        ]
        total += len(hot)
        hottest = nsmallest(MOST, hottest + hot, key=_coolness)
        yield
    return hottest, total


def _coolness(each: HotNode) -> tuple[bool, float, HotNode]:
    return each.instances > 0, -each.callers / max(each.instances, 1), each
