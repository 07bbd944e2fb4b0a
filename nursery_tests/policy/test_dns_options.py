"""policy/dns_options: which name, whose instances, on which nodes; and what is refused."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.addresses import AddressError
from meshlocal.policy.dns_options import DnsOptions, NodeMap, NodeOf
from meshlocal.policy.source_options import SourceOptionsError
from meshlocal.policy.sources import SourceUrl


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_http._tcp.b.example?service=b", {"name": "_http._tcp.b.example", "kind": "SRV", "port": 0}),
        ("B.example.?service=b&port=9000", {"name": "b.example", "kind": "HOST", "port": 9000}),
        ("//b.example?service=b.shop&port=1&type=AAAA&port_name=grpc", {"kind": "AAAA", "port_name": "grpc"}),
        ("b.example?service=b&port=1&server=10.0.0.2", {"server": ("10.0.0.2", 53)}),
        ("b.example?service=b&port=1&server=[::1]:5353", {"server": ("::1", 5353)}),
        ("b.example?service=b&port=1&server=::1", {"server": ("::1", 53)}),
        (
            "b.example?service=b&port=1&node=10.0.1.0/24=n1&node=fd00::1%3Dn2",
            {"nodes": (NodeOf("10.0.1.0/24", "n1"), NodeOf("fd00::1/128", "n2"))},
        ),
    ],
)
def test_read(text: str, expected: dict[str, object]) -> None:
    found = DnsOptions.parse(text)
    assert {name: getattr(found, name) for name in expected} == expected
    assert DnsOptions.parse(str(found)) == found
    assert SourceUrl.parse(f"dns:{text}") == SourceUrl.parse(f"dns:{found}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected dns:NAME?service=SERVICE, got 'dns:'"),
        ("b.example", "expected dns:NAME?service=SERVICE, got 'dns:b.example'"),
        ("?service=b", "expected dns:NAME?service=SERVICE"),
        ("10.0.0.1?service=b&port=1", "'10.0.0.1' is an address, and no name to ask for"),
        ("b..example?service=b&port=1", "b..example"),
        ("b.example?port=1", "service is missing"),
        ("b.example?service=b%20c&port=1", "service: 'b c' is no service name"),
        ("b.example?service=b", "records of type HOST take port"),
        ("_a._tcp.b?service=b&port=1", "SRV records say the port: leave port out"),
        ("b.example?service=b&port=70000", "port: '70000' is not within 1 to 65535"),
        ("b.example?service=b&port=1&type=MX", "type: expected SRV, A, AAAA or HOST, got 'MX'"),
        ("b.example?service=b&port=1&server=dns.example", "server: expected IP or IP:PORT, got 'dns.example'"),
        ("b.example?service=b&port=1&server=1.2.3.4:0", "server: expected IP or IP:PORT"),
        ("b.example?service=b&port=1&node=10.0.1.0/24", "node: expected NETWORK=NODE such as 10.0.1.0/24=n1"),
        ("b.example?service=b&port=1&node=n1", "node: expected NETWORK=NODE"),
        ("b.example?service=b&port=1&node=10.0.1.1/24=n1", "node: '10.0.1.1/24' is no network"),
        ("b.example?service=b&port=1&ttl=5", "unknown key"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises((AddressError, SourceOptionsError)) as caught:
        DnsOptions.parse(text)
    assert message in str(caught.value)


def test_the_narrowest_network_counts() -> None:
    found = NodeMap((NodeOf("10.0.0.0/8", "far"), NodeOf("10.0.1.0/24", "n1"), NodeOf("10.0.1.7/32", "n7")))
    assert [found.node(each) for each in ("10.9.9.9", "10.0.1.1", "10.0.1.7", "11.0.0.1", "::1")] == [
        "far",
        "n1",
        "n7",
        None,
        None,
    ]


NETWORKS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)), max_size=12)


@given(NETWORKS, st.integers(0, 2**32 - 1))
def test_it_finds_what_a_search_finds(networks: list[tuple[int, int]], number: int) -> None:
    nodes = tuple(
        NodeOf(str(ipaddress.ip_network((start, length), strict=False)), f"n{index}")
        for index, (start, length) in enumerate(networks)
    )
    address = ipaddress.ip_address(number)
    having = [each for each in nodes if address in ipaddress.ip_network(each.network)]
    expected = max(having, key=lambda each: ipaddress.ip_network(each.network).prefixlen).node if having else None
    assert NodeMap(nodes).node(str(address)) == expected
