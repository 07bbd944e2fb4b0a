"""From the arguments of `open_mesh` to a configuration, by the proxy's own schema and checks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from meshlocal.library.errors import MeshConfigError
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig, resolve_node_name
from meshlocal.policy.config_build import ConfigError, Layer, build_config
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.problems import describe, quote

MAX_SERVICES = 1000
"""Services that one mesh follows at once: as many as a discovery server takes in one watch."""


def mesh_config(
    urls: Sequence[str],
    environment: Mapping[str, str],
    *,
    node_name: str | None,
    prefer: Sequence[str],
    labels: Mapping[str, str] | None,
    within: str | None,
    namespace: str | None,
    attempts: AttemptPolicy | None,
    services: Mapping[str, ServiceConfig] | None,
    ejection: EjectionConfig | None,
    ca_file: str | os.PathLike[str] | None,
    token_file: str | os.PathLike[str] | None,
    allow_plaintext_tokens: bool,
    certificate_file: str | os.PathLike[str] | None,
    key_file: str | os.PathLike[str] | None,
    cache_file: str | os.PathLike[str] | None,
    socket_folder: str | os.PathLike[str] | None,
) -> ProxyConfig:
    """The configuration that a mesh goes by; its node name is resolved (L1).

    Raises:
        MeshConfigError: an argument cannot be used.
    """
    if isinstance(prefer, str):
        # It is a sequence of strings as well, to Python.
        raise MeshConfigError([f"prefer: expected label keys, got the string {quote(prefer)}"])
    discovery: dict[str, object] = {"urls": list(urls)}
    files = {
        "ca_file": ca_file,
        "token_file": token_file,
        "certificate_file": certificate_file,
        "key_file": key_file,
        "cache_file": cache_file,
    }
    discovery.update({key: os.fspath(file) for key, file in files.items() if file is not None})
    discovery["allow_plaintext_tokens"] = allow_plaintext_tokens
    if cache_file is not None and any(str(url).startswith("file:") for url in urls):
        raise MeshConfigError(["cache_file: an instances file needs none"])
    proxy: dict[str, object] = {
        "discovery": discovery,
        "node_name": node_name,
        "prefer": list(prefer),
        "labels": dict(labels or {}),
        "within": within,
        "namespace": namespace,
        "socket_folder": os.fspath(socket_folder) if socket_folder is not None else None,
        "http": {"max_services": MAX_SERVICES},
    }
    if attempts is not None:
        proxy["attempts"] = msgspec.to_builtins(attempts)
    if ejection is not None:
        proxy["ejection"] = msgspec.to_builtins(ejection)
    if services is not None:
        if problems := list(_of_no_use(services)):
            raise MeshConfigError(problems)
        proxy["services"] = {name: msgspec.to_builtins(each) for name, each in services.items()}
    try:
        config = build_config([Layer("", {"proxy": proxy})]).proxy
    except ConfigError as error:
        raise MeshConfigError([_as_argument(f"{each.path}: {each.message}") for each in error.problems]) from None
    return msgspec.structs.replace(config, node_name=resolve_node_name(node_name, environment))


def _of_no_use(services: Mapping[str, ServiceConfig]) -> Iterator[str]:
    """What a service is given that only a proxy does. To pass it over would let its author count on it."""
    for name, service in services.items():
        if not isinstance(service, ServiceConfig):
            yield f"services.{name}: expected a ServiceConfig, got {describe(service)}"
            continue
        if service.health_check is not None:
            yield f"services.{name}.health_check: a mesh learns from its own requests only; a proxy checks"
        if service.tls is not None:
            yield f"services.{name}.tls: a mesh speaks no TLS itself; put it over its streams, or give httpx a context"
        if service.failback is not None:
            yield f"services.{name}.failback: an open stream is its application's to end; a proxy ends them"


def _as_argument(problem: str) -> str:
    """A problem with the names that `open_mesh` gives to the config's keys."""
    return problem.replace("proxy.discovery.urls", "sources").replace("proxy.discovery.", "").replace("proxy.", "")
