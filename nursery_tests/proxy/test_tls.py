"""proxy/tls: what a configuration makes of its sections (T1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshlocal.policy.config import ProxyConfig, ServiceConfig
from meshlocal.policy.config_tls import UpstreamTlsConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.tls import ProxyTls
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
