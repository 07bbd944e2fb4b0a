"""proxy/tls: what a configuration makes of its sections (T1)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from meshlocal.policy.config import ProxyConfig, ServiceConfig
from meshlocal.policy.config_tls import TlsConfig, UpstreamTlsConfig
from meshlocal.policy.model import ServiceKey, make_instance
from meshlocal.proxy.tls import ProxyTls, UpstreamTls
from nursery_tests.certificates import Authority


@pytest.mark.parametrize(
    ("namespace", "name", "key"),
    [
        (None, "b", "b"),
        ("shop", "b", "b.shop"),
        ("shop", "b.shop", "b.shop"),
        ("shop", "a.b", "a.b.shop"),
        ("shop", "a.b", "a.b"),
        ("shop", "web.prod.shop", "web.prod"),
    ],
)
def test_a_service_has_the_tls_of_its_own_section(tmp_path: Path, namespace: str | None, name: str, key: str) -> None:
    """T1: whatever finds the section finds its TLS; nothing goes out in plaintext for another spelling."""
    section = UpstreamTlsConfig(ca_file=Authority(tmp_path).file, server_name="b.example", port=8443)
    config = ProxyConfig(namespace=namespace, services={ServiceKey(name): ServiceConfig(tls=section)})
    assert config.service(ServiceKey(key)).tls is section
    tls = ProxyTls(config)
    assert tls.security(ServiceKey(key)) is tls.services[section]
    assert tls.security(ServiceKey("other")) is None


@pytest.mark.parametrize(
    ("tier", "address", "skipped"),
    [
        (0, "127.0.0.1", True),
        (0, "127.9.8.7", True),
        (0, "::1", True),
        # A registry that says that this is on the proxy's node lies (RFC 5737, 3; RFC 3849).
        (0, "192.0.2.1", False),
        (0, "2001:db8::1", False),
        (1, "127.0.0.1", False),
        (2, "127.0.0.1", False),
    ],
)
def test_tls_is_skipped_for_an_address_that_is_this_hosts_own(
    tmp_path: Path, tier: int, address: str, skipped: bool
) -> None:
    section = UpstreamTlsConfig(ca_file=Authority(tmp_path).file, server_name="b.example", skip_tiers=("node",))
    security = UpstreamTls(section, TlsConfig(), ("node", "zone"))
    assert security.skips(make_instance(address, 1, labels={"node": "n1"}), tier) is skipped
    plain = UpstreamTls(msgspec.structs.replace(section, skip_tiers=()), TlsConfig(), ("node", "zone"))
    assert not plain.skips(make_instance(address, 1, labels={"node": "n1"}), tier)
