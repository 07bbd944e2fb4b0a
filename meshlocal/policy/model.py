"""What is known of services: instances, and immutable snapshots of them.

Every value here is immutable. A change of a service makes a new
`ServiceSnapshot` that shares the instances it did not touch; who holds the old
one goes on reading a consistent state.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple, NewType, TypeAlias

import msgspec

ServiceKey = NewType("ServiceKey", str)
"""A service's name as its registry gives it: `b`, or `b.namespace`."""

NODE = "node"
ZONE = "zone"
REGION = "region"
CLUSTER = "cluster"
NAMESPACE = "namespace"
REGISTRY = "registry"
SERVICE = "service"
SOCKET = "socket"

MAX_LABELS = 64
MAX_LABEL_LENGTH = 1024
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_PLAIN_IPV4 = re.compile(rf"(?:[1-9]|[1-9][0-9]|1[0-9][0-9]|2[01][0-9]|22[0-3])(?:\.{_OCTET}){{3}}")
"""Addresses of 1.0.0.0 to 223.255.255.255, spelled as they are compared: nearly all there are."""

_SERVICE_KEY = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")


class Caller(NamedTuple):
    """Who asks discovery, in its own words.

    Attributes:
        name: of the proxy or application.
        node: that it runs on; empty if it does not know.
        software: what it is, and its version.
    """

    name: str = ""
    node: str = ""
    software: str = ""


class ModelError(ValueError):
    """A value that no registry may publish. `where` names the field, `what` says why."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


def parse_service_key(text: str) -> ServiceKey:
    """Check a service's name.

    Raises:
        ModelError: it is empty, longer than 253 characters, or has others than letters, digits, `.`, `-` and `_`.
    """
    if not _SERVICE_KEY.fullmatch(text):
        what = "is empty" if not text else f"{text!r} is no service name (letters, digits, '.', '-', '_'; at most 253)"
        raise ModelError("service", what)
    return ServiceKey(text)


FIXED = "@"
"""How the name of what is no service begins: one fixed address, of which no registry is asked."""


def is_fixed(key: ServiceKey) -> bool:
    """Whether it stands for one fixed address."""
    return key.startswith(FIXED)


HostPort: TypeAlias = tuple[str, int]
"""An instance's address and port: what a connection leads to, and what is remembered of an instance goes by."""


class EndpointKey(NamedTuple):
    """What makes an instance itself, across updates of its labels and conditions. Its order is a tier's order."""

    address: str
    port: int
    port_name: str
    protocol: str

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


class Conditions(msgspec.Struct, frozen=True, gc=False):
    """A registry's word on an instance's fitness, with the meaning of EndpointSlice conditions."""

    ready: bool = True
    serving: bool = True
    terminating: bool = False


READY = Conditions()


class Instance(msgspec.Struct, frozen=True, gc=False):
    """One running copy of a service: where it listens, and its labels.

    Build it with `make_instance`, which checks every field; `labels` must not be changed afterwards.
    """

    # No part of it can refer back to it, so that the garbage collector, whose pauses stop all traffic, need not look.

    key: EndpointKey
    labels: Mapping[str, str]
    conditions: Conditions = READY

    @property
    def node(self) -> str:
        """The node that it runs on; empty if unknown (L2)."""
        return known(self.labels.get(NODE))

    @property
    def is_ipv6(self) -> bool:
        """Whether its address is of the IPv6 family."""
        return ":" in self.key.address


def known(label: str | None) -> str:
    """A label's value with missing and blank both as the empty string: unknown (L1, L2)."""
    return label.strip() if label is not None else ""


def make_instance(
    address: str,
    port: int,
    port_name: str = "",
    labels: Mapping[str, str] | None = None,
    conditions: Conditions = READY,
    protocol: str = "tcp",
) -> Instance:
    """Check and build an instance.

    Raises:
        ModelError: the address is no IPv4 or IPv6 address, the port is not within 1 to 65535, or a label is too long.
    """
    if not _PLAIN_IPV4.fullmatch(address):
        address = _canonical(address)
    if not 1 <= port <= 65535:
        raise ModelError("port", f"{port} is not within 1 to 65535")
    labels = dict(labels) if labels else {}
    if len(labels) > MAX_LABELS:
        raise ModelError("labels", f"{len(labels)} of them; at most {MAX_LABELS}")
    for name, value in labels.items():
        if not name or len(name) + len(value) > MAX_LABEL_LENGTH:
            raise ModelError(f"labels.{name[:64]}", f"empty name, or longer than {MAX_LABEL_LENGTH} characters")
    return Instance(EndpointKey(address, port, port_name, protocol or "tcp"), labels, conditions)


def _canonical(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        what = "is empty" if not address.strip() else f"{address!r} is neither an IPv4 nor an IPv6 address"
        raise ModelError("address", what) from None
    if parsed.is_unspecified or parsed.is_multicast:
        raise ModelError("address", f"{address!r} is no address of an instance")
    return str(parsed)


class ServiceSnapshot(msgspec.Struct, frozen=True):
    """All instances of one service at one moment.

    Attributes:
        service: the service that the instances are of.
        version: opaque; equal versions of a service mean equal instances.
        instances: by key, in no particular order; must not be changed.
        unknown: no registry knows the service (its instances are then none).
    """

    service: ServiceKey
    version: str
    instances: Mapping[EndpointKey, Instance]
    unknown: bool = False


class ServiceChange(msgspec.Struct, frozen=True):
    """What turns the snapshot of `base_version` into that of `version`."""

    service: ServiceKey
    base_version: str
    version: str
    upserted: tuple[Instance, ...]
    removed: tuple[EndpointKey, ...]
    unknown: bool = False

    def __bool__(self) -> bool:
        """Whether it changes anything but the version."""
        return bool(self.upserted or self.removed)


def index(instances: Iterable[Instance]) -> dict[EndpointKey, Instance]:
    """Instances by key. Of several with one key the first stays."""
    by_key: dict[EndpointKey, Instance] = {}
    for instance in instances:
        by_key.setdefault(instance.key, instance)
    return by_key


def diff(old: ServiceSnapshot | None, new: ServiceSnapshot) -> ServiceChange:
    """The change from one snapshot of a service to another; from None, from nothing.

    Costs one pass over both. Instances that the snapshots share are told by identity first.
    """
    before: Mapping[EndpointKey, Instance] = old.instances if old is not None else {}
    after = new.instances
    get = before.get
    upserted = tuple(
        instance for key, instance in after.items() if (was := get(key)) is not instance and was != instance
    )
    # How many are missing follows from the sizes: the pass over them ends with the last, and is mostly spared.
    missing = len(before) + sum(instance.key not in before for instance in upserted) - len(after)
    removed = tuple(islice((key for key in before if key not in after), missing))
    return ServiceChange(
        new.service, old.version if old is not None else "", new.version, upserted, removed, new.unknown
    )


class BaseMismatchError(ValueError):
    """A change was applied to another snapshot than the one it was made from (D1: never a mix of the two)."""


def apply(base: ServiceSnapshot, change: ServiceChange) -> ServiceSnapshot:
    """The snapshot that a change leads to.

    Raises:
        BaseMismatchError: the change is of another service or starts from another version.
    """
    if change.service != base.service or change.base_version != base.version:
        raise BaseMismatchError(
            f"a change of {change.service} from version {change.base_version!r} does not fit"
            f" {base.service} at version {base.version!r}"
        )
    instances = dict(base.instances)
    for key in change.removed:
        instances.pop(key, None)
    for instance in change.upserted:
        instances[instance.key] = instance
    return ServiceSnapshot(base.service, change.version, instances, change.unknown)
