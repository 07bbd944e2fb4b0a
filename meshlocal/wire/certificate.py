"""What is read of a certificate that Python's `ssl` does not tell of one's own: when it is valid (RFC 5280, 4.1.2.5).

Nothing is checked by it: what a peer shows is for OpenSSL to judge.
"""

from __future__ import annotations

import base64
import calendar
import re
from typing import NamedTuple

_PEM = re.compile(rb"-----BEGIN ((?:X509 |TRUSTED )?CERTIFICATE)-----(.*?)-----END \1-----", re.DOTALL)
"""RFC 7468, 5.1, and the older labels that OpenSSL reads as well (openssl-format-options(1))."""

_SEQUENCE, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x17, 0x18, 0xA0


class Validity(NamedTuple):
    """From when to when a certificate is valid, in seconds since 1970, UTC."""

    not_before: float
    not_after: float


def first_of_pem(pem: bytes) -> bytes:
    """The first certificate of a PEM file, in DER.

    Raises:
        ValueError: there is none.
    """
    found = _PEM.search(pem)
    if found is None:
        raise ValueError("holds no certificate in PEM")
    return base64.b64decode(found[2])


def validity(der: bytes) -> Validity:
    """When a certificate is valid.

    Raises:
        ValueError: it is no certificate in DER (X.690, 8.1; RFC 5280, 4.1).
    """
    certificate, _ = _value(der, _SEQUENCE)
    rest, _ = _value(certificate, _SEQUENCE)
    if rest[:1] == bytes([_VERSION]):
        rest = _value(rest, _VERSION)[1]
    # The serial number, the signature's algorithm, the issuer.
    for _ in range(3):
        rest = _value(rest, rest[0] if rest else 0)[1]
    period, _ = _value(rest, _SEQUENCE)
    begin, period = _time(period)
    end, _ = _time(period)
    return Validity(begin, end)


def split(der: bytes) -> list[bytes]:
    """Certificates that stand one behind the other.

    Raises:
        ValueError: one of them is none.
    """
    found = []
    while der:
        rest = _value(der, _SEQUENCE)[1]
        each = der[: len(der) - len(rest)]
        validity(each)
        found.append(each)
        der = rest
    return found


def _value(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """The contents of the first value of data, which must have this tag, and what stands behind it."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError("is no certificate")
    size, start = data[1], 2
    if size & 0x80:
        count = size & 0x7F
        if not 1 <= count <= 4 or len(data) < 2 + count:
            raise ValueError("is no certificate")
        size, start = int.from_bytes(data[2 : 2 + count], "big"), 2 + count
    if len(data) < start + size:
        raise ValueError("is cut short")
    return data[start : start + size], data[start + size :]


def _time(data: bytes) -> tuple[float, bytes]:
    kind = data[0] if data else 0
    if kind not in (_UTC_TIME, _GENERALIZED_TIME):
        raise ValueError("has no time of validity")
    value, rest = _value(data, kind)
    digits = value.removesuffix(b"Z").decode("ascii", "replace")
    if kind == _UTC_TIME:
        # RFC 5280, 4.1.2.5.1: 50 to 99 are of the last century.
        digits = ("19" if digits[:2] >= "50" else "20") + digits
    if len(digits) != 14 or not digits.isdecimal() or not value.endswith(b"Z"):
        raise ValueError("has no time of validity")
    year, month, day = int(digits[:4]), int(digits[4:6]), int(digits[6:8])
    if not (1 <= month <= 12 and 1 <= day <= 31 and year >= 1):
        raise ValueError("has no time of validity")
    return float(calendar.timegm((year, month, day, int(digits[8:10]), int(digits[10:12]), int(digits[12:])))), rest
