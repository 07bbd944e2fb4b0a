"""What must hold between the keys of a configuration, each of which is right by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from meshlocal.policy.addresses import AddressError, SocketAddress, check_host, parse_target, unix_path
from meshlocal.policy.config import Config, DiscoveryServerConfig, ProxyConfig
from meshlocal.policy.config_access import AdminAccessConfig
from meshlocal.policy.config_health import HealthCheckConfig
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.config_tls import UpstreamTlsConfig
from meshlocal.policy.config_tracing import TracingConfig
from meshlocal.policy.exposure import TOKEN_IN_PLAINTEXT, is_loopback, would_show_token
from meshlocal.policy.identity import IdentityError, IdentityPattern, is_identity, placeholders
from meshlocal.policy.model import MAX_LABEL_LENGTH, MAX_LABELS, NODE, ModelError, is_fixed, parse_service_key
from meshlocal.policy.problems import KeyPath, format_path, quote

_TARGET = re.compile(r"/[!-~]*")
_AUTHORITY = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]+")

Finding: TypeAlias = tuple[KeyPath, str]
"""The path of the key at fault, and what is wrong with it."""


def check_config(config: Config, needs: Literal["proxy", "discovery"] | None) -> Iterator[Finding]:
    """Everything that no key shows by itself. `needs` is the part that must be complete."""
    yield from _check_proxy(config.proxy)
    yield from _check_server(config.discovery)
    if needs == "proxy":
        if not config.proxy.listen:
            yield ("proxy", "listen"), "no listener is given; such as tcp://127.0.0.1:15001=b"
        fixed = [listen.service is not None and is_fixed(listen.service) for listen in config.proxy.listen]
        if not config.proxy.discovery.urls and not (fixed and all(fixed)):
            yield ("proxy", "discovery", "urls"), "no discovery URL is given; such as grpc://127.0.0.1:7070"
    if needs == "discovery":
        if not config.discovery.sources:
            yield ("discovery", "sources"), "no source is given; such as file:instances.yaml"
        if not config.discovery.bind:
            yield ("discovery", "bind"), "no address is given; such as 127.0.0.1:7070"


def _check_proxy(proxy: ProxyConfig) -> Iterator[Finding]:
    at = "proxy"
    for name, value in proxy.labels.items():
        if name == NODE:
            yield (at, "labels", name), "is set by proxy.node_name"
        if not name.strip() or len(name) + len(value) > MAX_LABEL_LENGTH:
            yield (at, "labels", name), f"empty name, or longer than {MAX_LABEL_LENGTH} characters"
    if len(proxy.labels) > MAX_LABELS:
        yield (at, "labels"), f"{len(proxy.labels)} of them; at most {MAX_LABELS}"
    if proxy.bypass.pin is not None and proxy.bypass.cgroup is None:
        yield (at, "bypass", "pin"), "takes proxy.bypass.cgroup too"
    if proxy.bypass.cgroup is not None and proxy.workers > 1:
        yield (at, "bypass"), "takes proxy.workers: 1; each worker would have a list of its own"
    if not proxy.prefer:
        yield (at, "prefer"), "is empty; at least one label key, such as node"
    yield from _check_repeated((at, "prefer"), proxy.prefer)
    if proxy.within is not None and proxy.within != NODE and not proxy.labels.get(proxy.within, "").strip():
        message = f"proxy.labels has no {quote(proxy.within)}, so that no instance could ever be used"
        yield (at, "within"), message
    urls, client = proxy.discovery.urls, proxy.discovery
    if len(urls) > 1:
        for position, url in enumerate(urls):
            if url.scheme == "file":
                yield (
                    (at, "discovery", "urls", position),
                    "an instances file stands alone, with no other discovery URL",
                )
    yield from _check_repeated((at, "discovery", "urls"), urls)
    if shown := [str(url) for url in urls if would_show_token(url, client)]:
        yield (at, "discovery", "token_file"), f"{TOKEN_IN_PLAINTEXT}, which {shown[0]} is: use TLS (grpcs://, wss://)"
    if client.identity is not None and not is_identity(client.identity):
        yield (at, "discovery", "identity"), f"expected a URI or a DNS name, got {quote(client.identity)}"
    if client.key_file is not None and client.certificate_file is None:
        yield (at, "discovery", "key_file"), "takes proxy.discovery.certificate_file too"
    yield from _check_admin_access((at, "admin_access"), proxy.admin_access)
    if client.backoff_initial > client.backoff_max:
        message = f"{client.backoff_initial:g} is more than proxy.discovery.backoff_max, {client.backoff_max:g}"
        yield (at, "discovery", "backoff_initial"), message
    sockets: list[tuple[KeyPath, SocketAddress]] = [
        ((at, "listen", position), address)
        for position, listener in enumerate(proxy.listen)
        if (address := listener.address) is not None
    ]
    if proxy.admin is not None:
        sockets.append(((at, "admin"), proxy.admin))
    yield from _check_sockets(sockets)
    yield from _check_unix_sockets(proxy)
    yield from _check_routes(proxy.http)
    yield from _check_tls(proxy)
    yield from _check_tracing(proxy.tracing)
    for key in proxy.services:
        try:
            if str(parse_target(key)) != key:
                yield (at, "services", key), f"write {parse_target(key)}"
        except ModelError as error:
            yield (at, "services", key), error.what
        except AddressError as error:
            yield (at, "services", key), str(error)
        yield from _check_upstream_tls((at, "services", key, "tls"), proxy.services[key].tls, proxy.prefer)
        check = proxy.services[key].health_check
        yield from _check_health_check((at, "services", key, "health_check"), check)
        if check is not None and check.kind != "tcp" and check.port is None and proxy.services[key].tls is not None:
            message = f"a check of kind {check.kind} speaks plaintext, and the instances TLS: give it a port of its own"
            yield (at, "services", key, "health_check", "kind"), message
        if proxy.namespace and f"{key}.{proxy.namespace}" in proxy.services:
            other = format_path((at, "services", f"{key}.{proxy.namespace}"))
            yield (at, "services", key), f"is the same service as {other}"


def _check_unix_sockets(proxy: ProxyConfig) -> Iterator[Finding]:
    paths: dict[str, KeyPath] = {}
    for position, listener in enumerate(proxy.listen):
        at: KeyPath = ("proxy", "listen", position)
        if listener.path and (first := paths.setdefault(listener.path, at)) is not at:
            yield at, f"unix:{listener.path} is already the address of {format_path(first)}"
        if listener.path and proxy.workers > 1:
            yield at, "several workers cannot share a Unix socket: it takes proxy.workers 1"
    if proxy.socket_folder is not None and not proxy.socket_folder.startswith("/"):
        yield ("proxy", "socket_folder"), f"expected an absolute path, got {quote(proxy.socket_folder)}"


def _check_tls(proxy: ProxyConfig) -> Iterator[Finding]:
    tls, at = proxy.tls, ("proxy", "tls")
    for position, listener in enumerate(proxy.listen):
        if listener.is_tls and tls.certificate_file is None and tls.workload_api is None:
            yield ("proxy", "listen", position), "takes proxy.tls.certificate_file, or workload_api"
    if tls.workload_api is not None:
        yield from _check_socket((*at, "workload_api"), tls.workload_api)
    if tls.key_file is not None and tls.certificate_file is None:
        yield (*at, "key_file"), "takes proxy.tls.certificate_file too"
    for position, pattern in enumerate(tls.allow):
        try:
            IdentityPattern(pattern)
        except IdentityError as error:
            yield (*at, "allow", position), str(error)
    if tls.allow and tls.client_ca_file is None and tls.workload_api is None:
        yield (*at, "allow"), "takes proxy.tls.client_ca_file: without it no client proves who it is"
    if tls.allow and tls.client_certificate == "optional":
        yield (*at, "allow"), "lets in nobody without a certificate: proxy.tls.client_certificate must be required"


def _check_tracing(tracing: TracingConfig) -> Iterator[Finding]:
    at, url = ("proxy", "tracing"), tracing.endpoint
    for key in ("token_file", "ca_file"):
        if url is None and getattr(tracing, key) is not None:
            yield (*at, key), "takes proxy.tracing.endpoint too"
    if url is None:
        return
    if tracing.ca_file is not None and url.scheme != "https":
        yield (*at, "ca_file"), f"{url} is without TLS: there is no certificate to check"
    if tracing.token_file is not None and url.scheme != "https" and not is_loopback(url.host):
        yield (*at, "token_file"), f"no token goes over plaintext beyond this machine, where {url} is: use https"


def _check_socket(at: KeyPath, text: str) -> Iterator[Finding]:
    try:
        unix_path(text)
    except AddressError as error:
        yield at, str(error)


def _check_upstream_tls(at: KeyPath, tls: UpstreamTlsConfig | None, prefer: Sequence[str]) -> Iterator[Finding]:
    if tls is None:
        return
    for position, tier in enumerate(tls.skip_tiers):
        if tier not in prefer:
            yield (*at, "skip_tiers", position), f"expected one of proxy.prefer: {', '.join(prefer)}; got {quote(tier)}"
    if tls.server_name is None and tls.identity is None:
        yield at, "has neither server_name nor identity: any certificate of the authority would do"
    if tls.server_name is not None:
        try:
            check_host(tls.server_name)
        except AddressError as error:
            yield (*at, "server_name"), str(error)
    if tls.identity is not None:
        try:
            placeholders(tls.identity)
        except IdentityError as error:
            yield (*at, "identity"), str(error)
    if tls.key_file is not None and tls.certificate_file is None:
        yield (*at, "key_file"), "takes certificate_file too"


def _check_health_check(at: KeyPath, check: HealthCheckConfig | None) -> Iterator[Finding]:
    if check is None:
        return
    if not _TARGET.fullmatch(check.path):
        yield (*at, "path"), f"expected a path such as /healthz, got {quote(check.path)}"
    if check.host is not None and not _AUTHORITY.fullmatch(check.host):
        yield (*at, "host"), f"expected a host such as b.example, got {quote(check.host)}"
    if check.timeout > check.interval:
        yield (*at, "timeout"), f"{check.timeout:g} is more than the interval, {check.interval:g}"


def _check_routes(http: HttpConfig) -> Iterator[Finding]:
    at = ("proxy", "http", "routes")
    for position, route in enumerate(http.routes):
        try:
            parse_service_key(route.service)
        except ModelError as error:
            yield (*at, position, "service"), error.what
        if not route.prefix.startswith("/") or not route.prefix.isascii() or any(c in route.prefix for c in " ?#"):
            yield (*at, position, "prefix"), f"expected a path such as /api, got {quote(route.prefix)}"
    yield from _check_repeated(at, [f"{route.host or ''}{route.prefix}" for route in http.routes])


def _check_admin_access(at: KeyPath, access: AdminAccessConfig) -> Iterator[Finding]:
    for position, name in enumerate(access.names):
        try:
            check_host(name)
        except AddressError as error:
            yield (*at, "names", position), str(error)
    if access.key_file is not None and access.certificate_file is None:
        yield (*at, "key_file"), f"takes {format_path((*at, 'certificate_file'))} too"


def _check_server(server: DiscoveryServerConfig) -> Iterator[Finding]:
    at = "discovery"
    yield from _check_admin_access((at, "admin_access"), server.admin_access)
    for position, entry in enumerate(server.allow):
        try:
            IdentityPattern(entry.identity)
        except IdentityError as error:
            yield (at, "allow", position, "identity"), str(error)
    if server.tls_workload_api is not None:
        yield from _check_socket((at, "tls_workload_api"), server.tls_workload_api)
    if server.allow and not server.asks:
        message = "takes discovery.tls_client_ca_file or discovery.tokens_file: without, no caller proves who it is"
        yield (at, "allow"), message
    if server.tls_client_ca_file is not None and not server.is_tls:
        yield (at, "tls_client_ca_file"), "takes discovery.tls_certificate_file too"
    yield from _check_repeated((at, "sources"), server.sources)
    sockets: list[tuple[KeyPath, SocketAddress]] = [
        ((at, "bind", position), address) for position, address in enumerate(server.bind)
    ]
    sockets += [((at, "websocket_bind", position), address) for position, address in enumerate(server.websocket_bind)]
    sockets += [((at, "xds_bind", position), address) for position, address in enumerate(server.xds_bind)]
    if server.admin is not None:
        sockets.append(((at, "admin"), server.admin))
    yield from _check_sockets(sockets)
    if not server.xds_prefer:
        yield (at, "xds_prefer"), "is empty; at least one label key, such as node"
    yield from _check_repeated((at, "xds_prefer"), server.xds_prefer)
    if server.tls_key_file is not None and server.tls_certificate_file is None:
        yield (at, "tls_key_file"), "takes discovery.tls_certificate_file too"


def _check_repeated(path: KeyPath, values: Sequence[object]) -> Iterator[Finding]:
    for position, value in enumerate(values):
        first = values.index(value)
        if first != position:
            yield (*path, position), f"{quote(str(value))} is already {format_path((*path, first))}"


def _check_sockets(sockets: Sequence[tuple[KeyPath, SocketAddress]]) -> Iterator[Finding]:
    taken: dict[tuple[str, int], KeyPath] = {}
    for path, address in sockets:
        if address.port == 0:
            continue
        host = "127.0.0.1" if address.host == "localhost" else address.host
        first = taken.setdefault((host, address.port), path)
        if first is not path:
            yield path, f"{address} is already the address of {format_path(first)}"
