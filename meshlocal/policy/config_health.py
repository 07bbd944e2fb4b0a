"""The sections of the configuration for health, limits, return and spill (H1, H3, F2, F3)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from meshlocal.policy.config_types import AnyStatus, Count, Name, PortNumber, Seconds, Section


class EjectionConfig(Section, frozen=True):
    """When an instance on which requests fail is tried last of all, and for how long (H1)."""

    failures: Annotated[
        Count | None, Meta(description="Requests that fail on an instance in a row until it is ejected; null: never.")
    ] = 3
    time: Annotated[
        Seconds, Meta(description="Seconds of the first ejection; each further one is twice as long; before jitter.")
    ] = 5.0
    max_time: Annotated[Seconds, Meta(description="Seconds of an ejection at most, before jitter.")] = 60.0


class LimitsConfig(Section, frozen=True):
    """How much is taken on at once; what comes beyond is refused at once."""

    connections: Annotated[Count | None, Meta(description="Connections of clients, at most; null: no limit.")] = None
    requests: Annotated[
        Count | None,
        Meta(description="Requests under way, at most; a tcp connection is one request; null: no limit."),
    ] = None
    waiting: Annotated[
        Count | None, Meta(description="Requests that wait for an instance to be connected, at most; null: no limit.")
    ] = None


class BypassConfig(Section, frozen=True):
    """Connects to tcp listeners that go straight to an instance of this node, past the proxy (B1)."""

    cgroup: Annotated[
        Name | None,
        Meta(
            description="The folder of a cgroup of version 2, such as /sys/fs/cgroup/app.slice: the connects of its"
            " processes, and of those below it, are looked at; null: none are. It takes Linux 5.14, CAP_BPF and"
            " CAP_NET_ADMIN; where these are not, the proxy serves without, and says so."
        ),
    ] = None
    pin: Annotated[
        Name | None,
        Meta(
            description="A folder of a BPF file system, such as /sys/fs/bpf/meshlocal: the program stays there when the"
            " proxy ends, so that local traffic goes on while it restarts. null: it ends with the proxy."
        ),
    ] = None


class HealthCheckConfig(Section, frozen=True):
    """How the instances of a service are checked, whether or not there are requests (H3)."""

    kind: Annotated[
        Literal["tcp", "http", "grpc"],
        Meta(
            description="tcp: it can be connected; http: a GET is answered with the right status; grpc: grpc.health.v1"
            " says SERVING."
        ),
    ]
    interval: Annotated[Seconds, Meta(description="Seconds between checks of one instance, give or take a tenth.")] = (
        5.0
    )
    timeout: Annotated[Seconds, Meta(description="Seconds that a check may take.")] = 1.0
    failures: Annotated[
        Count, Meta(description="Checks that fail in a row until the instance is tried last of all.")
    ] = 3
    port: Annotated[PortNumber | None, Meta(description="The port to check; null: the instance's own.")] = None
    path: Annotated[Name, Meta(description="http: the target of the GET.")] = "/"
    host: Annotated[Name | None, Meta(description="http, grpc: the host to ask for; null: the address.")] = None
    status: Annotated[AnyStatus | None, Meta(description="http: the right status; null: any from 200 to 399.")] = None
    service: Annotated[
        Name | None, Meta(description="grpc: the service to ask about, by its full name; null: the whole server.")
    ] = None


class FailbackConfig(Section, frozen=True):
    """How tcp connections and HTTP/2 streams to other nodes end once the local tier is back, so that their clients come
    back (F2)."""

    after: Annotated[
        Seconds,
        Meta(description="Seconds for which the local tier must be fit first; up to half as much again by chance."),
    ] = 30.0
    interval: Annotated[
        Seconds, Meta(description="Seconds between two connections that are ended, give or take a half.")
    ] = 1.0
    quiet: Annotated[Seconds, Meta(description="Seconds for which a connection must have been silent to be ended.")] = (
        1.0
    )
