"""Where callers outnumber the instances of their own node (L1): pure, over who watches and what there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from meshlocal.policy.model import ServiceKey, ServiceSnapshot
from meshlocal.policy.steps import Steps


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


def hot_nodes(
    callers: Iterable[tuple[str, Iterable[ServiceKey]]], snapshots: Iterable[ServiceSnapshot]
) -> Steps[list[HotNode]]:
    """The hot nodes, in steps: those without an instance first, then those with the most callers for each instance.

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
            ready.update((snapshot.service, each.node) for each in snapshot.instances.values() if each.conditions.ready)
        yield
    found = [
        HotNode(service, node, count, ready[service, node])
        for (service, node), count in calling.items()
        if service in known and count > ready[service, node]
    ]
    yield
    return sorted(found, key=lambda each: (each.instances > 0, -each.callers / max(each.instances, 1), each))
