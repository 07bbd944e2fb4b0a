"""`meshlocal:` URLs: which discovery server is followed, and how it is spoken to."""

from __future__ import annotations

import pytest

from meshlocal.policy.addresses import AddressError, DiscoveryUrl
from meshlocal.policy.meshlocal_options import MeshlocalOptions
from meshlocal.policy.source_options import SourceOptionsError
from meshlocal.policy.sources import SourceUrl


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("grpc://other:7070", MeshlocalOptions(urls=(DiscoveryUrl("grpc", "other", 7070),))),
        (
            "grpcs://a:1,wss://b:2?zone=z2&cluster=c2&ca_file=/ca.pem&certificate_file=/c.pem&key_file=/k.pem"
            "&identity=spiffe%3A//mesh/discovery&token_file=/token",
            MeshlocalOptions(
                urls=(DiscoveryUrl("grpcs", "a", 1), DiscoveryUrl("wss", "b", 2)),
                zone="z2",
                cluster="c2",
                ca_file="/ca.pem",
                certificate_file="/c.pem",
                key_file="/k.pem",
                identity="spiffe://mesh/discovery",
                token_file="/token",
            ),
        ),
        (
            "grpc://a:1?token_file=/token&allow_plaintext_tokens=yes",
            MeshlocalOptions(urls=(DiscoveryUrl("grpc", "a", 1),), token_file="/token", allow_plaintext_tokens=True),
        ),
    ],
)
def test_reads(text: str, options: MeshlocalOptions) -> None:
    """And what it writes is read to the same."""
    assert MeshlocalOptions.parse(text) == options
    assert MeshlocalOptions.parse(str(options)) == options
    assert SourceUrl.parse(f"meshlocal:{text}").options == options


@pytest.mark.parametrize(
    ("text", "error", "what"),
    [
        (
            "",
            AddressError,
            "expected meshlocal:grpc://HOST:PORT (or grpcs, ws, wss):"
            " expected grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH, got ''",
        ),
        (
            "grpc://a",
            AddressError,
            "expected meshlocal:grpc://HOST:PORT (or grpcs, ws, wss): expected grpc://HOST:PORT, got 'grpc://a'",
        ),
        ("file:x.yaml", AddressError, "'file:x.yaml' is no server; a file is a source of its own"),
        ("grpc://a:1,grpc://a:1", AddressError, "grpc://a:1 stands twice"),
        ("grpc://a:1?zone", SourceOptionsError, "expected OPTION=VALUE, got 'zone'"),
        ("grpc://a:1?", SourceOptionsError, "expected OPTION=VALUE, got ''"),
        ("grpc://a:1?key_file=/k", SourceOptionsError, "key_file takes certificate_file too"),
        ("grpc://a:1?identity=*.b", SourceOptionsError, "identity: expected a URI or a DNS name, got '*.b'"),
        (
            "grpc://a:1?allow_plaintext_tokens=true",
            SourceOptionsError,
            "allow_plaintext_tokens: expected yes or no, got 'true'",
        ),
    ],
)
def test_refuses(text: str, error: type[Exception], what: str) -> None:
    with pytest.raises(error) as caught:
        MeshlocalOptions.parse(text)
    assert str(caught.value) == what
