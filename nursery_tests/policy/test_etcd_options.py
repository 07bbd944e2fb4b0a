"""policy/etcd_options: which cluster, where in it, and what is refused."""

from __future__ import annotations

import pytest

from meshlocal.policy.addresses import AddressError
from meshlocal.policy.etcd_options import EtcdOptions
from meshlocal.policy.source_options import SourceOptionsError
from meshlocal.policy.sources import SourceUrl


@pytest.mark.parametrize(
    ("text", "endpoints", "prefix"),
    [
        ("//10.0.0.1:2379/meshlocal", (("10.0.0.1", 2379),), "meshlocal"),
        ("//etcd.example:2379/a/b/", (("etcd.example", 2379),), "a/b"),
        ("//[::1]:2379//registry", (("::1", 2379),), "/registry"),
        ("//a:1,b:2,[fd00::1]:3/p", (("a", 1), ("b", 2), ("fd00::1", 3)), "p"),
    ],
)
def test_read(text: str, endpoints: tuple[tuple[str, int], ...], prefix: str) -> None:
    found = EtcdOptions.parse(text)
    assert (found.endpoints, found.prefix, found.tls) == (endpoints, prefix, False)
    assert EtcdOptions.parse(str(found)) == found


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("tls=yes", {"tls": True}),
        ("tls=no", {"tls": False}),
        ("ca_file=/a+b/ca.pem", {"tls": True, "ca_file": "/a b/ca.pem"}),
        ("certificate_file=/c&key_file=/k", {"tls": True, "certificate_file": "/c", "key_file": "/k"}),
        ("user=mesh&password_file=/p", {"tls": False, "user": "mesh", "password_file": "/p"}),
    ],
)
def test_options(query: str, expected: dict[str, object]) -> None:
    found = EtcdOptions.parse(f"//h:1/p?{query}")
    assert {name: getattr(found, name) for name in expected} == expected
    assert EtcdOptions.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h:1/p", "expected etcd://HOST:PORT/PREFIX, got 'etcd:h:1/p'"),
        ("//h:1", "the prefix of its keys is missing"),
        ("//h:1/", "the prefix of its keys is missing"),
        ("//h:1//", "the prefix of its keys is missing"),
        ("//h/p", "expected etcd://HOST:PORT/PREFIX, got 'h'"),
        ("//h:0/p", "port 0 is not within 1 to 65535"),
        ("//h:1,h:1/p", "h:1 stands twice"),
        ("//h:1/a b", "cannot be a prefix of keys"),
        ("//h:1/p?", "expected OPTION=VALUE, got ''"),
        ("//h:1/p?ca=x", "unknown key"),
        ("//h:1/p?tls=maybe", "tls: expected yes or no, got 'maybe'"),
        ("//h:1/p?key_file=/k", "key_file takes certificate_file too"),
        ("//h:1/p?user=x", "user and password_file belong together"),
        ("//h:1/p?tls=yes&tls=yes", "tls stands twice"),
        ("//h:1/p?user=%zz&password_file=x", "user: '%zz' is no percent-encoded text"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises((AddressError, SourceOptionsError)) as caught:
        EtcdOptions.parse(text)
    assert message in str(caught.value)


def test_it_is_a_source() -> None:
    url = SourceUrl.parse("etcd://h:1/p")
    assert str(url) == "etcd://h:1/p"
    assert isinstance(url.options, EtcdOptions)
