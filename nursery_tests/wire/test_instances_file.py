"""The instances file: its format, and how its mistakes are told."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.model import Conditions, ServiceKey, make_instance
from meshlocal.policy.problems import Problem
from meshlocal.wire.instances_file import InstancesFileError, parse_instances_file

B = ServiceKey("b")

EXAMPLE = """\
zone: z1
cluster: c1
services:
  b:
    - {address: 10.0.1.10, port: 9000, port_name: grpc, labels: {node: n1}}
    - {address: 10.0.2.10, port: 9000, port_name: grpc, labels: {node: n2, zone: z2}}
  c.other:
    - address: "fd00::1"
      port: 80
      protocol: udp
      ready: false
      serving: true
      terminating: true
  idle: []
"""


def refused(text: str) -> str:
    with pytest.raises(InstancesFileError) as caught:
        parse_instances_file(text, "instances.yaml")
    return str(caught.value)


def test_the_documented_example() -> None:
    found = parse_instances_file(EXAMPLE, "instances.yaml")
    common = {"cluster": "c1", "registry": "file"}
    assert (found.zone, found.cluster) == ("z1", "c1")
    assert found.services == {
        "b": (
            make_instance("10.0.1.10", 9000, "grpc", {**common, "zone": "z1", "service": "b", "node": "n1"}),
            make_instance("10.0.2.10", 9000, "grpc", {**common, "zone": "z2", "service": "b", "node": "n2"}),
        ),
        "c.other": (
            make_instance(
                "fd00::1",
                80,
                "",
                {**common, "zone": "z1", "service": "c.other"},
                Conditions(ready=False, serving=True, terminating=True),
                "udp",
            ),
        ),
        "idle": (),
    }


def test_json_is_the_same_format() -> None:
    text = json.dumps({"services": {"b": [{"address": "10.0.0.1", "port": 1, "labels": {"node": "n1"}}]}}, indent=1)
    (instance,) = parse_instances_file(text, "instances.json").services[B]
    assert instance == make_instance("10.0.0.1", 1, "", {"node": "n1", "service": "b", "registry": "file"})


def test_zone_and_cluster_come_from_the_instance_then_the_file_then_the_arguments() -> None:
    text = "{zone: '%s', services: {b: [{address: 10.0.0.1, port: 1, labels: {cluster: own}}]}}"
    found = parse_instances_file(text % "file", "f", zone="argument", cluster="argument")
    assert (found.zone, found.cluster) == ("file", "argument")
    assert found.services[B][0].labels == {"zone": "file", "cluster": "own", "service": "b", "registry": "file"}
    found = parse_instances_file(text % " ", "f", zone="argument")
    assert found.services[B][0].labels["zone"] == "argument"


def test_unknown_zone_is_no_label() -> None:
    (instance,) = parse_instances_file("services: {b: [{address: 10.0.0.1, port: 1}]}", "f").services[B]
    assert instance.labels == {"service": "b", "registry": "file"}


def test_keys_without_value_are_as_good_as_none() -> None:
    text = """
zone:
services:
  b:
    - {address: 10.0.0.1, port: 1, port_name: , protocol: , labels: , ready: , serving: , terminating: }
"""
    (instance,) = parse_instances_file(text, "f").services[B]
    assert instance == make_instance("10.0.0.1", 1, "", {"service": "b", "registry": "file"})


def test_labels_of_the_registry_may_be_repeated() -> None:
    text = "services: {b: [{address: 10.0.0.1, port: 1, labels: {service: b, registry: file}}]}"
    assert parse_instances_file(text, "f").services[B][0].labels == {"service": "b", "registry": "file"}


def test_no_service_at_all_is_said_with_braces() -> None:
    assert parse_instances_file("services: {}", "f").services == {}


NO_SERVICES = "instances.yaml:2: services: expected a mapping of services, got nothing (null); write {} for none"
NO_INSTANCES = "instances.yaml:2: services.b: expected a list of instances, got nothing (null); write [] for none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "instances.yaml:1: expected a mapping with the key services, got nothing (null)"),
        ("- b", "instances.yaml:1: expected a mapping with the key services, got a list"),
        ("zone: z1", "instances.yaml:1: the key services is missing"),
        (
            "zone: z1\nservices:",
            "instances.yaml:2: services: expected a mapping of services, got nothing (null); write {} for none",
        ),
        ("services: [b]", "instances.yaml:1: services: expected a mapping of services, got a list"),
        ("services: {}\nsources: 1", "instances.yaml:2: sources: unknown key; did you mean 'services'?"),
        ("services: {}\nx: 1", "instances.yaml:2: x: unknown key; known here: zone, cluster, services"),
        ("zone: 1\nservices: {}", "instances.yaml:1: zone: expected text, got the number 1; put it between quotes"),
        (
            "services:\n  b:",
            "instances.yaml:2: services.b: expected a list of instances, got nothing (null); write [] for none",
        ),
        ("services:\n  b: {}", "instances.yaml:2: services.b: expected a list of instances, got a mapping"),
        (
            "services:\n  -b: []",
            "instances.yaml:2: services.-b: '-b' is no service name (letters, digits, '.', '-', '_'; at most 253)",
        ),
        ("services: {'': []}", "instances.yaml:1: services.: is empty"),
        ("services: {b: [], b: []}", "instances.yaml:1: the key 'b' is already on line 1"),
        ("services: [", "instances.yaml:2: while parsing a flow node, did not find expected node content"),
    ],
)
def test_mistakes_in_the_file(text: str, message: str) -> None:
    assert refused(text) == message


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("10.0.0.1:80", ": expected a mapping with address and port, got the text '10.0.0.1:80'"),
        ("", ": expected a mapping with address and port, got nothing (null)"),
        ("{port: 1}", ": the key address is missing"),
        ("{address: 10.0.0.2}", ": the key port is missing"),
        ("{address: , port: 1}", ".address: expected text, got nothing (null)"),
        ("{address: '', port: 1}", ".address: is empty"),
        ("{address: b.example, port: 1}", ".address: 'b.example' is neither an IPv4 nor an IPv6 address"),
        ("{address: 10, port: 1}", ".address: expected text, got the number 10; put it between quotes"),
        ("{address: [10], port: 1}", ".address: expected text, got a list"),
        ("{address: 0.0.0.0, port: 1}", ".address: '0.0.0.0' is no address of an instance"),
        ("{address: 10.0.0.2, port: 70000}", ".port: 70000 is not within 1 to 65535"),
        ("{address: 10.0.0.2, port: 0}", ".port: 0 is not within 1 to 65535"),
        ("{address: 10.0.0.2, port: '80'}", ".port: expected a whole number, got the text '80'"),
        ("{address: 10.0.0.2, port: true}", ".port: expected a whole number, got true"),
        ("{address: 10.0.0.2, port: 80.0}", ".port: expected a whole number, got the number 80.0"),
        ("{address: 10.0.0.2, port: }", ".port: expected a whole number, got nothing (null)"),
        (
            "{address: 10.0.0.2, port: 1, port_name: 5}",
            ".port_name: expected text, got the number 5; put it between quotes",
        ),
        ("{address: 10.0.0.2, port: 1, protocol: [tcp]}", ".protocol: expected text, got a list"),
        ("{address: 10.0.0.2, port: 1, adress: 2}", ".adress: unknown key; did you mean 'address'?"),
        (
            "{address: 10.0.0.2, port: 1, weight: 2}",
            ".weight: unknown key; known here: address, port, port_name, protocol, labels, ready, serving, terminating",
        ),
        ("{address: 10.0.0.2, port: 1, labels: n1}", ".labels: expected a mapping of labels, got the text 'n1'"),
        (
            "{address: 10.0.0.2, port: 1, labels: {zone: 1}}",
            ".labels.zone: expected text, got the number 1; put it between quotes",
        ),
        (
            "{address: 10.0.0.2, port: 1, labels: {canary: true}}",
            ".labels.canary: expected text, got true; put it between quotes",
        ),
        ("{address: 10.0.0.2, port: 1, labels: {node: }}", ".labels.node: expected text, got nothing (null)"),
        ("{address: 10.0.0.2, port: 1, labels: {service: c}}", ".labels.service: is always 'b' here"),
        ("{address: 10.0.0.2, port: 1, labels: {registry: etcd}}", ".labels.registry: is always 'file' here"),
        ("{address: 10.0.0.2, port: 1, labels: {'': x}}", ".labels.: empty name, or longer than 1024 characters"),
        ("{address: 10.0.0.2, port: 1, ready: 1}", ".ready: expected true or false, got the number 1"),
        ("{address: 10.0.0.2, port: 1, serving: yes}", ".serving: expected true or false, got the text 'yes'"),
        ("{address: 10.0.0.1, port: 1}", ": 10.0.0.1:1 is already services.b[0], on line 3"),
    ],
)
def test_mistakes_in_an_instance(item: str, message: str) -> None:
    """Each is told with its line and the path of its key."""
    text = f"services:\n  b:\n    - {{address: 10.0.0.1, port: 1}}\n    - {item}\n"
    assert refused(text) == f"instances.yaml:4: services.b[1]{message}"


def test_the_same_address_with_another_port_name_is_another_instance() -> None:
    text = "services: {b: [{address: 10.0.0.1, port: 1}, {address: 10.0.0.1, port: 1, port_name: grpc}]}"
    assert len(parse_instances_file(text, "f").services[B]) == 2


def test_differently_written_addresses_are_one() -> None:
    text = "services: {b: [{address: 'fd00::1', port: 1}, {address: 'FD00:0::1', port: 1}]}"
    assert refused(text) == "instances.yaml:1: services.b[1]: [fd00::1]:1 is already services.b[0], on line 1"


def test_all_mistakes_are_told_at_once() -> None:
    text = "services:\n  b:\n    - {port: x}\n  c:\n    - {address: 10.0.0.1, port: 0}\n"
    assert refused(text).splitlines() == [
        "instances.yaml:3: services.b[0]: the key address is missing",
        "instances.yaml:3: services.b[0].port: expected a whole number, got the text 'x'",
        "instances.yaml:5: services.c[0].port: 0 is not within 1 to 65535",
    ]


def test_many_mistakes_are_told_up_to_a_bound() -> None:
    text = "services:\n  b:\n" + "    - x\n" * 50
    with pytest.raises(InstancesFileError) as caught:
        parse_instances_file(text, "f")
    assert len(caught.value.problems) == 20
    assert caught.value.omitted == 30
    assert str(caught.value).splitlines()[-1] == "and 30 more"


words = st.sampled_from(["zone", "services", "b", "address", "port", "labels", "node", "ready", "10.0.0.1", "::1"])
data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
instances = st.fixed_dictionaries({}, optional=dict.fromkeys(["address", "port", "labels", "ready", "port_name"], data))
files = st.fixed_dictionaries({"services": st.dictionaries(words, st.lists(instances | data, max_size=3), max_size=3)})


@given((data | files).map(json.dumps))
def test_nothing_but_its_own_error(text: str) -> None:
    problems: tuple[Problem, ...] = ()
    services: Mapping[Any, Any] = {}
    try:
        services = parse_instances_file(text, "f").services
    except InstancesFileError as error:
        problems = error.problems
    assert all(problem.origin.startswith("f:") and problem.message for problem in problems)
    assert all(instance.labels["service"] == key for key, every in services.items() for instance in every)


def test_ten_thousand_instances() -> None:
    """All of them are read; how fast is the benchmarks' matter."""
    lines = [
        f"    - {{address: 10.0.{i // 250}.{i % 250 + 1}, port: 9000, labels: {{node: n{i}}}}}" for i in range(10_000)
    ]
    found = parse_instances_file("\n".join(["services:", "  b:", *lines]), "f").services[B]
    assert len({instance.key for instance in found}) == 10_000
