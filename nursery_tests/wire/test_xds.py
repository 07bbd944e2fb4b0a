"""xDS's resources: names, places, and endpoints in priorities (L1 to L5, O1)."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Conditions, Instance, ModelError, ServiceKey, ServiceSnapshot, index, make_instance
from meshlocal.policy.picker import Cursors, Picker
from meshlocal.policy.steps import finish
from meshlocal.wire import xds
from meshlocal.wire.pb import envoy_cluster_pb2 as cluster_pb
from meshlocal.wire.pb import envoy_core_pb2 as core_pb
from meshlocal.wire.pb import envoy_endpoint_pb2 as endpoint_pb
from meshlocal.wire.pb import envoy_http_connection_manager_pb2 as http_pb
from meshlocal.wire.pb import envoy_listener_pb2 as listener_pb
from meshlocal.wire.pb import envoy_previous_hosts_pb2 as previous_hosts_pb
from meshlocal.wire.pb import envoy_previous_priorities_pb2 as previous_priorities_pb
from meshlocal.wire.pb import envoy_route_pb2 as route_pb
from meshlocal.wire.pb import envoy_upstream_http_pb2 as upstream_http_pb

TERMINATING = Conditions(ready=False, serving=True, terminating=True)


@pytest.mark.parametrize(
    ("text", "service", "port_name"),
    [("b", "b", None), ("b.shop", "b.shop", None), ("b:grpc", "b", "grpc"), ("b.shop:8080", "b.shop", "8080")],
)
def test_names_of_resources(text: str, service: str, port_name: str | None) -> None:
    assert xds.parse_resource_name(text) == (service, port_name)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        (":grpc", "is empty"),
        ("xdstp://a/b", "neither SERVICE nor SERVICE:PORT_NAME|no service name"),
        ("b:", "neither SERVICE nor SERVICE:PORT_NAME"),
        ("b:\n", "neither SERVICE nor SERVICE:PORT_NAME"),
        ("b:" + "x" * 64, "neither SERVICE nor SERVICE:PORT_NAME"),
        ("b/c", "no service name"),
        ("*", "no service name"),
    ],
)
def test_names_that_are_refused(text: str, what: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        xds.parse_resource_name(text)
    assert caught.value.where == "resource name"


@pytest.mark.parametrize(
    ("node", "labels", "prefer", "within"),
    [
        ({}, {}, ("node",), None),
        ({"locality": {"subZone": "n1"}}, {"node": "n1"}, ("node",), None),
        ({"metadata": {"node": "n1", "rack": "r", "heap": 7, "notes": "x" * 5000}}, {"node": "n1"}, ("node",), None),
        (
            {"metadata": {"node": "n1", "rack": "r", "prefer": ["node", "rack"]}},
            {"node": "n1", "rack": "r"},
            ("node", "rack"),
            None,
        ),
        (
            {"locality": {"region": "eu", "zone": "z1", "subZone": "n1"}, "metadata": {"node": "n9", "zone": "z9"}},
            {"node": "n1", "zone": "z1", "region": "eu"},
            ("node",),
            None,
        ),
        ({"metadata": {"prefer": ["node", "zone", "node"]}}, {}, ("node", "zone"), None),
        ({"metadata": {"prefer": "zone", "within": "zone"}}, {}, ("zone",), "zone"),
    ],
)
def test_the_place_of_a_client(
    node: Mapping[str, Any], labels: Mapping[str, str], prefer: tuple[str, ...], within: str | None
) -> None:
    place = xds.place_of(ParseDict(dict(node), core_pb.Node()), ("node",))
    assert place.locality == Locality(labels, prefer, within)
    assert place.caller.node == labels.get("node", "")


def test_who_a_client_is() -> None:
    node = core_pb.Node(id="pod-1", cluster="shop", user_agent_name="gRPC C-core", user_agent_version="1.85")
    assert xds.place_of(node, ("node",)).caller[:3] == ("pod-1", "", "gRPC C-core 1.85")
    assert xds.place_of(core_pb.Node(cluster="shop"), ("node",)).caller.name == "shop"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"prefer": 7}, "node.metadata.prefer: is not a list of 1 to 16 names of labels"),
        ({"prefer": []}, "node.metadata.prefer: is not a list of 1 to 16 names of labels"),
        ({"prefer": ["node", ""]}, "node.metadata.prefer: is not a list of 1 to 16 names of labels"),
        ({"prefer": ["node", {"a": "b"}]}, "node.metadata.prefer: is not a list of 1 to 16 names of labels"),
        ({"within": ["zone", "rack"]}, "node.metadata.within: is not the name of a label"),
        ({"within": ""}, "node.metadata.within: is not the name of a label"),
        ({"node": "n" * 1021}, "node.metadata.node: is longer than 1024 characters"),
        ({"prefer": "p" * 1025}, f"node.metadata.{'p' * 64}: is longer than 1024 characters"),
    ],
)
def test_a_node_that_cannot_be_read(metadata: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        xds.place_of(ParseDict({"metadata": metadata}, core_pb.Node()), ("node",))
    assert str(caught.value) == message


def test_places_from_which_all_looks_alike_share_a_key() -> None:
    def key(metadata: Mapping[str, Any]) -> bytes:
        return xds.place_of(ParseDict({"metadata": metadata}, core_pb.Node()), ("node",)).key

    assert key({"node": "n1", "pod": "a"}) == key({"node": "n1", "pod": "b"})
    assert key({"node": "n1"}) != key({"node": "n2"})
    assert key({"node": "n1"}) != key({"node": "n1", "prefer": ["node", "zone"]})
    assert key({"node": "n1", "within": "zone", "zone": "a"}) != key({"node": "n1", "within": "zone", "zone": "b"})
    assert key({"node": "n1"}) != key({"node": "n1", "within": "node"})


def placed(
    address: str, node: str = "", zone: str = "", conditions: Conditions | None = None, port_name: str = ""
) -> Instance:
    labels = {"node": node, "zone": zone}
    return make_instance(address, 80, port_name, labels, conditions or Conditions())


def assigned(locality: Locality, *instances: Instance, port_name: str | None = None) -> Any:
    snapshot = ServiceSnapshot(ServiceKey("b"), "1", index(instances))
    picker = Picker.build(Selector(locality, port_name), snapshot)
    return endpoint_pb.ClusterLoadAssignment.FromString(finish(xds.assignment("b", picker)))


def shown(message: Any) -> list[tuple[int, str, list[str]]]:
    return [
        (
            each.priority,
            each.locality.sub_zone,
            [endpoint.endpoint.address.socket_address.address for endpoint in each.lb_endpoints],
        )
        for each in message.endpoints
    ]


def test_priority_0_is_the_clients_own_node_then_the_zone_then_the_rest() -> None:
    instances = [
        placed("10.0.0.1", "n1", "z1"),
        placed("10.0.0.2", "n1", "z1"),
        placed("10.0.0.3", "n2", "z1"),
        placed("10.0.0.4", "n3", "z2"),
        placed("10.0.0.5"),
        placed("10.0.0.6", "n1", "z1", TERMINATING),
        placed("10.0.0.7", "n1", "z1", Conditions(ready=False)),
    ]
    message = assigned(Locality({"node": "n1", "zone": "z1"}, ("node", "zone")), *instances)
    assert shown(message) == [
        (0, "n1", ["10.0.0.1", "10.0.0.2"]),
        (1, "n2", ["10.0.0.3"]),
        (2, "n3", ["10.0.0.4"]),
        (2, "", ["10.0.0.5"]),
        (3, "n1", ["10.0.0.6"]),
    ]
    assert [each.load_balancing_weight.value for each in message.endpoints] == [2, 1, 1, 1, 1]
    assert (message.endpoints[0].locality.zone, message.cluster_name) == ("z1", "b")
    # Of two local instances, one takes all.
    assert message.policy.overprovisioning_factor.value == 200


def test_there_are_no_gaps_in_the_priorities() -> None:
    here = Locality({"node": "n1", "zone": "z1"}, ("node", "zone"))
    assert shown(assigned(here, placed("10.0.0.4", "n3", "z2"))) == [(0, "n3", ["10.0.0.4"])]
    assert shown(assigned(here, placed("10.0.0.1", "n1"), placed("10.0.0.4", "n3"))) == [
        (0, "n1", ["10.0.0.1"]),
        (1, "n3", ["10.0.0.4"]),
    ]


def test_a_service_without_instances_has_no_endpoints() -> None:
    message = assigned(Locality({"node": "n1"}))
    assert (shown(message), message.HasField("policy")) == ([], False)


def test_an_address_under_several_port_names_stands_once() -> None:
    """gRPC rejects an assignment in which one stands twice."""
    both = [placed("10.0.0.1", "n1", port_name="a"), placed("10.0.0.1", "n1", port_name="b")]
    assert shown(assigned(Locality({"node": "n1"}), *both)) == [(0, "n1", ["10.0.0.1"])]
    # Also where all of a group stood before it, which makes no priority.
    gone = placed("10.0.0.1", "n1", port_name="c", conditions=TERMINATING)
    last = placed("10.0.0.2", "n2", conditions=TERMINATING)
    assert shown(assigned(Locality({"node": "n1"}), *both, gone, last)) == [
        (0, "n1", ["10.0.0.1"]),
        (1, "n2", ["10.0.0.2"]),
    ]


def test_only_ports_of_the_name_are_used() -> None:
    instances = [placed("10.0.0.1", port_name="grpc"), placed("10.0.0.2", port_name="metrics")]
    assert shown(assigned(Locality({}), *instances, port_name="grpc")) == [(0, "", ["10.0.0.1"])]


@given(
    st.lists(
        st.tuples(
            st.integers(1, 40),
            st.sampled_from(["", "n1", "n2", "n3"]),
            st.sampled_from(["", "z1", "z2"]),
            st.sampled_from([Conditions(), TERMINATING, Conditions(ready=False)]),
            st.sampled_from(["a", "b"]),
        ),
        max_size=30,
    ),
    st.sampled_from(["", "n1", "n2"]),
    st.sampled_from([("node",), ("node", "zone"), ("zone",)]),
    st.sampled_from([None, "a"]),
)
def test_priorities_are_what_a_plan_goes_through(
    drawn: list[tuple[int, str, str, Conditions, str]], node: str, prefer: tuple[str, ...], port_name: str | None
) -> None:
    """What a plan of a proxy at the same place can try stands here once, in the order of its tiers (O1)."""
    instances = [placed(f"10.0.0.{last}", node, zone, conditions, name) for last, node, zone, conditions, name in drawn]
    locality = Locality({"node": node, "zone": "z1"}, prefer)
    picker = Picker.build(Selector(locality, port_name), ServiceSnapshot(ServiceKey("b"), "1", index(instances)))
    plan = picker.plan(Cursors(Random(0)))
    groups: dict[tuple[bool, int], list[str]] = {}
    while (pick := plan.next()) is not None:
        groups.setdefault((pick.last_resort, pick.tier), []).append(pick.instance.key.address)
    message = assigned(locality, *instances, port_name=port_name)
    priorities: dict[int, list[str]] = {}
    for priority, _, addresses in shown(message):
        priorities.setdefault(priority, []).extend(addresses)
    assert list(priorities) == list(range(len(groups)))
    assert [sorted(each) for each in priorities.values()] == [sorted(each) for each in groups.values()]
    localities = [(each.priority, each.locality.zone, each.locality.sub_zone) for each in message.endpoints]
    assert len(set(localities)) == len(localities)


@pytest.mark.parametrize("largest", [1, 2, 3, 100, 6553, 6554, 10_000, 1_000_000])
def test_one_healthy_instance_takes_all_as_far_as_an_envoy_can_count(largest: int) -> None:
    """It multiplies in 32 bits, and takes no less than its own default."""
    factor = xds.overprovisioning(largest)
    assert factor * largest < 1 << 32
    assert factor >= 140
    if largest <= 6553:
        assert factor * 1 // largest >= 100


def test_what_a_channel_finds_leads_to_its_endpoints() -> None:
    """Each resource refers to the next by name, over the same stream; every `Any` is what its type says."""
    listener = listener_pb.Listener.FromString(xds.listener("b:grpc"))
    manager = http_pb.HttpConnectionManager()
    assert listener.api_listener.api_listener.Unpack(manager)
    assert (listener.name, manager.rds.route_config_name) == ("b:grpc", "b:grpc")
    assert manager.rds.config_source.HasField("ads")
    # gRFC A39: without a router in the end, a client rejects it.
    assert manager.http_filters[-1].typed_config.type_url.endswith("envoy.extensions.filters.http.router.v3.Router")
    route = route_pb.RouteConfiguration.FromString(xds.route("b:grpc"))
    [host] = route.virtual_hosts
    [only] = host.routes
    assert (list(host.domains), only.match.WhichOneof("path_specifier"), only.route.cluster) == (
        ["*"],
        "prefix",
        "b:grpc",
    )
    # Without a timeout, an Envoy would have one of 15 s.
    assert only.route.HasField("timeout")
    retry = only.route.retry_policy
    assert "unavailable" in retry.retry_on.split(",")
    assert retry.retry_priority.typed_config.Unpack(previous_priorities_pb.PreviousPrioritiesConfig())
    assert retry.retry_host_predicate[0].typed_config.Unpack(previous_hosts_pb.PreviousHostsPredicate())
    cluster = cluster_pb.Cluster.FromString(xds.cluster("b:grpc"))
    assert (cluster.name, cluster.eds_cluster_config.service_name) == ("b:grpc", "b:grpc")
    assert cluster.eds_cluster_config.eds_config.HasField("ads")
    assert cluster.connect_timeout.seconds == 1
    [speaks] = cluster.typed_extension_protocol_options.values()
    assert speaks.Unpack(upstream_http_pb.HttpProtocolOptions())
    [limits] = cluster.circuit_breakers.thresholds
    assert limits.max_requests.value == limits.max_retries.value == (1 << 32) - 1


def test_types_are_sent_in_the_order_in_which_they_refer_to_each_other() -> None:
    """Make before break: what is referred to is there first."""
    assert [kind.short for kind in xds.ResourceType] == [
        "Cluster",
        "ClusterLoadAssignment",
        "Listener",
        "RouteConfiguration",
    ]
    assert [kind for kind in xds.ResourceType if kind.whole] == [xds.ResourceType.CLUSTER, xds.ResourceType.LISTENER]
    assert all(xds.kind_of(kind.url) is kind for kind in xds.ResourceType)
    assert xds.kind_of("type.googleapis.com/envoy.service.runtime.v3.Runtime") is None
