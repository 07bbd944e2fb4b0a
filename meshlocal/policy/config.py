"""The configuration: one schema, for the file, the environment and the flags alike.

Every field carries its description, its default and its range, so that the checks and the reference documentation come
from here alone. Times are seconds, as plain numbers. `meshlocal.policy.config_build` makes a `Config` out of plain
data and says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from meshlocal.policy.addresses import DiscoveryUrl, ListenAddress, SocketAddress
from meshlocal.policy.config_access import AdminAccessConfig, AllowConfig
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.config_health import BypassConfig, EjectionConfig, FailbackConfig, HealthCheckConfig, LimitsConfig
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.config_tls import TlsConfig, UpstreamTlsConfig
from meshlocal.policy.config_tracing import TracingConfig
from meshlocal.policy.config_types import (
    Bytes,
    Count,
    GrpcStatus,
    Microseconds,
    Name,
    Seconds,
    SecondsOrZero,
    Section,
    Status,
    Workers,
)
from meshlocal.policy.model import NODE, ServiceKey, is_fixed
from meshlocal.policy.protocols import HttpVersion
from meshlocal.policy.sources import SourceUrl

# Written once, for `proxy.attempts` and what a service does otherwise.
_ConnectTimeoutLocal = Annotated[Seconds, Meta(description="Seconds to connect to an instance of the first tier.")]
_ConnectTimeout = Annotated[Seconds, Meta(description="Seconds to connect to an instance of any other tier.")]
_Deadline = Annotated[
    Seconds, Meta(description="Seconds for all attempts of one request together, until one has connected.")
]
_MaxAttempts = Annotated[Count | None, Meta(description="Instances that one request tries at most; null: every one.")]
_FirstSnapshotWait = Annotated[
    SecondsOrZero,
    Meta(description="Seconds that a request waits for its service's first snapshot; 0: not at all."),
]
_IdleTimeout = Annotated[
    Seconds | None,
    Meta(description="Seconds without a byte either way after which a connection is closed; null: never."),
]
_AttemptTimeout = Annotated[
    Seconds | None,
    Meta(description="HTTP: seconds that one instance has until its response's head; null: response_deadline's."),
]
_ResponseDeadline = Annotated[
    Seconds, Meta(description="HTTP: seconds for all attempts of one request together, until a response's head.")
]
_RetryOn = Annotated[
    tuple[Status, ...],
    Meta(description="HTTP: statuses of an answer that is a failure, if the request may be sent again (A3)."),
]
_GrpcRetryOn = Annotated[
    tuple[GrpcStatus, ...],
    Meta(
        description="gRPC: statuses that are a failure, as a response without a message; to list one declares that such"
        " calls may be repeated (A3)."
    ),
]
_ReplayBuffer = Annotated[
    Bytes,
    Meta(
        description="Bytes held for another attempt. HTTP: of a request's body; a longer one has none. tcp: of what"
        " the client sent, with replay; at most 65536."
    ),
]
_Replay = Annotated[
    bool,
    Meta(
        description="tcp: what the client sent goes to another instance if the one that was connected fails before"
        " its first byte. Only for protocols that may say a thing twice (A5)."
    ),
]
_ReplayWait = Annotated[
    Seconds | None,
    Meta(
        description="tcp, with replay: seconds that an instance may be silent after the client's words; null: as"
        " long as its connection lasts."
    ),
]


class AttemptPolicy(Section, frozen=True):
    """How long and how often a request is tried (A1, A7, O5)."""

    connect_timeout_local: _ConnectTimeoutLocal = 0.25
    connect_timeout: _ConnectTimeout = 1.0
    deadline: _Deadline = 10.0
    max_attempts: _MaxAttempts = None
    first_snapshot_wait: _FirstSnapshotWait = 5.0
    idle_timeout: _IdleTimeout = 3600.0
    attempt_timeout: _AttemptTimeout = None
    response_deadline: _ResponseDeadline = 15.0
    retry_on: _RetryOn = (503,)
    grpc_retry_on: _GrpcRetryOn = ()
    replay_buffer: _ReplayBuffer = 65536
    replay: _Replay = False
    replay_wait: _ReplayWait = None


class AttemptOverrides(Section, frozen=True):
    """What one service does otherwise than `proxy.attempts`: the same keys, each optional."""

    connect_timeout_local: _ConnectTimeoutLocal | UnsetType = UNSET
    connect_timeout: _ConnectTimeout | UnsetType = UNSET
    deadline: _Deadline | UnsetType = UNSET
    max_attempts: _MaxAttempts | UnsetType = UNSET
    first_snapshot_wait: _FirstSnapshotWait | UnsetType = UNSET
    idle_timeout: _IdleTimeout | UnsetType = UNSET
    attempt_timeout: _AttemptTimeout | UnsetType = UNSET
    response_deadline: _ResponseDeadline | UnsetType = UNSET
    retry_on: _RetryOn | UnsetType = UNSET
    grpc_retry_on: _GrpcRetryOn | UnsetType = UNSET
    replay_buffer: _ReplayBuffer | UnsetType = UNSET
    replay: _Replay | UnsetType = UNSET
    replay_wait: _ReplayWait | UnsetType = UNSET

    def over(self, base: AttemptPolicy) -> AttemptPolicy:
        """The policy with these overrides in it."""
        own = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not UNSET}
        return msgspec.structs.replace(base, **own) if own else base


class ServiceConfig(Section, frozen=True):
    """What holds for one service only."""

    port_name: Annotated[
        Name | None, Meta(description="Only instances whose port has this name are used (L4); null: any.")
    ] = None
    protocol: Annotated[
        HttpVersion | None,
        Meta(
            description="What http listeners speak to its instances; null: HTTP/2 where a port's name or appProtocol"
            " says so, else what the client speaks."
        ),
    ] = None
    tls: Annotated[
        UpstreamTlsConfig | None,
        Meta(description="How its instances are spoken to over TLS; null: in plaintext."),
    ] = None
    attempts: Annotated[AttemptOverrides, Meta(description="What the service does otherwise than proxy.attempts.")] = (
        AttemptOverrides()
    )
    health_check: Annotated[
        HealthCheckConfig | None, Meta(description="How its instances are checked; null: not at all (H3).")
    ] = None
    limits: Annotated[LimitsConfig, Meta(description="How much of it is taken on at once.")] = LimitsConfig()
    failback: Annotated[
        FailbackConfig | None,
        Meta(
            description="How tcp connections and HTTP/2 streams to other nodes end once the local tier is back; null:"
            " they stay (F2)."
        ),
    ] = None
    spill: Annotated[
        Count | None,
        Meta(
            description="Requests under way from this proxy on one instance of the first tier, from which on more go to"
            " the next instance or tier while one is left (F3); null: no matter how many."
        ),
    ] = None


class DiscoveryClientConfig(Section, frozen=True):
    """Where the proxy's instances come from, and how it stays connected to there (D1)."""

    urls: Annotated[
        tuple[DiscoveryUrl, ...],
        Meta(
            description="Discovery servers (grpc://HOST:PORT, over TLS grpcs://, over WebSocket ws:// and wss://),"
            " tried in turn; or one instances file (file:PATH, a relative path from the working directory)."
        ),
    ] = ()
    connect_timeout: Annotated[Seconds, Meta(description="Seconds to connect to a discovery server.")] = 3.0
    keepalive_interval: Annotated[
        Seconds, Meta(description="Seconds of silence after which the connection is probed with a ping.")
    ] = 10.0
    keepalive_timeout: Annotated[
        Seconds, Meta(description="Seconds that a ping's answer may take before the connection is given up.")
    ] = 5.0
    backoff_initial: Annotated[Seconds, Meta(description="Seconds before the first reconnect, before jitter.")] = 0.2
    backoff_max: Annotated[
        Seconds, Meta(description="Seconds between reconnects at most; each is drawn from between nothing and that.")
    ] = 5.0
    ca_file: Annotated[
        Name | None,
        Meta(
            description="The authorities, in PEM, of which one must have signed the certificate of a grpcs:// or wss://"
            " server; null: those of the system."
        ),
    ] = None
    token_file: Annotated[
        Name | None,
        Meta(description="A file with the token that is sent to discovery servers, read for each connection."),
    ] = None
    allow_plaintext_tokens: Annotated[
        bool,
        Meta(description="Whether the token may go over plaintext (grpc://, ws://) to a server beyond this machine."),
    ] = False
    certificate_file: Annotated[
        Name | None,
        Meta(description="The certificate, in PEM, that grpcs:// and wss:// servers are shown; null: none."),
    ] = None
    key_file: Annotated[
        Name | None, Meta(description="The certificate's key, in PEM; null: it stands in certificate_file.")
    ] = None
    identity: Annotated[
        Name | None,
        Meta(
            description="The URI or DNS name that grpcs:// and wss:// servers must prove; null: the host of their URL."
        ),
    ] = None
    cache_file: Annotated[
        Name | None,
        Meta(
            description="A file that keeps the last snapshots over a restart, one for each proxy, in a directory that"
            " exists; null: none (D2)."
        ),
    ] = None


class DrainConfig(Section, frozen=True):
    """What happens between SIGTERM and the end (S1)."""

    delay: Annotated[
        SecondsOrZero, Meta(description="Seconds for which new connections are still taken, though not ready.")
    ] = 0.0
    timeout: Annotated[
        SecondsOrZero, Meta(description="Seconds that connections then have to end before they are cancelled.")
    ] = 30.0


class MetricsConfig(Section, frozen=True):
    """What /metrics tells beside what it always does."""

    instances: Annotated[
        bool,
        Meta(description="Counts of each instance, of 1,000 at most; the page and /services have them in any case."),
    ] = False


class ProxyConfig(Section, frozen=True):
    """The sidecar proxy."""

    node_name: Annotated[
        str | None,
        Meta(description="The node that the proxy runs on; else the environment's NODE_NAME; blank: unknown (L1)."),
    ] = None
    namespace: Annotated[
        str | None, Meta(description="The namespace that a bare service name belongs to; null: none.")
    ] = None
    labels: Annotated[
        Mapping[str, str], Meta(description="The proxy's own labels beside node, such as zone and cluster (L3).")
    ] = msgspec.field(default_factory=dict)
    prefer: Annotated[
        tuple[Name, ...],
        Meta(description="Label keys in order of preference: instances that share the first one's value come first."),
    ] = (NODE,)
    within: Annotated[
        Name | None,
        Meta(description="A label key: instances that do not share the proxy's value are never used (L6); null: off."),
    ] = None
    bypass: Annotated[
        BypassConfig, Meta(description="Healthy connects to instances of this node that pass the proxy by.")
    ] = BypassConfig()
    discovery: Annotated[DiscoveryClientConfig, Meta(description="Where instances come from.")] = (
        DiscoveryClientConfig()
    )
    listen: Annotated[
        tuple[ListenAddress, ...],
        Meta(
            description="Listeners: tcp://HOST:PORT=SERVICE, http://HOST:PORT=SERVICE, or http://HOST:PORT, which"
            " routes by host; over TLS tls:// and https://. With @ADDRESS:PORT for SERVICE, all goes to that address;"
            " with unix:PATH for HOST:PORT, it is a Unix socket."
            " Port 0: any free one. An IPv6 address in brackets."
        ),
    ] = ()
    socket_folder: Annotated[
        str | None,
        Meta(
            description="The folder in which instances of this node have Unix sockets: what their label socket names"
            " there is connected to instead of their port, where it can be. null: none is."
        ),
    ] = None
    admin: Annotated[
        SocketAddress | None, Meta(description="Where metrics and health are served, HOST:PORT; none: nowhere.")
    ] = SocketAddress("127.0.0.1", 15000)
    admin_access: Annotated[AdminAccessConfig, Meta(description="Who may read those pages.")] = AdminAccessConfig()
    metrics: Annotated[MetricsConfig, Meta(description="What /metrics tells beside.")] = MetricsConfig()
    workers: Annotated[
        Workers,
        Meta(
            description="Processes that share the listeners, for machines with cores to spare; each picks, counts"
            " limits and watches discovery on its own. 1: one process, with no other above it."
        ),
    ] = 1
    busy_poll: Annotated[
        Microseconds,
        Meta(
            description="Microseconds that the proxy looks for more to do before it sleeps, where something came as"
            " soon as that before; 0: it sleeps at once."
        ),
    ] = 80
    attempts: Annotated[AttemptPolicy, Meta(description="How long and how often a request is tried.")] = AttemptPolicy()
    services: Annotated[
        Mapping[ServiceKey, ServiceConfig], Meta(description="What holds for single services only, by their name.")
    ] = msgspec.field(default_factory=dict)
    ejection: Annotated[
        EjectionConfig, Meta(description="When an instance is tried last of all, and for how long (H1).")
    ] = EjectionConfig()
    limits: Annotated[LimitsConfig, Meta(description="How much the whole proxy takes on at once.")] = LimitsConfig()
    http: Annotated[HttpConfig, Meta(description="What holds for http listeners.")] = HttpConfig()
    tls: Annotated[TlsConfig, Meta(description="The proxy's certificate, and whom tls and https listeners let in.")] = (
        TlsConfig()
    )
    tracing: Annotated[TracingConfig, Meta(description="Traces of HTTP requests.")] = TracingConfig()
    access_log: Annotated[
        bool, Meta(description="One log line for each connection (tcp) or request (http), at its end.")
    ] = False
    drain: Annotated[DrainConfig, Meta(description="How the proxy stops.")] = DrainConfig()

    def service_key(self, name: ServiceKey) -> ServiceKey:
        """The registry's name of a service: with `namespace` set, a name without a dot belongs to that namespace."""
        if not self.namespace or "." in name or is_fixed(name):
            return name
        return ServiceKey(f"{name}.{self.namespace}")

    def service(self, key: ServiceKey) -> ServiceConfig:
        """What holds for the service. With `namespace` set, `b` and `b.NAMESPACE` are one service."""
        found = self.services.get(key)
        if found is None and self.namespace:
            suffix = f".{self.namespace}"
            bare = key.removesuffix(suffix) if key.endswith(suffix) else key + suffix
            found = self.services.get(ServiceKey(bare))
        return found if found is not None else ServiceConfig()

    def attempts_for(self, service: ServiceKey) -> AttemptPolicy:
        """The whole policy of one service: `attempts`, with the service's own overrides."""
        return self.service(service).attempts.over(self.attempts)


class DiscoveryServerConfig(Section, frozen=True):
    """The discovery server."""

    bind: Annotated[
        tuple[SocketAddress, ...], Meta(description="Where it listens, HOST:PORT; port 0: any free one.")
    ] = (SocketAddress("127.0.0.1", 7070),)
    websocket_bind: Annotated[
        tuple[SocketAddress, ...], Meta(description="Where it serves WebSocket, HOST:PORT; none: nowhere.")
    ] = ()
    xds_bind: Annotated[
        tuple[SocketAddress, ...],
        Meta(description="Where it serves xDS, to gRPC clients and Envoys without a proxy, HOST:PORT; none: nowhere."),
    ] = ()
    xds_prefer: Annotated[
        tuple[Name, ...],
        Meta(
            description="Labels by which instances are near to a client of xDS, nearest first, such as [node, zone]. A"
            " client's own metadata.prefer wins."
        ),
    ] = (NODE,)
    websocket_origins: Annotated[
        tuple[Name, ...],
        Meta(
            description="Origins of web pages that may connect by WebSocket, such as https://ops.example; those of the"
            " server's own host may in any case."
        ),
    ] = ()
    tls_certificate_file: Annotated[
        Name | None,
        Meta(
            description="Certificates in PEM, with which gRPC and WebSocket are served over TLS; null: without TLS."
            " It is read again when it changes, and so are the other files here."
        ),
    ] = None
    tls_key_file: Annotated[
        Name | None, Meta(description="The certificate's key, in PEM; null: it stands in tls_certificate_file.")
    ] = None
    tls_workload_api: Annotated[
        Name | None,
        Meta(
            description="The socket of a SPIFFE agent, such as unix:///run/spire/agent.sock, which gives the"
            " certificate and the clients' authorities in place of files; null: none."
        ),
    ] = None
    tls_client_ca_file: Annotated[
        Name | None,
        Meta(
            description="The authorities, in PEM, of which one must have signed a client's certificate; null: clients"
            " are not asked for one."
        ),
    ] = None
    tokens_file: Annotated[
        Name | None,
        Meta(
            description="Tokens, one a line, of which clients without a certificate must send one; behind a token and"
            " a comma may stand a name for allow. null: none."
        ),
    ] = None
    allow: Annotated[
        tuple[AllowConfig, ...],
        Meta(description="Who may see which services; empty: whoever is let in sees all of them."),
    ] = ()
    sources: Annotated[
        tuple[SourceUrl, ...],
        Meta(
            description="Registries: file:PATH (an instances file; a relative path from the working directory),"
            " etcd://HOST:PORT/PREFIX (several members: separated by commas), dns:NAME?service=SERVICE,"
            " meshlocal:grpc://HOST:PORT (another discovery server; several that know the same: separated by commas),"
            " or kubernetes: (a cluster; kubernetes:?namespace=a&selector=app%3Db and more)."
        ),
    ] = ()
    zone: Annotated[str | None, Meta(description="The label zone of instances that come without one; null: none.")] = (
        None
    )
    cluster: Annotated[
        str | None, Meta(description="The label cluster of instances that come without one; null: none.")
    ] = None
    admin: Annotated[
        SocketAddress | None, Meta(description="Where metrics and health are served, HOST:PORT; none: nowhere.")
    ] = None
    admin_access: Annotated[AdminAccessConfig, Meta(description="Who may read those pages.")] = AdminAccessConfig()
    heartbeat_interval: Annotated[
        Seconds, Meta(description="Seconds of silence on a watch after which a heartbeat is sent.")
    ] = 10.0
    keepalive_interval: Annotated[
        Seconds, Meta(description="Seconds of silence after which a connection is probed with a ping.")
    ] = 30.0
    keepalive_timeout: Annotated[
        Seconds, Meta(description="Seconds that a ping's answer may take before the connection is given up.")
    ] = 10.0
    limits: Annotated[
        ServerLimitsConfig, Meta(description="How much the server takes on, of all clients and of each.")
    ] = ServerLimitsConfig()
    drain: Annotated[DrainConfig, Meta(description="How the server stops.")] = DrainConfig()

    @property
    def is_tls(self) -> bool:
        """Whether it is served over TLS."""
        return self.tls_certificate_file is not None or self.tls_workload_api is not None

    @property
    def asks(self) -> bool:
        """Whether callers must prove who they are."""
        files = (self.tokens_file, self.tls_client_ca_file, self.tls_workload_api)
        return any(file is not None for file in files)


class LogConfig(Section, frozen=True):
    """What is logged, to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least severe level that is logged.")
    ] = "info"
    format: Annotated[
        Literal["auto", "text", "json"], Meta(description="auto: text on a terminal, JSON elsewhere.")
    ] = "auto"
    levels: Annotated[
        Mapping[str, Literal["debug", "info", "warning", "error"]],
        Meta(
            description="Other levels for single loggers, by name: `meshlocal.client` and all below it, or a library's."
            " What libraries say at debug may hold secrets."
        ),
    ] = {}


class Config(Section, frozen=True):
    """Everything that can be configured."""

    proxy: Annotated[ProxyConfig, Meta(description="The sidecar proxy.")] = ProxyConfig()
    discovery: Annotated[DiscoveryServerConfig, Meta(description="The discovery server.")] = DiscoveryServerConfig()
    log: Annotated[LogConfig, Meta(description="Logging.")] = LogConfig()


def resolve_node_name(configured: str | None, environment: Mapping[str, str]) -> str:
    """The proxy's node: the configured name, else the environment's NODE_NAME, else unknown, the empty string (L1).

    Blank is unknown: a configured blank is as good as none.
    """
    return (configured or "").strip() or environment.get("NODE_NAME", "").strip()
