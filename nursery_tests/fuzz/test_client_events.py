"""Events that make no sense, into the watch of a client: only what it may publish is published, and only documented
errors come of it (D1)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from ipaddress import ip_address

import trio
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.client.watch import DiscoveryWatch, UnexpectedEventError
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.model import BaseMismatchError, ServiceChange, ServiceKey, ServiceSnapshot
from meshlocal.wire.pb import discovery_pb2 as pb

FOLLOWED = {ServiceKey("b"), ServiceKey("c")}
NAMES = st.sampled_from(["b", "b", "b", "c", "d", "", "no good"])
VERSIONS = st.sampled_from(["", "1", "2", "3"])
ADDRESSES = st.sampled_from(
    ["10.0.0.1", "10.0.0.2", "::1", "0:0:0:0:0:0:0:1", "fe80::1%eth0", "b.example", "", "10.0.0.1 "]
)
PORTS = st.sampled_from([1, 9000, 65_535, 0, -1, 65_536, 2**63 - 1, -(2**63)])
TEXTS = st.one_of(st.sampled_from(["", "tcp", "udp", "grpc", "node", "n1", " "]), st.text(max_size=10))
ENDPOINTS = st.builds(pb.NetworkEndpoint, address=ADDRESSES, port=PORTS, port_name=TEXTS, protocol=TEXTS)
INSTANCES = st.builds(
    pb.Instance,
    endpoint=ENDPOINTS,
    labels=st.builds(pb.Labels, labels=st.dictionaries(TEXTS, TEXTS, max_size=3)),
    conditions=st.one_of(
        st.none(), st.builds(pb.Conditions, ready=st.booleans(), serving=st.booleans(), terminating=st.booleans())
    ),
)
MANY = st.lists(INSTANCES, max_size=4)
EVENTS = st.one_of(
    st.builds(
        lambda **fields: pb.WatchInstancesResponse(snapshot=pb.ServiceSnapshot(**fields)),
        service=NAMES,
        version=VERSIONS,
        instances=MANY,
        unknown=st.booleans(),
    ),
    st.builds(
        lambda **fields: pb.WatchInstancesResponse(change=pb.ServiceChange(**fields)),
        service=NAMES,
        base_version=VERSIONS,
        version=VERSIONS,
        upserted=MANY,
        removed=st.lists(ENDPOINTS, max_size=3),
    ),
    st.builds(
        lambda interval: pb.WatchInstancesResponse(heartbeat=pb.Heartbeat(interval_ms=interval)),
        st.sampled_from([0, 1, 1000, 2**31 - 1]),
    ),
)


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """An event as it travels, whole or damaged."""
    data = bytearray(draw(EVENTS).SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 1, 2])) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.sampled_from([len(data)] * 4 + [len(data) // 2]))]) + draw(
        st.sampled_from([b""] * 4 + [b"\x9a\x06\x01x", b"\xff"])
    )


class Sink:
    def __init__(self) -> None:
        self.published: list[ServiceSnapshot] = []

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        self.published.append(snapshot)


@given(st.lists(payloads(), max_size=8))
def test_watch_events(sent: list[bytes]) -> None:
    """D1: never a mix of two states, never an instance that no proxy could connect to."""

    async def main() -> None:
        sink = Sink()
        watch = DiscoveryWatch([DiscoveryUrl("grpc", "test", 1)], FOLLOWED, sink, random.Random(0))
        watch._subscribed = frozenset(FOLLOWED)
        held: dict[ServiceKey, ServiceSnapshot] = {}
        for payload in sent:
            try:
                event = pb.WatchInstancesResponse.FromString(payload)
            except DecodeError:
                continue
            before = len(sink.published)
            refused = False
            try:
                assert await watch._take(event, 10.0, 0, sorted(FOLLOWED)) >= 1.0
            except (BaseMismatchError, UnexpectedEventError):
                refused = True
            assert not refused or len(sink.published) == before
            for snapshot in sink.published[before:]:
                check(snapshot)
                if event.HasField("change"):
                    assert event.change.base_version == held[snapshot.service].version
                    assert event.change.version == snapshot.version
                held[snapshot.service] = snapshot

    trio.run(main)


def check(snapshot: ServiceSnapshot) -> None:
    assert snapshot.service in FOLLOWED
    for key, instance in snapshot.instances.items():
        assert key == instance.key
        assert str(ip_address(key.address)) == key.address
        assert 1 <= key.port <= 65_535
