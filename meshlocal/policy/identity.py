"""Identities that a certificate proves, and patterns of them (rule T4).

An identity is a URI of a certificate's subjectAltName, such as a SPIFFE ID (SPIFFE-ID, 2), or a DNS name of it. A
pattern is an identity in which, of a URI, any segment of the path may be `*`, and of a name the first label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from meshlocal.policy.problems import quote

_URI = re.compile(r"([a-z][a-z0-9+.-]*)://([^/*\s]+)((?:/[^/\s]+)*)")
_NAME = re.compile(r"(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_SEGMENT = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]+")
"""Of a path, as SPIFFE-ID, 2.2 has it."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class IdentityError(ValueError):
    """A text that is no identity, or no pattern of one. Its text says why."""


class IdentityPattern:
    """Which identities are meant.

    Args:
        text: a URI, each segment of whose path may be `*`; or a DNS name, whose first label may be `*`.

    Raises:
        IdentityError: it is neither.
    """

    __slots__ = ("_segments", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._segments: tuple[str, ...] | None = None
        if "://" in text:
            if _URI.fullmatch(text) is None:
                raise IdentityError(f"expected a URI such as spiffe://example/ns/*/sa/web, got {quote(text)}")
            segments = text.split("/")
            if any("*" in segment and segment != "*" for segment in segments):
                raise IdentityError(f"a * stands for a whole segment of the path: {quote(text)}")
            self._segments = tuple(segments)
        elif _NAME.fullmatch(text) is None:
            raise IdentityError(f"expected a URI or a DNS name, got {quote(text)}")

    def __str__(self) -> str:
        return self.text

    def matches(self, identity: str) -> bool:
        """Whether an identity is meant."""
        if self._segments is None:
            return "://" not in identity and _name_matches(self.text.lower(), identity.lower())
        given = identity.split("/")
        return len(given) == len(self._segments) and all(
            wanted in ("*", own) and own != "" if position > 2 else wanted == own
            for position, (wanted, own) in enumerate(zip(self._segments, given, strict=True))
        )


def _name_matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("*."):
        return pattern == name
    label, _, rest = name.partition(".")
    return bool(label) and rest == pattern[2:]


def identities(certificate: Mapping[str, object], trust_domain: str | None = None) -> tuple[str, ...]:
    """The URIs and DNS names that a certificate proves, URIs first.

    Args:
        certificate: as `ssl.SSLObject.getpeercert` gives it.
        trust_domain: the only one of whose SPIFFE IDs its authorities may speak (SPIFFE-ID, 2.1); None: they are
            trusted with all.
    """
    names = certificate.get("subjectAltName", ())
    assert isinstance(names, tuple)
    # One that looks like one of the other kind is of neither: an authority may be trusted with one kind only.
    return (
        *(
            value
            for kind, value in names
            if kind == "URI" and "://" in value and (trust_domain is None or _is_within(value, trust_domain))
        ),
        *(value for kind, value in names if kind == "DNS" and "://" not in value),
    )


def is_svid(proved: Iterable[str], trust_domain: str | None) -> bool:
    """Whether a certificate proves a SPIFFE ID, where its authorities speak of one trust domain.

    Args:
        proved: what it proves of that.
        trust_domain: as in `identities`; None: anything will do.
    """
    return trust_domain is None or any(each.startswith("spiffe://") for each in proved)


def client_cert_value(digest: str, proved: Iterable[str]) -> str:
    """The value of X-Forwarded-Client-Cert for one client, as Envoy writes it; empty if it showed no certificate.

    Args:
        digest: the SHA-256 of its certificate, in hexadecimal digits; empty: it showed none.
        proved: what that proves.
    """
    if not digest:
        return ""
    pairs = [("Hash", digest), *(("URI" if "://" in each else "DNS", each) for each in proved)]
    return ";".join(f"{name}={_quoted(value)}" for name, value in pairs)


def _quoted(value: str) -> str:
    """A value, in quotes where a character of it would end it."""
    value = "".join(character if " " <= character <= "~" else "?" for character in value)
    if not set(value) & set(',;="\\'):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def is_identity(text: str) -> bool:
    """Whether a text is one identity, not a pattern of several."""
    try:
        IdentityPattern(text)
    except IdentityError:
        return False
    return "*" not in text


def _is_within(uri: str, trust_domain: str) -> bool:
    return not uri.startswith("spiffe://") or uri.split("/")[2] == trust_domain


def allowed(patterns: Iterable[IdentityPattern], proved: Iterable[str]) -> bool:
    """Whether one of the identities is one of those that are meant."""
    proved = tuple(proved)
    return any(pattern.matches(identity) for pattern in patterns for identity in proved)


def placeholders(template: str) -> list[str]:
    """The labels that a template of an identity names in braces.

    Raises:
        IdentityError: a brace stands alone, or it would be no identity.
    """
    names = _PLACEHOLDER.findall(template)
    filled = _PLACEHOLDER.sub("x", template)
    if "{" in filled or "}" in filled or not all(names):
        raise IdentityError(f"braces stand around a label's name: {quote(template)}")
    if "*" in filled:
        raise IdentityError(f"an instance has one identity, not a pattern: {quote(template)}")
    IdentityPattern(filled)
    return names


def fill(template: str, labels: Mapping[str, str]) -> str | None:
    """The identity that an instance must prove; None: it lacks a label, or one is no part of an identity."""
    values = {name: labels.get(name, "") for name in _PLACEHOLDER.findall(template)}
    if not all(_SEGMENT.fullmatch(value) for value in values.values()):
        return None
    filled = _PLACEHOLDER.sub(lambda found: values[found[1]], template)
    try:
        IdentityPattern(filled)
    except IdentityError:
        return None
    return filled
