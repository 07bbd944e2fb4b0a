"""Every object that is held, by service; and the services that changed since they were last taken.

A change of an object costs work for its service only: the object is mapped, its service is marked, and the marked
services are merged when they are taken. A change of a node costs work for the objects that name it, once however many
nodes changed since.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshlocal.discovery.kubernetes.mapping import Defaults, LeftOutCounts, MappedPart, ObjectKey, Part, map_part, merge
from meshlocal.discovery.kubernetes.objects import Topology
from meshlocal.discovery.source import Instances
from meshlocal.policy.model import ServiceKey

_NOWHERE = Topology()


class EndpointTable:
    """The objects of one cluster.

    Args:
        defaults: labels of the whole cluster.
    """

    def __init__(self, defaults: Defaults) -> None:
        self._defaults = defaults
        self._objects: dict[ObjectKey, MappedPart] = {}
        self._services: dict[ServiceKey, dict[ObjectKey, MappedPart]] = {}
        self._nodes: dict[str, Topology] = {}
        self._on_node: dict[str, set[ObjectKey]] = {}
        self._stale: dict[ObjectKey, None] = {}
        self._marked: dict[ServiceKey, None] = {}
        self._left_out = LeftOutCounts()

    @property
    def left_out(self) -> LeftOutCounts:
        """What the objects held have no instance for, counted over all of them."""
        return self._left_out

    @property
    def services(self) -> int:
        """How many services are known."""
        return len(self._services)

    @property
    def objects(self) -> int:
        """How many objects are held."""
        return len(self._objects)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._objects

    def put(self, part: Part) -> tuple[str, ...]:
        """Hold what an object says now. Returns its problems if they are others than before."""
        before = self._objects.get(part.key)
        reused = before if part.key not in self._stale else None
        self._stale.pop(part.key, None)
        mapped = map_part(part, self._nodes, self._defaults, reused)
        self._set(part.key, before, mapped)
        if before is not None and before.problems == mapped.problems:
            return ()
        return mapped.problems

    def remove(self, key: ObjectKey) -> None:
        """Forget an object, if it is held."""
        if (before := self._objects.get(key)) is not None:
            self._stale.pop(key, None)
            self._set(key, before, None)

    def set_node(self, name: str, topology: Topology | None) -> None:
        """Take a node's topology; None: it is gone. Every object with an endpoint on it is mapped anew when taken."""
        topology = topology or _NOWHERE
        if self._nodes.get(name, _NOWHERE) == topology:
            return
        if topology == _NOWHERE:
            del self._nodes[name]
        else:
            self._nodes[name] = topology
        self._stale.update(dict.fromkeys(self._on_node.get(name, ())))

    def take(self) -> dict[ServiceKey, Instances | None]:
        """The services that changed since this was last called, with all of their instances; None: no longer known."""
        self._refresh()
        marked, self._marked = self._marked, {}
        return {service: self._merged(service) for service in marked}

    def take_all(self) -> dict[ServiceKey, Instances]:
        """Every service with its instances; nothing counts as changed afterwards."""
        self._refresh()
        self._marked = {}
        return {service: merge(_in_order(parts)) for service, parts in self._services.items()}

    def _refresh(self) -> None:
        """Map what stands on a node that changed."""
        stale, self._stale = self._stale, {}
        for key in stale:
            before = self._objects[key]
            self._set(key, before, map_part(before.part, self._nodes, self._defaults))

    def _merged(self, service: ServiceKey) -> Instances | None:
        parts = self._services.get(service)
        return merge(_in_order(parts)) if parts is not None else None

    def _set(self, key: ObjectKey, before: MappedPart | None, now: MappedPart | None) -> None:
        if before is not None:
            self._left_out = LeftOutCounts(*(a - b for a, b in zip(self._left_out, before.left_out, strict=True)))
        if now is not None:
            self._left_out = LeftOutCounts(*(a + b for a, b in zip(self._left_out, now.left_out, strict=True)))
            self._objects[key] = now
        else:
            del self._objects[key]
        was = before.service if before is not None else None
        service = now.service if now is not None else None
        if was is not None and was != service:
            parts = self._services[was]
            del parts[key]
            if not parts:
                del self._services[was]
            self._marked[was] = None
        if service is not None:
            assert now is not None
            self._services.setdefault(service, {})[key] = now
            if was != service or before is None or before.instances != now.instances:
                self._marked[service] = None
        self._index_nodes(key, before, now)

    def _index_nodes(self, key: ObjectKey, before: MappedPart | None, now: MappedPart | None) -> None:
        old, new = _nodes_of(before), _nodes_of(now)
        for name in old - new:
            keys = self._on_node[name]
            keys.discard(key)
            if not keys:
                del self._on_node[name]
        for name in new - old:
            self._on_node.setdefault(name, set()).add(key)


def _nodes_of(mapped: MappedPart | None) -> set[str]:
    if mapped is None:
        return set()
    return {
        name
        for group in mapped.part.groups
        for endpoint in group.endpoints
        if (name := (endpoint.node_name or "").strip())
    }


def _in_order(parts: Mapping[ObjectKey, MappedPart]) -> list[MappedPart]:
    return [parts[key] for key in sorted(parts)]
