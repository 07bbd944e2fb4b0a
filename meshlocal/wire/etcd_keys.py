"""Instances as they stand in etcd: keys `PREFIX/SERVICE/INSTANCE`, and what they hold.

A value is an instance as JSON, as it stands in an instances file (`meshlocal.wire.instances_file`), or a
`meshlocal.discovery.v1.Instance` in protobuf's encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from google.protobuf.message import DecodeError

from meshlocal.policy.model import (
    CLUSTER,
    REGISTRY,
    SERVICE,
    ZONE,
    Instance,
    ModelError,
    ServiceKey,
    make_instance,
    parse_service_key,
)
from meshlocal.policy.problems import Problem
from meshlocal.wire.discovery_codec import instance_from_message
from meshlocal.wire.instances_file import InstancesFileError, parse_instance
from meshlocal.wire.pb import discovery_pb2 as pb

REGISTRY_NAME = "etcd"


class EtcdKeyError(ValueError):
    """A key or a value that is no instance's. The text says why, and names the key."""


class InstanceKey(NamedTuple):
    """What a key says.

    Attributes:
        service: whose instance it is.
        name: which of them; what it is called is its own affair.
    """

    service: ServiceKey
    name: str


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """The first key behind a prefix and its slash, and the first that is not (etcd, "range_end")."""
    first = prefix.encode() + b"/"
    return first, first[:-1] + bytes([first[-1] + 1])


def instance_key(prefix: str, service: ServiceKey, name: str) -> bytes:
    """The key of an instance."""
    return f"{prefix}/{service}/{name}".encode()


def parse_key(key: bytes, prefix: str) -> InstanceKey:
    """Read a key behind the prefix.

    Raises:
        EtcdKeyError: it is no instance's.
    """
    shown = key.decode("utf-8", "backslashreplace")
    service, slash, name = shown[len(prefix) + 1 :].partition("/")
    if not slash or not name or "/" in name:
        raise EtcdKeyError(f"{shown}: is no key of an instance: expected {prefix}/SERVICE/INSTANCE")
    try:
        return InstanceKey(parse_service_key(service), name)
    except ModelError as error:
        raise EtcdKeyError(f"{shown}: {error.what}") from None


def parse_value(value: bytes, key: bytes, service: ServiceKey, defaults: Mapping[str, str]) -> Instance:
    """Read what a key holds.

    Args:
        value: as it stands in etcd.
        key: for messages.
        service: whose instance it is.
        defaults: `zone` and `cluster` of an instance that says nothing of them; those that are empty are none.

    Raises:
        EtcdKeyError: it is no instance.
    """
    shown = key.decode("utf-8", "backslashreplace")
    added = {name: defaults[name] for name in (ZONE, CLUSTER) if defaults.get(name)}
    added |= {SERVICE: service, REGISTRY: REGISTRY_NAME}
    if value.lstrip()[:1] == b"{":
        try:
            return parse_instance(value, shown, added)
        except InstancesFileError as error:
            raise EtcdKeyError("; ".join(str(problem) for problem in error.problems)) from None
    try:
        message = pb.Instance.FromString(value)
    except DecodeError:
        raise EtcdKeyError(f"{shown}: holds neither JSON nor a protobuf Instance") from None
    try:
        found = instance_from_message(message)
        key_of = found.key
        labels = {**added, **found.labels, SERVICE: service, REGISTRY: REGISTRY_NAME}
        return make_instance(key_of.address, key_of.port, key_of.port_name, labels, found.conditions, key_of.protocol)
    except ModelError as error:
        raise EtcdKeyError(str(Problem(error.where, error.what, shown))) from None
