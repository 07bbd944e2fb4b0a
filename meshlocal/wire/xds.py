"""xDS as this project speaks it: API v3, the aggregated stream, state of the world.

Sources: the xDS protocol as Envoy documents it; gRFCs A27 (what gRPC takes of it), A30 (v3), A39 (HTTP filters), A44
(retries), A50 (outlier detection). A service is a listener, a route, a cluster and an assignment of endpoints, all of
one name, `SERVICE` or `SERVICE:PORT_NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from google.protobuf.wrappers_pb2 import UInt32Value

from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import (
    MAX_LABEL_LENGTH,
    NODE,
    REGION,
    ZONE,
    Caller,
    HostPort,
    ModelError,
    ServiceKey,
    known,
    parse_service_key,
)
from meshlocal.policy.picker import Picker
from meshlocal.policy.steps import STEP, Steps
from meshlocal.wire.discovery_codec import caller_of
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.pb import envoy_cluster_pb2 as cluster_pb
from meshlocal.wire.pb import envoy_core_pb2 as core_pb
from meshlocal.wire.pb import envoy_discovery_pb2 as discovery_pb
from meshlocal.wire.pb import envoy_endpoint_pb2 as endpoint_pb
from meshlocal.wire.pb import envoy_http_connection_manager_pb2 as http_pb
from meshlocal.wire.pb import envoy_listener_pb2 as listener_pb
from meshlocal.wire.pb import envoy_previous_hosts_pb2 as previous_hosts_pb
from meshlocal.wire.pb import envoy_previous_priorities_pb2 as previous_priorities_pb
from meshlocal.wire.pb import envoy_route_pb2 as route_pb
from meshlocal.wire.pb import envoy_router_pb2 as router_pb
from meshlocal.wire.pb import envoy_type_pb2 as type_pb
from meshlocal.wire.pb import envoy_upstream_http_pb2 as upstream_http_pb

SERVICE_NAME = "envoy.service.discovery.v3.AggregatedDiscoveryService"

STREAM = Method(
    f"/{SERVICE_NAME}/StreamAggregatedResources",
    discovery_pb.DiscoveryRequest,
    discovery_pb.DiscoveryResponse,
    client_streaming=True,
    server_streaming=True,
)

TYPES_PREFIX = "type.googleapis.com/"

MOST_NAME = 512
"""Characters of a resource's name at most: twice what a service's and a port's take together."""

RETRIES = 3
"""Further attempts of a request: two in the first priority, two in those behind it."""

_PORT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,63}")
_UINT32 = (1 << 32) - 1
_SHARED = 1 << 15
"""Localities that are kept encoded: two of each of 10,000 instances, and some."""

_SHARED_PLACES = 8
"""Instances that one of them has at most."""

_PATIENCE = 5
"""How often an Envoy that is to retry on another host draws one before it takes what it has."""


class ResourceType(StrEnum):
    """The types of resources, in the order in which they are sent: what others refer to comes before them."""

    CLUSTER = "envoy.config.cluster.v3.Cluster"
    ENDPOINTS = "envoy.config.endpoint.v3.ClusterLoadAssignment"
    LISTENER = "envoy.config.listener.v3.Listener"
    ROUTE = "envoy.config.route.v3.RouteConfiguration"

    @property
    def url(self) -> str:
        """The type as requests and responses name it."""
        return TYPES_PREFIX + self.value

    @property
    def short(self) -> str:
        """The type without its package, for people."""
        return self.value.rpartition(".")[2]

    @property
    def whole(self) -> bool:
        """Whether each response has all resources of the type: what is missing in it does not exist."""
        return self in (ResourceType.CLUSTER, ResourceType.LISTENER)


class ResourceName(NamedTuple):
    """What the name of a resource stands for.

    Attributes:
        service: whose instances are meant.
        port_name: only those whose port has this name; None: any.
    """

    service: ServiceKey
    port_name: str | None = None


@lru_cache(maxsize=8192)
def parse_resource_name(text: str) -> ResourceName:
    """Read `SERVICE` or `SERVICE:PORT_NAME`.

    Raises:
        ModelError: it is neither.
    """
    service, colon, port_name = text.partition(":")
    if colon and not _PORT_NAME.fullmatch(port_name):
        raise ModelError("resource name", f"{text[:300]!r} is neither SERVICE nor SERVICE:PORT_NAME")
    try:
        return ResourceName(parse_service_key(service), port_name if colon else None)
    except ModelError as error:
        raise ModelError("resource name", error.what) from None


class Place(NamedTuple):
    """Who asks, and from where: what the `node` of a client's bootstrap says.

    Attributes:
        caller: as it is shown to people.
        locality: decides on the priorities.
        key: equal for places from which all services look alike.
    """

    caller: Caller
    locality: Locality
    key: bytes


def place_of(node: core_pb.Node, prefer: tuple[str, ...]) -> Place:
    """The place of a client.

    Its node is `locality.sub_zone`, or `metadata.node`; its zone `locality.zone`, or `metadata.zone`; other labels that
    it prefers are texts of `metadata` too. `metadata.prefer` (a list of labels, or one) and `metadata.within` stand for
    what a proxy's configuration calls so.

    Args:
        node: of its bootstrap.
        prefer: the labels that count where it has no `prefer`.

    Raises:
        ModelError: `prefer` or `within` is nothing of the kind, or a label is too long.
    """
    fields = node.metadata.fields
    within: str | None = None
    if "prefer" in fields:
        prefer = _labels(fields["prefer"])
    if "within" in fields:
        (within,) = _labels(fields["within"], most=1)
    given = {NODE: node.locality.sub_zone, ZONE: node.locality.zone, REGION: node.locality.region}
    labels: dict[str, str] = {}
    # What an Envoy has in its metadata beside is none of our business.
    for key in dict.fromkeys((NODE, ZONE, REGION, *prefer, *([within] if within is not None else []))):
        value = given.get(key) or (fields[key].string_value if key in fields else "")
        if len(key) + len(value) > MAX_LABEL_LENGTH:
            raise ModelError(f"node.metadata.{key[:64]}", f"is longer than {MAX_LABEL_LENGTH} characters")
        if value:
            labels[key] = value
    software = " ".join(filter(None, (node.user_agent_name, node.user_agent_version)))
    locality = Locality(labels, prefer, within)
    return Place(caller_of(node.id or node.cluster, locality.node, software), locality, _key(locality))


def _key(locality: Locality) -> bytes:
    """A digest of what of a place a `Selector` looks at."""
    within = locality.within
    own = tuple(map(locality.own, locality.prefer))
    looked_at = (locality.prefer, own, within, None if within is None else locality.own(within))
    return blake2b(repr(looked_at).encode(), digest_size=16).digest()


def _labels(value: Value, most: int = 16) -> tuple[str, ...]:
    key = "within" if most == 1 else "prefer"
    values = list(value.list_value.values) if value.WhichOneof("kind") == "list_value" else [value]
    names = tuple(dict.fromkeys(each.string_value for each in values))
    if not 1 <= len(values) <= most or not all(names):
        what = "the name of a label" if most == 1 else f"a list of 1 to {most} names of labels"
        raise ModelError(f"node.metadata.{key}", f"is not {what}")
    return names


def _packed(message: Message) -> Any:
    return Any(
        type_url=TYPES_PREFIX + message.DESCRIPTOR.full_name, value=message.SerializeToString(deterministic=True)
    )


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


_FROM_HERE = core_pb.ConfigSource(ads=core_pb.AggregatedConfigSource(), resource_api_version=core_pb.V3)


def listener(name: str) -> bytes:
    """What a channel to `xds:///NAME` begins with: it refers to the route of the same name."""
    manager = http_pb.HttpConnectionManager(
        stat_prefix=name,
        rds=http_pb.Rds(config_source=_FROM_HERE, route_config_name=name),
        http_filters=[http_pb.HttpFilter(name="router", typed_config=_packed(router_pb.Router()))],
    )
    message = listener_pb.Listener(name=name, api_listener=listener_pb.ApiListener(api_listener=_packed(manager)))
    return message.SerializeToString(deterministic=True)


def route(name: str) -> bytes:
    """Everything goes to the cluster of the same name, and is tried again where an instance was not available.

    gRPC tries again what ended with UNAVAILABLE before its answer began; which instance comes next is up to its
    priorities. An Envoy tries first another host of the same priority, then the priorities behind it.
    """
    retry = route_pb.RetryPolicy(
        retry_on="unavailable,connect-failure,refused-stream,reset-before-request",
        num_retries=UInt32Value(value=RETRIES),
        retry_priority=route_pb.RetryPolicy.RetryPriority(
            name="envoy.retry_priorities.previous_priorities",
            typed_config=_packed(previous_priorities_pb.PreviousPrioritiesConfig(update_frequency=2)),
        ),
        retry_host_predicate=[
            route_pb.RetryPolicy.RetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts",
                typed_config=_packed(previous_hosts_pb.PreviousHostsPredicate()),
            )
        ],
        host_selection_retry_max_attempts=_PATIENCE,
    )
    action = route_pb.RouteAction(cluster=name, timeout=Duration(), retry_policy=retry)
    host = route_pb.VirtualHost(
        name=name,
        domains=["*"],
        routes=[route_pb.Route(match=route_pb.RouteMatch(prefix=""), route=action)],
    )
    return route_pb.RouteConfiguration(name=name, virtual_hosts=[host]).SerializeToString(deterministic=True)


def cluster(name: str) -> bytes:
    """A service's instances, whatever the client speaks to them.

    An instance that cannot be connected is ejected as a proxy of ours would eject it (H1). Ejected ones are tried all
    the same where there are no others (O5), which is what a panic is.
    """
    ejection, attempts = EjectionConfig(), AttemptPolicy()
    any_number = UInt32Value(value=_UINT32)
    none = UInt32Value(value=0)
    always = UInt32Value(value=100)
    outlier = cluster_pb.OutlierDetection(
        interval=_duration(1),
        base_ejection_time=_duration(ejection.time),
        max_ejection_time=_duration(ejection.max_time),
        max_ejection_percent=always,
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=UInt32Value(value=ejection.failures or 0),
        enforcing_consecutive_local_origin_failure=always,
        # Any answer takes a live instance to give it, and how others do says nothing of one.
        enforcing_consecutive_5xx=none,
        enforcing_consecutive_gateway_failure=none,
        enforcing_success_rate=none,
        enforcing_local_origin_success_rate=none,
        enforcing_failure_percentage=none,
    )
    speaks = upstream_http_pb.HttpProtocolOptions(
        use_downstream_protocol_config=upstream_http_pb.HttpProtocolOptions.UseDownstreamHttpConfig(
            http_protocol_options=core_pb.Http1ProtocolOptions(), http2_protocol_options=core_pb.Http2ProtocolOptions()
        )
    )
    message = cluster_pb.Cluster(
        name=name,
        type=cluster_pb.Cluster.EDS,
        eds_cluster_config=cluster_pb.Cluster.EdsClusterConfig(eds_config=_FROM_HERE, service_name=name),
        connect_timeout=_duration(attempts.connect_timeout),
        lb_policy=cluster_pb.Cluster.ROUND_ROBIN,
        # A proxy of ours has no such limits unless it is told; the defaults here, of 3 retries among others, would fail
        # requests when a busy instance is gone.
        circuit_breakers=cluster_pb.CircuitBreakers(
            thresholds=[
                cluster_pb.CircuitBreakers.Thresholds(
                    max_connections=any_number,
                    max_pending_requests=any_number,
                    max_requests=any_number,
                    max_retries=any_number,
                )
            ]
        ),
        outlier_detection=outlier,
        common_lb_config=cluster_pb.Cluster.CommonLbConfig(healthy_panic_threshold=type_pb.Percent(value=1)),
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _packed(speaks)},
    )
    return message.SerializeToString(deterministic=True)


def assignment(name: str, picker: Picker) -> Steps[bytes]:
    """The instances that a client may use, in priorities: what a plan of a proxy at the same place goes through (O1).

    Each tier that has instances is a priority, then each with terminating ones (L4); there are no gaps. Within a
    priority, instances are grouped by their node, a locality, whose weight is their number. An address and port stands
    once.
    """
    # Encoded messages that stand one behind the other are one message, whose lists are theirs joined (Protocol Buffers,
    # "Last One Wins"). So what is the same for many clients is encoded once.
    parts = [endpoint_pb.ClusterLoadAssignment(cluster_name=name).SerializeToString()]
    seen: set[HostPort] = set()
    largest = priority = done = 0
    for group in picker.ranked():
        members: dict[tuple[str, str, str], list[HostPort]] = {}
        before = len(seen)
        for instance in group:
            done += 1
            if done % STEP == 0:
                yield
            place = instance.key[:2]
            # The zone of a scoped address (RFC 4007) is an interface of another host: clients reject it, or worse.
            if place not in seen and "%" not in place[0]:
                seen.add(place)
                label = instance.labels.get
                locality = (known(label(REGION)), known(label(ZONE)), known(label(NODE)))
                members.setdefault(locality, []).append(place)
        for locality, places in members.items():
            encode = _endpoints if len(places) <= _SHARED_PLACES else _endpoints.__wrapped__
            parts.append(encode(locality, tuple(places), priority))
        if members:
            priority += 1
            largest = max(largest, len(seen) - before)
    if largest:
        message = endpoint_pb.ClusterLoadAssignment()
        message.policy.overprovisioning_factor.value = overprovisioning(largest)
        parts.append(message.SerializeToString())
    return b"".join(parts)


@lru_cache(maxsize=_SHARED)
def _endpoints(locality: tuple[str, str, str], places: tuple[HostPort, ...], priority: int) -> bytes:
    """An assignment with one locality in it, encoded."""
    message = endpoint_pb.ClusterLoadAssignment()
    endpoints = message.endpoints.add(priority=priority)
    endpoints.locality.region, endpoints.locality.zone, endpoints.locality.sub_zone = locality
    for host, port in places:
        address = endpoints.lb_endpoints.add().endpoint.address.socket_address
        address.address, address.port_value = host, port
    endpoints.load_balancing_weight.value = len(places)
    return message.SerializeToString()


def overprovisioning(largest: int) -> int:
    """The factor, in per cent, with which one healthy instance of a priority takes all of its requests.

    An Envoy takes a priority for whole while its healthy instances times the factor, divided by all of them, is 100 or
    more; it multiplies in 32 bits, so that beyond 6,553 instances a part must be healthy.

    Args:
        largest: instances of the largest priority, 1 or more.
    """
    return min(100 * max(2, largest), _UINT32 // largest)


def no_endpoints(name: str) -> bytes:
    """The assignment of a service that has no instances, or that is not there for a client."""
    return endpoint_pb.ClusterLoadAssignment(cluster_name=name).SerializeToString()


def response(kind: ResourceType, version: str, nonce: str, resources: Iterable[bytes]) -> Steps[bytes]:
    """A response, encoded, in steps.

    Args:
        kind: of the resources.
        version: which the client names as the one that it has accepted.
        nonce: which its answer names.
        resources: encoded.
    """
    url = kind.url
    message = discovery_pb.DiscoveryResponse(version_info=version, type_url=url, nonce=nonce)
    for position, value in enumerate(resources):
        message.resources.add(type_url=url, value=value)
        if position % STEP == STEP - 1:
            yield
    return message.SerializeToString()


_BY_URL: Mapping[str, ResourceType] = {kind.url: kind for kind in ResourceType}


def kind_of(url: str) -> ResourceType | None:
    """The type that a request names; None: it is none that is served."""
    return _BY_URL.get(url)


def error_text(request: discovery_pb.DiscoveryRequest) -> str | None:
    """Why a client rejects the response that it answers; None if it accepts it."""
    return (request.error_detail.message or "it gave no reason") if request.HasField("error_detail") else None
