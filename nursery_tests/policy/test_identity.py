"""Identities and patterns of them (T4)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.identity import (
    IdentityError,
    IdentityPattern,
    allowed,
    client_cert_value,
    fill,
    identities,
    is_identity,
    is_svid,
    placeholders,
)

WEB = "spiffe://example.org/ns/shop/sa/web"


@pytest.mark.parametrize(
    ("pattern", "identity", "matches"),
    [
        (WEB, WEB, True),
        ("spiffe://example.org/ns/*/sa/web", WEB, True),
        ("spiffe://example.org/*/*/*/*", WEB, True),
        ("spiffe://example.org/ns/shop/sa/*", "spiffe://example.org/ns/shop/sa/", False),
        ("spiffe://example.org/ns/*", WEB, False),
        ("spiffe://example.org/ns/*/sa/web", "spiffe://example.org/ns/a/b/sa/web", False),
        ("spiffe://example.org/ns/*/sa/web", "spiffe://other.org/ns/shop/sa/web", False),
        ("spiffe://example.org", "spiffe://example.org", True),
        ("spiffe://example.org", WEB, False),
        (WEB, WEB.upper(), False),
        ("web.shop.example", "web.shop.example", True),
        ("Web.Shop.Example", "web.shop.EXAMPLE", True),
        ("*.shop.example", "web.shop.example", True),
        ("*.shop.example", "a.web.shop.example", False),
        ("*.shop.example", "shop.example", False),
        ("*.shop.example", ".shop.example", False),
        ("web", WEB, False),
        (WEB, "web", False),
    ],
)
def test_a_pattern_means_whole_segments(pattern: str, identity: str, matches: bool) -> None:
    assert IdentityPattern(pattern).matches(identity) is matches
    assert str(IdentityPattern(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *("", "*", "a b", "spiffe://", "spiffe://*/ns", "spiffe://example.org//ns", "spiffe://example.org/ns/w*"),
        *("spiffe://example.org/", "Spiffe://example.org/a", "a.*.b", "**.b", "-", "http://a/ b"),
    ],
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(IdentityError):
        IdentityPattern(text)


@given(st.text(st.sampled_from("ab*./:"), max_size=12), st.text(st.sampled_from("ab./:"), max_size=12))
def test_without_a_star_only_the_same_is_meant(pattern: str, identity: str) -> None:
    try:
        made = IdentityPattern(pattern)
    except IdentityError:
        return
    if "*" not in pattern:
        assert made.matches(identity) == (pattern == identity)


def test_a_certificate_proves_its_uris_and_names() -> None:
    names = (("DNS", "web.example"), ("URI", WEB), ("IP Address", "127.0.0.1"), ("email", "a@b"))
    proved = identities({"subjectAltName": names, "subject": ((("commonName", "other"),),)})
    assert proved == (WEB, "web.example")
    assert identities({}) == ()
    # What looks like one of the other kind is neither.
    mixed = (("DNS", WEB), ("URI", "web.example"), ("URI", "urn:web"))
    assert identities({"subjectAltName": mixed}) == ()
    patterns = [IdentityPattern("db.example"), IdentityPattern("spiffe://example.org/ns/*/sa/web")]
    assert allowed(patterns, proved)
    assert not allowed(patterns[:1], proved)
    assert not allowed(patterns, ())
    assert not allowed((), proved)


def test_an_instances_identity_is_built_from_its_labels() -> None:
    template = "spiffe://td/ns/{namespace}/sa/{service_account}"
    assert placeholders(template) == ["namespace", "service_account"]
    labels = {"namespace": "shop", "service_account": "web-1", "node": "n1"}
    assert fill(template, labels) == "spiffe://td/ns/shop/sa/web-1"
    assert fill(template, {"namespace": "shop"}) is None
    assert fill("db.example", {}) == "db.example"
    assert fill("{pod}.web.example", {"pod": "-x"}) is None


@pytest.mark.parametrize("value", ["", " ", ".", "..", "a/b", "*", "a b", "../x", "a\n", "{x}"])
def test_a_label_is_no_more_than_a_segment(value: str) -> None:
    """A registry that lies could name another identity otherwise."""
    assert fill("spiffe://td/ns/{namespace}", {"namespace": value}) is None


@pytest.mark.parametrize("template", ["spiffe://td/{", "spiffe://td/}", "spiffe://td/{}", "spiffe://td/*", "a b"])
def test_what_is_no_template_is_refused(template: str) -> None:
    with pytest.raises(IdentityError):
        placeholders(template)


@pytest.mark.parametrize(
    ("names", "value"),
    [
        ([("URI", WEB), ("DNS", "web.example")], f"Hash=ab12;URI={WEB};DNS=web.example"),
        ([("DNS", "a"), ("DNS", "b"), ("email", "x@y")], "Hash=ab12;DNS=a;DNS=b"),
        ([("URI", "spiffe://td/a,b;c=d")], 'Hash=ab12;URI="spiffe://td/a,b;c=d"'),
        ([("URI", 'spiffe://td/"\\')], 'Hash=ab12;URI="spiffe://td/\\"\\\\"'),
        ([("URI", "spiffe://td/\r\nx: y")], "Hash=ab12;URI=spiffe://td/??x: y"),
        ([], "Hash=ab12"),
    ],
)
def test_what_an_instance_is_told_of_a_certificate(names: list[tuple[str, str]], value: str) -> None:
    """As Envoy's field, in which no name can end a value or the line."""
    assert client_cert_value("ab12", identities({"subjectAltName": tuple(names)})) == value


def test_who_shows_no_certificate_is_nobody() -> None:
    assert client_cert_value("", ()) == ""


@pytest.mark.parametrize(
    ("names", "trust_domain", "svid"),
    [
        ([("URI", WEB)], "example.org", True),
        ([("URI", WEB), ("URI", "spiffe://other/admin")], "example.org", True),
        ([("URI", "spiffe://other/admin"), ("DNS", "web")], "example.org", False),
        ([("URI", "https://x/"), ("DNS", "web")], "example.org", False),
        ([], "example.org", False),
        ([], None, True),
    ],
)
def test_what_a_trust_domains_authorities_must_have_signed(
    names: list[tuple[str, str]], trust_domain: str | None, svid: bool
) -> None:
    """And of what they signed for another one, an instance is told nothing."""
    proved = identities({"subjectAltName": tuple(names)}, trust_domain)
    assert is_svid(proved, trust_domain) is svid
    assert trust_domain is None or "other" not in client_cert_value("ab12", proved)


@pytest.mark.parametrize(
    ("text", "one"),
    [(WEB, True), ("ops", True), ("a.example", True), ("*.example", False), ("spiffe://td/*", False), ("a b", False)],
)
def test_one_identity(text: str, one: bool) -> None:
    assert is_identity(text) is one
