"""EndpointSlice and Endpoints objects → instances.

Both kinds become a `Part`: what one object says of one service. Its rules:

- every address of an endpoint, with every TCP port, is an instance; UDP and SCTP ports, and ports without a number,
  are left out and counted;
- conditions that are unknown mean what the API reference says: `ready` true, `serving` as `ready`, `terminating` false;
- labels are namespace, registry, service, and cluster and cluster_id, node, zone and region where they are known: the
  zone and region of the endpoint, else of its node, else (zone) of the discovery server; and app_protocol, where the
  port has an appProtocol;
- an FQDN slice has no addresses that could be dialled: it makes its service known, and nothing more;
- an endpoint or port that cannot be used is left out and reported with its place; the others stay.

A part is mapped again at each of its changes, but what did not change in it keeps its instances: the same objects, so
that whoever compares finds them by identity.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from meshlocal.discovery.kubernetes.objects import Endpoint, Endpoints, EndpointSlice, Port, SliceConditions, Topology
from meshlocal.policy.model import (
    CLUSTER,
    NAMESPACE,
    NODE,
    REGION,
    REGISTRY,
    SERVICE,
    ZONE,
    Conditions,
    EndpointKey,
    Instance,
    ModelError,
    ServiceKey,
    make_instance,
    parse_service_key,
)
from meshlocal.policy.protocols import APP_PROTOCOL

CLUSTER_ID = "cluster_id"
KUBERNETES = "kubernetes"
MAX_PROBLEMS = 10
"""Problems of one object that are told."""

_NOT_READY = SliceConditions(ready=False)
_CONDITIONS = {
    (ready, serving, terminating): Conditions(ready, serving, terminating)
    for ready in (False, True)
    for serving in (False, True)
    for terminating in (False, True)
}
_PROTOCOLS = ("TCP", "UDP", "SCTP")


class ObjectKey(NamedTuple):
    """An object's place among those of its resource."""

    namespace: str
    name: str


class Group(msgspec.Struct, frozen=True, gc=False):
    """Endpoints with the same ports. `family` is `IPv4` or `IPv6`, or empty where both may stand together."""

    ports: tuple[Port, ...]
    endpoints: tuple[Endpoint, ...]
    family: str = ""


class Part(msgspec.Struct, frozen=True, gc=False):
    """What one object says of a service. `service` is empty if the object names none."""

    key: ObjectKey
    service: str
    groups: tuple[Group, ...]
    fqdn: bool = False
    truncated: bool = False


class LeftOutCounts(NamedTuple):
    """What has no instance, and why.

    Attributes:
        not_tcp: pairs of an address and a port that is UDP or SCTP.
        no_port: pairs of an address and a port without a number, which means any.
        fqdn: slices of DNS names.
        no_service: objects that belong to no service.
        malformed: endpoints and ports that cannot be used.
        truncated: Endpoints objects that hold only some of their service's addresses.
    """

    not_tcp: int = 0
    no_port: int = 0
    fqdn: int = 0
    no_service: int = 0
    malformed: int = 0
    truncated: int = 0


class Defaults(msgspec.Struct, frozen=True):
    """Labels of a whole cluster. Empty: none."""

    zone: str = ""
    cluster: str = ""


_Mapped = dict[str, tuple[Endpoint, tuple[Instance, ...]]]


class MappedPart(msgspec.Struct, frozen=True):
    """A part with its instances.

    Attributes:
        part: as it was mapped.
        service: None if it belongs to none, or to one of an impossible name.
        instances: by key; of duplicates the fittest (`fitter`). Must not be changed.
        problems: what could not be used, with its place in the object.
        left_out: how many addresses were left out, by why.
    """

    part: Part
    service: ServiceKey | None
    instances: Mapping[EndpointKey, Instance]
    problems: tuple[str, ...]
    left_out: LeftOutCounts
    _mapped: tuple[_Mapped, ...] = ()


def part_of_slice(item: EndpointSlice) -> Part:
    """What an EndpointSlice says.

    Raises:
        ModelError: its address type is none that exists.
    """
    meta = item.metadata
    key = ObjectKey(meta.namespace, meta.name)
    service = meta.labels.service if meta.labels is not None else ""
    if item.address_type == "FQDN":
        return Part(key, service, (), fqdn=True)
    if item.address_type not in ("IPv4", "IPv6"):
        raise ModelError("addressType", f"{item.address_type!r} is none of IPv4, IPv6 and FQDN")
    return Part(key, service, (Group(item.ports or (), item.endpoints or (), item.address_type),))


def part_of_endpoints(item: Endpoints) -> Part | None:
    """What an Endpoints object says; None for one that is only a leader's lock."""
    meta = item.metadata
    annotations = meta.annotations
    if annotations is not None and annotations.leader is not None:
        return None
    groups = []
    for subset in item.subsets or ():
        endpoints = [Endpoint((each.ip,), None, each.node_name) for each in subset.addresses or ()]
        endpoints += [Endpoint((each.ip,), _NOT_READY, each.node_name) for each in subset.not_ready_addresses or ()]
        groups.append(Group(subset.ports or (), tuple(endpoints)))
    truncated = annotations is not None and annotations.over_capacity == "truncated"
    return Part(ObjectKey(meta.namespace, meta.name), meta.name, tuple(groups), truncated=truncated)


def map_part(
    part: Part, nodes: Mapping[str, Topology], defaults: Defaults, before: MappedPart | None = None
) -> MappedPart:
    """The instances of a part.

    Args:
        part: what the object says.
        nodes: the topology of the nodes that are known.
        defaults: labels of the whole cluster.
        before: the same object's last mapping, from the same `nodes` and `defaults`, whose instances are reused.
    """
    mapper = _PartMapper(part, nodes, defaults)
    service: ServiceKey | None = None
    if part.service:
        try:
            service = parse_service_key(f"{part.service}.{part.key.namespace}")
        except ModelError as error:
            mapper.refuse(str(error))
    if service is None:
        return MappedPart(part, None, {}, tuple(mapper.problems), LeftOutCounts(no_service=1))
    reuse = before._mapped if before is not None and before.service == service else ()
    mapped = []
    for position, group in enumerate(part.groups):
        old: _Mapped = {}
        if position < len(reuse) and before is not None and before.part.groups[position].ports == group.ports:
            old = reuse[position]
        mapped.append(mapper.map_group(position, group, old))
    left_out = LeftOutCounts(mapper.not_tcp, mapper.no_port, int(part.fqdn), 0, mapper.malformed, int(part.truncated))
    return MappedPart(part, service, mapper.instances, tuple(mapper.problems), left_out, tuple(mapped))


def fitter(one: Instance, other: Instance) -> bool:
    """Whether the first of two accounts of one endpoint is the one to believe.

    An endpoint that moves between slices is in both for a while; and a pod network may give the address of a
    terminating pod to the next one, which is in a slice of its own. As kube-proxy does, one of them is taken, and one
    that is not terminating goes first. What kube-proxy leaves to chance goes on here: first the ready one, then the
    serving one, then one whose node is known.
    """
    return _fitness(one) > _fitness(other)


def _fitness(instance: Instance) -> tuple[bool, bool, bool, bool]:
    conditions = instance.conditions
    return not conditions.terminating, conditions.ready, conditions.serving, NODE in instance.labels


def merge(parts: Sequence[MappedPart]) -> Mapping[EndpointKey, Instance]:
    """The instances of all objects of one service; of equally fit duplicates that of the first object."""
    if len(parts) == 1:
        return parts[0].instances
    merged: dict[EndpointKey, Instance] = {}
    for part in parts:
        if merged.keys().isdisjoint(part.instances):
            merged.update(part.instances)
            continue
        for key, instance in part.instances.items():
            held = merged.get(key)
            if held is None or fitter(instance, held):
                merged[key] = instance
    return merged


class _PartMapper:
    """Maps the groups of one part into one table of instances."""

    def __init__(self, part: Part, nodes: Mapping[str, Topology], defaults: Defaults) -> None:
        self.instances: dict[EndpointKey, Instance] = {}
        self.problems: list[str] = []
        self.not_tcp = self.no_port = self.malformed = 0
        self._nodes = nodes
        self._zone = defaults.zone
        self._labels = {NAMESPACE: part.key.namespace, REGISTRY: KUBERNETES, SERVICE: part.service}
        if defaults.cluster:
            self._labels |= {CLUSTER: defaults.cluster, CLUSTER_ID: defaults.cluster}
        self._at = "subsets[{}]." if part.groups and not part.groups[0].family else ""

    def refuse(self, problem: str) -> None:
        self.malformed += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def map_group(self, position: int, group: Group, old: _Mapped) -> _Mapped:
        at = self._at.format(position)
        ports = self._tcp_ports(at, group)
        mapped: _Mapped = {}
        for index, endpoint in enumerate(group.endpoints):
            first = endpoint.addresses[0] if endpoint.addresses else ""
            known = old.get(first)
            if known is not None and known[0] == endpoint:
                mapped[first] = known
            else:
                before = self.malformed
                instances = tuple(self._map_endpoint(f"{at}endpoints[{index}]", endpoint, ports, group.family))
                known = (endpoint, instances)
                if self.malformed == before:
                    # One with a problem is mapped anew each time, so that it is reported each time.
                    mapped[first] = known
            for instance in known[1]:
                held = self.instances.get(instance.key)
                if held is None or fitter(instance, held):
                    self.instances[instance.key] = instance
        return mapped

    def _tcp_ports(self, at: str, group: Group) -> list[tuple[int, str, str]]:
        """Number, name and appProtocol of each port that is one of TCP's."""
        ports: list[tuple[int, str, str]] = []
        addresses = sum(bool(endpoint.addresses) for endpoint in group.endpoints)
        for index, port in enumerate(group.ports):
            protocol = port.protocol or "TCP"
            if protocol not in _PROTOCOLS:
                self.refuse(f"{at}ports[{index}].protocol: {protocol!r} is none of {', '.join(_PROTOCOLS)}")
            elif protocol != "TCP":
                self.not_tcp += addresses
            elif port.port is None:
                self.no_port += addresses
            elif not 1 <= port.port <= 65535:
                self.refuse(f"{at}ports[{index}].port: {port.port} is not within 1 to 65535")
            else:
                ports.append((port.port, port.name or "", sys.intern((port.app_protocol or "").strip())))
        return ports

    def _map_endpoint(
        self, at: str, endpoint: Endpoint, ports: list[tuple[int, str, str]], family: str
    ) -> list[Instance]:
        labels = self._endpoint_labels(endpoint)
        conditions = _conditions(endpoint.conditions)
        instances: list[Instance] = []
        # An endpoint is one pod: what further addresses would mean is not defined, and kube-proxy passes them over.
        for address in endpoint.addresses[:1]:
            try:
                for port, name, spoken in ports:
                    all_labels = {**labels, APP_PROTOCOL: spoken} if spoken else labels
                    instance = make_instance(address, port, name, all_labels, conditions)
                    if family and instance.is_ipv6 != (family == "IPv6"):
                        raise ModelError("address", f"{address!r} in a slice of {family} addresses")
                    instances.append(instance)
            except ModelError as error:
                self.refuse(f"{at}.addresses[0]: {error.what}")
        return instances

    def _endpoint_labels(self, endpoint: Endpoint) -> dict[str, str]:
        labels = dict(self._labels)
        node = (endpoint.node_name or "").strip()
        topology = self._nodes.get(node)
        own = endpoint.deprecated_topology
        zone = endpoint.zone or (own.zone if own else "") or (topology.zone if topology else "") or self._zone
        region = (own.region if own else "") or (topology.region if topology else "")
        # The same few names stand in thousands of labels.
        if node:
            labels[NODE] = sys.intern(node)
        if zone:
            labels[ZONE] = sys.intern(zone)
        if region:
            labels[REGION] = sys.intern(region)
        return labels


def _conditions(conditions: SliceConditions | None) -> Conditions:
    if conditions is None:
        return _CONDITIONS[True, True, False]
    ready = conditions.ready is not False
    serving = ready if conditions.serving is None else conditions.serving
    return _CONDITIONS[ready, serving, conditions.terminating is True]
