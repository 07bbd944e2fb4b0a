"""proxy/tls: what a configuration makes of its sections, and what a resumed session proves (T1, T4)."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from meshlocal.policy.config import ProxyConfig, ServiceConfig
from meshlocal.policy.config_tls import UpstreamTlsConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.tls import ProxyTls, has_expired
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


class Resumed:
    """What is asked of a pipe."""

    def __init__(self, *, resumed: bool, days: float | None) -> None:
        self.resumed = resumed
        self.certificate: dict[str, object] = {}
        if days is not None:
            until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
            self.certificate["notAfter"] = until.strftime("%b %d %H:%M:%S %Y GMT")


@pytest.mark.parametrize(
    ("resumed", "days", "expired"),
    [(True, -0.01, True), (True, 0.01, False), (True, None, False), (False, -1, False)],
)
def test_a_session_does_not_outlive_its_certificate(resumed: bool, days: float | None, expired: bool) -> None:
    """OpenSSL looks at a certificate's time in a full handshake only."""
    pipe: Any = Resumed(resumed=resumed, days=days)
    assert has_expired(pipe) is expired
