"""From the arguments of `open_mesh` to a configuration, by the proxy's own schema and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from meshlocal.library.errors import MeshConfigError
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig, resolve_node_name
from meshlocal.policy.config_build import ConfigError, Layer, build_config

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
) -> ProxyConfig:
    """The configuration that a mesh goes by; its node name is resolved (L1).

    Raises:
        MeshConfigError: an argument cannot be used.
    """
    proxy: dict[str, object] = {
        "discovery": {"urls": list(urls)},
        "node_name": node_name,
        "prefer": list(prefer),
        "labels": dict(labels or {}),
        "within": within,
        "namespace": namespace,
        "http": {"max_services": MAX_SERVICES},
    }
    if attempts is not None:
        proxy["attempts"] = msgspec.to_builtins(attempts)
    if services is not None:
        proxy["services"] = {name: msgspec.to_builtins(each) for name, each in services.items()}
    try:
        config = build_config([Layer("", {"proxy": proxy})]).proxy
    except ConfigError as error:
        raise MeshConfigError([_as_argument(f"{each.path}: {each.message}") for each in error.problems]) from None
    return msgspec.structs.replace(config, node_name=resolve_node_name(node_name, environment))


def _as_argument(problem: str) -> str:
    """A problem with the names that `open_mesh` gives to the config's keys."""
    return problem.replace("proxy.discovery.", "").replace("proxy.", "")
