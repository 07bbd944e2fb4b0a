"""What is read of the Kubernetes API's JSON; everything else in it is skipped without being built.

Field names and meanings are those of the API reference: discovery.k8s.io/v1 EndpointSlice, v1 Endpoints, v1 Node
(its metadata only, meta.k8s.io/v1 PartialObjectMetadata), meta/v1 ListMeta, Status and WatchEvent. The API writes
empty lists as null, or leaves them out.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

_Text = Annotated[str, Meta(max_length=1024)]


class _Object(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """A JSON object of the API."""


class ListMeta(_Object, frozen=True):
    """A list's or bookmark's metadata."""

    resource_version: str = ""
    continue_token: str = field(default="", name="continue")


class ObjectList(_Object, frozen=True):
    """A list, its items still encoded: one that cannot be read must not spoil the others."""

    metadata: ListMeta = ListMeta()
    items: list[msgspec.Raw] | None = None


class WatchEvent(_Object, frozen=True):
    """One line of a watch."""

    type: str
    object: msgspec.Raw


class StatusDetails(_Object, frozen=True):
    """What a Status adds for machines."""

    retry_after_seconds: float | None = None


class Status(_Object, frozen=True):
    """The API's word on a request that failed."""

    message: str = ""
    reason: str = ""
    code: int = 0
    metadata: ListMeta = ListMeta()
    details: StatusDetails | None = None


class Identity(_Object, frozen=True):
    """What tells an object from all others of its resource, and its state from earlier ones."""

    name: str
    namespace: str = ""
    resource_version: str = ""


class AnyObject(_Object, frozen=True):
    """Any object, for those that can be read no further."""

    metadata: Identity


class SliceLabels(_Object, frozen=True):
    """The label by which a slice names its service."""

    service: str = field(default="", name="kubernetes.io/service-name")


class SliceMeta(Identity, frozen=True):
    """An EndpointSlice's metadata."""

    labels: SliceLabels | None = None


class SliceConditions(_Object, frozen=True):
    """Each of them may be unknown."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Topology(_Object, frozen=True):
    """Where a node or endpoint stands."""

    zone: _Text = field(default="", name="topology.kubernetes.io/zone")
    region: _Text = field(default="", name="topology.kubernetes.io/region")


class Endpoint(_Object, frozen=True):
    """One endpoint of a slice."""

    addresses: tuple[str, ...]
    conditions: SliceConditions | None = None
    node_name: _Text | None = None
    zone: _Text | None = None
    deprecated_topology: Topology | None = None


class Port(_Object, frozen=True):
    """A port that each endpoint of a slice has."""

    port: int | None = None
    name: _Text | None = None
    protocol: str | None = None
    app_protocol: _Text | None = None


class EndpointSlice(_Object, frozen=True):
    """discovery.k8s.io/v1 EndpointSlice."""

    metadata: SliceMeta
    address_type: str
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[Port, ...] | None = None


class EndpointsAnnotations(_Object, frozen=True):
    """Annotations that change what an Endpoints object means."""

    over_capacity: str = field(default="", name="endpoints.kubernetes.io/over-capacity")
    leader: str | None = field(default=None, name="control-plane.alpha.kubernetes.io/leader")


class EndpointsMeta(Identity, frozen=True):
    """An Endpoints object's metadata."""

    annotations: EndpointsAnnotations | None = None


class EndpointsAddress(_Object, frozen=True):
    """An address of a subset."""

    ip: str
    node_name: _Text | None = None


class EndpointsSubset(_Object, frozen=True):
    """Addresses that have the same ports."""

    addresses: tuple[EndpointsAddress, ...] | None = None
    not_ready_addresses: tuple[EndpointsAddress, ...] | None = None
    ports: tuple[Port, ...] | None = None


class Endpoints(_Object, frozen=True):
    """v1 Endpoints."""

    metadata: EndpointsMeta
    subsets: tuple[EndpointsSubset, ...] | None = None


class NodeMeta(Identity, frozen=True):
    """A Node's metadata."""

    labels: Topology | None = None


class Node(_Object, frozen=True):
    """A Node, of which only the metadata is asked for."""

    metadata: NodeMeta


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the decoders raise: at what is no JSON, other JSON than expected, no UTF-8, or nested without measure."""

decode_list = msgspec.json.Decoder(ObjectList).decode
decode_event = msgspec.json.Decoder(WatchEvent).decode
decode_status = msgspec.json.Decoder(Status).decode
decode_any = msgspec.json.Decoder(AnyObject).decode
decode_slice = msgspec.json.Decoder(EndpointSlice).decode
decode_endpoints = msgspec.json.Decoder(Endpoints).decode
decode_node = msgspec.json.Decoder(Node).decode


class Bookmark(_Object, frozen=True):
    """The object of a BOOKMARK event: only its version means anything."""

    metadata: ListMeta


decode_bookmark = msgspec.json.Decoder(Bookmark).decode


def encode(value: Any) -> bytes:
    """Encode plain data as JSON."""
    return msgspec.json.encode(value)
