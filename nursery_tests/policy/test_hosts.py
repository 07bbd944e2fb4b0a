"""Under which names pages are asked for: what DNS rebinding cannot pass."""

from __future__ import annotations

import pytest

from meshlocal.policy.hosts import host_of, is_own_host, is_own_origin


@pytest.mark.parametrize(
    ("authority", "local", "own"),
    [
        ("localhost", "127.0.0.1", True),
        ("LOCALHOST:15000", "127.0.0.1", True),
        ("127.0.0.1:15000", "127.0.0.1", True),
        ("127.8.9.1", "127.0.0.1", True),
        ("[::1]:15000", "127.0.0.1", True),
        ("10.0.0.7:15000", "10.0.0.7", True),
        ("[fe80::1]:15000", "fe80::1%eth0", True),
        ("[FD00::0:7]", "fd00::7", True),
        ("ops.example:443", "10.0.0.7", True),
        ("Ops.Example", "10.0.0.7", True),
        ("10.0.0.8", "10.0.0.7", False),
        ("evil.example", "127.0.0.1", False),
        ("evil.example:15000", "127.0.0.1", False),
        ("localhost.evil.example", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("ops.example.evil.example", "10.0.0.7", False),
        ("ops.example@evil.example", "10.0.0.7", False),
        ("[::1", "::1", False),
        ("", "127.0.0.1", False),
        (":80", "127.0.0.1", False),
        ("2130706433", "127.0.0.1", False),
    ],
)
def test_own_hosts(authority: str, local: str, own: bool) -> None:
    assert is_own_host(host_of(authority), local, {"ops.example"}) is own


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://localhost:15000", "localhost", True),
        ("https://LOCALHOST", "localhost", True),
        ("http://[::1]:8080", "::1", True),
        ("https://ops.example", "10.0.0.7", True),
        ("https://ops.example:8443", "10.0.0.7", False),
        ("http://evil.example", "localhost", False),
        ("null", "localhost", False),
        ("null", None, False),
        ("http://[::1", "::1", False),
        ("", "localhost", False),
    ],
)
def test_own_origins(origin: str, host: str | None, own: bool) -> None:
    assert is_own_origin(origin, host, {"https://ops.example"}) is own
