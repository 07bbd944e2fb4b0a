"""What a configuration opens to others than this machine's own, without encryption or without asking who they are."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from meshlocal.policy.addresses import DiscoveryUrl, SocketAddress
from meshlocal.policy.config import DiscoveryClientConfig, DiscoveryServerConfig, ProxyConfig
from meshlocal.policy.config_access import AdminAccessConfig


class Exposure(NamedTuple):
    """A listener that whoever reaches its address can use or listen in on.

    Attributes:
        key: of the configuration, that opens it.
        address: where it listens.
        lacks: `tls` or `authentication`.
        remedy: the keys that help.
    """

    key: str
    address: str
    lacks: str
    remedy: str

    def __str__(self) -> str:
        what = "in plaintext" if self.lacks == "tls" else "without asking who asks"
        return f"{self.key} {self.address} is served {what} beyond this machine; see {self.remedy}"


def is_loopback(host: str) -> bool:
    """Whether a host, an address or a name, is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def of_server(config: DiscoveryServerConfig) -> list[Exposure]:
    """What a discovery server exposes."""
    found = []
    for key, addresses in (
        ("bind", config.bind),
        ("websocket_bind", config.websocket_bind),
        ("xds_bind", config.xds_bind),
    ):
        for address in addresses:
            if is_loopback(address.host):
                continue
            name = f"discovery.{key}"
            if not config.is_tls:
                found.append(Exposure(name, str(address), "tls", "discovery.tls_certificate_file"))
            if not config.asks:
                remedy = "discovery.tokens_file, discovery.tls_client_ca_file"
                found.append(Exposure(name, str(address), "authentication", remedy))
    return found + _of_admin("discovery", config.admin, config.admin_access)


def of_proxy(config: ProxyConfig) -> list[Exposure]:
    """What a proxy exposes beside its listeners, which are for clients to use."""
    return _of_admin("proxy", config.admin, config.admin_access)


def _of_admin(section: str, address: SocketAddress | None, access: AdminAccessConfig) -> list[Exposure]:
    if address is None or is_loopback(address.host):
        return []
    found = []
    if access.certificate_file is None:
        found.append(Exposure(f"{section}.admin", str(address), "tls", f"{section}.admin_access.certificate_file"))
    if access.token_file is None:
        remedy = f"{section}.admin_access.token_file"
        found.append(Exposure(f"{section}.admin", str(address), "authentication", remedy))
    return found


TOKEN_IN_PLAINTEXT = "without allow_plaintext_tokens, no token goes over plaintext beyond this machine"
"""What is said where `would_show_token` is true."""


def would_show_token(url: DiscoveryUrl, config: DiscoveryClientConfig) -> bool:
    """Whether a token that is sent to a server could be read on the way, which nobody allowed."""
    plaintext = url.scheme in ("grpc", "ws") and not is_loopback(url.host)
    return plaintext and config.token_file is not None and not config.allow_plaintext_tokens
