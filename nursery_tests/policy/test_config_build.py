"""Layers become a configuration, or a list of what is wrong with them."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.addresses import CollectorUrl, DiscoveryUrl, ListenAddress, SocketAddress
from meshlocal.policy.config import (
    AttemptOverrides,
    AttemptPolicy,
    Config,
    DiscoveryClientConfig,
    DiscoveryServerConfig,
    DrainConfig,
    LogConfig,
    MetricsConfig,
    ProxyConfig,
    ServiceConfig,
)
from meshlocal.policy.config_access import AdminAccessConfig, AllowConfig
from meshlocal.policy.config_build import ConfigError, Layer, Role, build_config, kind_of, known_keys
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.config_health import BypassConfig, EjectionConfig, LimitsConfig
from meshlocal.policy.config_http import Http2Config, HttpConfig, RouteConfig
from meshlocal.policy.config_tls import TlsConfig, UpstreamTlsConfig
from meshlocal.policy.config_tracing import TracingConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.policy.sources import FileOptions, SourceUrl

LISTENERS = "expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https)"

FULL: dict[str, Any] = {
    "proxy": {
        "node_name": "n1",
        "namespace": "default",
        "labels": {"zone": "z1"},
        "prefer": ["node", "zone"],
        "socket_folder": "/run/services",
        "bypass": {"cgroup": "/sys/fs/cgroup/app.slice", "pin": "/sys/fs/bpf/meshlocal"},
        "within": "zone",
        "discovery": {
            "urls": ["grpc://127.0.0.1:7070", "grpc://discovery:7070"],
            "connect_timeout": 1,
            "keepalive_interval": 2,
            "keepalive_timeout": 3,
            "backoff_initial": 0.5,
            "backoff_max": 6,
            "ca_file": "/etc/ca.pem",
            "token_file": "/run/token",
            "allow_plaintext_tokens": True,
            "certificate_file": "client.pem",
            "key_file": "client.key",
            "identity": "spiffe://td/discovery",
            "cache_file": "/var/lib/meshlocal/snapshots",
        },
        "listen": ["tcp://127.0.0.1:15001=b", "tcp://[::1]:0=c", "tcp://[::1]:0=d"],
        "admin": "localhost:15000",
        "admin_access": {
            "names": ["ops.example"],
            "token_file": "admin.token",
            "certificate_file": "admin.pem",
            "key_file": "admin.key",
        },
        "attempts": {
            "connect_timeout_local": 0.1,
            "connect_timeout": 2,
            "deadline": 20,
            "max_attempts": 3,
            "first_snapshot_wait": 0,
            "idle_timeout": None,
            "attempt_timeout": 2,
            "response_deadline": 5,
            "retry_on": [502, 503],
            "grpc_retry_on": ["UNAVAILABLE"],
            "replay_buffer": 0,
            "replay": True,
            "replay_wait": 0.5,
        },
        "http": {
            "routes": [{"prefix": "/api", "service": "b"}, {"prefix": "/", "service": "c", "host": "shop"}],
            "cluster_domain": "corp.example",
            "max_services": 2,
            "service_idle_timeout": 3,
            "max_head": 4,
            "max_headers": 5,
            "max_target": 6,
            "max_body": 7,
            "header_timeout": 8,
            "body_timeout": 9,
            "keep_alive_timeout": 10,
            "pool_size": 11,
            "pool_idle_timeout": 12,
            "retry_percent": 13,
            "retry_floor": 14,
            "x_forwarded": "append",
            "via": "mesh",
            "request_id": "make",
            "response_headers": True,
            "http2": {
                "max_streams": 1,
                "upstream_streams": 2,
                "connections": 3,
                "window": 4096,
                "keepalive_interval": 5,
                "keepalive_timeout": 6,
                "resets": 7,
                "resets_per_second": 8,
                "control_frames": 9,
                "control_frames_per_second": 10,
                "continuations": 11,
            },
        },
        "tls": {
            "workload_api": "unix:///run/agent.sock",
            "certificate_file": "own.pem",
            "key_file": "own.key",
            "client_ca_file": "clients.pem",
            "client_certificate": "required",
            "allow": ["spiffe://td/ns/*", "*.example"],
            "min_version": "1.2",
            "handshake_timeout": 1,
        },
        "ejection": {"failures": 1, "time": 2, "max_time": 3},
        "limits": {"connections": 1, "requests": 2, "waiting": 3},
        "services": {
            "b": {
                "port_name": "grpc",
                "protocol": "http2",
                "tls": {
                    "ca_file": "b.pem",
                    "server_name": "b.example",
                    "identity": "spiffe://td/{namespace}",
                    "certificate_file": "to-b.pem",
                    "key_file": "to-b.key",
                    "port": 8443,
                    "skip_tiers": ["node"],
                    "min_version": "1.2",
                },
                "attempts": {"deadline": 1, "max_attempts": None},
                "limits": {"connections": 4},
                "spill": 5,
            },
            "c": None,
        },
        "metrics": {"instances": True},
        "workers": 1,
        "busy_poll": 20,
        "tracing": {
            "endpoint": "https://collector.example:4318/otlp",
            "sample_percent": 0.5,
            "service_name": "edge",
            "token_file": "/run/token",
            "ca_file": "/run/collector.pem",
        },
        "access_log": True,
        "drain": {"delay": 1, "timeout": 2},
    },
    "discovery": {
        "bind": ["127.0.0.1:7070", "[::1]:7070"],
        "websocket_bind": ["127.0.0.1:7071"],
        "xds_bind": ["127.0.0.1:18000"],
        "xds_prefer": ["node", "zone"],
        "websocket_origins": ["https://ops.example"],
        "tls_certificate_file": "cert.pem",
        "tls_key_file": "key.pem",
        "tls_client_ca_file": "clients.pem",
        "tls_workload_api": "unix:///run/agent.sock",
        "tokens_file": "tokens",
        "allow": [{"identity": "spiffe://example/ns/*/sa/web", "services": ["*.shop", "b"]}],
        "sources": ["file:instances.yaml"],
        "zone": "z1",
        "cluster": "c1",
        "admin": "127.0.0.1:0",
        "admin_access": {
            "names": ["10.0.0.1"],
            "token_file": "t",
            "certificate_file": "c",
            "key_file": "k",
        },
        "heartbeat_interval": 1,
        "keepalive_interval": 2,
        "keepalive_timeout": 3,
        "limits": {
            "connections": 1,
            "watchers": 2,
            "client_watchers": 3,
            "subscriptions": 4,
            "all_subscriptions": 5,
            "client_connections": 50,
            "client_subscriptions": 51,
            "message_size": 4096,
            "client_calls_per_second": 7,
            "client_calls_burst": 8,
            "bytes_per_second": 9000,
            "stall_timeout": 10,
        },
        "drain": {"timeout": 0},
    },
    "log": {"level": "debug", "format": "json", "levels": {"trio": "warning"}},
}


def build(data: object, needs: Role | None = None) -> Config:
    return build_config([Layer("config.yaml", data)], needs)


def refused(*layers: Layer, needs: Role | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(layers, needs)
    error = caught.value
    assert (error.path, error.message, error.origin) == error.problems[0]
    return str(error).splitlines()


def test_every_key() -> None:
    assert build(FULL, "proxy") == build(FULL, "discovery")
    assert build(FULL) == Config(
        proxy=ProxyConfig(
            node_name="n1",
            namespace="default",
            labels={"zone": "z1"},
            prefer=("node", "zone"),
            socket_folder="/run/services",
            bypass=BypassConfig(cgroup="/sys/fs/cgroup/app.slice", pin="/sys/fs/bpf/meshlocal"),
            within="zone",
            discovery=DiscoveryClientConfig(
                urls=(DiscoveryUrl("grpc", "127.0.0.1", 7070), DiscoveryUrl("grpc", "discovery", 7070)),
                connect_timeout=1.0,
                keepalive_interval=2.0,
                keepalive_timeout=3.0,
                backoff_initial=0.5,
                backoff_max=6.0,
                ca_file="/etc/ca.pem",
                token_file="/run/token",
                allow_plaintext_tokens=True,
                certificate_file="client.pem",
                key_file="client.key",
                identity="spiffe://td/discovery",
                cache_file="/var/lib/meshlocal/snapshots",
            ),
            listen=(
                ListenAddress("tcp", "127.0.0.1", 15001, ServiceKey("b")),
                ListenAddress("tcp", "::1", 0, ServiceKey("c")),
                ListenAddress("tcp", "::1", 0, ServiceKey("d")),
            ),
            admin=SocketAddress("localhost", 15000),
            admin_access=AdminAccessConfig(
                names=("ops.example",),
                token_file="admin.token",
                certificate_file="admin.pem",
                key_file="admin.key",
            ),
            attempts=AttemptPolicy(
                connect_timeout_local=0.1,
                connect_timeout=2.0,
                deadline=20.0,
                max_attempts=3,
                first_snapshot_wait=0.0,
                idle_timeout=None,
                attempt_timeout=2.0,
                response_deadline=5.0,
                retry_on=(502, 503),
                grpc_retry_on=("UNAVAILABLE",),
                replay_buffer=0,
                replay=True,
                replay_wait=0.5,
            ),
            http=HttpConfig(
                routes=(
                    RouteConfig(prefix="/api", service=ServiceKey("b")),
                    RouteConfig(prefix="/", service=ServiceKey("c"), host="shop"),
                ),
                cluster_domain="corp.example",
                max_services=2,
                service_idle_timeout=3.0,
                max_head=4,
                max_headers=5,
                max_target=6,
                max_body=7,
                header_timeout=8.0,
                body_timeout=9.0,
                keep_alive_timeout=10.0,
                pool_size=11,
                pool_idle_timeout=12.0,
                retry_percent=13,
                retry_floor=14,
                x_forwarded="append",
                via="mesh",
                request_id="make",
                response_headers=True,
                http2=Http2Config(
                    max_streams=1,
                    upstream_streams=2,
                    connections=3,
                    window=4096,
                    keepalive_interval=5.0,
                    keepalive_timeout=6.0,
                    resets=7,
                    resets_per_second=8,
                    control_frames=9,
                    control_frames_per_second=10,
                    continuations=11,
                ),
            ),
            services={
                ServiceKey("b"): ServiceConfig(
                    port_name="grpc",
                    tls=UpstreamTlsConfig(
                        ca_file="b.pem",
                        server_name="b.example",
                        identity="spiffe://td/{namespace}",
                        certificate_file="to-b.pem",
                        key_file="to-b.key",
                        port=8443,
                        skip_tiers=("node",),
                        min_version="1.2",
                    ),
                    protocol="http2",
                    attempts=AttemptOverrides(deadline=1.0, max_attempts=None),
                    limits=LimitsConfig(connections=4),
                    spill=5,
                ),
                ServiceKey("c"): ServiceConfig(),
            },
            ejection=EjectionConfig(failures=1, time=2.0, max_time=3.0),
            limits=LimitsConfig(connections=1, requests=2, waiting=3),
            metrics=MetricsConfig(instances=True),
            workers=1,
            busy_poll=20,
            tls=TlsConfig(
                workload_api="unix:///run/agent.sock",
                certificate_file="own.pem",
                key_file="own.key",
                client_ca_file="clients.pem",
                allow=("spiffe://td/ns/*", "*.example"),
                min_version="1.2",
                handshake_timeout=1.0,
            ),
            tracing=TracingConfig(
                endpoint=CollectorUrl("https", "collector.example", 4318, "/otlp"),
                sample_percent=0.5,
                service_name="edge",
                token_file="/run/token",
                ca_file="/run/collector.pem",
            ),
            access_log=True,
            drain=DrainConfig(delay=1.0, timeout=2.0),
        ),
        discovery=DiscoveryServerConfig(
            bind=(SocketAddress("127.0.0.1", 7070), SocketAddress("::1", 7070)),
            websocket_bind=(SocketAddress("127.0.0.1", 7071),),
            xds_bind=(SocketAddress("127.0.0.1", 18000),),
            xds_prefer=("node", "zone"),
            websocket_origins=("https://ops.example",),
            tls_certificate_file="cert.pem",
            tls_key_file="key.pem",
            tls_client_ca_file="clients.pem",
            tls_workload_api="unix:///run/agent.sock",
            tokens_file="tokens",
            allow=(AllowConfig(identity="spiffe://example/ns/*/sa/web", services=("*.shop", "b")),),
            sources=(SourceUrl("file", FileOptions("instances.yaml")),),
            zone="z1",
            cluster="c1",
            admin=SocketAddress("127.0.0.1", 0),
            admin_access=AdminAccessConfig(names=("10.0.0.1",), token_file="t", certificate_file="c", key_file="k"),
            heartbeat_interval=1.0,
            keepalive_interval=2.0,
            keepalive_timeout=3.0,
            limits=ServerLimitsConfig(
                connections=1,
                watchers=2,
                client_watchers=3,
                subscriptions=4,
                all_subscriptions=5,
                client_connections=50,
                client_subscriptions=51,
                message_size=4096,
                client_calls_per_second=7,
                client_calls_burst=8,
                bytes_per_second=9000,
                stall_timeout=10.0,
            ),
            drain=DrainConfig(timeout=0.0),
        ),
        log=LogConfig(level="debug", format="json", levels={"trio": "warning"}),
    )


def test_every_key_of_the_schema_can_be_read() -> None:
    """A key that the schema gains is in `FULL`, and so read, too."""

    def check(path: tuple[str, ...], data: dict[str, Any]) -> None:
        assert set(known_keys(path)) <= set(data), path
        for key in known_keys(path):
            if known_keys((*path, key)) and (*path, key) != ("discovery", "drain"):
                check((*path, key), data[key])

    check((), FULL)


@pytest.mark.parametrize("data", [None, {}, {"proxy": None}, {"proxy": {"listen": None, "drain": {"delay": None}}}])
def test_a_key_without_value_is_as_good_as_none(data: object) -> None:
    assert build(data) == Config()


@pytest.mark.parametrize("value", ["none", "off", None])
def test_admin_can_be_off(value: object) -> None:
    assert build({"proxy": {"admin": value}}).proxy.admin is None


def test_numbers_are_floats_where_they_are_times() -> None:
    deadline = build({"proxy": {"attempts": {"deadline": 3}}}).proxy.attempts.deadline
    assert (deadline, type(deadline)) == (3.0, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a mapping, got a list"),
        ("proxy", "expected a mapping, got the text 'proxy'"),
        ({"proxi": {}}, "proxi: unknown key; did you mean 'proxy'?"),
        ({"x": {}}, "x: unknown key; known here: proxy, discovery, log"),
        ({1: {}}, "expected text as a key, got the number 1"),
        ({"proxy": []}, "proxy: expected a mapping, got a list"),
        ({"proxy": {"nod_name": "n"}}, "proxy.nod_name: unknown key; did you mean 'node_name'?"),
        ({"proxy": {"node_name": 1}}, "proxy.node_name: expected text, got the number 1; put it between quotes"),
        ({"proxy": {"node_name": ["n"]}}, "proxy.node_name: expected text, got a list"),
        ({"proxy": {"labels": "zone=z1"}}, "proxy.labels: expected a mapping, got the text 'zone=z1'"),
        ({"proxy": {"labels": {"zone": True}}}, "proxy.labels.zone: expected text, got true; put it between quotes"),
        ({"proxy": {"labels": {"zone": None}}}, "proxy.labels.zone: expected text, got nothing (null)"),
        ({"proxy": {"labels": {"node": "n1"}}}, "proxy.labels.node: is set by proxy.node_name"),
        (
            {"proxy": {"listen": ["tcp://unix:/run/a=b", "http://unix:///run/a"]}},
            "proxy.listen[1]: unix:/run/a is already the address of proxy.listen[0]",
        ),
        (
            {"proxy": {"listen": ["tcp://unix:/run/a=b"], "workers": 2}},
            "proxy.listen[0]: several workers cannot share a Unix socket: it takes proxy.workers 1",
        ),
        (
            {"proxy": {"socket_folder": "run"}},
            "proxy.socket_folder: expected an absolute path, got 'run'",
        ),
        (
            {"proxy": {"listen": ["tls://127.0.0.1:1=b"]}},
            "proxy.listen[0]: takes proxy.tls.certificate_file, or workload_api",
        ),
        (
            {"proxy": {"listen": ["https://127.0.0.1:1"]}},
            "proxy.listen[0]: takes proxy.tls.certificate_file, or workload_api",
        ),
        ({"proxy": {"tls": {"key_file": "k"}}}, "proxy.tls.key_file: takes proxy.tls.certificate_file too"),
        (
            {"proxy": {"tls": {"allow": ["a.example"]}}},
            "proxy.tls.allow: takes proxy.tls.client_ca_file: without it no client proves who it is",
        ),
        (
            {"proxy": {"tls": {"client_ca_file": "c", "client_certificate": "optional", "allow": ["a.example"]}}},
            "proxy.tls.allow: lets in nobody without a certificate: proxy.tls.client_certificate must be required",
        ),
        (
            {"proxy": {"tls": {"client_ca_file": "c", "allow": ["a b"]}}},
            "proxy.tls.allow[0]: expected a URI or a DNS name, got 'a b'",
        ),
        (
            {"proxy": {"services": {"b": {"tls": {"ca_file": "c"}}}}},
            "proxy.services.b.tls: has neither server_name nor identity: any certificate of the authority would do",
        ),
        (
            {"proxy": {"services": {"b": {"tls": {"server_name": "a..b"}}}}},
            "proxy.services.b.tls.server_name: host 'a..b' is neither an IP address nor a DNS name",
        ),
        (
            {"proxy": {"services": {"b": {"tls": {"identity": "spiffe://td/{"}}}}},
            "proxy.services.b.tls.identity: braces stand around a label's name: 'spiffe://td/{'",
        ),
        (
            {"proxy": {"services": {"b": {"tls": {"server_name": "b", "key_file": "k"}}}}},
            "proxy.services.b.tls.key_file: takes certificate_file too",
        ),
        (
            {"proxy": {"services": {"b": {"tls": {"server_name": "b"}, "health_check": {"kind": "http"}}}}},
            "proxy.services.b.health_check.kind: a check of kind http speaks plaintext, and the instances TLS: give it"
            " a port of its own",
        ),
        ({"proxy": {"labels": {"": "n1"}}}, "proxy.labels.: empty name, or longer than 1024 characters"),
        ({"proxy": {"labels": {"a": "x" * 1024}}}, "proxy.labels.a: empty name, or longer than 1024 characters"),
        ({"proxy": {"labels": {f"l{i}": "" for i in range(65)}}}, "proxy.labels: 65 of them; at most 64"),
        ({"proxy": {"prefer": "node"}}, "proxy.prefer: expected a list, got the text 'node'"),
        ({"proxy": {"prefer": []}}, "proxy.prefer: is empty; at least one label key, such as node"),
        ({"proxy": {"prefer": ["node", " "]}}, "proxy.prefer[1]: is empty"),
        ({"proxy": {"prefer": ["x" * 1025]}}, "proxy.prefer[0]: is longer than 1024 characters"),
        ({"proxy": {"prefer": [None]}}, "proxy.prefer[0]: expected text, got nothing (null)"),
        ({"proxy": {"prefer": ["node", "zone", "node"]}}, "proxy.prefer[2]: 'node' is already proxy.prefer[0]"),
        ({"proxy": {"within": ""}}, "proxy.within: is empty"),
        (
            {"proxy": {"within": "zone", "labels": {"zone": " "}}},
            "proxy.within: proxy.labels has no 'zone', so that no instance could ever be used",
        ),
        (
            {"proxy": {"discovery": {"urls": ["file:a", "grpc://h:1"]}}},
            "proxy.discovery.urls[0]: an instances file stands alone, with no other discovery URL",
        ),
        (
            {"proxy": {"discovery": {"urls": ["grpc://h:1", "grpc://H:1/"]}}},
            "proxy.discovery.urls[1]: 'grpc://h:1' is already proxy.discovery.urls[0]",
        ),
        (
            {"proxy": {"tracing": {"endpoint": "grpc://h:4317"}}},
            "proxy.tracing.endpoint: expected http://HOST:PORT or https://HOST:PORT, got 'grpc://h:4317'",
        ),
        (
            {"proxy": {"tracing": {"endpoint": "http://h"}}},
            "proxy.tracing.endpoint: expected http://HOST:PORT or https://HOST:PORT, got 'http://h'",
        ),
        ({"proxy": {"tracing": {"endpoint": "http://h:0"}}}, "proxy.tracing.endpoint: port 0 is not within 1 to 65535"),
        (
            {"proxy": {"tracing": {"ca_file": "x"}}},
            "proxy.tracing.ca_file: takes proxy.tracing.endpoint too",
        ),
        (
            {"proxy": {"tracing": {"endpoint": "http://127.0.0.1:1", "ca_file": "x"}}},
            "proxy.tracing.ca_file: http://127.0.0.1:1/v1/traces is without TLS: there is no certificate to check",
        ),
        (
            {"proxy": {"tracing": {"endpoint": "http://h:1/", "token_file": "x"}}},
            "proxy.tracing.token_file: no token goes over plaintext beyond this machine, where http://h:1/v1/traces is:"
            " use https",
        ),
        (
            {"proxy": {"discovery": {"urls": ["http://h:1"]}}},
            "proxy.discovery.urls[0]: expected grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH, got 'http://h:1'",
        ),
        (
            {"discovery": {"tls_key_file": "key.pem"}},
            "discovery.tls_key_file: takes discovery.tls_certificate_file too",
        ),
        (
            {"discovery": {"tls_client_ca_file": "ca.pem"}},
            "discovery.tls_client_ca_file: takes discovery.tls_certificate_file too",
        ),
        (
            {"discovery": {"tls_workload_api": "/run/agent.sock"}},
            "discovery.tls_workload_api: expected unix:///PATH, got '/run/agent.sock'",
        ),
        (
            {"discovery": {"allow": [{"identity": "ops", "services": ["*"]}]}},
            "discovery.allow: takes discovery.tls_client_ca_file or discovery.tokens_file: without, no caller"
            " proves who it is",
        ),
        (
            {"discovery": {"tokens_file": "t", "allow": [{"identity": "a b", "services": ["*"]}]}},
            "discovery.allow[0].identity: expected a URI or a DNS name, got 'a b'",
        ),
        (
            {"discovery": {"admin_access": {"key_file": "k"}}},
            "discovery.admin_access.key_file: takes discovery.admin_access.certificate_file too",
        ),
        (
            {"proxy": {"admin_access": {"names": ["a b"]}}},
            "proxy.admin_access.names[0]: host 'a b' is neither an IP address nor a DNS name",
        ),
        (
            {"proxy": {"tls": {"workload_api": "unix:relative"}}},
            "proxy.tls.workload_api: expected unix:///PATH, got 'unix:relative'",
        ),
        (
            {"proxy": {"discovery": {"urls": ["grpcs://h:1"], "identity": "spiffe://td/*"}}},
            "proxy.discovery.identity: expected a URI or a DNS name, got 'spiffe://td/*'",
        ),
        (
            {"proxy": {"discovery": {"urls": ["grpcs://h:1"], "key_file": "k"}}},
            "proxy.discovery.key_file: takes proxy.discovery.certificate_file too",
        ),
        (
            {"proxy": {"discovery": {"urls": ["grpcs://h:1", "ws://h:2"], "token_file": "t"}}},
            "proxy.discovery.token_file: without allow_plaintext_tokens, no token goes over plaintext beyond this"
            " machine, which ws://h:2 is: use TLS (grpcs://, wss://)",
        ),
        (
            {"proxy": {"services": {"b": {"tls": {"server_name": "b", "skip_tiers": ["zone"]}}}}},
            "proxy.services.b.tls.skip_tiers[0]: expected one of proxy.prefer: node; got 'zone'",
        ),
        (
            {"proxy": {"services": {"@localhost:1": {}}}},
            "proxy.services.@localhost:1: write @127.0.0.1:1",
        ),
        (
            {"discovery": {"bind": ["127.0.0.1:1"], "websocket_bind": ["127.0.0.1:1"]}},
            "discovery.websocket_bind[0]: 127.0.0.1:1 is already the address of discovery.bind[0]",
        ),
        (
            {"discovery": {"bind": ["127.0.0.1:1"], "xds_bind": ["127.0.0.1:1"]}},
            "discovery.xds_bind[0]: 127.0.0.1:1 is already the address of discovery.bind[0]",
        ),
        (
            {"proxy": {"bypass": {"cgroup": "/c"}, "workers": 2}},
            "proxy.bypass: takes proxy.workers: 1; each worker would have a list of its own",
        ),
        ({"proxy": {"bypass": {"pin": "/p"}}}, "proxy.bypass.pin: takes proxy.bypass.cgroup too"),
        ({"discovery": {"xds_prefer": []}}, "discovery.xds_prefer: is empty; at least one label key, such as node"),
        (
            {"discovery": {"xds_prefer": ["node", "node"]}},
            "discovery.xds_prefer[1]: 'node' is already discovery.xds_prefer[0]",
        ),
        (
            {"proxy": {"discovery": {"backoff_initial": 20}}},
            "proxy.discovery.backoff_initial: 20 is more than proxy.discovery.backoff_max, 5",
        ),
        (
            {"proxy": {"http": {"routes": [{"prefix": "api", "service": "b"}]}}},
            "proxy.http.routes[0].prefix: expected a path such as /api, got 'api'",
        ),
        (
            {"proxy": {"http": {"routes": [{"prefix": "/a", "service": "b"}, {"prefix": "/b", "service": "/"}]}}},
            "proxy.http.routes[1].service: '/' is no service name (letters, digits, '.', '-', '_'; at most 253)",
        ),
        ({"proxy": {"http": {"routes": [{"service": "b"}]}}}, "proxy.http.routes[0]: has no 'prefix'"),
        (
            {"proxy": {"attempts": {"retry_on": [503, 200]}}},
            "proxy.attempts.retry_on[1]: expected a whole number, from 400 to 599; got the number 200",
        ),
        ({"proxy": {"listen": [80]}}, "proxy.listen[0]: expected text, got the number 80; put it between quotes"),
        (
            {"proxy": {"listen": ["tcp://127.0.0.1:80=b", "tcp://localhost:80=c"]}},
            "proxy.listen[1]: localhost:80 is already the address of proxy.listen[0]",
        ),
        (
            {"proxy": {"listen": ["tcp://[::1]:80=b", "tcp://[0::1]:80=b"]}},
            "proxy.listen[1]: [::1]:80 is already the address of proxy.listen[0]",
        ),
        (
            {"proxy": {"listen": ["tcp://127.0.0.1:80=b"], "admin": "127.0.0.1:80"}},
            "proxy.admin: 127.0.0.1:80 is already the address of proxy.listen[0]",
        ),
        ({"proxy": {"admin": "15000"}}, "proxy.admin: expected HOST:PORT, got '15000'"),
        (
            {"proxy": {"attempts": {"deadline": "5s"}}},
            "proxy.attempts.deadline: expected a number of seconds, got the text '5s'",
        ),
        (
            {"proxy": {"attempts": {"deadline": True}}},
            "proxy.attempts.deadline: expected a number of seconds, got true",
        ),
        (
            {"proxy": {"attempts": {"deadline": 0}}},
            "proxy.attempts.deadline: expected a number of seconds, from more than 0 to 2592000; got the number 0",
        ),
        (
            {"proxy": {"attempts": {"deadline": float("nan")}}},
            "proxy.attempts.deadline: expected a number of seconds, from more than 0 to 2592000; got the number nan",
        ),
        (
            {"proxy": {"attempts": {"first_snapshot_wait": float("inf")}}},
            "proxy.attempts.first_snapshot_wait: expected a number of seconds, from 0 to 2592000; got the number inf",
        ),
        (
            {"proxy": {"drain": {"delay": -1}}},
            "proxy.drain.delay: expected a number of seconds, from 0 to 2592000; got the number -1",
        ),
        (
            {"proxy": {"drain": {"delay": 10**400}}},
            "proxy.drain.delay: expected a number of seconds, from 0 to 2592000; got a huge number",
        ),
        (
            {"proxy": {"attempts": {"max_attempts": 0}}},
            "proxy.attempts.max_attempts: expected a whole number, from 1 to 1000000; got the number 0",
        ),
        (
            {"proxy": {"attempts": {"max_attempts": 1.5}}},
            "proxy.attempts.max_attempts: expected a whole number, got the number 1.5",
        ),
        (
            {"proxy": {"services": {"b": {"attempts": {"deadlin": 5}}}}},
            "proxy.services.b.attempts.deadlin: unknown key; did you mean 'deadline'?",
        ),
        (
            {"proxy": {"services": {"b": {"attempts": {"deadline": -5}}}}},
            "proxy.services.b.attempts.deadline: expected a number of seconds, from more than 0 to 2592000;"
            " got the number -5",
        ),
        ({"proxy": {"services": {"b": 5}}}, "proxy.services.b: expected a mapping, got the number 5"),
        (
            {"proxy": {"services": {"b c": {}}}},
            "proxy.services.b c: 'b c' is no service name (letters, digits, '.', '-', '_'; at most 253)",
        ),
        (
            {"proxy": {"namespace": "ns", "services": {"b": {}, "b.ns": {}}}},
            "proxy.services.b: is the same service as proxy.services.b.ns",
        ),
        (
            {"discovery": {"sources": ["kubernetes:?nodes=1"]}},
            "discovery.sources[0]: nodes: expected yes or no, got '1'",
        ),
        (
            {"discovery": {"sources": ["file:a", "file:a"]}},
            "discovery.sources[1]: 'file:a' is already discovery.sources[0]",
        ),
        (
            {"discovery": {"bind": ["127.0.0.1:1"], "admin": "127.0.0.1:1"}},
            "discovery.admin: 127.0.0.1:1 is already the address of discovery.bind[0]",
        ),
        ({"proxy": {"access_log": "yes"}}, "proxy.access_log: expected true or false, got the text 'yes'"),
        ({"proxy": {"access_log": 1}}, "proxy.access_log: expected true or false, got the number 1"),
        ({"discovery": {"zone": 1}}, "discovery.zone: expected text, got the number 1; put it between quotes"),
        (
            {"log": {"level": "warn"}},
            "log.level: expected one of debug, error, info, warning, got the text 'warn'; did you mean 'warning'?",
        ),
        ({"log": {"format": 1}}, "log.format: expected one of auto, json, text, got the number 1"),
    ],
)
def test_mistakes(data: object, message: str) -> None:
    assert refused(Layer("config.yaml", data)) == [f"config.yaml: {message}"]


@pytest.mark.parametrize(
    ("needs", "messages"),
    [
        (
            "proxy",
            [
                "proxy.listen: no listener is given; such as tcp://127.0.0.1:15001=b",
                "proxy.discovery.urls: no discovery URL is given; such as grpc://127.0.0.1:7070",
            ],
        ),
        ("discovery", ["discovery.sources: no source is given; such as file:instances.yaml"]),
    ],
)
def test_what_is_missing(needs: Role, messages: list[str]) -> None:
    assert refused(needs=needs) == messages


def test_an_empty_list_is_missing_where_it_was_given() -> None:
    layer = Layer("config.yaml", {"discovery": {"bind": [], "sources": ["file:a"]}})
    message = "config.yaml: discovery.bind: no address is given; such as 127.0.0.1:7070"
    assert refused(layer, needs="discovery") == [message]


def test_a_listener_on_the_default_admin_address() -> None:
    """The mistake is in no layer."""
    message = "proxy.admin: 127.0.0.1:15000 is already the address of proxy.listen[0]"
    assert refused(Layer("flag", {"proxy": {"listen": ["tcp://127.0.0.1:15000=b"]}})) == [message]


def test_all_mistakes_are_told_at_once_each_with_its_origin() -> None:
    flags = Layer("flag", {"log": {"level": "x"}})
    file = Layer(
        "config.yaml",
        {"log": {"level": 3}, "proxy": {"listen": ["b", "tcp://127.0.0.1:1=b", "c"]}},
        lambda path: f"config.yaml:{len(path)}",
    )
    assert refused(flags, file) == [
        "flag: log.level: expected one of debug, error, info, warning, got the text 'x'",
        "config.yaml:2: log.level: expected one of debug, error, info, warning, got the number 3",
        f"config.yaml:3: proxy.listen[0]: {LISTENERS}, got 'b'",
        f"config.yaml:3: proxy.listen[2]: {LISTENERS}, got 'c'",
    ]


def test_a_mistake_across_keys_is_told_where_the_value_in_force_was_given() -> None:
    flags = Layer("flag", {"proxy": {"prefer": ["a", "a"]}})
    file = Layer("config.yaml", {"proxy": {"prefer": ["node"], "within": "zone"}})
    assert refused(flags, file) == [
        "flag: proxy.prefer[1]: 'a' is already proxy.prefer[0]",
        "config.yaml: proxy.within: proxy.labels has no 'zone', so that no instance could ever be used",
    ]


def test_the_first_layer_wins_key_by_key_and_lists_are_replaced_whole() -> None:
    config = build_config(
        [
            Layer(
                "flag", {"proxy": {"prefer": ["zone"], "labels": {"zone": "flag"}, "attempts": {"max_attempts": None}}}
            ),
            Layer("environment", {"proxy": {"labels": {"zone": "environment", "rack": "r1"}}}),
            Layer(
                "file",
                {
                    "proxy": {
                        "prefer": ["node", "rack"],
                        "labels": {"cluster": "file"},
                        "attempts": {"max_attempts": 3, "deadline": 4},
                        "drain": {"delay": 5},
                    }
                },
            ),
        ]
    )
    assert config.proxy.prefer == ("zone",)
    assert config.proxy.labels == {"zone": "flag", "rack": "r1", "cluster": "file"}
    assert config.proxy.attempts == AttemptPolicy(max_attempts=None, deadline=4.0)
    assert config.proxy.drain == DrainConfig(delay=5.0)


def leaves(data: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in data.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return found


OTHER: dict[tuple[str, ...], Any] = {
    ("proxy", "node_name"): "other",
    ("proxy", "labels", "zone"): "other",
    ("proxy", "attempts", "deadline"): 99,
    ("proxy", "attempts", "max_attempts"): 99,
    ("proxy", "services", "b", "attempts", "deadline"): 99,
    ("proxy", "listen"): ["tcp://127.0.0.1:9=other"],
    ("discovery", "drain", "timeout"): 99,
    ("log", "level"): "error",
}
VALUES = {path: [dict(leaves(FULL))[path], other] for path, other in OTHER.items()}


def nest(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for path, value in flat.items():
        at = data
        for step in path[:-1]:
            at = at.setdefault(step, {})
        at[path[-1]] = value
    return data


flat_layers = st.lists(
    st.fixed_dictionaries({}, optional={path: st.sampled_from(values) for path, values in VALUES.items()}), max_size=4
)


@given(flat_layers)
def test_merging_takes_each_key_from_the_first_layer_that_has_it(flats: list[dict[tuple[str, ...], Any]]) -> None:
    layers = [Layer(f"layer {number}", nest(flat)) for number, flat in enumerate(flats)]
    before = copy.deepcopy(layers)
    first: dict[tuple[str, ...], Any] = {}
    for flat in reversed(flats):
        first |= flat
    assert build_config(layers) == build(nest(first))
    assert layers == before, "layers are left as they were"


keys = st.sampled_from(
    [
        "proxy",
        "discovery",
        "log",
        "labels",
        "prefer",
        "listen",
        "admin",
        "urls",
        "services",
        "b",
        "attempts",
        "deadline",
    ]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["tcp://127.0.0.1:1=b", "grpc://a:1", "127.0.0.1:80", "none", "node", 10**400, b"x"])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | scalars, inner, max_size=5),
    max_leaves=25,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The full configuration with one value replaced by anything."""
    data = copy.deepcopy(FULL)
    path, _ = draw(st.sampled_from(leaves(FULL)))
    at = data
    for step in path[: draw(st.integers(0, len(path) - 1))]:
        at = at[step]
        path = path[1:]
    at[path[0]] = draw(anything)
    return data


@given(st.lists(anything | mutated(), max_size=3), st.sampled_from([None, "proxy", "discovery"]))
def test_nothing_but_config_errors(data: list[object], needs: Role | None) -> None:
    text: str | None = None
    try:
        config = build_config([Layer("file", one) for one in data], needs)
    except ConfigError as error:
        text = str(error)
    else:
        assert msgspec.json.encode(config)
        assert config.proxy.attempts_for(ServiceKey("b")).deadline > 0
    assert text != "", "an error always says what is wrong"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("proxy", "mapping"),
        ("proxy.node_name", "text"),
        ("proxy.labels", "mapping"),
        ("proxy.labels.zone", "text"),
        ("proxy.labels.zone.x", None),
        ("proxy.listen", "list"),
        ("proxy.admin", "text"),
        ("proxy.admin.port", None),
        ("proxy.attempts.max_attempts", "value"),
        ("proxy.services.b", "mapping"),
        ("proxy.services.b.attempts.deadline", "value"),
        ("proxy.services.b.port", None),
        ("proxy.access_log", "value"),
        ("log.level", "text"),
        ("nothing", None),
    ],
)
def test_kinds_of_keys(path: str, kind: str | None) -> None:
    assert kind_of(path.split(".")) == kind


def test_known_keys() -> None:
    assert known_keys() == ("proxy", "discovery", "log")
    assert known_keys(("proxy", "drain")) == ("delay", "timeout")
    assert known_keys(("proxy", "labels")) == ()
    assert known_keys(("proxy", "admin", "x")) == ()


def test_booleans() -> None:
    """A switch takes true or false, and nothing that merely looks like it."""
    assert build_config([Layer("file", {"proxy": {"access_log": True}})]).proxy.access_log
    with pytest.raises(ConfigError, match=r"proxy\.access_log: expected true or false, got the text 'yes'"):
        build_config([Layer("file", {"proxy": {"access_log": "yes"}})])
