"""The discovery interface's messages: both ways, and compatible with the interface's first version."""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy import model
from meshlocal.policy.model import Conditions, Instance, ServiceChange, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.wire.discovery_codec import (
    change_event,
    change_from_message,
    instance_from_message,
    instance_to_message,
    snapshot_event,
    snapshot_from_message,
)
from meshlocal.wire.pb import discovery_pb2 as pb

B = ServiceKey("b")


def _usable(address: str) -> bool:
    try:
        make_instance(address, 1)
    except model.ModelError:
        return False
    return True


instances = st.builds(
    make_instance,
    st.ip_addresses().map(str).filter(_usable),
    st.integers(1, 65535),
    st.text(max_size=8),
    st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8), max_size=4),
    st.builds(Conditions, st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(["tcp", "udp", "sctp"]),
)


def refuse(service: ServiceKey, error: model.ModelError) -> None:
    raise AssertionError(error)


@given(instances)
def test_an_instance_survives_the_wire(instance: Instance) -> None:
    """What one side sends is what the other one has."""
    sent = instance_to_message(instance).SerializeToString()
    assert instance_from_message(pb.Instance.FromString(sent)) == instance


@given(st.lists(instances, max_size=4), st.lists(instances, max_size=4), st.booleans())
def test_snapshots_and_changes_survive_the_wire(some: list[Instance], others: list[Instance], unknown: bool) -> None:
    """So with the events that carry them."""
    snapshot = ServiceSnapshot(B, "1", model.index(some), unknown)
    event = pb.WatchInstancesResponse.FromString(snapshot_event(snapshot).SerializeToString())
    assert snapshot_from_message(event.snapshot, refuse) == snapshot
    upserted = model.index(some)
    removed = tuple(key for key in model.index(others) if key not in upserted)
    change = ServiceChange(B, "1", "2", tuple(upserted.values()), removed)
    event = pb.WatchInstancesResponse.FromString(change_event(change).SerializeToString())
    assert change_from_message(event.change, refuse) == change


def test_conditions_that_are_absent_mean_fit() -> None:
    """A registry that says nothing of an instance's fitness means that it is fit, as with EndpointSlices."""
    message = pb.Instance(endpoint=pb.NetworkEndpoint(address="10.0.0.1", port=1), conditions=pb.Conditions())
    assert instance_from_message(message).conditions == Conditions(ready=True, serving=True, terminating=False)


def _first_version() -> type:
    """Instance as the interface began: endpoint = 1, labels = 2; address = 1, int64 port = 2, port_name = 3."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="first.proto", package="first", syntax="proto3")
    endpoint = file.message_type.add(name="NetworkEndpoint")
    for number, (name, kind) in enumerate(
        [("address", kinds.TYPE_STRING), ("port", kinds.TYPE_INT64), ("port_name", kinds.TYPE_STRING)], start=1
    ):
        endpoint.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    labels = file.message_type.add(name="Labels")
    entry = labels.nested_type.add(name="LabelsEntry")
    entry.options.map_entry = True
    for number, name in ((1, "key"), (2, "value")):
        entry.field.add(name=name, number=number, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    labels.field.add(
        name="labels",
        number=1,
        type=kinds.TYPE_MESSAGE,
        type_name=".first.Labels.LabelsEntry",
        label=kinds.LABEL_REPEATED,
    )
    instance = file.message_type.add(name="Instance")
    for number, (name, of) in enumerate([("endpoint", "NetworkEndpoint"), ("labels", "Labels")], start=1):
        instance.field.add(
            name=name, number=number, type=kinds.TYPE_MESSAGE, type_name=f".first.{of}", label=kinds.LABEL_OPTIONAL
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("first.Instance"))


def test_wire_compatible_with_the_first_version() -> None:
    """Messages of the interface's first version parse as ours, and ours as its."""
    first = _first_version()
    instance = make_instance("10.0.1.10", 9000, "grpc", {"node": "n1", "zone": "z1"})
    theirs = first.FromString(instance_to_message(instance).SerializeToString())  # type: ignore[attr-defined]  # made at run time
    assert (theirs.endpoint.address, theirs.endpoint.port, theirs.endpoint.port_name) == ("10.0.1.10", 9000, "grpc")
    assert dict(theirs.labels.labels) == {"node": "n1", "zone": "z1"}
    assert instance_from_message(pb.Instance.FromString(theirs.SerializeToString())) == instance
