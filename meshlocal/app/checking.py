"""What `meshlocal check` says of a configuration: what is wrong, and what is right and most likely not meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from meshlocal.admin.access import AdminAccess
from meshlocal.app.certificates import make_collector, make_tls, make_workload
from meshlocal.app.config_loader import UNUSED_VARIABLE, load_config, unused_variables
from meshlocal.net.following import FileProblemError, Followed
from meshlocal.net.tls import expiring
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.config import Config, DiscoveryClientConfig, ProxyConfig
from meshlocal.policy.config_build import ConfigError, Role
from meshlocal.policy.config_unused import unused_keys
from meshlocal.policy.exposure import is_loopback, of_proxy, of_server
from meshlocal.policy.problems import Problem


def check(
    file: Path, environment: Mapping[str, str], parts: tuple[Role, ...] = ()
) -> tuple[tuple[Role, ...], list[str]]:
    """Read a configuration as `meshlocal proxy` and `meshlocal discovery` do, and the files that it names.

    Args:
        file: the configuration.
        environment: as `os.environ`; its variables win over the file.
        parts: what it is for; empty: whatever it has listeners or sources for.

    Returns:
        What it was checked for, and what to look at, a line each.

    Raises:
        ConfigError: something is wrong. A problem names the file, the line and the key.
    """
    config = load_config(file, {}, environment)
    if not parts:
        found: list[Role] = []
        if config.proxy.listen:
            found.append("proxy")
        if config.discovery.sources:
            found.append("discovery")
        parts = tuple(found)
    if not parts:
        raise ConfigError(
            [Problem("", "has neither proxy.listen nor discovery.sources: there is nothing to run", str(file))]
        )
    for part in parts:
        load_config(file, {}, environment, part)
    warnings = [UNUSED_VARIABLE.format(name) for name in unused_variables(environment)]
    if "proxy" in parts:
        warnings += _of_proxy(config.proxy, environment)
    if "discovery" in parts:
        warnings += _of_discovery(config)
    return parts, warnings


def _of_proxy(config: ProxyConfig, environment: Mapping[str, str]) -> Iterator[str]:
    yield from unused_keys(config)
    if not config.node_name:
        yield "proxy.node_name is not set, nor NODE_NAME: no instance is local to a proxy that does not know its node"
    yield from _plaintext_discovery(config.discovery)
    yield from map(str, of_proxy(config))
    try:
        access = AdminAccess(config.admin_access, "proxy")
        tls = make_tls(config, make_workload(config.tls.workload_api, Random()))
        make_collector(config)
    except FileProblemError as error:
        raise ConfigError([Problem("proxy", str(error), "")]) from None
    yield from _ending([*access.followed(), *(tls.followed() if tls is not None else ())])
    for name, service in config.services.items():
        if service.tls is not None and service.tls.skip_tiers:
            yield f"proxy.services.{name}.tls.skip_tiers: plaintext to this host's own addresses"


def _of_discovery(config: Config) -> Iterator[str]:
    from meshlocal.app.discovery_access import DiscoveryAccess

    server = config.discovery
    yield from map(str, of_server(server))
    access = DiscoveryAccess(server, make_workload(server.tls_workload_api, Random()))
    try:
        pages = AdminAccess(server.admin_access, "discovery")
    except FileProblemError as error:
        raise ConfigError([Problem("discovery.admin_access", str(error), "")]) from None
    yield from _ending([*access.followed(), *pages.followed()])


def _plaintext_discovery(client: DiscoveryClientConfig) -> Iterator[str]:
    for position, url in enumerate(client.urls):
        if url.scheme in ("grpc", "ws") and not is_loopback(url.host):
            yield f"proxy.discovery.urls[{position}]: {url} is plaintext, which others on the way can read and change"


def _ending(followed: list[Followed[Any]]) -> Iterator[str]:
    return expiring(followed, wall_clock())
