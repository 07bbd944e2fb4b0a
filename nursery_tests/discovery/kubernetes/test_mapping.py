"""Slices → instances: the rules one by one, and merging held to a second account of what slices mean."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlocal.discovery.kubernetes import table as table_module
from meshlocal.discovery.kubernetes.mapping import (
    Defaults,
    LeftOutCounts,
    map_part,
    merge,
    part_of_endpoints,
    part_of_slice,
)
from meshlocal.discovery.kubernetes.objects import Topology, decode_endpoints, decode_slice
from meshlocal.discovery.kubernetes.stores import node_store, slice_store
from meshlocal.discovery.kubernetes.table import EndpointTable
from meshlocal.policy.model import ModelError
from meshlocal.policy.steps import finish

TCP = {"name": "grpc", "port": 9000, "protocol": "TCP"}
SERVICE = "kubernetes.io/service-name"
ZONE, REGION = "topology.kubernetes.io/zone", "topology.kubernetes.io/region"


def mapped(
    endpoints: Any,
    ports: Any = (TCP,),
    family: Any = "IPv4",
    service: Any = "b",
    nodes: Any = None,
    defaults: Any = None,
) -> Any:
    item = {
        "metadata": {"name": "x", "namespace": "shop", "labels": {SERVICE: service}},
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports,
    }
    part = part_of_slice(decode_slice(json.dumps(item).encode()))
    return map_part(part, nodes or {}, defaults or Defaults())


def states(result: Any) -> Any:
    return {str(key): (c.ready, c.serving, c.terminating) for key, c in
            ((key, instance.conditions) for key, instance in result.instances.items())}  # fmt: skip


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ({}, (True, True, False)),
        (None, (True, True, False)),
        ({"ready": None, "serving": None, "terminating": None}, (True, True, False)),
        ({"ready": True}, (True, True, False)),
        ({"ready": False}, (False, False, False)),
        ({"ready": False, "serving": True, "terminating": True}, (False, True, True)),
        ({"ready": False, "serving": False, "terminating": True}, (False, False, True)),
        ({"ready": True, "serving": True, "terminating": True}, (True, True, True)),
        ({"serving": False}, (True, False, False)),
    ],
)
def test_conditions(conditions: Any, state: Any) -> None:
    """All three are carried through; what is unknown means what the API reference says."""
    result = mapped([{"addresses": ["10.0.0.1"], "conditions": conditions}])
    assert states(result) == {"10.0.0.1:9000": state}


def test_app_protocol_is_a_label_of_its_port_alone() -> None:
    ports = [TCP | {"appProtocol": "kubernetes.io/h2c"}, {"name": "metrics", "port": 9001}]
    result = mapped([{"addresses": ["10.0.0.1"]}], ports)
    found = {key.port: instance.labels.get("app_protocol") for key, instance in result.instances.items()}
    assert found == {9000: "kubernetes.io/h2c", 9001: None}


def test_only_tcp_ports() -> None:
    """UDP and SCTP ports and ports without a number are left out and counted; a missing protocol is TCP."""
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "sig", "port": 38412, "protocol": "SCTP"},
        {"name": "any"},
        {"port": 80},
        TCP,
    ]
    result = mapped([{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]}], ports)
    assert {(key.address, key.port, key.port_name) for key in result.instances} == {
        (address, port, name)
        for address in ("10.0.0.1", "10.0.0.2", "10.0.0.3")
        for port, name in ((80, ""), (9000, "grpc"))
    }
    assert result.left_out == LeftOutCounts(not_tcp=6, no_port=3)
    assert result.problems == ()


def test_only_the_first_address_of_an_endpoint_counts() -> None:
    """What further ones would mean is not defined, and kube-proxy passes them over."""
    result = mapped([{"addresses": ["10.0.0.1", "10.0.0.2"]}, {"addresses": []}], [TCP])
    assert [key.address for key in result.instances] == ["10.0.0.1"]
    assert result.left_out == LeftOutCounts()


@pytest.mark.parametrize("none", [None, []])
def test_no_ports_and_no_endpoints(none: Any) -> None:
    """The service is known all the same."""
    for result in (mapped(none), mapped([{"addresses": ["10.0.0.1"]}], none)):
        assert (result.service, result.instances, result.left_out) == ("b.shop", {}, LeftOutCounts())


def test_ipv6() -> None:
    """Addresses are written as RFC 5952 has them, so that two spellings are one instance."""
    result = mapped([{"addresses": ["FD77:0:0::9"]}, {"addresses": ["fd77::9"]}], family="IPv6")
    assert [str(key) for key in result.instances] == ["[fd77::9]:9000"]


def test_labels() -> None:
    """namespace, registry, service; node, zone and region where they are known; cluster and cluster_id if given."""
    nodes = {"n1": Topology("z1", "r1")}
    endpoints = [
        {"addresses": ["10.0.0.1"], "nodeName": "n1"},
        {"addresses": ["10.0.0.2"], "nodeName": "n1", "zone": "z2"},
        {"addresses": ["10.0.0.3"], "nodeName": "n9"},
        {"addresses": ["10.0.0.4"], "nodeName": " "},
        {"addresses": ["10.0.0.5"], "deprecatedTopology": {"topology.kubernetes.io/zone": "z5"}},
    ]
    result = mapped(endpoints, nodes=nodes, defaults=Defaults("z0", "c1"))
    always = {"namespace": "shop", "registry": "kubernetes", "service": "b", "cluster": "c1", "cluster_id": "c1"}
    assert {key.address: dict(each.labels) for key, each in result.instances.items()} == {
        "10.0.0.1": {**always, "node": "n1", "zone": "z1", "region": "r1"},
        "10.0.0.2": {**always, "node": "n1", "zone": "z2", "region": "r1"},
        "10.0.0.3": {**always, "node": "n9", "zone": "z0"},
        "10.0.0.4": {**always, "zone": "z0"},
        "10.0.0.5": {**always, "zone": "z5"},
    }
    (plain,) = mapped([{"addresses": ["10.0.0.1"]}]).instances.values()
    assert plain.labels == {"namespace": "shop", "registry": "kubernetes", "service": "b"}


@pytest.mark.parametrize(
    ("endpoint", "port", "problem"),
    [
        ({"addresses": ["10.0.0"]}, TCP, "endpoints[1].addresses[0]: '10.0.0' is neither an IPv4 nor an IPv6 address"),
        ({"addresses": ["fd00::1"]}, TCP, "endpoints[1].addresses[0]: 'fd00::1' in a slice of IPv4 addresses"),
        ({"addresses": ["0.0.0.0"]}, TCP, "endpoints[1].addresses[0]: '0.0.0.0' is no address of an instance"),
        ({"addresses": ["10.0.0.2"]}, {"port": 0}, "ports[1].port: 0 is not within 1 to 65535"),
        ({"addresses": ["10.0.0.2"]}, {"port": 70000}, "ports[1].port: 70000 is not within 1 to 65535"),
        (
            {"addresses": ["10.0.0.2"]},
            {"port": 1, "protocol": "QUIC"},
            "ports[1].protocol: 'QUIC' is none of TCP, UDP, SCTP",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_its_place(endpoint: Any, port: Any, problem: Any) -> None:
    """The others of the same object stay."""
    result = mapped([{"addresses": ["10.0.0.1"]}, endpoint], [TCP, port])
    assert problem in result.problems
    assert result.left_out.malformed == len(result.problems) == 1
    assert "10.0.0.1:9000" in states(result)


def test_problems_are_bounded() -> None:
    result = mapped([{"addresses": [f"bad-{number}"]} for number in range(50)])
    assert (len(result.problems), result.left_out.malformed) == (10, 50)


@pytest.mark.parametrize("service", ["", "-", "a b", "x" * 254])
def test_objects_of_no_service(service: Any) -> None:
    result = mapped([{"addresses": ["10.0.0.1"]}], service=service)
    assert (result.service, result.instances, result.left_out) == (None, {}, LeftOutCounts(no_service=1))


def test_unknown_address_type() -> None:
    with pytest.raises(ModelError, match="addressType: 'IPv8' is none of IPv4, IPv6 and FQDN"):
        mapped([], family="IPv8")


DOWN, UP = {"ready": False}, {"ready": True}
ENDING = {"ready": False, "serving": True, "terminating": True}


@pytest.mark.parametrize(
    ("fit", "other"),
    [
        # As kube-proxy: the address of a terminating pod was given to another.
        ({"conditions": UP}, {"conditions": ENDING}),
        ({"conditions": DOWN}, {"conditions": ENDING}),
        ({"conditions": DOWN}, {"conditions": {"ready": True, "terminating": True}}),
        # What kube-proxy leaves to chance.
        ({"conditions": UP}, {"conditions": DOWN, "nodeName": "n1"}),
        ({"conditions": {"ready": False, "serving": True}}, {"conditions": DOWN}),
        ({"nodeName": "n1"}, {}),
    ],
)
def test_duplicates(fit: Any, other: Any) -> None:
    """Of two accounts of one endpoint the same one is taken, in whichever order and slice they come."""
    one, two = {"addresses": ["10.0.0.1"], **fit}, {"addresses": ["10.0.0.1"], **other}
    wanted = mapped([one]).instances
    assert mapped([one, two]).instances == wanted
    assert mapped([two, one]).instances == wanted
    for first, second in ((one, two), (two, one)):
        tables = Tables()
        tables.slice("ADDED", "s-1", [first])
        tables.slice("ADDED", "s-2", [second])
        assert tables.services["b.shop"] == wanted


def test_truncated_endpoints() -> None:
    item = {
        "metadata": {
            "name": "b",
            "namespace": "shop",
            "annotations": {"endpoints.kubernetes.io/over-capacity": "truncated"},
        },
        "subsets": [{"addresses": [{"ip": "bad"}, {"ip": "10.0.0.1", "nodeName": "n1"}], "ports": [TCP]}],
    }
    part = part_of_endpoints(decode_endpoints(json.dumps(item).encode()))
    assert part is not None
    result = map_part(part, {}, Defaults())
    assert result.left_out == LeftOutCounts(malformed=1, truncated=1)
    assert result.problems == ("subsets[0].endpoints[0].addresses[0]: 'bad' is neither an IPv4 nor an IPv6 address",)
    assert list(states(result)) == ["10.0.0.1:9000"]


# Everything together, held to a second account.


class Tables:
    """The stores over one table, as the source has them, and a hub that keeps what it is told."""

    def __init__(self) -> None:
        self.table = EndpointTable(Defaults())
        self.services: dict[str, Any] = {}
        self.updates: list[str] = []
        self.slices = slice_store(self.table, self._publish, lambda what, key: None)
        self.nodes = node_store(self.table, self._publish)

    def _publish(self) -> None:
        for service, instances in self.table.take().items():
            self.updates.append(service)
            if instances is None:
                del self.services[service]
            else:
                self.services[service] = instances

    def slice(self, change: Any, name: Any, endpoints: Any) -> None:
        meta = {"name": name, "namespace": "shop", "resourceVersion": "1", "labels": {SERVICE: "b"}}
        item = {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": [TCP]}
        self.slices.changed(change, raw(item))
        self.slices.flush()


def raw(item: Any) -> Any:
    return msgspec.Raw(json.dumps(item).encode())


_flag = st.sampled_from([None, True, False])
_endpoint = st.fixed_dictionaries(
    {"addresses": st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "junk"]), max_size=2)},
    optional={
        "conditions": st.one_of(
            st.none(), st.fixed_dictionaries({}, optional={"ready": _flag, "serving": _flag, "terminating": _flag})
        ),
        "nodeName": st.sampled_from([None, "", "n1", "n2", "n3"]),
        "zone": st.sampled_from([None, "z8", "z9"]),
    },
)
_port = st.fixed_dictionaries(
    {},
    optional={
        "port": st.sampled_from([None, 0, 80, 9000, 65536]),
        "name": st.sampled_from([None, "", "http", "grpc"]),
        "protocol": st.sampled_from([None, "TCP", "UDP", "SCTP", "QUIC"]),
    },
)


def _slice(namespace: Any, name: Any, service: Any, family: Any, endpoints: Any, ports: Any) -> Any:
    labels = {SERVICE: service} if service else None
    meta = {"name": name, "namespace": namespace, "resourceVersion": "5", "labels": labels}
    return {"metadata": meta, "addressType": family, "endpoints": endpoints, "ports": ports}


_slices = st.builds(
    _slice,
    st.sampled_from(["shop", "play"]),
    st.sampled_from(["s-1", "s-2", "s-3"]),
    st.sampled_from(["", "b", "b", "c"]),
    st.sampled_from(["IPv4", "IPv4", "IPv6", "FQDN"]),
    st.one_of(st.none(), st.lists(_endpoint, max_size=4)),
    st.one_of(st.none(), st.lists(_port, max_size=3)),
)
_nodes = st.builds(
    lambda name, zone, region: {
        "metadata": {
            "name": name,
            "labels": {key: value for key, value in ((ZONE, zone), (REGION, region)) if value},
        }
    },
    st.sampled_from(["n1", "n2"]),
    st.sampled_from(["", "z1", "z2"]),
    st.sampled_from(["", "r1"]),
)
_step = st.one_of(
    st.tuples(st.just("slice"), st.sampled_from(["ADDED", "MODIFIED", "DELETED"]), _slices),
    st.tuples(st.just("node"), st.sampled_from(["ADDED", "DELETED"]), _nodes),
    st.tuples(st.just("list"), st.just(""), st.lists(_slices, max_size=4)),
    st.tuples(st.just("half a list"), st.just(""), st.lists(_slices, max_size=4)),
)


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(_step, max_size=12))
def test_whatever_comes_the_table_says_what_the_cluster_holds(steps: Any, reference: Any) -> None:
    """After any events, lists, broken lists and changes of nodes, in any order; and only what changed is published."""
    tables = Tables()
    slices: dict[Any, Any] = {}
    nodes: dict[Any, Any] = {}
    for what, change, item in steps:
        before = reference.read(tables.services)
        tables.updates.clear()
        if what in ("list", "half a list"):
            tables.slices.begin()
            listed = {key_of(each): each for each in item}
            for each in listed.values():
                tables.slices.listed(raw(each))
            if what == "list":
                slices = listed
                finish(tables.slices.commit())
            else:
                # Whatever others publish meanwhile, nothing of it counts.
                tables.slices.flush()
        else:
            held = slices if what == "slice" else nodes
            store = tables.slices if what == "slice" else tables.nodes
            if change == "DELETED":
                held.pop(key_of(item), None)
            else:
                held[key_of(item)] = item
            store.changed(change, raw(item))
            store.flush()
        labels = {name: item["metadata"]["labels"] for (_, name), item in nodes.items()}
        wanted = reference.meaning(slices, labels)
        found = reference.read(tables.services)
        assert found == wanted
        changed = {service for service in before.keys() | found.keys() if before.get(service) != found.get(service)}
        assert set(tables.updates) >= changed
        if what == "node":
            assert set(tables.updates) == changed, "a node's change publishes the services on it only"
    fresh = Tables()
    for item in slices.values():
        fresh.slices.changed("ADDED", raw(item))
    assert fresh.table.left_out == tables.table.left_out
    assert fresh.table.objects == tables.table.objects


def key_of(item: Any) -> Any:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _node(name: Any, zone: Any) -> Any:
    return {"metadata": {"name": name, "labels": {ZONE: zone}}}


@pytest.mark.parametrize("ports", [[TCP], [TCP, {"name": "http", "port": 80}]])
def test_a_node_and_what_stands_on_it_change_at_once(ports: Any) -> None:
    """Between two publications, in this order: the object's instances have the labels of the node as it is now."""
    tables = Tables()
    endpoint = {"addresses": ["10.0.0.1"], "nodeName": "n1"}
    tables.nodes.changed("ADDED", raw(_node("n1", "z1")))
    tables.slices.changed("ADDED", raw(_slice("shop", "s-1", "b", "IPv4", [endpoint], [TCP])))
    tables.slices.flush()
    tables.nodes.changed("MODIFIED", raw(_node("n1", "z2")))
    endpoints = [endpoint, {"addresses": ["10.0.0.2"], "nodeName": "n1"}]
    tables.slices.changed("MODIFIED", raw(_slice("shop", "s-1", "b", "IPv4", endpoints, ports)))
    tables.slices.flush()
    (instances,) = tables.services.values()
    assert {key.address for key in instances} == {"10.0.0.1", "10.0.0.2"}
    assert {instance.labels["zone"] for instance in instances.values()} == {"z2"}


@pytest.mark.parametrize("order", ["node, slice", "slice, node"])
def test_a_node_changes_and_what_stood_on_it_goes_at_once(order: Any) -> None:
    """Between two publications: the service is gone, and the others on the node follow it."""
    tables = Tables()
    slices = [
        _slice("shop", f"s-{service}", service, "IPv4", [{"addresses": ["10.0.0.1"], "nodeName": "n1"}], [TCP])
        for service in ("b", "c")
    ]
    tables.nodes.changed("ADDED", raw(_node("n1", "z1")))
    for item in slices:
        tables.slices.changed("ADDED", raw(item))
    tables.slices.flush()
    assert sorted(tables.services) == ["b.shop", "c.shop"]
    for what in order.split(", "):
        if what == "node":
            tables.nodes.changed("MODIFIED", raw(_node("n1", "z2")))
        else:
            tables.slices.changed("DELETED", raw(slices[0]))
    tables.slices.flush()
    assert list(tables.services) == ["c.shop"]
    (instance,) = tables.services["c.shop"].values()
    assert instance.labels["zone"] == "z2"


def test_a_change_costs_work_for_its_service_only(monkeypatch: Any) -> None:
    """Of a thousand objects one is mapped, and one service merged."""
    tables = Tables()
    for number in range(1000):
        item = _slice("shop", f"s-{number}", f"svc-{number}", "IPv4", [{"addresses": ["10.0.0.1"]}], [TCP])
        tables.slices.changed("ADDED", raw(item))
    tables.slices.flush()
    work = SimpleNamespace(mapped=[], merged=[])
    monkeypatch.setattr(
        table_module, "map_part", lambda part, *rest: work.mapped.append(part.service) or map_part(part, *rest)
    )
    monkeypatch.setattr(table_module, "merge", lambda parts: work.merged.append(parts[0].service) or merge(parts))
    item = _slice("shop", "s-7", "svc-7", "IPv4", [{"addresses": ["10.0.0.2"]}], [TCP])
    tables.slices.changed("MODIFIED", raw(item))
    tables.slices.flush()
    assert (work.mapped, work.merged) == (["svc-7"], ["svc-7.shop"])
