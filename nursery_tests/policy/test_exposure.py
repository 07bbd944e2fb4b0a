"""What is open beyond this machine, and which tokens could be read on the way."""

from __future__ import annotations

import pytest

from meshlocal.policy.addresses import DiscoveryUrl, SocketAddress
from meshlocal.policy.config import DiscoveryClientConfig, DiscoveryServerConfig, ProxyConfig
from meshlocal.policy.config_access import AdminAccessConfig
from meshlocal.policy.exposure import of_proxy, of_server, would_show_token

EVERYWHERE, HERE = SocketAddress("0.0.0.0", 7070), SocketAddress("127.0.0.1", 7070)


@pytest.mark.parametrize(
    ("config", "exposed"),
    [
        (DiscoveryServerConfig(bind=(HERE, SocketAddress("::1", 1), SocketAddress("localhost", 2))), []),
        (DiscoveryServerConfig(bind=(EVERYWHERE,)), [("bind", "tls"), ("bind", "authentication")]),
        (
            DiscoveryServerConfig(websocket_bind=(EVERYWHERE,), tokens_file="tokens"),
            [("websocket_bind", "tls")],
        ),
        (DiscoveryServerConfig(xds_bind=(EVERYWHERE,)), [("xds_bind", "tls"), ("xds_bind", "authentication")]),
        (
            DiscoveryServerConfig(bind=(EVERYWHERE,), tls_certificate_file="c", tls_key_file="k"),
            [("bind", "authentication")],
        ),
        (
            DiscoveryServerConfig(
                bind=(EVERYWHERE,), tls_certificate_file="c", tls_key_file="k", tls_client_ca_file="a"
            ),
            [],
        ),
        (DiscoveryServerConfig(admin=EVERYWHERE), [("admin", "tls"), ("admin", "authentication")]),
        (DiscoveryServerConfig(admin=HERE), []),
        (
            DiscoveryServerConfig(
                admin=EVERYWHERE, admin_access=AdminAccessConfig(certificate_file="c", token_file="t")
            ),
            [],
        ),
    ],
)
def test_what_a_server_exposes(config: DiscoveryServerConfig, exposed: list[tuple[str, str]]) -> None:
    found = of_server(config)
    assert [(each.key, each.lacks) for each in found] == [(f"discovery.{key}", lacks) for key, lacks in exposed]
    assert all(str(each).startswith(f"{each.key} 0.0.0.0:7070 is served ") for each in found)


def test_what_a_proxy_exposes() -> None:
    assert of_proxy(ProxyConfig()) == []
    assert of_proxy(ProxyConfig(admin=None)) == []
    found = of_proxy(ProxyConfig(admin=EVERYWHERE, admin_access=AdminAccessConfig(token_file="t")))
    assert [(each.key, each.lacks, each.remedy) for each in found] == [
        ("proxy.admin", "tls", "proxy.admin_access.certificate_file")
    ]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("grpc://10.0.0.1:7070", True),
        ("ws://discovery:7071", True),
        ("grpc://localhost.example:7070", True),
        ("grpcs://10.0.0.1:7070", False),
        ("wss://discovery:7071", False),
        ("grpc://127.0.0.1:7070", False),
        ("ws://[::1]:7071", False),
        ("grpc://localhost:7070", False),
        ("file:instances.yaml", False),
    ],
)
def test_tokens_that_could_be_read_on_the_way(url: str, shown: bool) -> None:
    parsed = DiscoveryUrl.parse(url)
    assert would_show_token(parsed, DiscoveryClientConfig(token_file="t")) is shown
    assert not would_show_token(parsed, DiscoveryClientConfig())
    assert not would_show_token(parsed, DiscoveryClientConfig(token_file="t", allow_plaintext_tokens=True))
